"""Read a LoRA file: account for every key, check every shape and value, turn it into changes of the model's parts."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..files import TensorFile, read_header
from ..spec import ModelSpec
from .buffers import HostBuffers
from .bulk import BulkRead, BulkReader
from .factor_cache import FactorCache
from .keys import FileKeys, account, name_format, plain_keys
from .kinds import Change, convert, product_factors
from .lowrank import Factors, Tolerance
from .metadata import adapter_config
from .report import LoraReport, overall_error
from .weights import Layer, LoraLayer, LoraWeights, VectorLayer, check_finite, to_float


def read_lora(
    path: str,
    spec: ModelSpec,
    cache_dir: str | os.PathLike[str] | None = None,
    tolerance: Tolerance = Tolerance(),
    buffers: HostBuffers | None = None,
) -> LoraWeights:
    """Read a LoRA for a model. Nothing is returned unless every key, shape, rank and value is right.

    Args:
        path: a safetensors file.
        spec: the model that it must fit.
        cache_dir: where matrices that are slow to compute are kept; None computes them each time.
        tolerance: how far a LoHa of high rank may be cut.
        buffers: where memory comes from; None takes it from the system, which is slower.

    Returns:
        Weights on the CPU, unscaled; ordinary matrices in the file's dtype.

    Raises:
        FileError: see `files.read_header`.
        LoraError: an unknown key, a missing half, a wrong shape, NaN, a kind that cannot be carried, or nothing for
            this model in it.
    """
    file = read_header(path)
    with torch.inference_mode(False), torch.no_grad(), BulkReader(file, plain_keys(file), buffers) as ahead:
        keys = account(file, spec)
        config = adapter_config(file)
        cut = [change for change in keys.changes if change.approximated(tolerance)]
        cache = FactorCache(cache_dir, file.identity, tolerance) if cut and cache_dir is not None else None
        factors = cache.load(cut) if cache is not None else None
        values, peak = _read(file, keys, factors or {}, ahead, buffers)
        if factors is None:
            factors = {change.name: product_factors(change, values[change.name], tolerance) for change in cut}
            if cache is not None:
                cache.store(factors)
        errors = {name: (value.error, value.norm) for name, value in factors.items()}
        layers: list[Layer] = []
        vectors = [
            VectorLayer(vector.parameter, to_float(values[""][vector.key]).flatten(), 1.0, vector.replaces)
            for vector in keys.vectors
        ]
        for change in keys.changes:
            tensors = values[change.name]
            if change.kind == "LoHa" and change.name not in factors:
                factors[change.name] = product_factors(change, tensors, tolerance)
            scale = None
            if config is not None and change.kind == "LoRA" and "alpha" not in change.pieces:
                scale = config.scale(change.name, change.rank)
            converted = convert(change, tensors, scale, factors.get(change.name), tolerance)
            layers += converted.layers
            vectors += converted.vectors
    # What was computed may be larger than what was read.
    computed = any(change.kind != "LoRA" or "mid" in change.pieces for change in keys.changes)
    report = make_report(name_format(file), keys.changes, layers, vectors, errors, len(keys.text_encoder))
    return LoraWeights(
        file.identity, tuple(layers), keys.text_encoder, tuple(vectors), math.inf if computed else peak, report
    )


def make_report(
    format_name: str,
    changes: Iterable[Change],
    layers: Iterable[Layer],
    vectors: Iterable[VectorLayer],
    errors: Mapping[str, tuple[float, float]],
    text_encoder_keys: int,
) -> LoraReport:
    """Count what became of the keys.

    Args:
        format_name: as a person knows it.
        changes: of linears.
        layers: what they became.
        vectors: likewise, and what the norms became.
        errors: name of a change that was cut -> its relative error and its norm.
        text_encoder_keys: how many there are.
    """
    kinds: Counter[str] = Counter()
    applied = approximated = biases = 0
    for change in changes:
        if change.kind != "bias":
            kinds[change.label] += 1
        biases += bool({"diff_b", "up_bias"} & change.pieces.keys())
        cut = errors.get(change.name, (0.0, 0.0))[0] > 0.0
        exact = len({"diff_b"} & change.pieces.keys()) if cut else len(change.pieces)
        applied += exact
        approximated += len(change.pieces) - exact
    norms = sum(not vector.parameter.endswith(".bias") for vector in vectors)
    kinds.update({kind: count for kind, count in (("bias", biases), ("norm", norms)) if count})
    ranks = [layer.rank for layer in layers if isinstance(layer, LoraLayer)]
    largest, overall = overall_error(errors)
    return LoraReport(
        format_name,
        dict(kinds),
        (min(ranks, default=0), max(ranks, default=0)),
        len({layer.module for layer in layers}),
        applied + norms,
        approximated,
        largest,
        overall,
        text_encoder_keys,
    )


def _read(
    file: TensorFile, keys: FileKeys, known: Mapping[str, Factors], ahead: BulkReader, buffers: HostBuffers | None
) -> tuple[dict[str, dict[str, Tensor]], float]:
    """Name of a change -> role -> values; those of norms by their key under the name "". And the largest element.

    What `ahead` does not read is read now, but for matrices that a known product stands for.
    """
    wanted = [vector.key for vector in keys.vectors]
    for change in keys.changes:
        for role, piece in change.pieces.items():
            if change.name not in known or role in ("alpha", "dora_scale", "diff_b"):
                wanted.append(piece.key)
    with BulkReader(file, set(wanted) - ahead.keys, buffers) as rest:
        reads = [ahead.result(), rest.result()]
    ignored = frozenset().union(*(change.ignored for change in keys.changes))
    for read in reads:
        _check_finite(file, read, ignored)
    tensors = {**reads[0].tensors, **reads[1].tensors}
    values = {
        change.name: {role: tensors[piece.key] for role, piece in change.pieces.items() if piece.key in tensors}
        for change in keys.changes
    }
    values[""] = {vector.key: tensors[vector.key] for vector in keys.vectors}
    return values, max(read.peak for read in reads)


def _check_finite(file: TensorFile, read: BulkRead, ignored: frozenset[str]) -> None:
    if not math.isfinite(read.peak):
        for key, tensor in read.tensors.items():
            if tensor.dtype.is_floating_point and key not in ignored:
                check_finite(f"'{file.name}': '{key}'", tensor)
