"""Blocks that take turns in a few buffers of the device: the next ones are copied while one computes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..memory.base import Chunks, DeviceMemory, Mark

# One block computes from a buffer while the next one is copied into the other.
SLOTS = 2


@dataclass
class _Slot:
    """A buffer of the device.

    Attributes:
        blocks: those that use it, in the order in which they run.
        holds: whose weights are in it, or on their way; None: unknown.
        copied: when they are there.
        free: when what computed with it last is done.
    """

    buffer: Tensor
    blocks: tuple[int, ...]
    holds: int | None = None
    copied: Mark = None
    free: Mark = None

    def next_after(self, block: int) -> int:
        return next((each for each in self.blocks if each > block), self.blocks[0])


class Ring:
    """Brings the weights of streamed blocks to the device, each to the one buffer that its parameters are views of.

    Call order, for every block that is run, streamed or not: `enter`, the block, `leave`. Blocks may be left out, run
    again, or run in any order: what is not where it should be is copied then, without anything beside it.

    Attributes:
        copied_bytes: what was copied to the device since it was made.
    """

    def __init__(self, memory: DeviceMemory, buffers: Sequence[Tensor], sources: Sequence[tuple[int, Chunks]]) -> None:
        """Copy nothing yet.

        Args:
            memory: of the device.
            buffers: on the device; streamed block number n, as `sources` has them, uses buffer n modulo their count.
            sources: block -> its bytes on the host, in the order in which the blocks run.
        """
        self._memory = memory
        self._sources = dict(sources)
        order, count = list(self._sources), len(buffers)
        # A buffer may have been computed with until a moment ago, as somebody else's.
        free = memory.mark()
        self._slots = [
            _Slot(buffer, tuple(order[number::count]), free=free) for number, buffer in enumerate(buffers)
        ]
        self._slot_of = {block: slot for slot in self._slots for block in slot.blocks}
        self.copied_bytes = 0
        # Whoever drops an engine between two blocks must not free what is being copied from or to.
        weakref.finalize(self, memory.finish).atexit = False

    @property
    def bytes(self) -> int:
        """What the buffers take of the device."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def enter(self, block: int) -> None:
        """Before a block runs: what is computed from now on finds its weights; and the next ones are on their way.

        Raises:
            Exception: what a copy failed with; entering again copies again.
        """
        own = self._slot_of.get(block)
        if own is not None:
            self._fill(own, block)
            try:
                self._memory.wait(own.copied)
            except BaseException:
                own.holds = None
                raise
        # Not as soon as a block is left: one that is run twice, or first in a step whose others are left out, is still
        # there then.
        others = [(slot.next_after(block), slot) for slot in self._slots if slot is not own]
        for wanted, slot in sorted(others, key=lambda item: (item[0] <= block, item[0])):
            self._fill(slot, wanted)

    def leave(self, block: int) -> None:
        """After a block was run, or has failed: its buffer may be used again when the device is done with it."""
        slot = self._slot_of.get(block)
        if slot is not None:
            slot.free = self._memory.mark()

    def close(self) -> None:
        """Wait until nothing is copied any more; the buffers may be dropped then."""
        self._memory.finish()
        for slot in self._slots:
            slot.holds = None

    def _fill(self, slot: _Slot, block: int) -> None:
        if slot.holds == block:
            return
        slot.holds = None  # an interrupt can rise between any two lines
        source = self._sources[block]
        slot.copied = self._memory.copy(slot.buffer, source, after=slot.free)
        self.copied_bytes += sum(chunk.numel() for _, chunk in source)
        slot.holds = block
