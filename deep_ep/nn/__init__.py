"""Mixture-of-experts parts over `deep_ep.Buffer`: router, differentiable dispatch and combine, experts, `MoE`."""

from . import fp8_gemm
from .dispatched import Dispatched, ExpertLayout, ExpertRows, build_layout, permute_by_expert, unpermute
from .experts import GroupedMLP
from .functional import combine, combine_async, dispatch
from .moe import MoE, MoEStats
from .router import Router, RouterOutput, capacity_cap, mask_padding

__all__ = [
    "Dispatched",
    "ExpertLayout",
    "ExpertRows",
    "GroupedMLP",
    "MoE",
    "MoEStats",
    "Router",
    "RouterOutput",
    "build_layout",
    "capacity_cap",
    "combine",
    "combine_async",
    "dispatch",
    "fp8_gemm",
    "mask_padding",
    "permute_by_expert",
    "unpermute",
]
