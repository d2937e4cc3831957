"""The extension: instruction sets agree, threads are used, forked children do not hang, no CUDA is no error."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from deep_ep import _native, ops
from deep_ep._native import _C

DIGEST = """
    import hashlib, json, torch
    from deep_ep import _native, fp8, logfmt, ops
    generator = torch.Generator().manual_seed(1)
    digest = hashlib.sha256()
    def add(*tensors):
        for t in tensors:
            digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bits = torch.randint(-(2**31), 2**31 - 1, (37, 515), generator=generator).to(torch.int32)
        patterns = bits.view(dtype)[:, :515]
        values = (torch.randn(37, 515, generator=generator) * 3).to(dtype)
        for x in (patterns, values):
            for scale_format in ("fp32", "pow2", "ue8m0"):
                q, scales = fp8.quantize_1x128(x, scale_format=scale_format)
                add(q, scales, *fp8.quantize_transposed(x, scale_format=scale_format))
                for out in (torch.bfloat16, torch.float16, torch.float32):
                    add(fp8.dequantize_1x128(q, scales, dtype=out))
            add(*fp8.quantize_128x128(x))
            slots = torch.randint(-1, 37, (29, 7), generator=generator, dtype=torch.int32)
            weights = torch.randn(29, 7, generator=generator)
            for out in (torch.bfloat16, torch.float16, torch.float32):
                add(ops.reduce_rows([x], slots, weights=weights, bias=(x[:29],), out_dtype=out))
                add(ops.reduce_rows([x], slots, round_every=3, out_dtype=out))
    rows = (torch.randn(16, 1024, generator=generator) * 0.1).bfloat16()
    add(logfmt.encode(rows), logfmt.simulate(rows))
    print(json.dumps([_native._C.cpu_isa(), digest.hexdigest()]))
"""


def run_python(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_instruction_set_gives_the_same_bits():
    results = {json.loads(run_python(DIGEST, DEEP_EP_CPU_ISA=isa))[0]: isa for isa in ("generic", "avx2", "avx512")}
    digests = {json.loads(run_python(DIGEST, DEEP_EP_CPU_ISA=isa))[1] for isa in results}
    assert "generic" in results
    assert len(digests) == 1


def test_thread_count_follows_the_environment():
    code = "from deep_ep import _native; print(_native.num_threads())"
    assert run_python(code, OMP_NUM_THREADS="3").strip() == "3"
    assert run_python(code, OMP_NUM_THREADS="5,2").strip() == "5"
    allowed = len(os.sched_getaffinity(0))
    assert run_python(code, OMP_NUM_THREADS="").strip() == str(allowed)


@pytest.fixture
def four_threads():
    before = _native.num_threads()
    _native.set_num_threads(4)
    yield
    _native.set_num_threads(before)


def big_gather():
    x = torch.arange(2048 * 1024, dtype=torch.int32).view(2048, 1024)
    index = torch.arange(2047, -1, -1)
    return torch.equal(ops.gather_rows(x, index), x.flip(0))


def test_threads_cover_every_row(four_threads):
    for _ in range(20):
        assert big_gather()


def test_python_threads_share_the_pool(four_threads):
    results = []
    workers = [threading.Thread(target=lambda: results.extend(big_gather() for _ in range(5))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert results == [True] * 20


def test_a_forked_child_makes_its_own_pool(four_threads):
    assert big_gather()
    x = torch.arange(2048 * 1024, dtype=torch.int32).view(2048, 1024)
    index = torch.arange(2047, -1, -1)
    out = torch.empty_like(x)
    expected = x.numpy()[::-1].copy()
    child = os.fork()
    if child == 0:
        # Nothing of torch but the tensors: its own thread pool does not survive a fork.
        signal.alarm(30)
        ops.gather_rows(x, index, out)
        os._exit(0 if (out.numpy() == expected).all() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert big_gather()


def test_cuda_questions_have_answers_without_a_device():
    code = """
        import json
        from deep_ep._native import _C
        print(json.dumps([_C.has_cuda, _C.cuda_build_archs(), _C.cuda_runtime_version(), _C.device_count()]))
    """
    has_cuda, archs, version, devices = json.loads(run_python(code, CUDA_VISIBLE_DEVICES=""))
    assert devices == 0
    assert bool(archs) == has_cuda
    assert (version >= 12000) == has_cuda


def test_the_extension_says_what_it_is():
    assert _C.cpu_isa() in ("generic", "avx2", "avx512")
    assert _native.num_threads() >= 1
