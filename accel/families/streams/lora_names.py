"""What LoRA files call the layers of such models, as far as the families agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..layout import FusedLinear, Layout, LoraTarget, VectorWeight


def renamed(name: str, ends: Mapping[str, str]) -> Iterator[str]:
    """The name with another end, for each end that it has: end -> instead."""
    for end, other in ends.items():
        if name.endswith(end):
            yield name.removesuffix(end) + other


def attention_rows(linear1: FusedLinear) -> LoraTarget:
    """The q, k and v rows of a single block's first linear, without its MLP."""
    parts = linear1.parts[:3]
    return LoraTarget(parts, linear1.in_features, sum(part.rows for part in parts), False, linear1.bias)


def lora_norms(layout: Layout) -> dict[str, VectorWeight]:
    """Name of a norm -> its scale: original names without the `.scale` at their end, and diffusers' names."""
    norms: dict[str, VectorWeight] = {}
    for vector in layout.vectors:
        norms[vector.name.removesuffix(".scale")] = norms[vector.parameter.removesuffix(".weight")] = vector
    return norms


def lora_absent(
    config: Any, names_of: Callable[[Any], set[str]], depths: tuple[int, int], without_guidance: str
) -> dict[str, str]:
    """Names of linears and norms that other models of the family have and this one lacks -> what to say of their keys.

    Args:
        config: the family's.
        names_of: config -> every name of a model.
        depths: up to how many double and single blocks there may be in other models.
        without_guidance: the model that lacks the guidance embedder.
    """
    absent: dict[str, str] = {}
    own = names_of(config)
    if not config.guidance:
        more = names_of(replace(config, guidance=True)) - own
        absent |= dict.fromkeys(more, f"of the guidance embedder, which {without_guidance} does not have")
    for field, full, kind in zip(("depth", "depth_single"), depths, ("double", "single"), strict=True):
        count = getattr(config, field)
        if count < full:
            more = names_of(replace(config, **{field: full})) - own
            absent |= dict.fromkeys(more, f"of {kind} blocks beyond the {count} that this model has")
    return absent
