"""What an engine takes of a device, from the shapes of its checkpoint alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..build import stored_sizes
from ..families.base import Workspace
from ..quantize import Mode
from ..spec import ModelSpec
from .flat import ALIGNMENT
from .ring import SLOTS


@dataclass(frozen=True)
class Workload:
    """What one forward computes.

    Attributes:
        width: of the picture in pixels; `height` likewise.
        batch: pictures at once; twice as many where two conditions run together.
        text_tokens: length of the text stream; None: of the family's usual prompt.
    """

    width: int = 1024
    height: int = 1024
    batch: int = 1
    text_tokens: int | None = None

    def __str__(self) -> str:
        """For sentences."""
        return f"{self.width}×{self.height}" + (f", batch {self.batch}" if self.batch > 1 else "")

    def activation_bytes(self, spec: ModelSpec, dtype: torch.dtype, mode: Mode | None, compiled: bool) -> int:
        """What one forward holds beside the weights; see `activation_bytes`."""
        side = spec.family.pixels_per_token
        text = spec.family.text_tokens if self.text_tokens is None else self.text_tokens
        tokens = self.batch * (text + -(-self.width // side) * -(-self.height // side))
        return activation_bytes(spec, tokens, dtype, mode, compiled)


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of the weights on the device.

    Attributes:
        blocks: of each block, in the order in which they run.
        rest: of everything outside the blocks.
    """

    blocks: tuple[int, ...]
    rest: int

    @property
    def total(self) -> int:
        """Of all weights."""
        return self.rest + sum(self.blocks)

    def slots(self, resident: int) -> list[list[int]]:
        """The sizes of the blocks that share each staging buffer when so many blocks stay on the device."""
        streamed = [self.blocks[index] for index in sorted(streamed_blocks(self.blocks, resident))]
        return [streamed[number::SLOTS] for number in range(min(SLOTS, len(streamed)))]

    def staging(self, resident: int) -> int:
        """Bytes of the staging buffers: each fits the largest block that uses it."""
        return sum(map(max, self.slots(resident)))

    def on_device(self, resident: int) -> int:
        """Bytes of resident weights and staging."""
        return self.total - sum(map(sum, self.slots(resident))) + self.staging(resident)

    def copied_per_step(self, resident: int) -> int:
        """Bytes that one forward copies to the device; a block with a buffer of its own is copied only once for all."""
        return sum(sum(sizes) for sizes in self.slots(resident) if len(sizes) > 1)

    def most_resident(self, limit_bytes: float) -> int | None:
        """The largest number of resident blocks that takes at most `limit_bytes`; None when not even 0 does."""
        counts = range(len(self.blocks), -1, -1)
        return next((count for count in counts if self.on_device(count) <= limit_bytes), None)


def activation_bytes(spec: ModelSpec, tokens: int, dtype: torch.dtype, mode: Mode | None, compiled: bool) -> int:
    """What one forward holds beside the weights; see `Family.activation_bytes`.

    Args:
        spec: the checkpoint.
        tokens: text and image tokens, references included, times the batch.
        dtype: what the engine computes in.
        mode: how the linears of the blocks are stored; None: as they are.
        compiled: whether the blocks are compiled.
    """
    workspace = Workspace() if mode is None else mode.workspace
    return spec.family.activation_bytes(spec.config, tokens, dtype, workspace, compiled)


def streamed_blocks(sizes: Sequence[int], resident_blocks: int) -> frozenset[int]:
    """Which blocks are streamed when so many stay.

    The largest ones stay, because the staging buffers are as large as the largest that does not; among those of one
    size, the streamed ones are spread evenly, so that the copies never wait for long.

    Args:
        sizes: of the blocks, in the order in which they run.
        resident_blocks: how many stay.
    """
    streamed: set[int] = set()
    resident = resident_blocks
    for size in sorted(set(sizes), reverse=True):
        alike = [block for block, each in enumerate(sizes) if each == size]
        leaving = len(alike) - min(resident, len(alike))
        resident -= len(alike) - leaving
        # The first of them stays, if any does: a step cache runs it in every step.
        streamed |= {
            block
            for number, block in enumerate(alike)
            if (number + 1) * leaving // len(alike) > number * leaving // len(alike)
        }
    return frozenset(streamed)


def weight_sizes(spec: ModelSpec, dtype: torch.dtype, mode: Mode | None) -> WeightSizes:
    """What the weights of a checkpoint will take, quantized or not, each block in a flat buffer.

    Args:
        spec: the checkpoint.
        dtype: what the engine computes in.
        mode: how the linears of the blocks are stored.
    """
    layout = spec.layout
    # What lies in one flat buffer, see `flat.FlatLayout`.
    blocks = [ALIGNMENT] * len(layout.blocks)
    rest = ALIGNMENT
    for name, parameters in stored_sizes(spec, dtype, mode):
        size = sum(-(-each // ALIGNMENT) * ALIGNMENT for each in parameters)
        block = layout.block_of(name)
        if block is None:
            rest += size
        else:
            blocks[block] += size
    return WeightSizes(tuple(blocks), rest)
