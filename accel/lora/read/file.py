"""Read a LoRA file: account for every key, check every shape and value, turn it into changes of the model's parts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence

import torch

from ...errors import LoraError
from ...files import TensorFile, read_header
from ...memory.buffers import HostBuffers
from ...memory.garbage import collected_later
from ...spec import ModelSpec
from ..adapter import Adapter
from ..kinds.base import ALPHA, Change
from ..kinds.lowrank import Tolerance
from .convert import convert_all, make_report
from .factor_cache import Products
from .keys import FileKeys, account
from .origins import name_format
from .other_models import for_another_model
from .peft_config import adapter_config
from .stream import BulkReader
from .values import FiniteValues


def read_lora(
    path: str | os.PathLike[str],
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
        keys = _account(file, spec)
        scale = _scale(file)
        products = Products(keys.changes, file.identity, tolerance, cache_dir)
        wanted = _wanted(keys, products.known, spec.layout.modules)
        reader.expect(file, wanted)
        values = FiniteValues(file, keys, wanted, reader)
        norms = values.of_norms(keys)
        converted = convert_all(keys.changes, values.of, scale, products, tolerance)
        reader.finish()
        products.store()
    layers, vectors = converted.layers, (*norms, *converted.vectors)
    # What was computed may be larger than what was read.
    stored = all(change.kind.is_stored(change.headers) for change in keys.changes)
    report = make_report(name_format(file, spec), keys, layers, vectors, products.errors)
    return Adapter(file.identity, layers, keys.text_encoder, vectors, reader.peak if stored else math.inf, report)


def _account(file: TensorFile, spec: ModelSpec) -> FileKeys:
    """`keys.account`; what it refuses because it is for another model is refused by that model's name."""
    try:
        return account(file, spec)
    except LoraError as wrong:
        shapes = {key: info.shape for key, info in file.tensors.items()}
        message = for_another_model(f"LoRA '{file.name}'", shapes, spec.family, spec.config)
        if message is None:
            raise
        raise LoraError(message) from wrong


def _scale(file: TensorFile) -> Callable[[Change], float | None]:
    """What scales a change by PEFT's configuration in a file, in place of alpha / rank.

    Raises:
        LoraError: see `peft_config.adapter_config`; what is returned raises it where the ranks differ.
    """
    config = adapter_config(file)

    def scale(change: Change) -> float | None:
        if config is None or not change.kind.scaled_by_config or ALPHA in change.headers:
            return None
        return config.scale(change.name, change.rank)

    return scale


def _wanted(keys: FileKeys, known: Collection[str], modules: Sequence[str]) -> list[str]:
    """Keys of all tensors that are needed: not those of matrices that a known product stands for.

    As `flatten` will place them: lora_A in the order of the model's linears, then lora_B, then all others.
    """
    position = {module: index for index, module in enumerate(modules)}
    wanted = [
        (change.kind.place(role), position[change.target.parts[0].module], header.key)
        for change in keys.changes
        for role, header in change.headers.items()
        if change.name not in known or role not in change.kind.roles
    ]
    return [key for *_, key in sorted(wanted)] + [norm.key for norm in keys.norms]
