"""What engines do at once for calls like nearly all others, before anything is looked at in detail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..config import Config
from ..event import EventHandle, EventOverlap
from ..fp8 import ScaleFormat

if TYPE_CHECKING:
    from .portable import DispatchResult

#: Gives the configuration of an operation on rows, which travel as FP8 or not.
ConfigOf = Callable[[str, torch.Tensor, bool], Config]
#: previous_event, which may be anything, and async_finish.
When = tuple[EventOverlap | EventHandle | None, bool]


class ShortCuts:
    """Operations on the current stream, or, where they are asynchronous or wait for an event, beside it.

    Arguments are as the caller passed them. An answer of None means that something is new, unusual or wrong: then
    nothing has happened that matters, and the call takes the long way, on which each argument is checked.
    """

    def try_layout(
        self, topk_idx: Any, num_experts: Any, previous_event: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """num_tokens_per_rank, num_tokens_per_expert and is_token_in_rank, of the current stream in any case."""
        return None

    def try_dispatch(
        self,
        x: Any,
        handle: Any,
        layout: tuple[Any, Any, Any],
        topk: tuple[Any, Any],
        scale_format: ScaleFormat | None,
        config: Config | None,
        default_config: ConfigOf,
        when: When,
    ) -> tuple[DispatchResult, EventOverlap] | None:
        """A dispatch by ``handle``, or, where that is None, one anew whose number of rows is not fixed.

        Args:
            layout: num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert.
            topk: topk_idx and topk_weights.
            scale_format: of the FP8 that rows are quantised to on the way; None if they travel as they are.
            default_config: asked if ``config`` is None.

        Raises:
            BufferOverflow, CommTimeout, ConfigError, PeerError, PoolExhausted: as the long way does.
        """
        return None

    def try_combine(
        self, x: Any, handle: Any, topk_weights: Any, config: Config | None, default_config: ConfigOf, when: When
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap] | None:
        """A combine without a bias.

        Raises:
            CommTimeout, PeerError, PoolExhausted: as the long way does.
        """
        return None
