"""The families that this pack runs: one line each."""

from __future__ import annotations

from typing import Any

from .base import Family
from .flux1 import Flux1
from .flux2 import Flux2

# Any: each has a config of its own, which nobody but itself looks into.
FAMILIES: tuple[Family[Any], ...] = (Flux1(), Flux2())
