"""What messages say of the families that this pack runs."""

from __future__ import annotations

from ..families import registry

OR, AND = " or ", " and "


def names() -> str:
    """Such as `FLUX.1 or FLUX.2`."""
    return OR.join(family.name for family in registry.FAMILIES)


def models() -> str:
    """Every model that runs here."""
    return AND.join(family.wording.runs for family in registry.FAMILIES)


def expected() -> str:
    """What a checkpoint should have been, and in which layout."""
    return OR.join(f"a {family.name} transformer in {family.wording.layouts}" for family in registry.FAMILIES)


def example() -> str:
    """The file name of a checkpoint."""
    return OR.join(family.wording.example for family in registry.FAMILIES)


def example_gguf() -> str:
    """The file name of a checkpoint in GGUF."""
    return OR.join(family.wording.example_gguf for family in registry.FAMILIES)
