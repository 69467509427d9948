"""The LoRA layers inside a model, and the binding of tensors to them.

Every linear that a LoRA can target is wrapped, so any LoRA is a subset of what is there. Switching gives the wrappers'
slots other tensors; nothing is copied into them, no weight changes, and compiled code does not see it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...linear.layers import LoraLinear
from ...linear.slot import NOTHING, Bound, make_slot
from ...quantize.linears import dequantize
from ..pack.flat import FlatLora

Owner = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Bindings:
    """What `LoraSlots.bind` binds.

    Attributes:
        loras: of each linear, in the order of `LoraSlots.modules`.
        vectors: (owner, name, Parameter) of biases and norms that replace the model's own.
    """

    loras: tuple[Bound, ...]
    vectors: tuple[tuple[Owner, str, nn.Parameter], ...] = ()


class LoraSlots:
    """The LoRA layers of one model."""

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[str],
        device: torch.device,
        own: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Wrap linears. Nothing is bound yet: the model runs after `bind(empty)`.

        Args:
            model: is changed: each named linear becomes a `LoraLinear`.
            modules: full names of the linears.
            device: where the transformer is.
            own: a module's own parameters by name, on the device or the host; None where they stay in the model.
        """
        self._own = own or self._in_place
        self._device = device
        self.modules = tuple(modules)
        self._model = model
        self._layers: dict[str, LoraLinear] = {}
        for name in modules:
            parent, _, child = name.rpartition(".")
            layer = self._layers[name] = LoraLinear(model.get_submodule(name))
            setattr(model.get_submodule(parent), child, layer)
        model.eval()
        self._owners = [layer._parameters for layer in self._layers.values()]
        self._slots = [make_slot(device) for _ in modules]
        # (owner, name, the model's own Parameter) of everything that a LoRA's `vectors` stand in for now.
        self._replaced: list[tuple[Owner, str, nn.Parameter]] = []
        self._unbound = True
        self._bound: Bindings | None = None
        self.empty = Bindings((NOTHING,) * len(self.modules))

    def bind(self, bindings: Bindings) -> None:
        """Make the model compute with these tensors. Assigns pointers only; cannot fail half way on valid input."""
        if bindings is self._bound:
            return  # another strength was multiplied into what is bound
        self._bound = None  # an interrupt may come between any two lines
        self._restore()
        if self._unbound:
            for owner, slot in zip(self._owners, self._slots, strict=True):
                owner["lora"] = slot
            self._unbound = False
        for slot, lora in zip(self._slots, bindings.loras, strict=True):
            slot.bound_lora = lora
        for owner, name, parameter in bindings.vectors:
            # Noted before it is replaced: an interrupt may come between any two lines.
            self._replaced.append((owner, name, owner[name]))
            owner[name] = parameter
        self._bound = bindings

    def unbind(self) -> None:
        """Let go of all tensors, and leave the model without slots: moving it moves its own weights only."""
        self._bound = None
        self._restore()
        self._unbound = True
        for owner, slot in zip(self._owners, self._slots, strict=True):
            owner["lora"] = None
            slot.bound_lora = None

    def bindings(self, flat: FlatLora) -> Bindings:
        """What to bind of a stack: views of its tensors.

        Args:
            flat: its tensors are on the model's device.
        """
        vectors: list[tuple[Owner, str, nn.Parameter]] = []
        with torch.inference_mode(False), torch.no_grad():
            loras = tuple(_lora_of(flat, module) for module in self.modules)
            for name, vector in flat.vectors.items():
                module, _, last = name.rpartition(".")
                layer = self._layers.get(module)
                owner = (layer.base if layer else self._model.get_submodule(module))._parameters
                vectors.append((owner, last, nn.Parameter(vector, requires_grad=False)))
        return Bindings(loras, tuple(vectors))

    def weight(self, module: str) -> Tensor:
        """A linear's own weight, (out_features, in_features) float32 on the CPU, whatever is bound."""
        with torch.inference_mode(False), torch.no_grad():
            base = self._layers[module].base
            readable = copy.copy(base)
            readable._parameters = {name: value.to(self._device) for name, value in self._own(base).items()}
            return dequantize(readable).cpu()

    def parameter(self, name: str) -> Tensor:
        """A bias or the scale of a norm, as the model itself has it, whatever is bound."""
        module, _, last = name.rpartition(".")
        layer = self._layers.get(module)
        return self._own(layer.base if layer else self._model.get_submodule(module))[last]

    def _in_place(self, module: nn.Module) -> Mapping[str, Tensor]:
        replaced = {key: parameter for owner, key, parameter in self._replaced if owner is module._parameters}
        return {**module._parameters, **replaced}

    def _restore(self) -> None:
        while self._replaced:
            owner, name, parameter = self._replaced[-1]
            owner[name] = parameter
            self._replaced.pop()


def _lora_of(flat: FlatLora, module: str) -> Bound:
    place, mixing, terms = flat.placed.get(module), flat.mixing.get(module), flat.kroneckers.get(module, ())
    if place is None and mixing is None and not terms:
        return NOTHING
    lora_A = lora_B = None
    if place is not None:
        lora_A, lora_B = (
            flat.buffer.as_strided(shape, (shape[1], 1), start)
            for start, shape in ((place.a_start, place.a_shape), (place.b_start, place.b_shape))
        )
    return Bound(lora_A, lora_B, None if mixing is None else mixing.flatten(), flat.buffer if terms else None, terms)
