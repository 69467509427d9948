"""Read a LoRA file: account for every key, check every shape and value, turn it into changes of the model's parts."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ...files import TensorFile, read_header
from ...memory.buffers import HostBuffers
from ...memory.garbage import collected_later
from ...spec import ModelSpec
from ..adapter import Adapter, Layer, LoraLayer, VectorLayer, check_finite, own_vector, to_float
from ..kinds.convert import Change, convert
from ..kinds.lowrank import Tolerance
from .factor_cache import Products
from .keys import FileKeys, VectorChange, account
from .origins import name_format
from .peft_config import adapter_config
from .report import LoraReport, overall_error
from .stream import BulkReader

# Role -> where its tensors stand among the wanted ones; all others behind.
_ROLE_ORDER = {"A": 0, "B": 1}


def read_lora(
    path: str,
    spec: ModelSpec,
    cache_dir: str | os.PathLike[str] | None = None,
    tolerance: Tolerance = Tolerance(),
    buffers: HostBuffers | None = None,
) -> Adapter:
    """Read a LoRA for a model. Nothing is returned unless every key, shape, rank and value is right.

    Args:
        path: a safetensors file.
        spec: the model that it must fit.
        cache_dir: where matrices that are slow to compute are kept; None computes them each time.
        tolerance: how far a product of high rank may be cut.
        buffers: where memory comes from; None takes it from the system, which is slower.

    Returns:
        The adapter on the CPU, unscaled; ordinary matrices in the file's dtype.

    Raises:
        FileError: see `files.read_header`.
        LoraError: an unknown key, a missing half, a wrong shape, NaN, a kind that cannot be carried, or nothing for
            this model in it.
    """
    with torch.inference_mode(False), torch.no_grad(), collected_later(), BulkReader(path, buffers) as reader:
        file = read_header(path)
        keys = account(file, spec)
        config = adapter_config(file)
        products = Products(keys.changes, file.identity, tolerance, cache_dir)
        wanted = _wanted(keys, products.known, spec.layout.modules)
        reader.expect(file, wanted)
        format_name = name_format(file, spec)
        values = _Values(file, keys, wanted, reader)
        vectors = [
            VectorLayer(vector.parameter, own_vector(values.of_norm(vector)), 1.0, vector.replaces)
            for vector in keys.vectors
        ]
        layers: list[Layer] = []
        # Each as soon as it is read, while the next ones come.
        for change in keys.changes:
            tensors = values.of(change)
            scale = None
            if config is not None and change.kind == "LoRA" and "alpha" not in change.pieces:
                scale = config.scale(change.name, change.rank)
            converted = convert(change, tensors, scale, products.of(change, tensors), tolerance)
            layers += converted.layers
            vectors += converted.vectors
        reader.finish()
        products.store()
    # What was computed may be larger than what was read.
    computed = any(change.kind != "LoRA" or "mid" in change.pieces for change in keys.changes)
    report = make_report(format_name, keys, layers, vectors, products.errors)
    return Adapter(
        file.identity, tuple(layers), keys.text_encoder, tuple(vectors), math.inf if computed else reader.peak, report
    )


def make_report(
    format_name: str,
    keys: FileKeys,
    layers: Iterable[Layer],
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
    kinds: Counter[str] = Counter()
    applied = approximated = biases = 0
    for change in keys.changes:
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
        len(keys.text_encoder),
        keys.unused,
    )


def _wanted(keys: FileKeys, known: Collection[str], modules: Sequence[str]) -> list[str]:
    """Keys of all tensors that are needed: not those of matrices that a known product stands for.

    As `flatten` will place them: lora_A in the order of the model's linears, then lora_B.
    """
    position = {module: index for index, module in enumerate(modules)}
    wanted = [
        (_ROLE_ORDER.get(role, len(_ROLE_ORDER)), position[change.target.parts[0].module], piece.key)
        for change in keys.changes
        for role, piece in change.pieces.items()
        if change.name not in known or role in ("alpha", "dora_scale", "diff_b")
    ]
    return [key for *_, key in sorted(wanted)] + [vector.key for vector in keys.vectors]


class _Values:
    """The values of a file's tensors as they come, all of them finite.

    Its methods raise LoraError where a tensor holds NaN or infinity, and what `BulkReader.tensor` raises.
    """

    def __init__(self, file: TensorFile, keys: FileKeys, wanted: Collection[str], reader: BulkReader) -> None:
        self._file = file
        self._wanted = dict.fromkeys(wanted)  # in order, and found at once
        self._ignored = frozenset().union(*(change.ignored for change in keys.changes))
        self._reader = reader
        self._checked = False

    def of(self, change: Change) -> dict[str, Tensor]:
        """Role -> values, of those that are wanted."""
        tensors = {
            role: self._tensor(piece.key) for role, piece in change.pieces.items() if piece.key in self._wanted
        }
        self._check()
        return tensors

    def of_norm(self, vector: VectorChange) -> Tensor:
        """The scale of a norm, or its difference."""
        tensor = self._tensor(vector.key)
        self._check()
        return tensor

    def _tensor(self, key: str) -> Tensor:
        tensor = self._reader.tensor(key)
        return to_float(tensor) if tensor.dtype == torch.float64 else tensor

    def _check(self) -> None:
        if self._checked or math.isfinite(self._reader.peak):
            return
        for key in self._wanted:
            tensor = self._tensor(key)
            if tensor.dtype.is_floating_point and key not in self._ignored:
                check_finite(f"LoRA '{self._file.name}': '{key}'", tensor)
        self._checked = True
