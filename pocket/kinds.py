"""The pocket models, by what `python -m pocket.train --model` calls them."""

from __future__ import annotations

from collections.abc import Mapping

from .flux1 import FLUX1
from .flux2 import FLUX2
from .kind import Kind

KINDS: Mapping[str, Kind] = {"flux1": FLUX1, "flux2": FLUX2}
