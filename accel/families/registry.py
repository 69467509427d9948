"""The families that this pack runs: one line each."""

from __future__ import annotations

from .base import Family
from .flux1 import Flux1

FAMILIES: tuple[Family, ...] = (Flux1(),)
