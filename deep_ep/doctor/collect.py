"""Gathering everything into one report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..buffer import Buffer
from ..engines.mesh import SoloComm
from .advice import PASSED, choose_engine, find_problems
from .facts import SCHEMA, Report, guard, reason_of
from .gpus import collect_gpus
from .host import collect_host
from .nics import collect_nics
from .software import collect_software

_ROOT = Path("/")


def diagnose(probe: bool = False, environment: Mapping[str, str] | None = None, root: Path = _ROOT) -> Report:
    """Look at this machine.

    Args:
        probe: measure the bandwidth between GPUs, in a child process that takes device memory for a moment.
        environment: variables to report and to judge, by default those of this process.
        root: where /proc, /sys and /dev are found.
    """
    variables = os.environ if environment is None else environment
    software = collect_software(variables, root)
    gpus = collect_gpus(probe, root)
    nics = guard(collect_nics, gpus.devices, root)
    host = collect_host(variables, root)
    tested = self_test()
    return Report(
        schema=SCHEMA,
        software=software,
        gpus=gpus,
        nics=nics,
        host=host,
        self_test=tested,
        engine=choose_engine(software, gpus, host),
        findings=find_problems(software, gpus, nics, host, tested),
    )


def self_test() -> str:
    """Dispatch and combine a few rows on the CPU with one rank: `PASSED`, or what went wrong."""
    try:
        return _dispatch_and_combine()
    except Exception as error:
        return reason_of(error)


def _dispatch_and_combine() -> str:
    num_tokens, hidden, num_experts, num_topk = 16, 128, 8, 2
    x = torch.arange(num_tokens * hidden, device="cpu").view(num_tokens, hidden).to(torch.bfloat16)
    topk_idx = torch.arange(num_tokens * num_topk, device="cpu").view(num_tokens, num_topk) % num_experts
    buffer = Buffer(None, comm=SoloComm(), device="cpu")
    try:
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        received, _, _, counts, handle, _ = buffer.dispatch(
            x, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert, topk_idx=topk_idx,
            topk_weights=torch.ones(num_tokens, num_topk, device="cpu"),
        )  # fmt: skip
        if not isinstance(received, torch.Tensor) or handle is None or counts is None:
            return "dispatch of bf16 rows returned something else than rows, counts and a handle"
        combined, _, _ = buffer.combine(received, handle)
    finally:
        buffer.destroy()
    if sum(counts) != num_tokens * num_topk or not torch.equal(combined, x):
        return "dispatch and combine of one rank changed the rows"
    return PASSED
