"""Parameters, quantized or not, as views of one flat buffer of bytes.

What travels together lies together: one copy moves a block, and its parameters are bound to a buffer once, whatever
bytes come to lie in it later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.linears import is_quantized, stored_tensors

# Compiled kernels assume the alignment of the pointers that they saw first, and a GPU reads memory in lines of 128.
ALIGNMENT = 256
# (the module that a parameter belongs to, its name there)
Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class ParameterCopy:
    """A copy of a group's parameters, in one place.

    Attributes:
        parameters: in the order of the group; what is assigned to the modules.
        chunks: their bytes: uint8 tensors, and where each begins in a flat buffer.
        buffer: the flat buffer that they are views of; None for parameters as they were loaded.
    """

    parameters: tuple[nn.Parameter, ...]
    chunks: tuple[tuple[int, Tensor], ...]
    buffer: Tensor | None = None


@dataclass(frozen=True)
class _Stored:
    """One plain tensor: dense, in whatever order of dimensions."""

    start: int
    bytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        flat = buffer[self.start : self.start + self.bytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())


@dataclass(frozen=True)
class _Form:
    """How a parameter is put together from plain tensors; without their data. `kind` None: it is one."""

    kind: type[Tensor] | None = None
    inner: tuple[tuple[str, _Form], ...] = ()
    attributes: Any = None
    shape: torch.Size | None = None
    stride: tuple[int, ...] = ()

    @classmethod
    def of(cls, parameter: Tensor) -> _Form:
        if not is_quantized(parameter):
            return cls()
        names, attributes = parameter.__tensor_flatten__()
        inner = tuple((name, cls.of(getattr(parameter, name))) for name in names)
        return cls(type(parameter), inner, attributes, parameter.shape, parameter.stride())

    def build(self, tensors: Iterator[Tensor]) -> Tensor:
        if self.kind is None:
            return next(tensors)
        inner = {name: form.build(tensors) for name, form in self.inner}
        return self.kind.__tensor_unflatten__(inner, self.attributes, self.shape, self.stride)


class FlatLayout:
    """How the parameters of some modules lie in one buffer of bytes.

    Attributes:
        places: whose they are.
        bytes: what a buffer takes.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        """Lay out the parameters that the modules have now.

        Raises:
            ValueError: a tensor has gaps.
        """
        self.places = tuple(places)
        self._forms: list[_Form] = []
        self._stored: list[tuple[_Stored, ...]] = []
        # dynamo makes an offset of 0 in a storage a constant where a size is a symbol, so nothing lies there.
        self.bytes = ALIGNMENT
        for module, name in self.places:
            parameter = module._parameters[name]
            self._forms.append(_Form.of(parameter))
            self._stored.append(tuple(map(self._add, stored_tensors(parameter))))

    def _add(self, tensor: Tensor) -> _Stored:
        _flat(tensor)  # raises when it has gaps
        stored = _Stored(self.bytes, tensor.nbytes, tensor.dtype, tensor.shape, tensor.stride())
        self.bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return stored

    def as_they_are(self) -> ParameterCopy:
        """The parameters that the modules have now."""
        parameters = tuple(module._parameters[name] for module, name in self.places)
        chunks = [
            (stored.start, _flat(tensor))
            for parameter, row in zip(parameters, self._stored, strict=True)
            for stored, tensor in zip(row, stored_tensors(parameter), strict=True)
        ]
        return ParameterCopy(parameters, tuple(chunks))

    def views_of(self, buffer: Tensor) -> ParameterCopy:
        """Parameters that are views of a buffer of `bytes` or more, whatever is in it."""
        parameters = []
        for form, row in zip(self._forms, self._stored, strict=True):
            parameters.append(nn.Parameter(form.build(stored.view(buffer) for stored in row), requires_grad=False))
        return ParameterCopy(tuple(parameters), ((0, buffer[: self.bytes]),), buffer)

    def bind(self, copy: ParameterCopy) -> None:
        """Make the modules compute with a copy. Assigns pointers only."""
        for (module, name), parameter in zip(self.places, copy.parameters, strict=True):
            module._parameters[name] = parameter

    def of_module(self, module: nn.Module, copy: ParameterCopy) -> Mapping[str, nn.Parameter]:
        """One module's parameters in a copy, by name."""
        return {
            name: parameter
            for (owner, name), parameter in zip(self.places, copy.parameters, strict=True)
            if owner is module
        }


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor, as they lie in memory."""
    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
    if not tensor.permute(order).is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps.")
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)
