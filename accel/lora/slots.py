"""The LoRA layers inside a model, and the binding of tensors to them.

PEFT puts a LoRA layer on every linear that a LoRA can target, so any LoRA is a subset of what is there. Switching
assigns other Parameters to those layers; nothing is copied into them and no weight changes. Compiled code takes them as
inputs of symbolic rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..quantize.bitsandbytes_modes import Nf4Linear
from .stack import HEAD_BYTES, RANK_ALIGNMENT, FlatLora

ADAPTER = "slot"

# One Parameter for each dictionary of `LoraSlots`, in its order.
Bindings = tuple[nn.Parameter, ...]


class LoraSlots:
    """The LoRA layers of one model."""

    def __init__(self, model: nn.Module, modules: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
        """Inject a PEFT layer over each linear. Nothing is bound yet: the model runs after `bind(empty)`.

        Args:
            model: is changed: each named linear is wrapped.
            modules: full names of the linears.
            dtype: of the LoRA matrices; the transformer's compute dtype.
            device: where the transformer is.
        """
        from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import
        from peft.tuners.lora import Linear

        sizes = {name: _sizes(model.get_submodule(name)) for name in modules}
        config = LoraConfig(r=RANK_ALIGNMENT, lora_alpha=RANK_ALIGNMENT, target_modules=list(modules))
        config._register_custom_module({Nf4Linear: Linear})
        inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)
        model.eval()
        self.modules = tuple(modules)
        self._owners: list[dict[str, nn.Parameter]] = []
        for name in modules:
            layer = model.get_submodule(name)
            layer.scaling[ADAPTER] = 1.0  # folded into lora_B, so it is the same constant in every graph
            self._owners += [layer.lora_A[ADAPTER]._parameters, layer.lora_B[ADAPTER]._parameters]
        self.empty = self._zeros(sizes, dtype, device)

    def bind(self, bindings: Bindings) -> None:
        """Make the model compute with these tensors. Assigns pointers only; cannot fail half way on valid input."""
        for owner, parameter in zip(self._owners, bindings, strict=True):
            owner["weight"] = parameter

    def unbind(self) -> None:
        """Leave the slots without tensors, so that moving the model moves its own weights only."""
        for owner in self._owners:
            owner["weight"] = None

    def bindings(self, flat: FlatLora) -> Bindings:
        """Make the Parameters of a stack, as views of its buffer; linears that it does not touch get the shared zeros.

        Args:
            flat: its buffer is on the model's device.
        """
        made = list(self.empty)
        with torch.inference_mode(False), torch.no_grad():
            for index, module in enumerate(self.modules):
                place = flat.placed.get(module)
                if place is not None:
                    made[2 * index] = _view(flat.buffer, place.a_start, place.a_shape)
                    made[2 * index + 1] = _view(flat.buffer, place.b_start, place.b_shape)
        return tuple(made)

    def _zeros(self, sizes: dict[str, tuple[int, int]], dtype: torch.dtype, device: torch.device) -> Bindings:
        largest = max(max(pair) for pair in sizes.values())
        with torch.inference_mode(False), torch.no_grad():
            # One block of zeros under every slot. The Parameters are distinct objects: dynamo guards on two inputs
            # being the same object, and would recompile when a LoRA tells them apart.
            head = HEAD_BYTES // dtype.itemsize
            zeros = torch.zeros(head + largest * RANK_ALIGNMENT, dtype=dtype, device=device)
            made = []
            for module in self.modules:
                in_features, out_features = sizes[module]
                made.append(_view(zeros, head, (RANK_ALIGNMENT, in_features)))
                made.append(_view(zeros, head, (out_features, RANK_ALIGNMENT)))
        return tuple(made)


def _view(buffer: Tensor, start: int, shape: tuple[int, int]) -> nn.Parameter:
    # One as_strided takes half the time of a slice and a view; a FLUX LoRA has a thousand of them.
    return nn.Parameter(buffer.as_strided(shape, (shape[1], 1), start), requires_grad=False)


def _sizes(linear: nn.Module) -> tuple[int, int]:
    return linear.in_features, linear.out_features
