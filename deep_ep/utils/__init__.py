"""Helpers for callers and tests: events, process-group set-up, comparing and timing."""

from ..event import EventHandle, EventOverlap
from .envs import check_nvlink_connections

__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections"]
