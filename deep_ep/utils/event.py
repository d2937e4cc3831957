"""`EventHandle` and `EventOverlap` under the name that callers import them by."""

from ..event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
