"""The families that benchmarks know, and the models that they can be asked for by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report import BenchmarkError
from .base import BenchmarkFamily, Config
from .flux1 import FLUX1
from .flux2 import FLUX2

FAMILIES = (FLUX1, FLUX2)
# Of what is measured where no other model is asked for.
DEFAULT = "flux1-dev"


def published() -> Mapping[str, Any]:
    """Name -> sizes of every published model."""
    return {name: config for family in FAMILIES for name, config in family.family.published.items()}


def config_of(name: str, quick: bool = False) -> Config:
    """The sizes of a published model, or of a narrow one of its family.

    Raises:
        BenchmarkError: there is none of that name.
    """
    models = published()
    if name not in models:
        raise BenchmarkError(f"--family is '{name}', expected one of: {', '.join(models)}.")
    return of(models[name]).quick if quick else models[name]


def of(config: Config) -> BenchmarkFamily:
    """The family of a model with these sizes."""
    return next(family for family in FAMILIES if isinstance(config, type(family.quick)))
