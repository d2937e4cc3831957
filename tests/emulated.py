"""Low-latency kernels on the CPU: all ranks in this process, the kernels' own source compiled as C++.

See `emulation/cuda_on_cpu.h` for what that can show and what not.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from low_latency_cases import FP8_ARGS, LowLatencyCase, make_expert_rows, make_inputs

from deep_ep import fp8
from deep_ep._native import _C
from deep_ep.layout import num_local_experts

HERE = Path(__file__).resolve().parent / "emulation"
SOURCES = HERE.parent.parent / "csrc"
KERNELS = ("low_latency_dispatch", "low_latency_combine")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-w", "-pthread")
#: What of CUDA is no C++, even with macros, and what it becomes.
NO_CPP = {
    r"(\w+)<<<([^;]+?)>>>\(": r"launch_emulated(false, \1, \2, ",
    r"extern __shared__ (\w+) (\w+)\[\];": r"\1* \2 = emulated::dynamic_shared<\1>();",
}
WHOLE, SEND, RECEIVE = 0, 1, 2
DISPATCH_SIGNATURE, COMBINE_SIGNATURE = 11, 12
_FORMATS = ("fp32", "pow2", "ue8m0")
_SHAPE = (
    "num_ranks max_tokens num_topk num_experts hidden num_sms timeout_ns mask_after_ns delay_seed planted with_lines"
)
_DISPATCH = (
    "x topk_idx topk_weights rows scales small recv_stats wait_stats",
    "topk_is_int64 num_tokens num_topk num_experts max_tokens hidden format expert_major num_sms",
)
_COMBINE = (
    "x small topk_idx topk_weights out wait_stats ticket",
    "knows_positions knows_weights topk_is_int64 num_tokens num_topk num_experts max_tokens hidden expert_major "
    "sum_at_home use_logfmt num_sms",
)


def _structure(name: str, pointers: str, numbers: str) -> type[ctypes.Structure]:
    fields = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in numbers.split()]  # type: ignore[misc]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


WorldShape = _structure("WorldShape", "", _SHAPE)
DispatchCall = _structure("DispatchCall", *_DISPATCH)
CombineCall = _structure("CombineCall", *_COMBINE)


def cuda_headers() -> Path | None:
    """The directory of CUDA's headers, which need no GPU and no driver."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    candidates = [Path(home) / "include" for home in homes if home]
    return next((path for path in candidates if (path / "cuda_fp8.h").exists()), None)


def unavailable() -> str | None:
    """Why kernels cannot run on this CPU, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    if os.uname().machine != "x86_64":
        return "needs an x86-64 CPU"  # its order of memory, and swapcontext
    return None if cuda_headers() else "needs the headers of a CUDA toolkit"


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled once for the sources as they are, by whichever process comes first."""
    files = [*HERE.rglob("*.*"), *(p for p in SOURCES.rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".inl"))]
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    folder = SOURCES.parent / "build" / "emulation" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "library.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(folder, target)
            for other in folder.parent.iterdir():  # of sources as they were
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
    loaded = ctypes.CDLL(str(target))
    loaded.world_open.restype = ctypes.c_void_p
    loaded.world_refusal.restype = ctypes.c_char_p
    return loaded


def _compile(folder: Path, target: Path) -> None:
    includes = [f"-I{path}" for path in (HERE / "include", HERE, SOURCES, cuda_headers())]
    runs = []
    for name in (*KERNELS, "world"):
        source = HERE / f"{name}.cpp"
        if name in KERNELS:
            source = folder / f"{name}.cpp"
            text = (SOURCES / "kernels" / f"{name}.cu").read_text()
            for pattern, cpp in NO_CPP.items():
                text = re.sub(pattern, cpp, text)
            source.write_text(text)
        command = ["g++", *FLAGS, *includes, "-include", "cuda_on_cpu.h", "-c", str(source), "-o", str(folder / name)]
        runs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for run in runs:
        errors = run.communicate()[1]
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, run.args))}\n{errors[:4000]}")
    objects = [str(folder / name) for name in (*KERNELS, "world")]
    unfinished = folder / "unfinished.so"
    subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", str(unfinished)], check=True)
    unfinished.rename(target)


class Outputs:
    """What a dispatch writes on a rank, full of a pattern before."""

    def __init__(self, case: LowLatencyCase, rank: int):
        num_ranks, tokens, topk, hidden = case.num_ranks, case.max_tokens, case.num_topk, case.hidden
        self.num_local = num_local_experts(case.num_experts, num_ranks, rank)
        groups = (self.num_local, num_ranks * tokens) if case.expert_major else (num_ranks, tokens)
        at = _C.LowLatencyOutputs(self.num_local, num_ranks, tokens, topk, case.weights_at_dispatch, case.expert_major)
        self.rows = torch.full((*groups, hidden * (2 if case.fp8 == "none" else 1)), 0xEE, dtype=torch.uint8)
        self.scales = None
        if case.fp8 != "none":
            dtype, columns = fp8.scale_columns(hidden, case.fp8)
            self.scales = torch.full((groups[0], columns, groups[1]), 7, dtype=dtype)
        self.small = torch.full((at.small_block_bytes + 64,), 0xEE, dtype=torch.uint8)
        self.end_of_small = at.small_block_bytes

        def part(start: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            size = torch.Size(shape).numel() * dtype.itemsize
            return self.small[start : start + size].view(dtype).view(shape)

        by_selection = (num_ranks, tokens, topk)
        self.count = part(at.recv_count_at, torch.int32, self.num_local if case.expert_major else num_ranks)
        if case.expert_major:
            self.handle = (
                part(at.src_info_at, torch.int32, *groups),
                part(0, torch.int64, self.num_local, num_ranks),
            )
        else:
            weights = torch.empty(0)
            if case.weights_at_dispatch:
                weights = part(at.weights_at, torch.float32, *by_selection)
            self.handle = (part(at.positions_at, torch.int32, *by_selection), weights)
        self.stats = torch.zeros(self.num_local, dtype=torch.int32)
        self.wait = torch.zeros(num_ranks, dtype=torch.int64)
        self.ticket = torch.zeros(1, dtype=torch.int64)

    def received(self, case: LowLatencyCase) -> tuple[torch.Tensor, ...]:
        assert bool((self.small[self.end_of_small :] == 0xEE).all()), "written past the end"
        if self.scales is None:
            return (self.rows.view(torch.bfloat16),)
        return self.rows.view(torch.float8_e4m3fn), self.scales.transpose(1, 2)


class Ranks:
    """The ranks of a case, whose operations are launched one by one and run side by side.

    Args:
        num_sms: blocks of a launch at most.
        with_lines: rows may travel in lines.
        mask_after_s: above 0, ranks that do not come are left out after it.
    """

    def __init__(
        self,
        case: LowLatencyCase,
        *,
        num_sms: int = 3,
        with_lines: bool = True,
        timeout_s: float = 30.0,
        mask_after_s: float = 0.0,
        delay_seed: int = 0,
        planted: int = 0,
    ):
        self.case, self.num_sms = case, num_sms
        self.inputs = [make_inputs(case, rank) for rank in range(case.num_ranks)]
        self.rows = [make_expert_rows(case, rank) for rank in range(case.num_ranks)]
        self.new_outputs()
        shape = WorldShape(
            num_ranks=case.num_ranks,
            max_tokens=case.max_tokens,
            num_topk=case.num_topk,
            num_experts=case.num_experts,
            hidden=case.hidden,
            num_sms=num_sms,
            timeout_ns=int(timeout_s * 1e9),
            mask_after_ns=int(mask_after_s * 1e9),
            delay_seed=delay_seed,
            planted=planted,
            with_lines=with_lines,
        )
        self._kept: list[object] = []  # what launches read
        self._world = ctypes.c_void_p(library().world_open(ctypes.byref(shape)))

    def new_outputs(self) -> None:
        self.outputs = [Outputs(self.case, rank) for rank in range(self.case.num_ranks)]
        self.combined = [torch.full_like(x, 7.0) for x, _, _ in self.inputs]

    def dispatch(self, rank: int, part: int = WHOLE, signature: int = DISPATCH_SIGNATURE) -> None:
        case, (x, idx, weights), outputs = self.case, self.inputs[rank], self.outputs[rank]
        call = DispatchCall(
            x=x.data_ptr(),
            topk_idx=idx.data_ptr(),
            topk_weights=(weights.data_ptr() or outputs.small.data_ptr()) if case.weights_at_dispatch else None,
            rows=outputs.rows.data_ptr(),
            scales=outputs.scales.data_ptr() if outputs.scales is not None else None,
            small=outputs.small.data_ptr(),
            recv_stats=outputs.stats.data_ptr(),
            wait_stats=outputs.wait.data_ptr(),
            format=-1 if case.fp8 == "none" else _FORMATS.index(case.fp8),
            **self._numbers(rank),
        )
        self._launch("world_dispatch", rank, signature, call, part, (x, idx, weights, outputs))

    def combine(
        self, rank: int, part: int = WHOLE, signature: int = COMBINE_SIGNATURE, knows_positions: bool = True
    ) -> None:
        case, (_, idx, weights), outputs = self.case, self.inputs[rank], self.outputs[rank]
        call = CombineCall(
            x=self.rows[rank].data_ptr(),
            small=outputs.small.data_ptr(),
            topk_idx=idx.data_ptr(),
            topk_weights=weights.data_ptr(),
            out=self.combined[rank].data_ptr(),
            wait_stats=outputs.wait.data_ptr(),
            ticket=outputs.ticket.data_ptr(),
            knows_positions=knows_positions,
            knows_weights=case.weights_at_dispatch,
            sum_at_home=case.sum_at_home,
            use_logfmt=case.use_logfmt,
            **self._numbers(rank),
        )
        kept = (idx, weights, self.rows[rank], outputs, self.combined[rank])
        self._launch("world_combine", rank, signature, call, part, kept)

    def refuse(self, rank: int, kind: int) -> None:
        library().world_refuse(self._world, rank, kind)

    def wait(self, *ranks: int) -> None:
        """Until the launches of these ranks (of all, if none is given) are over."""
        for rank in ranks or range(self.case.num_ranks):
            library().world_wait(self._world, rank)

    def failure(self, rank: int) -> list[int]:
        """Error, phase, peer, 1 + a rank that refused."""
        record = (ctypes.c_int64 * 4)()
        library().world_failure(self._world, rank, record)
        return list(record)

    def masks(self, rank: int) -> list[int]:
        masks = (ctypes.c_int64 * self.case.num_ranks)()
        library().world_masks(self._world, rank, masks)
        return list(masks)

    def result(self, rank: int) -> dict[str, Any]:
        """What `low_latency_cases.verify` compares."""
        outputs = self.outputs[rank]
        recv = outputs.received(self.case)
        return {
            "recv": recv,
            "count": outputs.count,
            "handle": (*outputs.handle, self.case.max_tokens, self.case.hidden, self.case.num_experts),
            "stats": outputs.stats,
            "strides": recv[1].stride() if len(recv) > 1 else None,
            "combined": self.combined[rank],
            "wait": outputs.wait,
        }

    def close(self) -> None:
        library().world_close(self._world)

    def _numbers(self, rank: int) -> dict[str, int]:
        case, idx = self.case, self.inputs[rank][1]
        return {
            "topk_is_int64": idx.dtype == torch.int64,
            "num_tokens": len(idx),
            "num_topk": case.num_topk,
            "num_experts": case.num_experts,
            "max_tokens": case.max_tokens,
            "hidden": case.hidden,
            "expert_major": case.expert_major,
            "num_sms": self.num_sms,
        }

    def _launch(self, name: str, rank: int, signature: int, call: ctypes.Structure, part: int, kept: object) -> None:
        self._kept.append(kept)
        launch: Callable[..., int] = getattr(library(), name)
        if launch(self._world, rank, ctypes.c_uint64(signature), ctypes.byref(call), part) != 0:
            raise RuntimeError(library().world_refusal().decode())


@contextlib.contextmanager
def emulated(case: LowLatencyCase, **options: Any) -> Iterator[Ranks]:
    """The ranks of a case; see `Ranks`."""
    assert case.fp8 in FP8_ARGS
    ranks = Ranks(case, **options)
    try:
        yield ranks
    finally:
        ranks.close()
