"""What a checkpoint is: its family, its sizes, and where each tensor of the model lies in it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..families import registry
from ..families.base import Config, Family
from ..families.layout import Layout
from ..families.wording import KnownNames
from ..files import TensorInfo
from ..spec import ModelSpec, StoredTensor
from . import wording
from .attention_requests import find_requests
from .gguf_file import ARCHITECTURE
from .headers import read_headers
from .locate import locate, read_json
from .other_models import OTHERS, first_match, foreign_quantization, is_lora
from .scales import find_scales
from .source import Checkpoint
from .stored import check_stored

# What stands before the transformer's names: nothing, as ComfyUI saves checkpoints, and as trainers save them.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.")
# Architectures in GGUF files that say nothing of the model: the converter of calcuis and gguf-org writes this one into
# every file (city96/ComfyUI-GGUF#230), stable-diffusion.cpp writes none.
NAMELESS_ARCHITECTURES = (None, "pig")
# The other parts of an all-in-one checkpoint, which have loaders of their own.
OTHER_PARTS = (
    "vae.", "first_stage_model.", "text_encoders.", "text_encoder.", "text_encoder_2.", "cond_stage_model.",
    "conditioner.", "clip_vision.", "clip_l.", "t5xxl.",
)  # fmt: skip


def inspect_checkpoint(path: str | os.PathLike[str]) -> ModelSpec:
    """Recognise a checkpoint from its header.

    Args:
        path: a .safetensors, .sft or .gguf file, the index of a sharded model, or a diffusers folder.

    Raises:
        FileError: see `locate.locate` and `headers.read_headers`.
        CheckpointError: no known family, a tensor missing, unknown, or of another shape than the sizes demand, or a
            quantization that is not supported.
    """
    located = locate(path)
    if located.config is not None:
        _check_class(located.name, located.config)
    file = read_headers(located)
    _check_architecture(file)
    relatives = _refuse_others(file)
    for prefix in PREFIXES:
        names = {key.removeprefix(prefix): info for key, info in file.tensors.items() if key.startswith(prefix)}
        for family in registry.FAMILIES:
            found = None if family in relatives else _recognise(file, prefix, names, family)
            if found is not None:
                config, layout = found
                if located.config is not None:
                    _check_config(located.name, located.config, family, config)
                return _spec(file, prefix, {family.canonical(name): name for name in names}, family, config, layout)
    raise _relative(file, relatives) if relatives else _unknown(file)


def looks_like(file: Checkpoint) -> Family | None:
    """The family whose transformer a file seems to hold, complete or not: for messages."""
    for prefix in PREFIXES:
        names = {key.removeprefix(prefix): info for key, info in file.tensors.items() if key.startswith(prefix)}
        for family in registry.FAMILIES:
            if first_match(family.relatives, names) is not None:
                continue
            try:
                found = family.recognise(names, file.name)
            except CheckpointError:
                return family
            if found is not None:
                return family
    return None


def _recognise(
    file: Checkpoint, prefix: str, names: Mapping[str, TensorInfo], family: Family[Config]
) -> tuple[Config, Layout] | None:
    """What a family makes of a file's sizes; where it cannot be, the weights' format is named, if that is why."""
    try:
        return family.recognise(names, file.name)
    except CheckpointError as exc:
        wrong = exc
    find_scales(file, prefix, names)  # packed weights have other sizes than they stand for
    raise wrong


def _check_architecture(file: Checkpoint) -> None:
    known: dict[str, list[str]] = {}
    for family in registry.FAMILIES:
        known.setdefault(family.gguf_architecture, []).append(family.name)
    found = file.metadata.get(ARCHITECTURE)
    # Then the names of the tensors must do.
    if found not in NAMELESS_ARCHITECTURES and found not in known:
        expected = " or ".join(f"'{architecture}' ({' or '.join(names)})" for architecture, names in known.items())
        raise CheckpointError(
            f"'{file.name}' is a GGUF file of the architecture '{found}', expected {expected}. Choose a file such as "
            f"{wording.example_gguf()}."
        )


def _refuse_others(file: Checkpoint) -> dict[Family, KnownNames]:
    """Refuse what no family runs; return the families that a file is not of, and the relative of each that it is."""
    if is_lora(file.tensors):
        raise CheckpointError(
            f"'{file.name}' is a LoRA, expected a {wording.names()} transformer. Put it into models/loras and choose "
            f"it in Hotswap LoRA; choose a file such as {wording.example()} here."
        )
    names = _without_prefixes(file)
    found = {family: first_match(family.relatives, names) for family in registry.FAMILIES}
    relatives = {family: relative for family, relative in found.items() if relative is not None}
    if len(relatives) == len(registry.FAMILIES):
        raise _relative(file, relatives)
    foreign = foreign_quantization(file.tensors)
    if foreign is not None:
        what, key = foreign
        raise CheckpointError(
            f"'{file.name}' is quantized by {what} ('{key}'), which this loader does not read. Choose the bf16, fp8 or "
            "GGUF file, and the quantization in Quantize Transformer."
        )
    return relatives


def _without_prefixes(file: Checkpoint) -> list[str]:
    return [key.removeprefix(prefix) for prefix in PREFIXES for key in file.tensors if key.startswith(prefix)]


def _relative(file: Checkpoint, relatives: Mapping[Family, KnownNames]) -> CheckpointError:
    relative = next(iter(relatives.values()))
    return CheckpointError(
        f"'{file.name}' is {relative.what}; this pack runs {wording.models()}. Load it with {relative.loader}."
    )


def _unknown(file: Checkpoint) -> CheckpointError:
    known = first_match(OTHERS, _without_prefixes(file))
    what, instead = f"not a model that this pack knows (its first tensor is '{next(iter(file.tensors))}')", ""
    if known is not None:
        what, instead = known.what, f", or load this one with {known.loader}"
    return CheckpointError(
        f"'{file.name}' is {what}, expected {wording.expected()}. Choose a file such as {wording.example()}{instead}."
    )


def _spec(
    file: Checkpoint,
    prefix: str,
    canonical: Mapping[str, str],
    family: Family[Config],
    config: Config,
    layout: Layout,
) -> ModelSpec[Config]:
    """Check that every tensor of the layout is there once, and that nothing is left over."""
    names = {name: file.tensors[prefix + original] for name, original in canonical.items()}
    scales, consumed = find_scales(file, prefix, names)
    requests, kernels = find_requests(file, prefix, names)
    expected = layout.expected_shapes()
    missing = [name for name in expected if name not in names]
    if missing:
        raise CheckpointError(
            f"'{file.name}': {len(missing)} of {len(expected)} tensors are missing, such as '{prefix}{missing[0]}'. It "
            "is incomplete, or from a trainer that left them out: get the complete transformer."
        )
    used = {prefix + canonical[name] for name in [*expected, *consumed, *requests]}
    unknown = [key for key in file.tensors if key not in used and not key.startswith(OTHER_PARTS)]
    if unknown:
        raise CheckpointError(
            f"'{file.name}': {len(unknown)} tensors have no place in the model, such as '{unknown[0]}': they belong to "
            "another model, or to an extension that this loader does not know."
        )
    stored: dict[str, StoredTensor] = {}
    bytes_of: Counter[torch.dtype] = Counter()
    for name, shape in expected.items():
        layer = name.removesuffix(".weight")
        scale = scales.get(layer) if layer != name else None
        key = prefix + canonical[name]
        stored[name] = StoredTensor(key, names[name])
        if scale is not None:
            stored[name] = StoredTensor(key, names[name], prefix + canonical[scale], names[scale].numel)
        check_stored(file, stored[name], shape)
        bytes_of[names[name].dtype] += names[name].bytes
    return ModelSpec(file, family, config, bytes_of.most_common(1)[0][0], layout, stored, kernels)


def _check_class(name: str, config: Path) -> None:
    found = read_json(config).get("_class_name")
    known = {family.diffusers_class for family in registry.FAMILIES}
    if found is not None and found not in known:
        raise CheckpointError(
            f"'{name}': its config.json is of a {found}, expected {' or '.join(sorted(known))}: this is "
            f"another model. Choose the folder of a {wording.names()} model."
        )


def _check_config(name: str, path: Path, family: Family[Config], config: Config) -> None:
    written = read_json(path)
    if written.get("_class_name", family.diffusers_class) != family.diffusers_class:
        raise CheckpointError(
            f"'{name}': config.json is of a {written['_class_name']}, but the tensors are a {family.name} "
            "transformer's. They are of different models: get the complete folder again."
        )
    for field, value in family.diffusers_config(config).items():
        found = written.get(field)
        if found is not None and _plain(found) != _plain(value):
            raise CheckpointError(
                f"'{name}': config.json says {field} = {found}, but the tensors say {value}. They are of "
                "different models: get the complete folder again."
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
