"""From checked keys and their values to layers, and to the report of what became of every key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from .. import kinds
from ..kinds.base import Change, Converted
from ..kinds.layers import Layer, VectorLayer
from ..kinds.lowrank import Tolerance, overall_error
from .factor_cache import Products
from .keys import FileKeys
from .report import LoraReport

# What changes of norms are called: they belong to no linear, and so to no kind.
NORM = "norm"


def convert_all(
    changes: Iterable[Change],
    values: Callable[[Change], Mapping[str, Tensor]],
    scale: Callable[[Change], float | None],
    products: Products,
    tolerance: Tolerance,
) -> Converted:
    """Turn every change into layers, each as soon as its values are there.

    Args:
        changes: in order.
        values: change -> role -> values.
        scale: change -> what stands in the place of alpha / rank; None: nothing does.
        products: low-rank matrices of those that are products.
        tolerance: see `kinds.convert`.

    Raises:
        LoraError: values that cannot be carried.
    """
    layers: list[Layer] = []
    vectors: list[VectorLayer] = []
    for change in changes:
        tensors = values(change)
        converted = kinds.convert(change, tensors, scale(change), products.of(change, tensors), tolerance)
        layers += converted.layers
        vectors += converted.vectors
    return Converted(tuple(layers), tuple(vectors))


def make_report(
    format_name: str,
    keys: FileKeys,
    layers: Sequence[Layer],
    vectors: Iterable[VectorLayer],
    errors: Mapping[str, tuple[float, float]],
) -> LoraReport:
    """Count what became of the keys.

    Args:
        format_name: as a person knows it.
        keys: all of them.
        layers: what changes of linears became.
        vectors: what those of biases and norms became.
        errors: name of a change that was cut -> its relative error and its norm.
    """
    bias = kinds.KINDS.bias
    counts: Counter[str] = Counter()
    applied = approximated = biases = 0
    for change in keys.changes:
        if change.kind.changes_weight:
            counts[change.label] += 1
        biases += not kinds.KINDS.bias_roles.isdisjoint(change.headers)
        cut = errors.get(change.name, (0.0, 0.0))[0] > 0.0
        exact = len(change.headers.keys() & bias.roles) if cut else len(change.headers)
        applied += exact
        approximated += len(change.headers) - exact
    norms = sum(not vector.parameter.endswith(".bias") for vector in vectors)
    counts.update({kind: count for kind, count in ((bias.name, biases), (NORM, norms)) if count})
    ranks = [layer.rank for layer in layers if layer.rank]
    largest, overall = overall_error(errors)
    return LoraReport(
        format=format_name,
        kinds=dict(counts),
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        targets=len({layer.module for layer in layers}),
        keys_applied=applied + norms,
        keys_approximated=approximated,
        max_error=largest,
        overall_error=overall,
        text_encoder_keys=len(keys.text_encoder),
        unused=keys.unused,
    )
