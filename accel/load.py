"""A model in memory by the shortest way: from the cache of quantized weights, or from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import nn

from .build import (
    Destination,
    OnDevice,
    Progress,
    assign,
    check_complete,
    conversion_of,
    count_parts,
    empty_model,
    load_model,
    model_bytes,
)
from .hardware import dtype_name
from .quantize import Mode
from .quantize.cache import CachedModel, CacheKey, CacheWriter, open_cached
from .quantize.codec import CodecError, make_module, unflatten
from .settings import QuantizedCache
from .spec import ModelSpec
from .store.disk import DamagedError

Notice = Callable[[str, bool], None]


def load_quantized(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    mode: Mode,
    cache: QuantizedCache | None,
    on_progress: Progress,
    notice: Notice,
    destination: Destination | None = None,
) -> nn.Module:
    """Map a quantized model from the cache; without one, convert the checkpoint and store the result.

    Args:
        spec: see `build.load_model`, as `dtype`, `device`, `mode` and `on_progress`.
        cache: where to look and to store, or None.
        notice: gets what a user should know: a sentence, and whether it is a warning.
        destination: see `build.load_model`.

    Returns:
        See `build.load_model`. From the cache on a CPU, its weights are pages of the file.

    Raises:
        FileError: see `build.load_model`.
        CheckpointError: likewise.
    """
    notice(f"{mode.name}: {conversion_of(spec, mode)}", False)
    if cache is None:
        return load_model(spec, dtype, device, on_progress, mode, destination=destination)
    with spec.file.open():  # raises when the files were changed since
        pass
    libraries = (f"torch {version('torch')}", *mode.libraries)
    key = CacheKey(spec.file.identity, mode.name, dtype_name(dtype), device.type, libraries)
    try:
        cached = open_cached(cache, key, _scaled(on_progress, count_parts(spec)))
        if cached is not None:
            model = _restore(spec, cached, destination or OnDevice(device))
            notice(f"{mode.name}: {cached.bytes / 1e9:.2f} GB from the cache, {cached.name}", False)
            return model
    except (DamagedError, CodecError, KeyError) as exc:
        notice(f"the quantized weights are made again: {exc}", True)
    writer = CacheWriter(
        cache, key, model_bytes(spec, dtype, mode), 4 * count_parts(spec), lambda sentence: notice(sentence, True)
    )
    try:
        model = load_model(spec, dtype, device, on_progress, mode, writer, destination)
    except BaseException:
        writer.discard()
        raise
    writer.finish(model)
    return model


def _scaled(on_progress: Progress, parts: int) -> Progress:
    """Tell the share of a check as that many of a load's parts, so that a bar is as long either way."""
    on_progress(1, parts)
    return lambda done, total: on_progress(max(1, parts * done // total), parts)


def _restore(spec: ModelSpec, cached: CachedModel, destination: Destination) -> nn.Module:
    with torch.inference_mode(False), torch.no_grad():
        model = empty_model(spec)
        destination.begin(model)
        for name, description in cached.modules.items():
            model.set_submodule(name, make_module(description).eval())
        for name, description in cached.parameters.items():
            device = destination.device_of(name.rpartition(".")[0])
            assign(model, name, unflatten(name, description, cached.tensors).to(device))
        check_complete(model, spec)
        destination.complete()
    return model
