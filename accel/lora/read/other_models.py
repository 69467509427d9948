"""Which published model a LoRA is for that this one is not, by the names and shapes of its layers: for messages only.

Models of one family differ in width, and families share names: `double_blocks.0.img_attn.qkv` is a layer of each.
Whatever kind a LoRA is of, it is for the model into which most of its tensors fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import LoraError
from ...families import registry
from ...families.base import Config, Family
from ...families.layout import LoraTarget
from .. import kinds
from ..kinds.shapes import TensorHeader
from .keys import NORM_ENDS, find_linear
from .names import KnownModules, cuts, known_names

Shapes = Mapping[str, tuple[int, ...]]
Model = tuple[Family[Any], Any]  # a family and its sizes


def for_another_model(source: str, shapes: Shapes, family: Family[Config], config: Config) -> str | None:
    """What to say of a LoRA that does not fit.

    Args:
        source: what the message begins with, such as `LoRA 'x.safetensors'`.
        shapes: key -> shape of every tensor.
        family: of the model that it does not fit.
        config: that model's sizes.

    Returns:
        The message; None: no published model of another family or width takes most of it, and more than this one.
    """
    own = _fitting(shapes, known_names(family, config))
    fitting = [(_fitting(shapes, known_names(*model)), model) for model in _published()]
    most = max((count for count, _ in fitting), default=0)
    best = [model for count, model in fitting if count == most]
    widths = {other.layout(sizes).width for other, sizes in best}
    here = family.layout(config).width
    same = here in widths and any(other.name == family.name for other, _ in best)
    if same or most <= own or 2 * most <= len(shapes):
        return None
    models, this = _named(best), f"{family.name} {config.variant}"
    why = "its layers have that model's names and shapes"
    if len(widths) == 1 and here not in widths:
        why = f"its layers are {widths.pop()} wide, this model's are {here} wide"
    return (
        f"{source}: it is for {models}, not for {this}: {why}. Choose that model in Accelerated Flux Loader, or a LoRA "
        f"for {this}."
    )


def _published() -> Iterator[Model]:
    for family in registry.FAMILIES:
        for config in family.published.values():
            yield family, config


def _named(models: Sequence[Model]) -> str:
    """Families, or the one model of a family that it can be."""
    variants: dict[str, set[str]] = {}
    for family, config in models:
        variants.setdefault(family.name, set()).add(config.variant)
    return " or ".join(f"{name} {found.pop()}" if len(found) == 1 else name for name, found in variants.items())


def _fitting(shapes: Shapes, names: KnownModules) -> int:
    """How many tensors have a place in a model, and the shape that it asks for."""
    modules: dict[str, tuple[LoraTarget, dict[str, TensorHeader]]] = {}
    count = 0
    for key, shape in shapes.items():
        if found := find_linear(key, names.linears):
            module, role, target = found
            modules.setdefault(module, (target, {}))[1][role] = TensorHeader(key, shape)
        elif any(end in NORM_ENDS and names.norms.find(module) for module, end in cuts(key)):
            count += 1
    for module, (target, headers) in modules.items():
        try:
            kinds.check_change("", module, target, headers)
        except LoraError:
            continue
        count += len(headers)
    return count
