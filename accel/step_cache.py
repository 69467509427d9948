"""Skip most of a step while the first block says that the rest would add what it added before.

First-block caching: neighbouring steps of a sampling differ little. After the first double block, what that block added
to the image tokens is compared with what it added in the last step that was computed in full. While the relative
difference is below a threshold, all other blocks are skipped, and what they added then is added again.

Sources: the decision is that of chengzeyi/ParaAttention's First Block Cache (relative L1 distance of residuals), which
builds on TeaCache (arXiv 2411.19108); adding along the line through the last two computed steps is the first order of
TaylorSeer (arXiv 2503.06923).

The decision is the host's, as it decides which kernels are launched: one scalar is read from the device per call that
could be skipped, and the device waits for the next launch that long. A decision on the device would need the whole loop
over blocks in one graph; one step late, it would need a guess of the next step. Without a cache nothing is read.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SettingsError


@dataclass(frozen=True)
class StepCacheSettings:
    """When steps are skipped.

    Attributes:
        threshold: relative difference below which a step is skipped; 0 never skips.
        start_percent: no step is skipped before this part of the sampling; 0 is its begin.
        end_percent: none after it; 1 is the end.
        max_skips: how many calls in a row may be skipped; 0: any number.
    """

    threshold: float
    start_percent: float = 0.0
    end_percent: float = 1.0
    max_skips: int = 0

    def __post_init__(self) -> None:
        """Reject what is no number of its kind."""
        if not 0.0 <= self.threshold < math.inf:
            raise SettingsError(
                f"Flux Step Cache: threshold is {self.threshold:g}, expected 0 (never skip) or more, such as 0.1."
            )
        if not 0.0 <= self.start_percent <= self.end_percent <= 1.0:
            raise SettingsError(
                f"Flux Step Cache: start_percent is {self.start_percent:g} and end_percent is {self.end_percent:g}, "
                "expected 0 ≤ start_percent ≤ end_percent ≤ 1. Exchange them, or choose 0 and 1 for all steps."
            )
        if self.max_skips < 0:
            raise SettingsError(f"Flux Step Cache: max_skips is {self.max_skips}, expected 0 (any number) or more.")


@dataclass(frozen=True)
class _Computed:
    """What a call that ran all blocks left: its noise level, and what the other blocks added, (B, n, H)."""

    sigma: Tensor
    rest: Tensor


@dataclass
class _Entry:
    """What is known of one kind of call.

    Attributes:
        signature: what must not change for it to be used again.
        first: (B, n, H), what the first block added in the last computed call.
        last: that call.
        before: the computed call before it, or None.
        skips: calls skipped since.
    """

    signature: Hashable
    first: Tensor
    last: _Computed
    before: _Computed | None = None
    skips: int = 0


class StepCache:
    """What one sampling keeps of its steps. Make a new one for each sampling; drop it to free the memory.

    Takes 3 tensors of (batch, image tokens, hidden size) per kind of call (cond, uncond, a region, …): 75 MB at
    1024 × 1024 in 16 bits.

    Attributes:
        settings: when it skips.
        calls: of the transformer so far.
        skipped: of these, how many ran the first block only.
    """

    def __init__(
        self, settings: StepCacheSettings, start_sigma: float = math.inf, end_sigma: float = -math.inf
    ) -> None:
        """Know nothing yet.

        Args:
            settings: when to skip.
            start_sigma: noise level at `settings.start_percent`; calls above it are computed.
            end_sigma: noise level at `settings.end_percent`; calls below it are computed.
        """
        self.settings = settings
        self.calls = 0
        self.skipped = 0
        self._bounded = start_sigma < math.inf or end_sigma > -math.inf
        self._start_sigma, self._end_sigma = start_sigma, end_sigma
        self._entries: dict[Hashable, _Entry] = {}
        self._step: Tensor | None = None
        self._step_computed = False

    def call(self, sigma: Tensor, kind: Hashable = (), state: Hashable = ()) -> StepCall:
        """Announce one call of the transformer.

        Once one call of a step was computed, the others (uncond after cond, the regions of a prompt) are too, without a
        look: as in one batch, into which ComfyUI joins them or not by the memory that is free. It lets 1 or 2 % fewer
        calls be skipped; at equal skips the pictures are as exact (Pocket FLUX, cfg 3, 28 steps, 2026-11-22).

        Args:
            sigma: (B,) noise level on the transformer's device. The calls of one step get the same tensor object.
            kind: what is remembered apart, such as the conditions of the call.
            state: what must be as it was for a step to be skipped, such as the bound LoRAs.
        """
        if sigma is not self._step:
            self._step, self._step_computed = sigma, False
        self.calls += 1
        return StepCall(self, sigma.flatten()[0], kind, state)

    def __str__(self) -> str:
        """For a log: `9 of 20 skipped`."""
        return f"{self.skipped} of {self.calls} skipped"


class StepCall:
    """One call's place in a cache: `skip` once after the first block, then, if it gave None, `keep` at the end."""

    def __init__(self, cache: StepCache, sigma: Tensor, kind: Hashable, state: Hashable) -> None:
        """Made by `StepCache.call`."""
        self._cache = cache
        self._sigma = sigma
        self._kind = kind
        self._state = state
        self._pending: tuple[Hashable, Tensor, Tensor] | None = None

    def skip(self, embedded: Tensor, after_first: Tensor, structure: Hashable) -> Tensor | None:
        """Decide whether to skip the other blocks.

        Args:
            embedded: (B, n, H) image tokens before the first block, without those of references.
            after_first: the same after it, with what a ControlNet adds there.
            structure: what else of the call's inputs must not change, such as the number of text tokens.

        Returns:
            (B, n, H), the image tokens as if all blocks had run; or None: run them, then call `keep`.
        """
        cache = self._cache
        if not cache.settings.threshold:
            return None
        first = after_first - embedded
        signature = (self._state, structure, first.shape, first.dtype, first.device)
        entry = cache._entries.get(self._kind)
        if entry is None or entry.signature != signature or not self._allows(entry, first):
            cache._step_computed = True
            self._pending = signature, first, after_first
            return None
        entry.skips += 1
        cache.skipped += 1
        return after_first + self._rest(entry)

    def keep(self, final: Tensor) -> None:
        """Remember a call that was computed.

        Args:
            final: (B, n, H) image tokens after the last block.
        """
        if self._pending is None:
            return
        (signature, first, after_first), self._pending = self._pending, None
        entries = self._cache._entries
        old = entries.get(self._kind)
        before = old.last if old is not None and old.signature == signature else None
        # One assignment, at the very end: an interrupt leaves the entry of the step before.
        entries[self._kind] = _Entry(signature, first, _Computed(self._sigma, final - after_first), before)

    def _allows(self, entry: _Entry, first: Tensor) -> bool:
        settings = self._cache.settings
        if self._cache._step_computed or 0 < settings.max_skips <= entry.skips:
            return False
        # The worst picture of a batch decides, so that none loses more than it would alone.
        change = (_size(first - entry.first) / _size(entry.first)).max()
        if self._cache._bounded:
            inside = (self._sigma <= self._cache._start_sigma) & (self._sigma >= self._cache._end_sigma)
            change = torch.where(inside, change, math.inf)
        return change.item() < settings.threshold  # NaN (no residual at all) is not

    def _rest(self, entry: _Entry) -> Tensor:
        """What the other blocks would add: on the line through the last two computed calls."""
        if entry.before is None:
            return entry.last.rest
        span = entry.last.sigma - entry.before.sigma
        # A sampler may call twice at one noise level: then there is no line.
        ahead = torch.where(span == 0, 0.0, (self._sigma - entry.last.sigma) / span)
        return torch.lerp(entry.before.rest, entry.last.rest, (1.0 + ahead).to(entry.last.rest.dtype))


def _size(residual: Tensor) -> Tensor:
    """(B, n, H) -> (B,) sums of magnitudes, float32."""
    return torch.linalg.vector_norm(residual, 1, dim=(1, 2), dtype=torch.float32)
