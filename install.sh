#!/usr/bin/env bash
# Installs deep_ep, and on request runs its demo or its tests:
#
#   bash install.sh                install into the active virtual environment, or into .venv, made here if need be
#   bash install.sh demo [flags]   install, then train the demonstration model (python -m deep_ep train --demo)
#   bash install.sh test [flags]   install, then run the tests (pytest)
#
# It asks for nothing but Python 3.10+ and g++. A torch >= 2.11 that imports is kept.
#   DEEP_EP_PYTHON   the interpreter to install for, instead of a virtual environment
#   DEEP_EP_TORCH    the torch requirement to install where none is found (default torch==2.13.0)
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")"

say() { printf '[deep_ep] %s\n' "$*"; }
fail() {
    printf '[deep_ep] error: %s\n' "$*" >&2
    exit 1
}
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local name
    for name in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$name" >/dev/null && new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "no Python 3.10 or newer was found; install one, or name it: DEEP_EP_PYTHON=/path/to/python bash install.sh"
}

mode=install
case "${1:-}" in
    "") ;;
    demo | test) mode=$1 && shift ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' install.sh && exit 0 ;;
    *) fail "unknown argument '$1'; expected nothing, 'demo' or 'test'" ;;
esac

if [ -n "${DEEP_EP_PYTHON:-}" ]; then
    python=$DEEP_EP_PYTHON
    say "using $python"
elif [ -n "${VIRTUAL_ENV:-}" ]; then
    python=$VIRTUAL_ENV/bin/python
    say "using the active virtual environment $VIRTUAL_ENV"
elif [ -n "${CONDA_PREFIX:-}" ] && [ -x "${CONDA_PREFIX:-}/bin/python" ]; then
    python=$CONDA_PREFIX/bin/python
    say "using the active conda environment $CONDA_PREFIX"
else
    python=$PWD/.venv/bin/python
    if ! { [ -x "$python" ] && "$python" -m pip --version >/dev/null 2>&1; }; then
        base=$(find_python)
        say "making the virtual environment .venv with $base"
        "$base" -m venv .venv || fail "$base cannot make virtual environments (on Debian and Ubuntu: install python3-venv)"
    fi
fi
[ -x "$(command -v "$python" || true)" ] || fail "$python does not exist or cannot be run"
new_enough "$python" || fail "$python is older than 3.10 ($("$python" --version 2>&1)); name a newer one in DEEP_EP_PYTHON"
compiler=${CXX:-g++}
command -v "${compiler%% *}" >/dev/null ||
    fail "no C++ compiler '$compiler'; install g++ (Debian and Ubuntu: apt install g++), or name one in CXX"

# What decides whether the last installation still holds. Python files do not: the installation points at this folder.
fingerprint() {
    "$python" - <<'EOF'
import hashlib, importlib.metadata, os, pathlib, sys, sysconfig
digest = hashlib.sha256()
files = ["setup.py", "pyproject.toml", *sorted(str(p) for p in pathlib.Path("csrc").rglob("*") if p.is_file())]
for name in files:
    digest.update(name.encode() + b"\0" + pathlib.Path(name).read_bytes())
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    torch = "none"
variables = [os.environ.get(name, "") for name in ("CXX", "NVCC", "CUDA_HOME", "DEEP_EP_CUDA", "DEEP_EP_CUDA_ARCHS", "DEEP_EP_TORCH")]
digest.update(repr([sys.version, sys.prefix, os.getcwd(), torch, variables, sysconfig.get_config_var("EXT_SUFFIX")]).encode())
print(digest.hexdigest())
EOF
}

# Whether the named modules can be imported, checked without importing them.
has_modules() { "$python" -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))' "$@"; }
# Whether `import deep_ep`, from anywhere, gets this folder's package with its extension.
points_here() {
    (cd / && "$python" - "$OLDPWD") <<'EOF' 2>/dev/null
import sys, deep_ep, deep_ep._C
raise SystemExit(not deep_ep.__file__.startswith(sys.argv[1] + "/deep_ep/"))
EOF
}
pip_install() {
    say "pip install $*"
    "$python" -m pip install --quiet --disable-pip-version-check "$@"
}

good_torch() {
    "$python" - 2>/dev/null <<'EOF'
import re, torch
major, minor = map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
raise SystemExit((major, minor) < (2, 11))
EOF
}

install() {
    if good_torch; then
        say "keeping torch $("$python" -c 'import torch; print(torch.__version__)')"
    else
        pip_install "${DEEP_EP_TORCH:-torch==2.13.0}"
        good_torch || fail "the installed torch does not import, or is older than 2.11; name another in DEEP_EP_TORCH"
    fi
    local missing=() module
    "$python" -c 'import re, setuptools as s; raise SystemExit(int(re.match(r"\d+", s.__version__)[0]) < 68)' 2>/dev/null ||
        missing+=("setuptools>=68")
    has_modules wheel || missing+=("wheel")
    "$python" -c 'import pybind11 as p; raise SystemExit(tuple(map(int, p.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null ||
        missing+=("pybind11>=2.11")
    for module in numpy pytest; do has_modules "$module" || missing+=("$module"); done
    [ ${#missing[@]} -eq 0 ] || pip_install "${missing[@]}"
    # Without isolation, so that pip does not fetch a second set of build tools, and without dependencies, all of which
    # were seen to above: nothing is downloaded on a machine that has them.
    pip_install --no-build-isolation --no-deps --editable .
}

# Packages that make a run nicer or more thorough, and that it can do without where there is no network.
want_modules() {
    local module missing=()
    for module in "$@"; do has_modules "$module" || missing+=("$module"); done
    [ ${#missing[@]} -eq 0 ] || pip_install "${missing[@]}" || say "could not install ${missing[*]}; going on without"
}

state=$("$python" -c 'import sys; print(sys.prefix)')
stamp_name=deep_ep-$(printf '%s' "$PWD $state" | cksum | cut -d' ' -f1)
stamp=.deep_ep_install/$stamp_name
if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] && has_modules torch numpy pybind11 pytest && points_here; then
    say "already installed, nothing has changed"
else
    install
    points_here || fail "deep_ep was installed, but $python does not import it from here (is it installed twice?)"
    mkdir -p .deep_ep_install
    fingerprint >"$stamp"
    say "installed deep_ep for $python"
fi

case $mode in
    demo)
        want_modules tqdm rich matplotlib
        say "running: python -m deep_ep train --demo $*"
        exec "$python" -m deep_ep train --demo "$@"
        ;;
    test)
        want_modules hypothesis tqdm rich matplotlib
        say "running: python -m pytest $*"
        exec "$python" -m pytest "$@"
        ;;
esac
say "ready. Try: $python -m deep_ep train --demo"
