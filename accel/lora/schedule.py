"""Strengths that change while sampling: which stack of LoRAs counts at which noise level.

When a keyframe begins follows ComfyUI's hook keyframes (comfy/hooks.py, HookKeyframeGroup.prepare_current_keyframe), so
that a scheduled LoRA draws the same picture either way.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import SettingsError
from .adapter import Adapter
from .stack import LoraStack, describe, grouped


@dataclass(frozen=True)
class Keyframe:
    """From a point of the sampling on, a LoRA counts `factor` times its strength.

    Attributes:
        start_percent: 0 is the first step's noise level, 1 is none left.
        factor: multiplies the LoRA's strength.
    """

    start_percent: float
    factor: float


# In order of their starts; none: the whole sampling at the LoRA's own strength.
Keyframes = tuple[Keyframe, ...]


def between(start_percent: float, end_percent: float) -> Keyframes:
    """A LoRA that counts from one point of the sampling to another.

    Raises:
        SettingsError: one is outside 0 to 1, or the end lies before the start.
    """
    if not 0.0 <= start_percent <= end_percent <= 1.0:
        raise SettingsError(
            f"Hotswap LoRA: start_percent is {start_percent:g} and end_percent is {end_percent:g}, expected "
            "0 ≤ start_percent ≤ end_percent ≤ 1. Exchange them, or choose 0 and 1 for the whole sampling."
        )
    if start_percent == 0.0 and end_percent == 1.0:
        return ()
    frames = [Keyframe(0.0, 0.0)] if start_percent > 0.0 else []
    frames.append(Keyframe(start_percent, 1.0))
    if end_percent < 1.0:
        frames.append(Keyframe(end_percent, 0.0))
    return tuple(frames)


@dataclass(frozen=True)
class ScheduledStack:
    """A stack of LoRAs, and how the strength of each varies over the sampling. Immutable.

    Attributes:
        stack: the LoRAs at their full strengths.
        keyframes: of each entry of the stack.
    """

    stack: LoraStack = LoraStack()
    keyframes: tuple[Keyframes, ...] = ()

    def with_lora(self, adapter: Adapter, strength: float, keyframes: Keyframes = ()) -> ScheduledStack:
        """A new stack with one more LoRA on top. See `LoraStack.with_lora` for the errors."""
        return ScheduledStack(self.stack.with_lora(adapter, strength), (*self.keyframes, keyframes))

    def with_max_rank(self, max_rank: int) -> ScheduledStack:
        """The same stack, cut to a rank. See `LoraStack.with_max_rank`."""
        return replace(self, stack=self.stack.with_max_rank(max_rank))

    @property
    def varies(self) -> bool:
        """Whether any strength changes while sampling."""
        return any(self.keyframes)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal keys, equal pictures."""
        frames = (frames for entry, frames in zip(self.stack.entries, self.keyframes, strict=True) if entry.strength)
        return self.stack.key, tuple(frames)

    def at(self, factors: Sequence[float]) -> LoraStack:
        """The stack while each entry counts `factors` times its strength."""
        entries = zip(self.stack.entries, factors, strict=True)
        scaled = tuple(replace(entry, strength=entry.strength * factor) for entry, factor in entries)
        return replace(self.stack, entries=scaled)

    def stacks(self) -> Iterator[LoraStack]:
        """Every stack that the sampling may need, in order: one for each point at which something changes."""
        starts = sorted({0.0, *(frame.start_percent for frame in itertools.chain(*self.keyframes))})
        for start in starts:
            yield self.at([_factor_at(frames, start) for frames in self.keyframes])

    def __str__(self) -> str:
        """As a person would write it: `a.safetensors × 0.8 (20–60 %) + b.safetensors × 1`."""
        active = (pair for pair in zip(self.stack.entries, self.keyframes, strict=True) if pair[0].strength)
        parts = [
            f"{describe(group)}{_describe(frames)}"
            for frames, run in itertools.groupby(active, key=operator.itemgetter(1))
            for group in grouped(entry for entry, _ in run)
        ]
        return " + ".join(parts) or "none"


class Playback:
    """Walks through a schedule while one sampler runs. Call `at` with each model call's noise level."""

    def __init__(self, scheduled: ScheduledStack, sigma_of: Callable[[float], float]) -> None:
        """Stand before the first step.

        Args:
            scheduled: what to play.
            sigma_of: percent of the sampling -> its noise level (sigma); falls as the percent rises.
        """
        self._scheduled = scheduled
        starts = {frame.start_percent for frame in itertools.chain(*scheduled.keyframes)}
        # Noise levels come in float32, where a keyframe may begin exactly at a step's.
        sigmas = {start: float(torch.tensor(sigma_of(start), dtype=torch.float32)) for start in starts}
        self._cursors = [
            _Cursor([(sigmas[frame.start_percent], frame.factor) for frame in frames]) for frames in scheduled.keyframes
        ]

    def at(self, sigma: float, first_sigma: float) -> LoraStack:
        """The stack that counts now.

        Args:
            sigma: noise level of this call; calls at the same one, such as cond and uncond, get the same stack.
            first_sigma: the largest noise level of this sampling, below 1 when it starts from an image.
        """
        return self._scheduled.at([cursor.advance(sigma, first_sigma) for cursor in self._cursors])


class _Cursor:
    """Where one LoRA's keyframes stand."""

    def __init__(self, frames: Sequence[tuple[float, float]]) -> None:
        """Begin with the first of (sigma at which it starts, factor)."""
        self._frames = frames
        self._index = 0
        self._used_steps = 0
        self._sigma: float | None = None

    def advance(self, sigma: float, first_sigma: float) -> float:
        if not self._frames:
            return 1.0
        if sigma != self._sigma:
            # Each keyframe counts for at least one step, except those that start before this sampling does.
            if self._used_steps >= self._guaranteed(self._index, first_sigma):
                self._skip(sigma, first_sigma)
            self._used_steps += 1
            self._sigma = sigma
        return self._frames[self._index][1]

    def _skip(self, sigma: float, first_sigma: float) -> None:
        for index in range(self._index + 1, len(self._frames)):
            if self._frames[index][0] < sigma:
                break
            self._index, self._used_steps = index, 0
            if self._guaranteed(index, first_sigma):
                break

    def _guaranteed(self, index: int, first_sigma: float) -> int:
        return 0 if self._frames[index][0] > first_sigma else 1


def _factor_at(frames: Keyframes, percent: float) -> float:
    factor = frames[0].factor if frames else 1.0
    for frame in frames:
        if frame.start_percent <= percent:
            factor = frame.factor
    return factor


def _describe(frames: Keyframes) -> str:
    if not frames:
        return ""
    if {frame.factor for frame in frames} <= {0.0, 1.0} and sum(frame.factor for frame in frames) == 1.0:
        start = next(frame.start_percent for frame in frames if frame.factor)
        ends = [frame.start_percent for frame in frames if not frame.factor and frame.start_percent >= start]
        return f" ({start * 100:g}–{(ends[-1] if ends else 1.0) * 100:g} %)"
    return " (" + ", ".join(f"× {frame.factor:g} from {frame.start_percent * 100:g} %" for frame in frames) + ")"
