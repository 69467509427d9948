"""Model families. What differs between them stands in one folder each; the rest of `accel` serves any of them."""

from __future__ import annotations

from .flux1 import Flux1

FAMILIES = (Flux1(),)
