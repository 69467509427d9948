"""Parameters that travel together, and where copies of them are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..linear.packed import is_packed, pack, packs, unpack
from ..memory.base import DeviceMemory
from .flat import FlatLayout, ParameterCopy, Place


@dataclass
class Group:
    """One block's parameters, or those outside the blocks.

    Attributes:
        modules: full names of the modules that have them.
        missing: those of `modules` that have no data yet.
        packed: those whose weight is packed: it stays where it is, and is no part of the layout.
        layout: None until all of them have.
        on_device: where the device computes with them; None: nowhere, or by turns in the ring.
        on_host: None while only the device has them.
    """

    modules: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    packed: list[nn.Linear] = field(default_factory=list)
    layout: FlatLayout | None = None
    on_device: ParameterCopy | None = None
    on_host: ParameterCopy | None = None

    @property
    def device_bytes(self) -> int:
        """What it takes of the device, the ring's buffers not counted."""
        if self.on_device is None:
            return 0
        flat = sum(chunk.numel() for _, chunk in self.on_device.chunks)
        return flat + sum(linear.weight.nbytes for linear in self.packed)

    def settle(self, model: nn.Module, memory: DeviceMemory, streamed: bool, packing: bool) -> None:
        """All its modules have their data: lay it out, and bring it to where it stays.

        Args:
            model: has the modules.
            memory: of the device.
            streamed: whether it stays on the host.
            packing: whether weights may be packed, as nothing will have to be copied.
        """
        self.layout = layout = FlatLayout(self._places(model, memory.device if packing else None))
        loaded = layout.as_they_are()
        if streamed:
            self.on_host = loaded
            if memory.flat:
                self.on_host = _to_host(memory, layout, loaded)
                layout.bind(self.on_host)
        elif all(memory.holds(chunk) for _, chunk in loaded.chunks):
            self.on_device = loaded
            self.on_host = None if memory.separate else loaded
        else:
            self.on_device = layout.views_of(memory.empty(layout.bytes))
            _write(self.on_device, loaded)
            layout.bind(self.on_device)

    def _places(self, model: nn.Module, packing_on: torch.device | None) -> list[Place]:
        """The parameters to lay out; weights that a device multiplies packed are packed, and left out."""
        places: list[Place] = []
        for name in self.modules:
            module = model.get_submodule(name)
            plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
            if plain and packing_on is not None and packs(packing_on, module.weight.dtype):
                pack(module)
                self.packed.append(module)
            parameters = module._parameters.items()
            places += [(module, key) for key, value in parameters if value is not None and not is_packed(value)]
        return places

    def unpack(self, model: nn.Module, memory: DeviceMemory, streamed: bool) -> None:
        """Make its weights such that they can be copied; see `settle`."""
        packed, self.packed = self.packed, []
        for linear in packed:
            unpack(linear)
        if packed:
            self.settle(model, memory, streamed, packing=False)

    def come(self, copy: ParameterCopy) -> None:
        """Compute with a copy on the device."""
        self.layout.bind(copy)
        self.on_device = copy

    def leave_device(self, memory: DeviceMemory) -> None:
        """Let the device's copy go; what only the device has is copied to the host first.

        Raises:
            MemoryError: the host has no room.
        """
        if self.on_host is None:
            self.on_host = _to_host(memory, self.layout, self.on_device)
        if self.on_device is not None:
            self.layout.bind(self.on_host)
            self.on_device = None

    def own_parameters(self, module: nn.Module) -> Mapping[str, Tensor]:
        """A module's own parameters by name, on the device or the host, whatever is bound."""
        own = self.layout.of_module(module, self.on_device or self.on_host)
        return {**own, "weight": module.weight} if module in self.packed else own


def _to_host(memory: DeviceMemory, layout: FlatLayout, source: ParameterCopy) -> ParameterCopy:
    copy = layout.views_of(memory.host(layout.bytes))
    _write(copy, source)
    return copy


def _write(target: ParameterCopy, source: ParameterCopy) -> None:
    """Copy between the device and the host, or within one of them; behind what the device computes now."""
    for start, chunk in source.chunks:
        target.buffer[start : start + chunk.numel()].copy_(chunk)
