"""From the arguments of `Buffer.dispatch` to a checked `DispatchRequest`, and from a result to what the caller gets."""

from __future__ import annotations

from typing import Any

import torch

from . import checks, fp8
from .config import Config, align_up
from .engines.calls import Call
from .engines.portable import DispatchRequest, DispatchResult
from .engines.short_cuts import ConfigOf, ShortCuts, When
from .errors import ConfigError
from .event import EventOverlap
from .handles import Handle
from .layout import check_topk_range
from .topology import Topology

#: Arguments of a dispatch that a handle takes the place of.
_EXCLUDED = ("topk_idx", "topk_weights", "num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert")
_NO_FP8 = (False, False, False)
_INT32, _FLOAT32, _BOOL = (torch.int32,), (torch.float32,), (torch.bool,)


#: What `Buffer.dispatch` returns.
Returned = tuple[checks.Rows, torch.Tensor | None, torch.Tensor | None, list[int] | None, Handle | None, EventOverlap]


def try_dispatch(
    engine: ShortCuts,
    x: Any,
    handle: Any,
    layout: tuple[Any, ...],
    topk: tuple[Any, Any],
    sizes: tuple[Any, Any],
    formats: tuple[Any, Any, Any],
    configs: tuple[Any, ConfigOf],
    when: When,
) -> tuple[DispatchResult, EventOverlap] | None:
    """A dispatch of arguments as they came, if they are like those of most calls; see `ShortCuts`.

    Args:
        layout: num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert.
        topk: topk_idx and topk_weights.
        sizes: num_worst_tokens and expert_alignment.
        formats: use_fp8, round_scale and use_ue8m0.
        configs: the configuration given, and what gives one in its place.
        when: previous_event and async_finish.
    """
    per_rank, per_node, in_rank, per_expert = layout
    num_worst_tokens, alignment = sizes
    if num_worst_tokens != 0 or type(alignment) is not int or alignment < 1:
        return None
    if per_node is not None or not (configs[0] is None or isinstance(configs[0], Config)):
        return None
    if handle is not None and not (per_rank is in_rank is per_expert is topk[0] is topk[1] is None):
        return None
    scale_format = None
    if True in formats:
        try:
            scale_format = scale_format_of("dispatch", *formats)
        except ConfigError:
            return None
    elif formats != _NO_FP8:
        return None
    return engine.try_dispatch(x, handle, (per_rank, in_rank, per_expert), topk, scale_format, *configs, when)


def returned(
    result: DispatchResult, handle: Handle | None, num_worst_tokens: int, expert_alignment: int, event: EventOverlap
) -> Returned:
    """What the caller of a dispatch gets; ``handle``: that he gave."""
    rows: checks.Rows = result.rows if result.scales is None else (result.rows, result.scales)
    if handle is not None:
        return rows, None, None, None, None, event
    counts = [] if num_worst_tokens else result.num_recv_tokens_per_expert or []
    if expert_alignment > 1:
        counts = [align_up(count, expert_alignment) for count in counts]
    return rows, result.topk_idx, result.topk_weights, counts, result.handle, event


def cached_request(
    call: Call,
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    scale_format: fp8.ScaleFormat | None,
    handle: Handle,
    given: tuple[torch.Tensor | None, ...],
    num_worst_tokens: int,
    config: Config,
) -> DispatchRequest:
    """A dispatch that repeats the routing of ``handle``; ``given`` are the arguments `_EXCLUDED` by one."""
    for value in given:
        if value is None:
            continue
        extra = [name for name, value in zip(_EXCLUDED, given, strict=True) if value is not None]
        raise ConfigError(
            f"dispatch: {', '.join(extra)} given together with handle; a handle fixes the routing, so leave the layout "
            "and top-k arguments out, or leave the handle out to route anew"
        )
    route = call.route(handle, rows)
    if rows.shape[0] != route.num_tokens:
        raise ConfigError(
            f"dispatch: x has {rows.shape[0]} tokens but the handle's dispatch had {route.num_tokens}; pass the handle "
            "of a dispatch with the same tokens"
        )
    if num_worst_tokens and num_worst_tokens != route.num_rows:
        raise ConfigError(
            f"dispatch: num_worst_tokens is {num_worst_tokens} but the handle was made with {route.num_rows} rows"
        )
    sms, none = config.num_sms, None
    return DispatchRequest(
        rows, scales, handle[0], route, none, none, none, 0, 1, sms, none, scale_format, call.on_device
    )


def fresh_request(
    call: Call,
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    scale_format: fp8.ScaleFormat | None,
    layout: tuple[torch.Tensor | None, ...],
    topk: tuple[torch.Tensor | None, torch.Tensor | None],
    num_worst_tokens: int,
    config: Config,
) -> DispatchRequest:
    """A dispatch that routes anew.

    Args:
        layout: num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert.
        topk: topk_idx, topk_weights.
    """
    topology, on_device = call.engine.topology, call.on_device
    if num_worst_tokens and topk[0] is None:
        raise ConfigError("dispatch: num_worst_tokens needs topk_idx and topk_weights, which tell padding rows apart")
    routing: tuple[Any, ...] = (layout[0], layout[2], layout[3], *topk)
    if layout[1] is not None or not _are_plain(rows, topology.num_ranks, *routing):
        routing = _checked_routing(rows, topology, layout, topk)
    per_rank, in_rank, per_expert, topk_idx, topk_weights = routing
    if not on_device:
        sent = in_rank.sum(0, dtype=torch.int32)
        if not torch.equal(sent, per_rank):
            raise ConfigError(
                f"dispatch: num_tokens_per_rank is {per_rank.tolist()} but is_token_in_rank counts {sent.tolist()}; "
                "pass both from the same get_dispatch_layout"
            )
        per_rank = sent
        if topk_idx is not None:
            check_topk_range(topk_idx, per_expert.shape[0])
    return DispatchRequest(
        rows,
        scales,
        in_rank,
        None,
        topk_idx,
        topk_weights,
        per_expert,
        num_worst_tokens,
        config.num_channels,
        config.num_sms,
        per_rank,
        scale_format,
        on_device,
    )


def _are_plain(
    rows: torch.Tensor,
    num_ranks: int,
    per_rank: Any,
    in_rank: Any,
    per_expert: Any,
    topk_idx: Any,
    topk_weights: Any,
) -> bool:
    """Whether these are as most callers pass them: the results of `get_dispatch_layout`, and contiguous top-k.

    A short cut: `_checked_routing` says what is wrong with others, if anything.
    """
    device, num_tokens = rows.device, rows.shape[0]
    try:
        if topk_idx is not None or topk_weights is not None:
            tokens, num_topk = shape = topk_idx.shape
            if not (
                tokens == num_tokens
                and num_topk > 0
                and topk_weights.shape == shape
                and topk_idx.dtype in checks.TOPK_IDX_DTYPES
                and topk_weights.dtype is torch.float32
                and topk_idx.device == device == topk_weights.device
                and topk_idx.is_contiguous()
                and topk_weights.is_contiguous()
            ):
                return False
        (num_experts,) = per_expert.shape
        return (
            num_experts > 0
            and in_rank.dtype is torch.bool
            and in_rank.shape == (num_tokens, num_ranks)
            and in_rank.device == device == per_rank.device == per_expert.device
            and in_rank.is_contiguous()
            and per_rank.dtype is torch.int32 is per_expert.dtype
            and per_rank.shape == (num_ranks,)
            and per_rank.is_contiguous()
            and per_expert.is_contiguous()
        )
    except (AttributeError, TypeError, ValueError):  # no tensors, or of other dimensions
        return False


def _checked_routing(
    rows: torch.Tensor,
    topology: Topology,
    layout: tuple[torch.Tensor | None, ...],
    topk: tuple[torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx and topk_weights, contiguous."""
    operation, check, device = "dispatch", checks.check_tensor, rows.device
    per_rank, per_node, in_rank, per_expert = layout
    if per_rank is None or in_rank is None or per_expert is None:
        raise ConfigError(
            "dispatch: without a handle, num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert are needed; "
            "get them from get_dispatch_layout(topk_idx, num_experts)"
        )
    num_tokens, num_ranks = rows.shape[0], topology.num_ranks
    shape: tuple[int, ...] = (num_tokens, num_ranks)
    in_rank = check(in_rank, "is_token_in_rank", operation, dim=2, dtypes=_BOOL, shape=shape, device=device)
    shape = (num_ranks,)
    per_rank = check(per_rank, "num_tokens_per_rank", operation, dim=1, dtypes=_INT32, shape=shape, device=device)
    per_expert = check(per_expert, "num_tokens_per_expert", operation, dim=1, dtypes=_INT32, device=device)
    if per_expert.shape[0] == 0:
        raise ConfigError("dispatch: num_tokens_per_expert is empty; expected one count for each expert")
    if per_node is not None:
        shape = (topology.num_nodes,)
        check(per_node, "num_tokens_per_rdma_rank", operation, dim=1, dtypes=_INT32, shape=shape, device=device)
    topk_idx, topk_weights = topk
    if (topk_idx is None) != (topk_weights is None):
        raise ConfigError("dispatch: topk_idx and topk_weights are given both or neither; one is missing")
    if topk_idx is not None:
        topk_idx = checks.check_topk_idx(topk_idx, operation, num_tokens, device)
        shape = (num_tokens, topk_idx.shape[1])
        topk_weights = check(
            topk_weights, "topk_weights", operation, dim=2, dtypes=_FLOAT32, shape=shape, device=device
        )
    return per_rank, in_rank, per_expert, topk_idx, topk_weights


def scale_format_of(operation: str, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> fp8.ScaleFormat | None:
    """The scale format that the three flags of the interface ask for; None without FP8.

    Raises:
        ConfigError: flags that contradict each other.
    """
    if not use_fp8:
        if round_scale or use_ue8m0:
            raise ConfigError(f"{operation}: round_scale and use_ue8m0 describe FP8 scales; set use_fp8=True as well")
        return None
    if use_ue8m0 and not round_scale:
        raise ConfigError(f"{operation}: use_ue8m0 stores exponents, so it needs round_scale=True as well")
    return "ue8m0" if use_ue8m0 else "pow2" if round_scale else "fp32"


def check_quantizable(rows: torch.Tensor, scales: torch.Tensor | None) -> None:
    """What `dispatch(use_fp8=True)` takes.

    Raises:
        ConfigError: rows that are not bf16, fp16 or fp32, or that come with scales.
    """
    if scales is not None or rows.dtype not in checks.COMBINE_DTYPES:
        raise ConfigError(
            f"dispatch: use_fp8=True quantises a bf16, fp16 or fp32 x; got {rows.dtype}"
            + (" with scales" if scales is not None else "")
            + ". An x that is quantised already is passed as (x, scales) without use_fp8"
        )


def checked_config(config: Any, operation: str) -> Config | None:
    """Refuse what is not a `Config`."""
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"{operation}: config is a {type(config).__name__}; expected a deep_ep.Config or None")
    return config
