"""An engine's weights: which of them lie on the device, which on the host, and the way between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..memory.base import DeviceMemory
from .group import Group
from .plan import OffloadPlan
from .ring import SLOTS, Ring
from .sizes import streamed_blocks as choose_streamed


class Weights:
    """Call order: `begin`, `placed` for every module, `complete`; then `place` and `offload` in turns.

    Not thread-safe, but for `own_parameters`.

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
        self._outside = Group()
        self._blocks = [Group() for _ in range(blocks)]
        self._streamed: frozenset[int] = frozenset()
        self._model: nn.Module | None = None
        self._sizes: list[int] = []
        self._group_of: dict[nn.Module, Group] = {}
        self._lock = threading.RLock()
        self.ring: Ring | None = None

    @property
    def device_bytes(self) -> int:
        """What they take on the device, staging included."""
        staging = self.ring.bytes if self.ring is not None else 0
        return staging + sum(group.device_bytes for group in self._groups())

    def own_parameters(self, module: nn.Module) -> Mapping[str, Tensor]:
        """A module's own parameters by name, on the device or the host, whatever is bound. From any thread."""
        with self._lock:
            return self._group_of[module].own_parameters(module)

    def _groups(self) -> list[Group]:
        return [self._outside, *self._blocks]

    # While the model is read.

    def begin(self, model: nn.Module) -> None:
        """Take a model whose parameters have no data yet."""
        self._model = model
        for name, module in model.named_modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                group = self._named(name)
                group.modules.append(name)
                group.missing.add(name)
            if module._buffers:
                raise ValueError(f"'{name}' has buffers, which would stay behind.")
        for group in self._blocks:
            modules = map(model.get_submodule, group.modules)
            self._sizes.append(sum(parameter.numel() for module in modules for parameter in module.parameters(False)))
        self._streamed = streamed_blocks(self._sizes, self.plan)

    def device_of(self, name: str) -> torch.device:
        """Where a module's tensors should be made."""
        block = self._block_of(name)
        return torch.device("cpu") if block in self._streamed else self._memory.device

    def placed(self, name: str) -> None:
        """A module has its data. A block that is whole goes where it will stay."""
        group = self._named(name)
        group.missing.discard(name)
        if not group.missing:
            self._settle(group)

    def complete(self) -> None:
        """All modules have their data."""
        for group in self._groups():
            if group.layout is None:
                self._settle(group)

    def _named(self, name: str) -> Group:
        block = self._block_of(name)
        return self._outside if block is None else self._blocks[block]

    def _settle(self, group: Group) -> None:
        # A packed weight cannot be copied to where it is multiplied.
        packing = not self._memory.separate and not self._streamed
        group.settle(self._model, self._memory, self._is_streamed(group), packing)
        self._group_of.update((self._model.get_submodule(name), group) for name in group.modules)

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
                for group in self._groups():
                    group.unpack(self._model, self._memory, self._is_streamed(group))
            for block in self._streamed:
                self._blocks[block].leave_device(self._memory)
            absent = [
                group for group in self._groups() if group.on_device is None and not self._is_streamed(group)
            ]
            if not self._memory.separate:
                for group in absent:
                    group.come(group.on_host)
                absent = []
            self._bring(absent)
            if plan.mode == "none" and self._memory.separate:
                for group in self._groups():
                    if group.on_device is not None:
                        group.on_host = None

    def _bring(self, absent: Sequence[Group]) -> None:
        """Copy groups to the device, and bind the streamed blocks to a ring there; first of all find the room."""
        coming = [(group, group.layout.views_of(self._memory.empty(group.layout.bytes))) for group in absent]
        order = sorted(self._streamed)
        buffers = [
            self._memory.empty(max(self._blocks[block].layout.bytes for block in order[slot::SLOTS]))
            for slot in range(min(SLOTS, len(order)))
        ]
        for group, copy in coming:
            done = self._memory.copy(copy.buffer, group.on_host.chunks, after=self._memory.mark())
            self._memory.wait(done)
        # The host buffers may go now.
        self._memory.finish()
        for group, copy in coming:
            group.come(copy)
        for number, block in enumerate(order):
            layout = self._blocks[block].layout
            layout.bind(layout.views_of(buffers[number % SLOTS]))
        if order:
            sources = [(block, self._blocks[block].on_host.chunks) for block in order]
            self.ring = Ring(self._memory, buffers, sources)

    def offload(self) -> None:
        """Give the device back. What was copied to the host once stays there, so only what was not takes time.

        Raises:
            MemoryError: the host has no room.
        """
        with self._lock:
            self._drop_ring()
            for group in self._groups():
                group.leave_device(self._memory)

    def close(self) -> None:
        """Drop everything now, whoever still holds the model, such as the traceback of what went wrong."""
        with self._lock:
            ring, self.ring = self.ring, None
            if ring is not None:
                ring.close()
            for group in self._groups():
                group.on_device = group.on_host = None
            for module in self._model.modules() if self._model is not None else ():
                module._parameters.update(dict.fromkeys(module._parameters))

    def _is_streamed(self, group: Group) -> bool:
        return any(group is self._blocks[block] for block in self._streamed)

    def _drop_ring(self) -> None:
        """Bind the streamed blocks to the host, so that nothing holds the staging buffers."""
        ring, self.ring = self.ring, None
        if ring is not None:
            ring.close()
        for group in self._blocks:
            if group.on_device is None:
                group.layout.bind(group.on_host)


def streamed_blocks(sizes: Sequence[int], plan: OffloadPlan) -> frozenset[int]:
    """Which blocks a plan streams, see `sizes.streamed_blocks`.

    Raises:
        ValueError: the plan is for another model.
    """
    if plan.total_blocks != len(sizes) or not 0 <= plan.resident_blocks <= len(sizes):
        raise ValueError(f"a plan for {plan.resident_blocks} of {plan.total_blocks} blocks, expected {len(sizes)}.")
    return choose_streamed(sizes, plan.resident_blocks) if plan.mode == "stream" else frozenset()
