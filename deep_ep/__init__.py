"""deep_ep: expert-parallel communication for mixture-of-experts models.

`Buffer.dispatch` sends each token to the ranks that own its experts, `Buffer.combine` sums the experts' outputs back
at the token's home. `deep_ep.nn` has a router, differentiable dispatch and combine, and an `MoE` module on top.
"""

from .buffer import Buffer
from .config import Config, topk_idx_t
from .engines.mesh import SoloComm
from .errors import (
    BufferDestroyed,
    BufferOverflow,
    CommTimeout,
    ConfigError,
    DeepEPError,
    PeerError,
    PoolExhausted,
    TopologyError,
)
from .event import EventHandle, EventOverlap
from .traffic import TrafficStats
from .version import __version__

__all__ = [
    "Buffer",
    "BufferDestroyed",
    "BufferOverflow",
    "CommTimeout",
    "Config",
    "ConfigError",
    "DeepEPError",
    "EventHandle",
    "EventOverlap",
    "PeerError",
    "PoolExhausted",
    "SoloComm",
    "TopologyError",
    "TrafficStats",
    "__version__",
    "topk_idx_t",
]
