"""Engines move the rows. `portable` works everywhere and is the reference for every kernel."""

from .portable import PortableEngine

__all__ = ["PortableEngine"]
