"""The wheel: what is in it, that it works away from the checkout, and what the extension is linked to."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

import deep_ep
from deep_ep import _C

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="tests are run away from the sources"),
]


def run(*command: str, cwd: Path, **env: str) -> str:
    full = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **env}
    result = subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that nothing of the checkout's own build is used or touched."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "deep_ep_cpp.py"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("deep_ep", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    # The kernels' own compilation is what the installation under test did; here it would only cost time.
    command = ["-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(work), str(source)]
    run(sys.executable, *command, cwd=work, DEEP_EP_CUDA="0")
    (built,) = work.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_one_wheel_with_everything(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "deep_ep_cpp.py" in names
    assert "deep_ep/py.typed" in names
    assert "deep_ep/_C.pyi" in names
    assert any(re.fullmatch(r"deep_ep/_C\..*\.so", name) for name in names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/", "build/"))]
    packed = {name for name in names if name.startswith("deep_ep/") and name.endswith(".py")}
    assert packed == {str(path.relative_to(ROOT)) for path in (ROOT / "deep_ep").rglob("*.py")}
    tables = {name for name in names if name.startswith("deep_ep/tuned/")}
    assert tables == {str(path.relative_to(ROOT)) for path in (ROOT / "deep_ep" / "tuned").glob("*.json")}


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        assert any("licenses/LICENSE" in n or n.endswith("dist-info/LICENSE") for n in archive.namelist())
    assert metadata["Version"] == deep_ep.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.match(r"[\w-]+", r)[0] for r in needed} == {"torch", "numpy", "pybind11", "pytest"}


def test_works_away_from_the_checkout(installed, tmp_path):
    code = """
        import json, sys
        import deep_ep, deep_ep_cpp, torch
        from deep_ep import _C, fp8, ops
        q, scales = fp8.quantize_1x128(torch.ones(4, 256, dtype=torch.bfloat16))
        total = ops.reduce_rows([fp8.dequantize_1x128(q, scales)], torch.tensor([[0, 3]], dtype=torch.int32))
        print(json.dumps({
            "file": deep_ep.__file__, "version": deep_ep.__version__, "total": total.unique().tolist(),
            "cuda": torch.cuda.is_initialized(), "devices": _C.device_count(),
            "loaded": sorted(name for name in sys.modules if "nvshmem" in name or name.startswith("mpi4py")),
        }))
    """
    found = run(
        sys.executable,
        "-c",
        textwrap.dedent(code),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
    )
    report = json.loads(found)
    assert Path(report["file"]).is_relative_to(installed)
    assert report["version"] == deep_ep.__version__
    assert report["total"] == [2.0]
    assert report["cuda"] is False
    assert report["devices"] == 0
    assert report["loaded"] == []


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_the_extension_is_linked_to_the_system_alone():
    dynamic = run("readelf", "-dW", _C.__file__, cwd=ROOT)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic))
    system = r"(lib(stdc\+\+|gcc_s|c|m|pthread|dl|rt)|ld-linux-[\w-]+)\.so\.\d+"
    assert all(re.fullmatch(system, name) for name in needed), needed
    symbols = run("readelf", "-sW", "--dyn-syms", _C.__file__, cwd=ROOT)
    # Streams and locales must stay out: two copies of libstdc++ in a process would fight over them.
    assert not re.search(r"ios_base4Init|basic_ostream|basic_regex|St6locale", symbols)
    assert "PyInit__C" in symbols
