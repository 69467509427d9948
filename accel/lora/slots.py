"""The LoRA layers inside a model, and the binding of tensors to them.

Every linear that a LoRA can target is wrapped, so any LoRA is a subset of what is there. Switching assigns other
Parameters to the wrappers; nothing is copied into them and no weight changes. Compiled code takes them as inputs of any
rank, 0 included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch._dynamo
from torch import Tensor, nn

from ..quantize.linears import dequantize
from .kronecker import write_terms
from .layers import SLOTS, LoraLinear
from .stack import HEAD_BYTES, FlatLora

Owner = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Bindings:
    """Parameters, ready to assign.

    Attributes:
        matrices: lora_A and lora_B of each linear, in the order of `LoraSlots.modules`.
        others: what few LoRAs have: (owner, name, Parameter) of mixings, of Kronecker products, and of vectors that
            replace the model's own.
    """

    matrices: tuple[nn.Parameter, ...]
    others: tuple[tuple[Owner, str, nn.Parameter], ...] = ()


class LoraSlots:
    """The LoRA layers of one model."""

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[str],
        dtype: torch.dtype,
        device: torch.device,
        own: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Wrap linears. Nothing is bound yet: the model runs after `bind(empty)`.

        Args:
            model: is changed: each named linear becomes a `LoraLinear`.
            modules: full names of the linears.
            dtype: of the LoRA matrices; the transformer's compute dtype.
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
        # (owner, name, the model's own Parameter) of everything that a LoRA's `others` stand in for now.
        self._replaced: list[tuple[Owner, str, nn.Parameter]] = []
        self._unbound = True
        self._bound: Bindings | None = None
        self._nothing = [
            {
                "mixing": _empty((0,), dtype, device),
                "kron": _empty((0,), dtype, device),
                "kron_terms": _empty((0,), torch.int64, torch.device("cpu")),
            }
            for _ in modules
        ]
        matrices = []
        for layer in self._layers.values():
            matrices += [_empty((0, layer.in_features), dtype, device), _empty((0,), dtype, device)]
        self.empty = Bindings(tuple(matrices))

    def bind(self, bindings: Bindings) -> None:
        """Make the model compute with these tensors. Assigns pointers only; cannot fail half way on valid input."""
        if bindings is self._bound:
            return  # another strength was multiplied into what is bound
        self._bound = None  # an interrupt may come between any two lines
        self._restore()
        if self._unbound:
            for owner, parameters in zip(self._owners, self._nothing, strict=True):
                owner.update(parameters)
            self._unbound = False
        matrices = iter(bindings.matrices)
        for owner, lora_A, lora_B in zip(self._owners, matrices, matrices, strict=True):
            owner["lora_A"], owner["lora_B"] = lora_A, lora_B
        for owner, name, parameter in bindings.others:
            # Noted before it is replaced: an interrupt may come between any two lines.
            self._replaced.append((owner, name, owner[name]))
            owner[name] = parameter
        self._bound = bindings

    def unbind(self) -> None:
        """Leave the slots without tensors, so that moving the model moves its own weights only."""
        self._bound = None
        self._restore()
        self._unbound = True
        for owner in self._owners:
            for slot in SLOTS:
                owner[slot] = None

    def bindings(self, flat: FlatLora) -> Bindings:
        """Make the Parameters of a stack, as views of its buffer; linears that it does not touch get empty ones.

        Args:
            flat: its tensors are on the model's device.
        """
        matrices = list(self.empty.matrices)
        others: list[tuple[Owner, str, nn.Parameter]] = []
        with torch.inference_mode(False), torch.no_grad():
            for index, module in enumerate(self.modules):
                place = flat.placed.get(module)
                if place is not None:
                    rank, in_features = place.a_shape
                    matrices[2 * index] = _of_any_rank(
                        flat.buffer.as_strided((rank, in_features), (in_features, 1), place.a_start)
                    )
                    matrices[2 * index + 1] = _of_any_rank(
                        flat.buffer.as_strided((place.b_shape[0] * rank,), (1,), place.b_start)
                    )
            for module, mixing in flat.mixing.items():
                others.append((self._layers[module]._parameters, "mixing", _of_any_rank(_with_head(mixing.flatten()))))
            head = HEAD_BYTES // flat.buffer.element_size()
            for module, terms in flat.kroneckers.items():
                owner = self._layers[module]._parameters
                numbers = write_terms([term.relative_to(head) for term in terms])
                others.append((owner, "kron", _of_any_rank(flat.buffer[head:])))
                others.append((owner, "kron_terms", _of_any_rank(_with_head(numbers))))
            for name, vector in flat.vectors.items():
                module, _, last = name.rpartition(".")
                layer = self._layers.get(module)
                owner = (layer.base if layer else self._model.get_submodule(module))._parameters
                others.append((owner, last, _constant_size(vector)))
        return Bindings(tuple(matrices), tuple(others))

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



def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    # One object for each place: dynamo guards on two inputs being the same one, and would recompile when a LoRA tells
    # them apart.
    with torch.inference_mode(False), torch.no_grad():
        return _of_any_rank(_with_head(torch.empty(shape, dtype=dtype, device=device)))


def _with_head(tensor: Tensor) -> Tensor:
    """A contiguous copy that does not start at storage offset 0, see `stack.HEAD_BYTES`."""
    head = HEAD_BYTES // tensor.element_size()
    buffer = tensor.new_empty(head + tensor.numel())
    return buffer[head:].view(tensor.shape).copy_(tensor)


def _of_any_rank(tensor: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=False)
    # Not merely dynamic: dynamo compiles sizes 0 and 1 as constants otherwise.
    torch._dynamo.decorators.mark_unbacked(parameter, 0)
    return parameter


def _constant_size(tensor: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=False)
    torch._dynamo.mark_static(parameter)
    return parameter
