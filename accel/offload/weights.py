"""An engine's weights: which of them lie on the device, which on the host, and the way between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..linear.packed import is_packed, pack, packs, unpack
from ..memory.device import DeviceMemory
from .flat import FlatLayout, Home, Place
from .plan import OffloadPlan
from .ring import SLOTS, Ring
from .sizes import streamed_blocks as choose_streamed


@dataclass
class _Segment:
    """Parameters that travel together: one block's, or those outside the blocks.

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
    on_device: Home | None = None
    on_host: Home | None = None


class Weights:
    """Call order: `begin`, `placed` for every module, `complete`; then `place` and `offload` in turns.

    Not thread-safe, but for `own`.

    Attributes:
        ring: what brings the streamed blocks to the device; None when all of them stay there.
        plan: by which they lie where they are.
    """

    def __init__(
        self, memory: DeviceMemory, plan: OffloadPlan, block_of: Callable[[str], int | None], blocks: int
    ) -> None:
        """Get ready for a model that is about to be read.

        Args:
            memory: of the device.
            plan: by which it is loaded.
            block_of: full name of a module or parameter -> its block, counted in the order in which they run; None for
                what is outside the blocks.
            blocks: how many there are.
        """
        self._memory = memory
        self.plan = plan
        self._block_of = block_of
        self._outside = _Segment()
        self._blocks = [_Segment() for _ in range(blocks)]
        self._streamed: frozenset[int] = frozenset()
        self._model: nn.Module | None = None
        self._sizes: list[int] = []
        self._owners: dict[nn.Module, _Segment] = {}
        self._lock = threading.RLock()
        self.ring: Ring | None = None

    @property
    def device_bytes(self) -> int:
        """What they take on the device, staging included."""
        kept = self.ring.bytes if self.ring is not None else 0
        for segment in self._segments():
            if segment.on_device is not None:
                kept += sum(piece.numel() for _, piece in segment.on_device.pieces)
                kept += sum(linear.weight.nbytes for linear in segment.packed)
        return kept

    def _segments(self) -> list[_Segment]:
        return [self._outside, *self._blocks]

    # While the model is read.

    def begin(self, model: nn.Module) -> None:
        """Take a model whose parameters have no data yet."""
        self._model = model
        for name, module in model.named_modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                segment = self._segment(name)
                segment.modules.append(name)
                segment.missing.add(name)
            if module._buffers:
                raise ValueError(f"'{name}' has buffers, which would stay behind.")
        for segment in self._blocks:
            modules = map(model.get_submodule, segment.modules)
            self._sizes.append(sum(parameter.numel() for module in modules for parameter in module.parameters(False)))
        self._streamed = streamed_blocks(self._sizes, self.plan)

    def device_of(self, name: str) -> torch.device:
        """Where a module's tensors should be made."""
        block = self._block_of(name)
        return torch.device("cpu") if block in self._streamed else self._memory.device

    def placed(self, name: str) -> None:
        """A module has its data. A block that is whole goes where it will stay."""
        segment = self._segment(name)
        segment.missing.discard(name)
        if not segment.missing:
            self._settle(segment)

    def complete(self) -> None:
        """All modules have their data."""
        for segment in self._segments():
            if segment.layout is None:
                self._settle(segment)

    def _segment(self, name: str) -> _Segment:
        block = self._block_of(name)
        return self._outside if block is None else self._blocks[block]

    def _settle(self, segment: _Segment) -> None:
        places: list[Place] = []
        for name in segment.modules:
            module = self._model.get_submodule(name)
            if self._packs(module):
                pack(module)
                segment.packed.append(module)
            places += [
                (module, key)
                for key, value in module._parameters.items()
                if value is not None and not is_packed(value)
            ]
            self._owners[module] = segment
        layout = FlatLayout(places)
        loose = layout.loose()
        streamed = any(segment is self._blocks[block] for block in self._streamed)
        if not streamed and all(self._memory.holds(piece) for _, piece in loose.pieces):
            segment.on_device = loose
            segment.on_host = None if self._memory.separate else loose
        elif not streamed:
            home = layout.over(self._memory.empty(layout.bytes))
            _write(home, loose)
            layout.bind(home)
            segment.on_device = home
        elif self._memory.flat:
            segment.on_host = self._to_host(layout, loose)
            layout.bind(segment.on_host)
        else:
            segment.on_host = loose
        segment.layout = layout

    def _packs(self, module: nn.Module) -> bool:
        """Whether a module is a plain linear, and no weight has to be copied to where it is multiplied."""
        plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
        resident = not self._memory.separate and not self._streamed
        return plain and resident and packs(self._memory.device, module.weight.dtype)

    def _to_host(self, layout: FlatLayout, source: Home) -> Home:
        home = layout.over(self._memory.host(layout.bytes))
        _write(home, source)
        return home

    # Between phases.

    def place(self, plan: OffloadPlan) -> None:
        """Bring to the device what a plan keeps there, and make the ring for the rest.

        Raises:
            torch.OutOfMemoryError: it does not fit; then `offload` puts everything in order again.
        """
        with self._lock:
            self.plan = plan
            self._streamed = streamed_blocks(self._sizes, plan)
            self._drop_ring()
            if self._streamed:
                self._unpack()
            for block in self._streamed:
                self._leave_device(self._blocks[block])
            absent = [
                segment
                for segment in self._segments()
                if segment.on_device is None and not self._is_streamed(segment)
            ]
            if not self._memory.separate:
                for segment in absent:
                    segment.layout.bind(segment.on_host)
                    segment.on_device = segment.on_host
                absent = []
            coming = [(segment, segment.layout.over(self._memory.empty(segment.layout.bytes))) for segment in absent]
            order = sorted(self._streamed)
            buffers = [
                self._memory.empty(max(self._blocks[block].layout.bytes for block in order[slot::SLOTS]))
                for slot in range(min(SLOTS, len(order)))
            ]
            for segment, home in coming:
                done = self._memory.copy(home.buffer, segment.on_host.pieces, after=self._memory.mark())
                self._memory.wait(done)
            # The host buffers may go now.
            self._memory.finish()
            for segment, home in coming:
                segment.layout.bind(home)
                segment.on_device = home
            for number, block in enumerate(order):
                layout = self._blocks[block].layout
                layout.bind(layout.over(buffers[number % SLOTS]))
            if order:
                sources = [(block, self._blocks[block].on_host.pieces) for block in order]
                self.ring = Ring(self._memory, buffers, sources)
            if plan.mode == "none" and self._memory.separate:
                for segment in self._segments():
                    if segment.on_device is not None:
                        segment.on_host = None

    def offload(self) -> None:
        """Give the device back. What was copied to the host once stays there, so only what was not takes time.

        Raises:
            MemoryError: the host has no room.
        """
        with self._lock:
            self._drop_ring()
            for segment in self._segments():
                self._leave_device(segment)

    def close(self) -> None:
        """Drop everything now, whoever still holds the model, such as the traceback of what went wrong."""
        with self._lock:
            ring, self.ring = self.ring, None
            if ring is not None:
                ring.close()
            for segment in self._segments():
                segment.on_device = segment.on_host = None
            for module in self._model.modules() if self._model is not None else ():
                module._parameters.update(dict.fromkeys(module._parameters))

    def _unpack(self) -> None:
        """Make all weights such that they can be copied."""
        for segment in self._segments():
            packed, segment.packed = segment.packed, []
            for linear in packed:
                unpack(linear)
            if packed:
                self._settle(segment)

    def _is_streamed(self, segment: _Segment) -> bool:
        return any(segment is self._blocks[block] for block in self._streamed)

    def _drop_ring(self) -> None:
        """Bind the streamed blocks to the host, so that nothing holds the staging buffers."""
        ring, self.ring = self.ring, None
        if ring is not None:
            ring.close()
        for segment in self._blocks:
            if segment.on_device is None:
                segment.layout.bind(segment.on_host)

    def _leave_device(self, segment: _Segment) -> None:
        if segment.on_host is None:
            segment.on_host = self._to_host(segment.layout, segment.on_device)
        if segment.on_device is not None:
            segment.layout.bind(segment.on_host)
            segment.on_device = None

    def own(self, module: nn.Module) -> Mapping[str, Tensor]:
        """A module's own parameters by name, on the device or the host, whatever is bound. From any thread."""
        with self._lock:
            segment = self._owners[module]
            own = segment.layout.of_module(module, segment.on_device or segment.on_host)
            return {**own, "weight": module.weight} if module in segment.packed else own


def streamed_blocks(sizes: Sequence[int], plan: OffloadPlan) -> frozenset[int]:
    """Which blocks a plan streams, see `sizes.streamed_blocks`.

    Raises:
        ValueError: the plan is for another model.
    """
    if plan.total_blocks != len(sizes) or not 0 <= plan.resident_blocks <= len(sizes):
        raise ValueError(f"a plan for {plan.resident_blocks} of {plan.total_blocks} blocks, expected {len(sizes)}.")
    return choose_streamed(sizes, plan.resident_blocks) if plan.mode == "stream" else frozenset()


def _write(target: Home, source: Home) -> None:
    """Copy between the device and the host, or within one of them; behind what the device computes now."""
    for start, piece in source.pieces:
        target.buffer[start : start + piece.numel()].copy_(piece)
