"""Cases of normal-mode dispatch and combine: what a case is, its inputs, how ranks run it, how it is checked.

Inputs come from seeds, so a rank makes its own and the test process makes everybody's for the reference; only
results travel between processes.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import reference as ref
import torch
from harness import RankContext, expect_bits, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

PAYLOADS = (
    "bf16",
    "bf16_bits",
    "fp16",
    "fp32",
    "uint8",
    "int32",
    "fp8",
    "fp8_scales",
    "fp8_scales_colmajor",
    "fp8_scales_wide",
    "fp8_scales_packed",
    "bf16_use_fp8",
    "bf16_use_fp8_pow2",
    "bf16_use_fp8_ue8m0",
)
USE_FP8 = {
    "bf16_use_fp8": {},
    "bf16_use_fp8_pow2": {"round_scale": True},
    "bf16_use_fp8_ue8m0": {"round_scale": True, "use_ue8m0": True},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One dispatch + cached dispatch + combine on all ranks."""

    num_ranks: int = 2
    tokens: tuple[int, ...] = (5, 5)  # per rank
    hidden: int = 64
    num_topk: int = 2
    num_experts: int = 4
    payload: str = "bf16"
    cached_payload: str = "fp32"
    combine_dtype: torch.dtype = torch.bfloat16
    idx_dtype: torch.dtype = torch.int64
    mask: str = "none"  # none | some | rows | all | skew
    with_topk: bool = True
    num_bias: int = 0
    alignment: int = 1
    worst_extra: int | None = None  # num_worst_tokens = largest receive count + this
    domain: int | None = None  # ranks per node
    repeats: int = 1
    seed: int = 0

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return f"Case({', '.join(changed)})"


@dataclasses.dataclass
class Inputs:
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    x: Any  # tensor or (tensor, scales)


def generator(*key: int) -> torch.Generator:
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def make_topk(
    gen: torch.Generator,
    num_tokens: int,
    num_topk: int,
    num_experts: int,
    mask: str = "none",
    dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts per token (top-k above the number of experts is filled with -1), FP32 weights."""
    scores = torch.rand(num_tokens, num_experts, generator=gen)
    if mask == "skew":  # expert 0 is everybody's choice
        scores[:, 0] = 2.0
    chosen = scores.argsort(dim=1, descending=True)[:, :num_topk]
    idx = torch.full((num_tokens, num_topk), -1, dtype=dtype)
    idx[:, : chosen.size(1)] = chosen.to(dtype)
    drop = torch.rand(num_tokens, num_topk, generator=gen)
    if mask == "some":
        idx[drop < 0.4] = -1
    elif mask == "rows":
        idx[drop[:, 0] < 0.5] = -1
    elif mask == "all":
        idx.fill_(-1)
    return idx, torch.rand(num_tokens, num_topk, generator=gen)


def make_rows(gen: torch.Generator, payload: str, num_rows: int, hidden: int) -> Any:
    """Rows [num_rows, hidden] of a payload kind, with scales where the kind has them."""

    def random_bytes(width: int) -> torch.Tensor:
        return torch.randint(0, 256, (num_rows, width), dtype=torch.uint8, generator=gen)

    def viewed(dtype: torch.dtype, columns: int) -> torch.Tensor:
        if num_rows == 0:
            return torch.empty(0, columns, dtype=dtype)
        return random_bytes(columns * torch.empty(0, dtype=dtype).element_size()).view(dtype)

    if payload.startswith("bf16_use_fp8") or payload == "bf16":
        rows = torch.randn(num_rows, hidden, generator=gen)
        if payload != "bf16":  # zeros, tiny and large tiles, exact ties
            rows = rows * torch.exp2(torch.randint(-18, 12, (num_rows, 1), generator=gen).float())
            rows[:, ::7] = 0.0
        return rows.bfloat16()
    if payload in ("fp16", "fp32"):
        return torch.randn(num_rows, hidden, generator=gen).to(torch.float16 if payload == "fp16" else torch.float32)
    if payload == "bf16_bits":  # every pattern: NaN payloads, infinities, subnormals, signed zeros
        return viewed(torch.bfloat16, hidden)
    if payload == "uint8":
        return random_bytes(hidden)
    if payload == "int32":
        return viewed(torch.int32, hidden)
    rows = viewed(torch.float8_e4m3fn, hidden)
    if payload == "fp8":
        return rows
    tiles = max(1, hidden // 128)
    if payload == "fp8_scales_packed":
        return rows, viewed(torch.int32, max(1, tiles // 4))
    if payload == "fp8_scales_wide":
        return rows, viewed(torch.float32, tiles + 3)
    scales = torch.rand(num_rows, tiles, generator=gen)
    if payload == "fp8_scales_colmajor":
        padded = torch.zeros(tiles, (num_rows + 3) // 4 * 4 + 4)
        padded[:, :num_rows] = scales.t()
        scales = padded.t()[:num_rows]
    return rows, scales


def scale_layouts(num_tokens: int, columns: int) -> dict[str, tuple[int, int, int]]:
    """Both strides of [T, S] scales and the offset of the first one, in elements, by name; see `laid_out`."""
    tokens, pick = max(num_tokens, 1), random.Random(num_tokens * 1000 + columns)
    inner, outer = pick.randint(2, 5), pick.randint(1, 9)
    return {
        "row-major": (columns, 1, 0),
        "row-major, not on 16 bytes": (columns, 1, 1),
        "column-major": (1, tokens, 0),
        "column-major, padded": (1, (tokens + 3) // 4 * 4 + 4, 2),
        "a part of wider rows": (columns + 3, 1, 3),
        "random, tokens inside": (inner, inner * tokens + outer, pick.randint(0, 7)),
        "random, tokens outside": (inner * columns + outer, inner, pick.randint(0, 7)),
    }


def laid_out(values: torch.Tensor, row_stride: int, column_stride: int, offset: int) -> torch.Tensor:
    """The same [T, S] values in memory of their own with these strides, in elements."""
    rows, columns = values.shape
    size = offset + max(rows - 1, 0) * row_stride + (columns - 1) * column_stride + 1
    flat = torch.zeros(size, dtype=values.dtype, device=values.device)
    return flat.as_strided((rows, columns), (row_stride, column_stride), offset).copy_(values)


class TorchOperations(TorchDispatchMode):
    """Records the names of the torch operators that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def make_inputs(case: Case, rank: int) -> Inputs:
    gen = generator(case.seed, rank)
    idx, weights = make_topk(gen, case.tokens[rank], case.num_topk, case.num_experts, case.mask, case.idx_dtype)
    return Inputs(idx, weights, make_rows(gen, case.payload, case.tokens[rank], case.hidden))


def make_cached_rows(case: Case, rank: int) -> Any:
    # Another width than the first dispatch's, to show that a handle holds row numbers only.
    return make_rows(generator(case.seed, rank, 1), case.cached_payload, case.tokens[rank], case.hidden + 32)


def make_expert_rows(case: Case, rank: int, num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, case.hidden, generator=generator(case.seed, rank, 2)).to(case.combine_dtype)


def make_weight_grads(case: Case, rank: int, num_rows: int) -> torch.Tensor:
    # Integers: their sums are exact, so any order of the ranks' sum gives the same bits.
    return torch.randint(-64, 64, (num_rows, case.num_topk), generator=generator(case.seed, rank, 3)).float()


def make_bias(case: Case, rank: int) -> list[torch.Tensor]:
    gen = generator(case.seed, rank, 4)
    return [
        torch.randn(case.tokens[rank], case.hidden, generator=gen).to(case.combine_dtype) for _ in range(case.num_bias)
    ]


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, device) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) and value.device != device else value


def to_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: to_cpu(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_cpu(v) for v in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _head(value: Any, num_rows: int) -> Any:
    return tuple(v[:num_rows] for v in value) if isinstance(value, tuple) else value[:num_rows]


def run_case(ctx: RankContext, case: Case, num_worst: int, num_recv: list[int]) -> dict[str, Any]:
    """The rank's side: layout, dispatch, cached dispatch, combine with weights and bias, the last two repeated."""
    buffer = ctx.buffer(case.domain)
    inputs = make_inputs(case, ctx.rank)
    idx, weights, x = (to_device(v, ctx.device) for v in (inputs.topk_idx, inputs.topk_weights, inputs.x))
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, case.num_experts)
    out: dict[str, Any] = {"layout": (per_rank, per_node, per_expert, in_rank), "layout_event": event.event}
    topk = {"topk_idx": idx, "topk_weights": weights} if case.with_topk else {}
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        expert_alignment=case.alignment,
        num_worst_tokens=num_worst,
        **topk,
        **({"use_fp8": True, **USE_FP8[case.payload]} if case.payload in USE_FP8 else {}),
    )
    out.update(
        recv_x=recv_x,
        recv_idx=recv_idx,
        recv_weights=recv_weights,
        counts=counts,
        event=event.event,
        handle_len=len(handle),
        handle_is_tuple=type(handle) is tuple,
        handle_all_tensors=all(isinstance(t, torch.Tensor) for t in handle),
        handle=tuple(t.clone() for t in handle),
        recv_rows=(recv_x[0] if isinstance(recv_x, tuple) else recv_x).size(0),
    )
    out["contiguous"] = [t.is_contiguous() for t in (recv_x if isinstance(recv_x, tuple) else (recv_x,))]
    cached_in = to_device(make_cached_rows(case, ctx.rank), ctx.device)
    expert_rows = make_expert_rows(case, ctx.rank, out["recv_rows"]).to(ctx.device)
    grads = make_weight_grads(case, ctx.rank, out["recv_rows"]).to(ctx.device)
    bias = [b.to(ctx.device) for b in make_bias(case, ctx.rank)]
    for repeat in range(case.repeats):
        cached = buffer.dispatch(cached_in, handle=handle)
        combined, combined_weights, _ = buffer.combine(
            expert_rows,
            handle,
            topk_weights=grads if case.with_topk else None,
            bias=None if not bias else bias[0] if len(bias) == 1 else tuple(bias),
        )
        if repeat == 0:
            out.update(cached=cached[0], cached_rest=cached[1:5], combined=combined, combined_weights=combined_weights)
        else:
            count = num_recv[ctx.rank]  # what lies behind the received rows is undefined
            expect_bits(_head(cached[0], count), _head(out["cached"], count), f"cached dispatch, repeat {repeat}")
            expect_bits(combined, out["combined"], f"combine, repeat {repeat}")
    for before, now in zip(out["handle"], handle, strict=True):
        expect_bits(now, before, "handle after use")
    return to_cpu(out)


def _parts(values: list[Any]) -> list[list[torch.Tensor]]:
    """Payloads of all ranks -> per component (rows, scales) the list by rank."""
    if isinstance(values[0], tuple):
        return [[v[i] for v in values] for i in range(len(values[0]))]
    return [values]


def _check_rows(got: Any, payloads: list[Any], route: ref.Routes, rank: int, what: str) -> None:
    parts = _parts(payloads)
    components = list(got) if isinstance(got, tuple) else [got]
    if len(components) != len(parts):
        raise AssertionError(f"{what}: got {len(components)} components, expected {len(parts)}")
    for i, part in enumerate(parts):
        want = ref.gather(part, route, rank)
        expect_bits(components[i][: want.size(0)], want, f"{what}[{i}]")


@dataclasses.dataclass
class Plan:
    """A case with everything the reference needs: the inputs of all ranks and where every row goes."""

    case: Case
    inputs: list[Inputs]
    layouts: list[ref.Layout]
    route: ref.Routes

    @classmethod
    def of(cls, case: Case) -> Plan:
        inputs = [make_inputs(case, rank) for rank in range(case.num_ranks)]
        layouts = [ref.layout(i.topk_idx, case.num_experts, case.num_ranks, case.domain) for i in inputs]
        return cls(case, inputs, layouts, ref.routes([lay.is_token_in_rank for lay in layouts]))

    @property
    def num_recv(self) -> list[int]:
        return [self.route.num_recv(rank) for rank in range(self.case.num_ranks)]

    @property
    def num_worst(self) -> int:
        return 0 if self.case.worst_extra is None else max(1, max(self.num_recv) + self.case.worst_extra)

    def sent(self) -> list[Any]:
        """The payloads as they travel."""
        if self.case.payload not in USE_FP8:
            return [i.x for i in self.inputs]
        options = {"round_scale": False, "use_ue8m0": False, **USE_FP8[self.case.payload]}
        return [ref.quantize_1x128(i.x, ref.scale_format_of(**options)) for i in self.inputs]


def check_case(case: Case) -> None:
    """Run the case on its ranks and compare everything a caller can see with the reference."""
    plan = Plan.of(case)
    results = run_ranks(case.num_ranks, run_case, case, plan.num_worst, plan.num_recv)
    for rank, got in enumerate(results):
        verify(plan, rank, got)


def verify(plan: Plan, rank: int, got: dict[str, Any]) -> None:
    """Compare what `rank` saw (the result of `run_case`) with the reference."""
    case, route, inputs = plan.case, plan.route, plan.inputs
    tag = f"rank {rank} of {case}"
    lay = plan.layouts[rank]
    num_recv = route.num_recv(rank)
    rows = [plan.num_worst or n for n in plan.num_recv]
    expect_bits(
        got["layout"],
        (lay.num_tokens_per_rank, lay.num_tokens_per_rdma_rank, lay.num_tokens_per_expert, lay.is_token_in_rank),
        f"{tag}: layout",
    )
    expect_bits([got["event"], got["layout_event"]], [None, None], f"{tag}: events of synchronous calls")
    expect_bits(got["recv_rows"], rows[rank], f"{tag}: received rows")
    _check_rows(got["recv_x"], plan.sent(), route, rank, f"{tag}: recv_x")
    expect_bits(all(got["contiguous"]), True, f"{tag}: contiguous rows and scales")
    idx, weights = ref.recv_topk(
        [i.topk_idx for i in inputs], [i.topk_weights for i in inputs], route, case.num_experts, rank
    )
    if case.with_topk:
        expect_bits(got["recv_idx"][:num_recv], idx, f"{tag}: recv_topk_idx")
        expect_bits(got["recv_weights"][:num_recv], weights, f"{tag}: recv_topk_weights")
        expect_bits(tuple(got["recv_weights"].shape), (rows[rank], case.num_topk), f"{tag}: recv_topk_weights shape")
        expect_bits(bool((got["recv_idx"][num_recv:] == -1).all()), True, f"{tag}: trailing recv_topk_idx are -1")
    else:
        expect_bits((got["recv_idx"], got["recv_weights"]), (None, None), f"{tag}: top-k of a dispatch without top-k")
    num_local = len(ref.experts_of_rank(case.num_experts, case.num_ranks)[rank])
    want_counts = [] if plan.num_worst else ref.counts_list(idx, num_local, case.alignment)
    expect_bits(got["counts"], want_counts, f"{tag}: num_recv_tokens_per_expert_list")
    expect_bits([type(c) for c in got["counts"]], [int] * len(want_counts), f"{tag}: type of the counts")
    _check_handle(case, got, route, rank, case.domain is not None and case.domain < case.num_ranks, tag)
    _check_rows(
        got["cached"],
        [make_cached_rows(case, r) for r in range(case.num_ranks)],
        route,
        rank,
        f"{tag}: cached dispatch",
    )
    expect_bits(got["cached_rest"], (None, None, None, None), f"{tag}: rest of a cached dispatch")
    expert_rows = [make_expert_rows(case, r, n) for r, n in enumerate(rows)]
    expect_bits(
        got["combined"], ref.combine(expert_rows, route, rank, make_bias(case, rank), case.domain), f"{tag}: combine"
    )
    grads = [make_weight_grads(case, r, n) for r, n in enumerate(rows)]
    expect_bits(
        got["combined_weights"],
        ref.combine_weights(grads, route, rank) if case.with_topk else None,
        f"{tag}: combined top-k weights",
    )


def _check_handle(case: Case, got: dict[str, Any], route: ref.Routes, rank: int, internode: bool, tag: str) -> None:
    handle = got["handle"]
    expect_bits(
        (got["handle_len"], got["handle_is_tuple"], got["handle_all_tensors"]),
        (10 if internode else 6, True, True),
        f"{tag}: handle (length, plain tuple, tensors only)",
    )
    prefix = ref.rank_prefix_matrix(route)
    if internode:
        expect_bits(handle[-4].cpu(), prefix[:, rank].contiguous(), f"{tag}: handle[-4], rows up to each source rank")
        expect_bits(
            handle[0].sum(dim=0).int(),
            torch.tensor(
                [sum(1 for s, _ in route.sources[r] if s == rank) for r in range(case.num_ranks)], dtype=torch.int32
            ),
            f"{tag}: handle[0]",
        )
        return
    expect_bits(handle[0], prefix, f"{tag}: rank_prefix_matrix")
    tokens = torch.tensor([token for _, token in route.sources[rank]], dtype=torch.int32)
    expect_bits(handle[3][: tokens.numel()], tokens, f"{tag}: recv_src_idx")
    head = torch.full((case.tokens[rank], case.num_ranks), -1, dtype=torch.int32)
    for dst in range(case.num_ranks):
        for row, (src, token) in enumerate(route.sources[dst]):
            if src == rank:
                head[token, dst] = row
    expect_bits(handle[4], head >= 0, f"{tag}: is_token_in_rank in the handle")
    expect_bits(handle[5], head, f"{tag}: send_head (row at the destination, -1 where nothing was sent)")
