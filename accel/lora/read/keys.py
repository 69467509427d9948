"""Which tensor of a LoRA file does what: every key gets a module and a role, or an error names it. Reads no values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...errors import LoraError
from ...families.layout import LoraTarget, VectorWeight
from ...files import FLOAT_DTYPES, TensorFile
from ...spec import ModelSpec
from .. import kinds
from ..kinds.base import ALPHA, Change
from ..kinds.shapes import INSTEAD, OTHER, TensorHeader
from .names import ModuleNames, Target, cuts, known_names
from .origins import origin
from .text_encoders import split_encoder

# What may stand behind the name of a norm -> whether it replaces its scale, or is added to it.
NORM_ENDS: Mapping[str, bool] = {
    ".diff": False,
    ".weight.diff": False,
    ".scale.diff": False,
    ".w_norm": False,
    ".set_weight": True,
    ".scale": True,  # BFL's control LoRAs
    ".scale.set_weight": True,
}
# What trainers store beside the weights and no loader reads -> what it is.
ASIDE: Mapping[str, str] = {
    "bundle_emb.": "of trained embeddings, which ComfyUI reads from files of their own",  # OneTrainer
    "emb_params": "of a trained embedding, which ComfyUI reads from a file of its own",  # ai-toolkit
}
# The end of an entry that configures a module of ComfyUI's model (from about 0.40): which attention kernel it prefers.
CONFIG_END = ".config"
CONFIG = "which ask for an attention kernel; choose it in Accelerated Flux Loader"


@dataclass(frozen=True)
class NormChange:
    """A key that changes the scale of a norm.

    Attributes:
        key: in the file.
        parameter: the diffusers parameter.
        replaces: whether the value stands in its place, or is added to it.
    """

    key: str
    parameter: str
    replaces: bool


@dataclass(frozen=True)
class FileKeys:
    """A file's keys, all accounted for.

    Attributes:
        changes: of linears and their biases, in the file's order.
        norms: changes of norms.
        text_encoder: keys for CLIP or T5.
        unused: what nothing can use -> how many keys that is.
    """

    changes: tuple[Change, ...]
    norms: tuple[NormChange, ...]
    text_encoder: tuple[str, ...]
    unused: Mapping[str, int]


@dataclass
class _Sorted:
    """A file's keys by what they are for.

    Attributes:
        modules: name in the file -> its linears, and role -> tensor.
        norms: changes of norms.
        text_encoder: keys for text encoders.
        unused: what nothing can use -> how many keys that is.
        unknown: keys without a place.
    """

    modules: dict[str, tuple[LoraTarget, dict[str, TensorHeader]]] = field(default_factory=dict)
    norms: list[NormChange] = field(default_factory=list)
    text_encoder: list[str] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether anything is for the transformer."""
        return bool(self.modules or self.norms)


def account(file: TensorFile, spec: ModelSpec) -> FileKeys:
    """Find out what every key of a file is for, and check every shape and dtype.

    Raises:
        LoraError: a key without a place, a missing half, a wrong shape, or nothing for this model.
    """
    source = f"LoRA '{file.name}'"
    keys = _sort(file, spec, source)
    if origin(keys.unknown, spec.family) is None:
        _check_inputs(file, spec, keys)
    if keys.unknown or not (keys.fits or keys.text_encoder):
        raise LoraError(_unknown_message(file, spec, keys))
    _check_double(source, [(target.parts, name) for name, (target, _) in keys.modules.items()])
    _check_double(source, [(norm.parameter, norm.key) for norm in keys.norms])
    changes = tuple(kinds.check_change(source, name, *module) for name, module in keys.modules.items())
    for change in changes:
        for role, header in change.headers.items():
            dtype = file.tensors[header.key].dtype
            if role != ALPHA and dtype not in (*FLOAT_DTYPES, torch.float64):
                raise LoraError(
                    f"{source}: '{header.key}' is stored as {dtype}, expected a float type. Get the file in float16 or "
                    "bfloat16."
                )
    return FileKeys(changes, tuple(keys.norms), tuple(keys.text_encoder), keys.unused)


def _sort(file: TensorFile, spec: ModelSpec, source: str) -> _Sorted:
    names = known_names(spec.family, spec.config)
    keys = _Sorted()
    for key, info in file.tensors.items():
        if found := find_linear(key, names.linears):
            module, role, target = found
            _, headers = keys.modules.setdefault(module, (target, {}))
            if role in headers:
                raise LoraError(
                    f"{source}: '{key}' and '{headers[role].key}' say the same thing twice, expected one of them. Get "
                    "a file that holds one LoRA, or save it without the other key."
                )
            headers[role] = TensorHeader(key, info.shape)
        elif norm := _norm(file, key, names.norms):
            keys.norms.append(norm)
        elif split_encoder(key) is not None:
            keys.text_encoder.append(key)
        elif aside := next((what for prefix, what in ASIDE.items() if key.startswith(prefix)), None):
            keys.unused[aside] += 1
        elif key.endswith(CONFIG_END):
            keys.unused[CONFIG] += 1
        elif lacking := _absent(key, names.absent):
            keys.unused[lacking] += 1
        else:
            keys.unknown.append(key)
    return keys


def find_linear(key: str, names: ModuleNames[Target]) -> tuple[str, str, Target] | None:
    """A key's module as the file spells it, its role, and what the module means."""
    for module, end in cuts(key):
        if (role := kinds.role_of(end)) and (target := names.find(module)):
            return module, role, target
    return None


def _absent(key: str, absent: ModuleNames[str]) -> str | None:
    """What to say of a key for a layer that the model lacks; None: no model of its family has such a layer."""
    found = (absent.find(module) for module, end in cuts(key) if end in NORM_ENDS or kinds.role_of(end))
    return next(filter(None, found), None)


def _norm(file: TensorFile, key: str, norms: ModuleNames[VectorWeight]) -> NormChange | None:
    for module, end in cuts(key):
        if end in NORM_ENDS and (vector := norms.find(module)):
            info = file.tensors[key]
            if info.numel != vector.size or info.dtype not in FLOAT_DTYPES:
                raise LoraError(
                    f"LoRA '{file.name}': '{key}' is {info.shape} of {info.dtype}, expected ({vector.size},) of a "
                    f"float type: {OTHER}"
                )
            return NormChange(key, vector.parameter, NORM_ENDS[end])
    return None


def _check_double(source: str, named: Sequence[tuple[Hashable, str]]) -> None:
    """Refuse two LoRAs in one file: of two names for one layer, each program reads another one, or both."""
    seen: dict[Hashable, str] = {}
    for layer, name in named:
        other = seen.setdefault(layer, name)
        if other != name:
            raise LoraError(
                f"{source} holds two LoRAs: '{other}' and '{name}' are the same layer of the model, and programs "
                "differ in which one they read. Get a file that holds one, or save the wanted half by itself."
            )


def _check_inputs(file: TensorFile, spec: ModelSpec, keys: _Sorted) -> None:
    """Say which model a LoRA is for that reads more than this one, before its width is called a wrong shape."""
    for target, headers in keys.modules.values():
        shape = headers["A"].shape if "A" in headers else ()
        if target.parts[0].module != spec.family.image_embedder or len(shape) != 2:
            continue
        reads = spec.family.models_by_channels.get(shape[1])
        if reads is not None and shape[1] not in (target.in_features, target.narrow_in_features):
            instead = "Choose that model in Accelerated Flux Loader. " if reads.runs else ""
            raise LoraError(
                f"LoRA '{file.name}': '{headers['A'].key}' is {shape}, expected (rank, {target.in_features}): it is "
                f"for {reads.names}, trained on that model or made to turn another into it. That reads {shape[1]} "
                f"channels; this model reads {target.in_features}, and a compiled model keeps its shape. {instead}"
                f"{INSTEAD}"
            )


def _unknown_message(file: TensorFile, spec: ModelSpec, keys: _Sorted) -> str:
    model, unknown = spec.family.name, keys.unknown
    if not unknown:
        found = ", ".join(f"{count} keys {what}" for what, count in keys.unused.items())
        return (
            f"LoRA '{file.name}' holds nothing for the {model} transformer: {found}. Choose a file with a LoRA for it."
        )
    for whole in (spec.layout, spec.layout.separate()):
        if len(whole.expected_shapes().keys() & file.tensors.keys()) > len(file.tensors) // 2:
            return (
                f"LoRA '{file.name}' is a whole {model} checkpoint, with '{unknown[0]}' for example. Put it into the "
                "folder 'diffusion_models', and choose it in Accelerated Flux Loader; choose a LoRA here."
            )
    found = origin(unknown, spec.family)
    hint = f" (by its names: {found})" if found else ""
    if keys.fits and 2 * len(unknown) > len(file.tensors):
        return (
            f"LoRA '{file.name}': {len(unknown)} of {len(file.tensors)} keys have no place in this {model} model, such "
            f"as '{unknown[0]}': it is for another model, whose layers are named alike{hint}. Choose a LoRA "
            f"for {model}."
        )
    if keys.fits:
        return (
            f"LoRA '{file.name}': {len(unknown)} of {len(file.tensors)} keys have no place in this {model} model, such "
            f"as '{unknown[0]}'{hint}. Applying only the rest would not be this LoRA: choose a file without them."
        )
    *examples, last = spec.family.wording.lora_keys
    return (
        f"LoRA '{file.name}' does not fit {model}{hint}: none of its {len(file.tensors)} keys has a place in "
        f"the model, such as '{unknown[0]}'. Expected names like {', '.join(examples)} or {last}."
    )
