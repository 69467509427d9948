"""LoRAs that ComfyUI's own loaders, and packs built on them, bring as patches: read, not merged.

Every such node ends in `ModelPatcher.add_patches(patches, strength)`, with the adapters of comfy.weight_adapter under
the names of ComfyUI's FLUX model. File names are lost on the way, so these LoRAs are known by their content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.weight_adapter import LoRAAdapter
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..accel.errors import LoraError
from ..accel.layout import FusedLinear, Layout, LinearPart, LoraTarget
from ..accel.lora.weights import LoraWeights, TensorPair, from_pairs, tensor_digest

PREFIX = "diffusion_model."
INSTEAD = "Choose a LoRA without it, or use ComfyUI's Load Diffusion Model for this one."


class NativeLoras:
    """Reads patches for one model."""

    def __init__(self, layout: Layout) -> None:
        """Know the linears by the names that patches use."""
        self._linears = {f"{PREFIX}{linear.name}.weight": linear for linear in layout.linears}
        # Loader nodes keep a file's tensors, and patch with the same ones again when only the strength changes.
        self._digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def read(self, patches: Mapping[Any, Any]) -> tuple[LoraWeights | None, list[Any]]:
        """Turn patches into weights.

        Args:
            patches: key -> adapter, as `comfy.lora.load_lora` returns them; text-encoder keys may be among them.

        Returns:
            The weights, or None when the patches are for text encoders only; and the keys that they cover.

        Raises:
            LoraError: a patch cannot be carried beside the weights, has a wrong shape, or holds NaN; or nothing fits.
        """
        ours = [key for key in patches if _name(key).startswith(PREFIX)]
        if not patches:
            raise LoraError(
                "This LoRA has no key that fits the FLUX.1 model (ComfyUI's log names its keys): it is for another "
                "model. Choose a LoRA for FLUX.1."
            )
        if not ours:
            return None, []
        return from_pairs(self._pair(key, patches[key]) for key in ours), ours

    def _pair(self, key: Any, patch: Any) -> TensorPair:
        name = _name(key)
        linear = self._linears.get(name)
        if linear is None or type(patch) is not LoRAAdapter:
            kind = type(patch).__name__ if not isinstance(patch, tuple) else f"'{patch[0]}' patch"
            raise LoraError(
                f"LoRA: '{name}' has a {kind}, expected low-rank matrices on a linear layer's weight. The accelerated "
                f"model cannot carry it. {INSTEAD}"
            )
        lora_B, lora_A, alpha, middle, dora_scale, reshape = patch.weights
        for value, what in (
            (middle, "LoCon middle matrix"),
            (dora_scale, "DoRA scale"),
            (reshape, "reshaped weight, as BFL's control LoRAs have"),
        ):
            if value is not None:
                raise LoraError(f"LoRA: '{name}' has a {what}, which the accelerated model cannot carry. {INSTEAD}")
        digest = self._digest(name, lora_A) + self._digest(name, lora_B)
        return TensorPair(name, _target(key, linear), lora_A, lora_B, None if alpha is None else float(alpha), digest)

    def _digest(self, name: str, tensor: Tensor) -> str:
        if tensor not in self._digests:
            self._digests[tensor] = tensor_digest(f"for '{name}'", tensor)
        return self._digests[tensor]


def _name(key: Any) -> str:
    return key if isinstance(key, str) else key[0]


def _target(key: Any, linear: FusedLinear) -> LoraTarget:
    """What a key covers: a whole linear, rows of it `(name, (dim, start, length))`, or `(name, None, function)`."""
    if isinstance(key, str):
        return LoraTarget(linear.parts, linear.in_features, linear.out_features, linear.swap_halves)
    _, rows, *function = key
    if function and function[0] is not None:
        # ComfyUI's only function for FLUX swaps the halves back: the LoRA stands in diffusers' order, as ours does.
        if linear.swap_halves and rows is None:
            return LoraTarget(linear.parts, linear.in_features, linear.out_features, False)
        raise LoraError(f"LoRA: '{linear.name}' comes with a function over its weight. {INSTEAD}")
    dim, start, length = rows
    parts = [part for part in linear.parts if start <= part.start and part.start + part.rows <= start + length]
    if dim != 0 or sum(part.rows for part in parts) != length:
        raise LoraError(
            f"LoRA: rows {start} to {start + length} of '{linear.name}' are not whole layers of the accelerated model. "
            f"{INSTEAD}"
        )
    moved = tuple(LinearPart(part.module, part.start - start, part.rows) for part in parts)
    return LoraTarget(moved, linear.in_features, length, False)
