"""LoRAs that ComfyUI's own loaders, and packs built on them, bring as patches: read, not merged.

Every such node ends in `ModelPatcher.add_patches(patches, strength)`, with the adapters of comfy.weight_adapter under
the names of ComfyUI's own model. File names are lost on the way, so these LoRAs are known by their content.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.weight_adapter
import folder_paths
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..accel.errors import LoraError
from ..accel.families.base import Config, Family
from ..accel.families.layout import FusedLinear, LinearPart, LoraTarget, VectorWeight
from ..accel.lora.adapter import Adapter
from ..accel.lora.kinds import KINDS
from ..accel.lora.kinds.shapes import INSTEAD
from ..accel.lora.read.keys import CONFIG_END
from ..accel.lora.read.names import known_names
from ..accel.lora.read.other_models import for_another_model
from ..accel.lora.read.patches import SOURCE, LinearPatch, NormPatch, from_patches, shapes_of, tensor_digest
from .prompts import inputs_of_running_node

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."


class NativeLoras:
    """Reads patches for one model."""

    def __init__(
        self,
        family: Family[Config],
        config: Config,
        scale_names: Callable[[VectorWeight], tuple[str, ...]],
        cache_dir: str | os.PathLike[str] | None,
    ) -> None:
        """Know the linears and norms by the names that patches use.

        Args:
            family: of the model.
            config: the family's, of the model.
            scale_names: what ComfyUI calls the scale of a norm, see `families.base.ComfyFamily`.
            cache_dir: where matrices that are slow to compute are kept on disk; None computes them each time.
        """
        layout = family.layout(config)
        self._family, self._config = family, config
        # Linears that other models of the family have: what is for them is left, as ComfyUI does.
        self._absent = known_names(family, config).absent
        self._cache_dir = cache_dir
        self._linears = {f"{PREFIX}{linear.name}": linear for linear in layout.linears}
        self._norms = {f"{PREFIX}{name}": vector for vector in layout.vectors for name in scale_names(vector)}
        # Loader nodes keep a file's tensors, and patch with the same ones again when only the strength changes.
        self._digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        # Adapter class -> what the entries of its `weights` are.
        known, adapters = comfy.weight_adapter, [kind.comfyui for kind in KINDS if kind.comfyui is not None]
        self._roles = {getattr(known, each.name): each.roles for each in adapters if hasattr(known, each.name)}

    def read(self, patches: Mapping[Any, Any]) -> tuple[Adapter | None, list[Any]]:
        """Turn patches into an adapter.

        Args:
            patches: key -> adapter, as `comfy.lora.load_lora` returns them; text-encoder keys may be among them.

        Returns:
            The adapter, or None when the patches are for text encoders only; and the keys that they cover.

        Raises:
            LoraError: a patch cannot be carried beside the weights, has a wrong shape, or holds NaN; or nothing fits.
        """
        # ComfyUI makes a patch of every such entry, under its name in the file (comfy/lora.py, from about 0.40).
        configs = [key for key in patches if _name(key).endswith(CONFIG_END)]
        others = [key for key in patches if not _name(key).endswith(CONFIG_END)]
        ours = [
            key
            for key in others
            if _name(key).startswith(PREFIX) and self._absent.find(_name(key).rpartition(".")[0]) is None
        ]
        if not others:
            raise LoraError(
                f"LoRA: ComfyUI's loader found no key for the {self._family.name} model in it (the log names them): it "
                "is for another model, for text encoders alone, or in a format that only Hotswap LoRA reads, such as "
                "XLabs' and BFL's. Try it with Hotswap LoRA, which says what it is."
            )
        if configs:
            log.info(
                "Flux Hotswap: %d entries of a LoRA ask for an attention kernel, such as '%s': not used, choose it in "
                "Accelerated Flux Loader.",
                len(configs),
                _name(configs[0]),
            )
        if not ours:
            return None, configs
        return self._weights(patches, ours), [*ours, *configs]

    def _weights(self, patches: Mapping[Any, Any], keys: list[Any]) -> Adapter:
        own = [self._patch(key, patches[key]) for key in keys]
        try:
            return from_patches(own, self._digest, cache_dir=self._cache_dir)
        except LoraError as wrong:
            message = for_another_model(SOURCE, shapes_of(own), self._family, self._config)
            if message is None:
                raise
            raise LoraError(message) from wrong

    def _patch(self, key: Any, patch: Any) -> LinearPatch | NormPatch:
        name = _name(key)
        if name in self._norms:
            return _norm_patch(name, self._norms[name], patch)
        module, _, end = name.rpartition(".")
        linear = self._linears.get(module)
        if linear is not None and _is_difference(patch):
            if end == "weight":
                return LinearPatch(name, _target(key, linear), {"diff": patch[1][0]})
            if end == "bias" and isinstance(key, str):
                return LinearPatch(name, _target(key, linear), {"diff_b": patch[1][0]})
        roles = self._roles.get(type(patch))
        if linear is None:
            raise LoraError(
                f"LoRA: '{name}' is not a linear layer or norm of this {self._family.name} model, expected one: it is "
                f"for another variant. {INSTEAD}"
            )
        if end != "weight" or roles is None:
            kind = type(patch).__name__ if not isinstance(patch, tuple) else f"'{patch[0]}' patch"
            raise LoraError(
                f"LoRA: '{name}' has a {kind}, expected a low-rank change, a rotation or a difference of a linear "
                f"layer's weight, or a difference of a bias or norm. The accelerated model cannot carry it. {INSTEAD}"
            )
        if any(value is not None for value in patch.weights[len(roles) :]):
            raise LoraError(
                f"LoRA: '{name}' has a {type(patch).__name__} with {len(patch.weights)} values, expected "
                f"{', '.join(roles)}: this ComfyUI is newer than what this pack reads. Use Hotswap LoRA."
            )
        values = {role: value for role, value in zip(roles, patch.weights, strict=False) if value is not None}
        if "reshape_weight" in values:
            raise LoraError(
                f"LoRA: '{name}' has a reshaped weight, as BFL's control LoRAs have: the model's input has another "
                f"width then, which a compiled model cannot take on. {INSTEAD}"
            )
        return LinearPatch(name, _target(key, linear), values)

    def _digest(self, name: str, tensor: Tensor) -> str:
        if tensor not in self._digests:
            self._digests[tensor] = tensor_digest(f"LoRA: '{name}'", tensor)
        return self._digests[tensor]


def chosen_lora() -> str:
    """The LoRA that the node that runs now names, with its folder; "" where that is none, or one of several."""
    names = set(named_loras(inputs_of_running_node()))
    return names.pop() if len(names) == 1 else ""


def named_loras(inputs: Mapping[str, Any]) -> Iterator[str]:
    """Every name of a LoRA file among a node's inputs: loaders of several nest them, or number their inputs."""
    for value in inputs.values():
        if isinstance(value, Mapping):
            yield from named_loras(value)
        elif isinstance(value, str) and _is_lora(value):
            yield value


def _is_lora(name: str) -> bool:
    _, extensions = folder_paths.folder_names_and_paths["loras"]
    fits = not extensions or os.path.splitext(name)[1].lower() in extensions  # prompts are texts, too
    return bool(name) and fits and folder_paths.get_full_path("loras", name) is not None


def _name(key: Any) -> str:
    return key if isinstance(key, str) else key[0]


def _is_difference(patch: Any) -> bool:
    """`("diff", (tensor,))`, without the option to pad a weight."""
    return isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "diff" and len(patch[1]) == 1


def _norm_patch(name: str, vector: VectorWeight, patch: Any) -> NormPatch:
    if _is_difference(patch) or (isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "set"):
        return NormPatch(name, vector, patch[1][0], patch[0] == "set")
    kind = type(patch).__name__ if not isinstance(patch, tuple) else f"'{patch[0]}' patch"
    raise LoraError(f"LoRA: '{name}' has a {kind}, expected a difference of the norm's scale. {INSTEAD}")


def _target(key: Any, linear: FusedLinear) -> LoraTarget:
    """What a key covers: a whole linear, rows of it `(name, (dim, start, length))`, or `(name, None, function)`."""
    if isinstance(key, str):
        return LoraTarget.whole(linear)
    _, rows, *function = key
    if function and function[0] is not None:
        # ComfyUI's only function over a weight swaps the halves back: the LoRA stands in diffusers' order, as
        # ours does.
        if linear.swap_halves and rows is None:
            return LoraTarget(linear.parts, linear.in_features, linear.out_features, False, linear.bias)
        raise LoraError(f"LoRA: '{linear.name}' comes with a function over its weight. {INSTEAD}")
    dim, start, length = rows
    parts = [part for part in linear.parts if start <= part.start and part.start + part.rows <= start + length]
    if dim != 0 or sum(part.rows for part in parts) != length:
        raise LoraError(
            f"LoRA: rows {start} to {start + length} of '{linear.name}' are not whole layers of the accelerated model: "
            "ComfyUI names them so for models with another MLP. Read the file with Hotswap LoRA instead."
        )
    moved = tuple(LinearPart(part.module, part.start - start, part.rows) for part in parts)
    return LoraTarget(moved, linear.in_features, length, False, linear.bias)
