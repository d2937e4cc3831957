"""Builds `deep_ep._C`: the CPU loops with a C++ compiler and, where nvcc is found, the CUDA kernels.

Environment: CXX names the compiler (default g++); NVCC names nvcc (default: PATH, CUDA_HOME, /usr/local/cuda);
DEEP_EP_CUDA=0 leaves the kernels out; DEEP_EP_CUDA_ARCHS lists what they are compiled for (default "90": machine code
for sm_90, with PTX of the last one listed for later GPUs); MAX_JOBS limits parallel compilation.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
WARNINGS = ["-Wall", "-Wextra"]
# Contraction (fused multiply-add) would change bits between machines; so would fast-math, which is never on.
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread", *WARNINGS]


def find_nvcc() -> str | None:
    if os.environ.get("DEEP_EP_CUDA", "1") == "0":
        return None
    named = os.environ.get("NVCC")
    if named:
        return named
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)]
    return next((place for place in places if place), None)


def find_cxx() -> str:
    """g++ unless CXX says otherwise: the compiler Python itself was built with may not exist on this machine."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):
            return name
    raise SystemExit("deep_ep needs a C++17 compiler: no g++ was found (set CXX, or install g++)")


def cuda_archs() -> list[str]:
    text = os.environ.get("DEEP_EP_CUDA_ARCHS") or "90"
    archs = [arch for arch in text.replace(",", ";").replace(" ", ";").split(";") if arch]
    bad = [arch for arch in archs if not arch.rstrip("af").isdigit()]
    if bad or not archs:
        raise SystemExit(f'DEEP_EP_CUDA_ARCHS={text!r}: expected compute capabilities such as "90" or "90;100"')
    return archs


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")
    if result.stderr.strip():
        print(f"{command[-1]}:\n{result.stderr}", flush=True)


class Build(build_ext):
    """Compiles the sources in parallel, each only when it, a header or its command changed, and links them."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not build_temp: pip gives every build a fresh one, and nothing would ever be reused.
        work = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sysconfig.get_config_var('SOABI')}"
        cxx, nvcc = shlex.split(find_cxx()), find_nvcc()
        python = sysconfig.get_paths()
        includes = [f"-I{CSRC}", f"-I{python['include']}", f"-I{python['platinclude']}"]
        includes += ["-isystem", pybind11.get_include()]
        defines = ["-DDEEP_EP_WITH_CUDA"] if nvcc else []
        commands = {}
        for source in sorted(CSRC.rglob("*.cpp")):
            if not (nvcc and source.name == "device_none.cpp"):
                commands[source] = [*cxx, *CXX_FLAGS, *defines, *includes]
        if nvcc:
            archs = cuda_archs()
            print(f"deep_ep: CUDA kernels for {archs} with {nvcc}", flush=True)
            commands.update({source: self.nvcc_command(nvcc, archs) for source in sorted(CSRC.rglob("*.cu"))})
        else:
            print("deep_ep: no nvcc, building the CPU loops only", flush=True)
        jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(max(jobs, 1)) as pool:
            objects = list(pool.map(lambda item: self.compile(work, *item), commands.items()))
        linker = [nvcc, "-shared", "-cudart=static", *self.host_compiler()] if nvcc else [*cxx, "-shared", "-pthread"]
        hide = "--exclude-libs,ALL"
        run([*linker, *(["-Xlinker", hide] if nvcc else [f"-Wl,{hide}"]), *map(str, objects), "-o", str(target)])

    def nvcc_command(self, nvcc: str, archs: list[str]) -> list[str]:
        command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-fmad=false", "--threads=0", "-cudart=static"]
        command += [f"-I{CSRC}", *self.host_compiler(), "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        for arch in archs:
            command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
        return [*command, f'-DDEEP_EP_CUDA_ARCHS="{";".join(archs)};{archs[-1]}-ptx"']

    def host_compiler(self) -> list[str]:
        return [f"-ccbin={shlex.split(os.environ['CXX'])[0]}"] if os.environ.get("CXX") else []

    def compile(self, work: Path, source: Path, command: list[str]) -> Path:
        target = work / source.relative_to(ROOT).with_suffix(source.suffix + ".o")
        note, needs = target.with_suffix(".command"), target.with_suffix(".d")
        full = [*command, "-MMD", "-MF", str(needs), "-c", "-o", str(target), str(source)]
        current = target.exists() and note.exists() and note.read_text() == shlex.join(full)
        if not (current and target.stat().st_mtime > newest_time(needs)):
            target.parent.mkdir(parents=True, exist_ok=True)
            run(full)
            note.write_text(shlex.join(full))
        return target


def newest_time(needs: Path) -> float:
    """When the source of an object, or a header that it includes, was changed last; infinity if that is not known."""
    if not needs.exists():
        return float("inf")
    paths = shlex.split(needs.read_text().partition(": ")[2].replace("\\\n", " "))
    return max((os.stat(path).st_mtime if os.path.exists(path) else float("inf")) for path in paths)


setup(ext_modules=[Extension("deep_ep._C", sources=[])], cmdclass={"build_ext": Build})
