"""`MoE`: router, dispatch, experts, combine and shared experts as one module for a transformer block."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import layout
from ..buffer import Buffer
from ..engines.mesh import SoloComm
from ..errors import ConfigError
from .dispatched import ExpertRows, permute_by_expert, unpermute
from .experts import GroupedMLP, derive_seed
from .functional import combine_async, dispatch
from .router import Router

# Random streams of `derive_seed`; experts follow from 2 on by their global index.
_ROUTER_STREAM, _SHARED_STREAM = 0, 1


@dataclass(frozen=True)
class MoEStats:
    """How evenly tokens were spread over the experts of all ranks in the last update.

    Attributes:
        load: float32 [E], (token, k) pairs per expert.
        pairs: their sum.
        max_over_mean: load of the busiest expert over the mean; 1.0 is perfect balance, and also given for no tokens.
        idle_experts: experts that received nothing.
    """

    load: torch.Tensor
    pairs: int
    max_over_mean: float
    idle_experts: int


class MoE(nn.Module):
    """A mixture-of-experts layer whose experts are spread over the ranks of a group.

        moe = MoE(hidden, intermediate, num_experts=64, num_topk=6, group=group)   # in place of the MLP
        y = moe(x)                                                                  # [..., hidden] -> same
        ...
        optimizer.step(); moe.update_bias()                                         # once after each step

    Every rank holds the weights of its own experts only (contiguous ranges, see `deep_ep.layout`). Those parameters
    carry ``is_expert = True``: their gradient is complete on the owning rank, since tokens of all ranks come to it. All
    other parameters are replicated, start equal on all ranks, and need the usual gradient all-reduce (a sum, where
    every rank's loss is its share of the global mean).

    Construction and forward are collective, a forward of zero tokens too. It works under `torch.no_grad` and activation
    checkpointing.

    Args:
        hidden: H, width of a token; a multiple of 8 (16 bytes of bf16).
        intermediate: I, width of an expert.
        num_experts: E, over all ranks; need not divide by the number of ranks.
        num_topk: K, experts per token.
        group: process group; None takes the default group, or a single rank where torch.distributed is not initialised.
        buffer: a `deep_ep.Buffer` to use; None takes the group's shared one (`Buffer.get_or_grow`).
        precision: "fp8" sends tokens and their gradients as FP8 and multiplies FP8 operands; "bf16" neither.
        scoring, num_groups, topk_groups, normalize_weights, routed_scaling, bias_update_rate: see `Router`.
        num_shared_experts: experts that see every token: one dense SwiGLU of this many times the width, replicated,
            computed while combine is on its way.
        seed: initial weights depend on it and on global expert indices only, never on the number of ranks. Give each
            layer its own.
        device: where parameters live and tokens are expected.

    Attributes:
        router: `Router`.
        experts: `GroupedMLP` of the local experts.
        shared: `GroupedMLP` with one expert, or None.
        first_expert, num_local_experts: the range of global expert indices this rank owns.

    Raises:
        ConfigError: sizes or choices that do not fit.
    """

    counts: torch.Tensor
    last_load: torch.Tensor

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        num_topk: int,
        *,
        group: dist.ProcessGroup | None = None,
        buffer: Buffer | None = None,
        precision: str = "fp8",
        scoring: str = "softmax",
        num_groups: int = 1,
        topk_groups: int | None = None,
        normalize_weights: bool = True,
        routed_scaling: float = 1.0,
        bias_update_rate: float = 1e-3,
        num_shared_experts: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if hidden % 8 != 0:
            raise ConfigError(
                f"hidden={hidden} bf16 values are {2 * hidden} bytes; a row has to be a multiple of 16 bytes"
            )
        if num_shared_experts < 0:
            raise ConfigError(f"num_shared_experts={num_shared_experts} is negative")
        self._comm = _Communication(group, buffer, device)
        # Now rather than in the first forward, which may run under activation checkpointing's bookkeeping.
        self._comm.buffer()
        self.hidden = hidden
        self.num_experts = num_experts
        self.num_topk = num_topk
        self.precision = precision
        self.router = Router(
            hidden,
            num_experts,
            num_topk,
            scoring=scoring,
            num_groups=num_groups,
            topk_groups=topk_groups,
            normalize_weights=normalize_weights,
            routed_scaling=routed_scaling,
            bias_update_rate=bias_update_rate,
            seed=derive_seed(seed, _ROUTER_STREAM),
            device=device,
        )
        rank, num_ranks = self._comm.rank, self._comm.num_ranks
        self.first_expert = layout.first_local_expert(num_experts, num_ranks, rank)
        self.num_local_experts = layout.num_local_experts(num_experts, num_ranks, rank)
        self.experts = GroupedMLP(
            self.num_local_experts,
            hidden,
            intermediate,
            precision=precision,
            first_expert=self.first_expert,
            seed=seed,
            device=device,
        )
        self.shared: GroupedMLP | None = None
        if num_shared_experts:
            self.shared = GroupedMLP(
                1,
                hidden,
                intermediate * num_shared_experts,
                precision=precision,
                first_expert=_SHARED_STREAM - 2,  # stream of expert e is 2 + e
                seed=seed,
                is_expert=False,
                device=device,
            )
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer(
            "last_load", torch.zeros(num_experts, dtype=torch.float32, device=device), persistent=False
        )

    @property
    def buffer(self) -> Buffer:
        """The `deep_ep.Buffer` in use; made anew (collective) should the shared one have been destroyed."""
        return self._comm.buffer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] float32, bf16 or fp16 -> the same shape and dtype.

        Raises:
            ConfigError: last dimension or dtype does not fit; see `Buffer.dispatch` for communication errors.
        """
        if x.dim() < 1 or x.shape[-1] != self.hidden or not x.is_floating_point():
            raise ConfigError(f"MoE input is {tuple(x.shape)} {x.dtype}, expected float [..., {self.hidden}]")
        use_fp8 = self.precision == "fp8"
        tokens = x.reshape(-1, self.hidden)
        routed = self.router(tokens)
        self._count(routed.topk_idx)
        rounded = tokens.to(torch.bfloat16)
        received = dispatch(
            rounded, routed.topk_idx, routed.topk_weights, self.num_experts, self.buffer, use_fp8=use_fp8
        )
        rows = permute_by_expert(received, self.experts.row_alignment)
        y, event = combine_async(unpermute(self.experts(rows), rows), received)
        if self.shared is None:
            event.current_stream_wait()
        else:
            dense = self.shared(ExpertRows.single(rounded, self.shared.row_alignment))[: tokens.shape[0]]
            event.current_stream_wait()
            y = y.float() + dense.float()
        return y.to(x.dtype).view(x.shape)

    def _count(self, topk_idx: torch.Tensor) -> None:
        """Add the tokens of a training forward to the load; not those of a recomputation inside a backward."""
        if not self.training or torch._C._current_graph_task_id() != -1:
            return
        with torch.no_grad():
            flat = topk_idx.reshape(-1)
            self.counts.scatter_add_(0, flat, torch.ones_like(flat))

    @torch.no_grad()
    def update_bias(self) -> None:
        """Sum the load since the last call over all ranks and nudge the router's selection bias by it.

        Collective; call it once after each optimizer step, on every rank.
        """
        counts = self._comm.sum(self.counts)
        self.last_load = counts.to(torch.float32)
        self.router.update_bias(self.last_load)
        self.counts.zero_()

    def load(self) -> torch.Tensor:
        """float32 [E]: (token, k) pairs per expert over all ranks, as of the last `update_bias`."""
        return self.last_load.clone()

    def stats(self) -> MoEStats:
        """Balance of the last update."""
        load = self.load()
        mean = float(load.mean())
        return MoEStats(
            load=load,
            pairs=int(load.sum()),
            max_over_mean=float(load.max()) / mean if mean > 0 else 1.0,
            idle_experts=int((load == 0).sum()),
        )

    def expert_state_dict(self) -> dict[str, torch.Tensor]:
        """Weights of the local experts, keyed ``"<global expert>.w13"`` and ``"<global expert>.w2"``.

        The union over all ranks is the same for any number of ranks.
        """
        state = {}
        for local in range(self.num_local_experts):
            for name in ("w13", "w2"):
                state[f"{self.first_expert + local}.{name}"] = getattr(self.experts, name).detach()[local]
        return state

    @torch.no_grad()
    def load_expert_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load this rank's experts from ``state``; keys of other ranks' experts are ignored.

        Raises:
            ConfigError: an expert of this rank is missing, or has another shape. Nothing is changed then.
        """
        own = self.expert_state_dict()
        for key, current in own.items():
            if key not in state:
                raise ConfigError(
                    f"the checkpoint has no {key!r}; this rank owns experts {self.first_expert} to "
                    f"{self.first_expert + self.num_local_experts - 1}: merge the parts of all saved ranks"
                )
            if state[key].shape != current.shape:
                raise ConfigError(
                    f"{key!r} is {tuple(state[key].shape)} in the checkpoint, {tuple(current.shape)} here"
                )
        for key in own:
            expert, name = key.split(".")
            getattr(self.experts, name)[int(expert) - self.first_expert].copy_(state[key])

    def extra_repr(self) -> str:
        return f"rank={self._comm.rank}/{self._comm.num_ranks}, experts={self.num_experts}, precision={self.precision}"


@functools.cache
def _solo_comm() -> SoloComm:
    """One communicator for all layers of a process without a group, so that they share one buffer."""
    return SoloComm()


class _Communication:
    """Group and buffer of a layer, kept apart from the module: copies of the module share them."""

    def __init__(
        self, group: dist.ProcessGroup | None, buffer: Buffer | None, device: torch.device | str | None
    ) -> None:
        self._given = buffer
        self._solo: Any = None
        # A layer for a GPU wants its buffer there, though nothing of this process may have used the GPU yet.
        self._device: torch.device | None = None
        if device is not None and torch.device(device).type == "cuda":
            self._device = torch.empty(0, device=device).device  # with its index
        if buffer is not None:
            if group is not None and buffer.group is not None and buffer.group != group:
                raise ConfigError("group is not the buffer's group; give only one of them")
            group = buffer.group
            self.rank, self.num_ranks = buffer.rank, buffer.group_size
        elif group is None and not dist.is_initialized():
            self._solo = _solo_comm()
            self.rank, self.num_ranks = 0, 1
        else:
            group = dist.group.WORLD if group is None else group
            self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.group = group

    def buffer(self) -> Buffer:
        if self._given is not None:
            return self._given
        return Buffer.get_or_grow(self.group, comm=self._solo, device=self._device)

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over all ranks; the input stays."""
        if self.group is not None:
            total = counts.clone()
            dist.all_reduce(total, group=self.group)
            return total
        comm: Any = self._solo if self._given is None else self._given.comm
        parts = comm.allgather(counts.tolist())
        return torch.tensor(parts, dtype=counts.dtype).sum(0).to(counts.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Communication:
        return self
