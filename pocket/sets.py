"""The training sets of a pocket model, drawn once and kept beside its states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import autoencoder
from .data import Pictures, make_edits, make_pictures
from .kind import Kind, Tokenizer
from .loop import save_whole
from .loras import Recipe


@dataclass(frozen=True)
class Plan:
    """How much of everything; the tests train a plan of a few steps.

    Attributes:
        pictures: of the transformer's training set; of edits there are half as many.
        decoder_steps: with 16 crops of 48 pixels each.
        steps: of the transformer.
        cooldown: of its steps, the last ones, over which learning rates fall to zero.
        again: steps of the transformer behind those, in which learning rates rise and fall once more.
        batch: pictures in a step of the transformer or a LoRA.
        lora_pictures: of each LoRA's training set.
        lora_steps: of each LoRA.
        shown: prompts on a sample sheet, a multiple of 8 or fewer than that.
        seed: of everything.
    """

    pictures: int = 12000
    decoder_steps: int = 2000
    steps: int = 4200
    cooldown: int = 1400
    again: int = 0
    batch: int = 64
    lora_pictures: int = 1200
    lora_steps: int = 500
    shown: int = 24
    seed: int = 7


@dataclass(frozen=True)
class Examples:
    """What a transformer is trained on.

    Attributes:
        latents: (N, C, h, w).
        tokens: of the prompts, (N, S).
        before: latents of the pictures to change, shaped alike, or None.
    """

    latents: Tensor
    tokens: Tensor
    before: Tensor | None

    def references(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Of some of them."""
        return () if self.before is None else (self.before[rows],)


class Sets:
    """Training sets, which later runs read from a folder."""

    def __init__(self, kind: Kind, tokenizer: Tokenizer, work: Path, plan: Plan, say: Callable[[str], None]) -> None:
        """The folder must be there; `say` gets progress lines."""
        self.kind, self.tokenizer, self.work, self.plan, self.say = kind, tokenizer, work, plan, say

    def pictures(self, name: str, make: Callable[[Callable[[int, int], None]], Pictures]) -> Pictures:
        """Draw a set once; later runs read it."""
        path = self.work / f"{name}.pt"
        if not path.exists():
            made = make(lambda done, total: self.say(f"{name}: {done} of {total} pictures drawn"))
            save_whole(path, (made.averages, made.prompts, made.full, made.before))
        return Pictures(*torch.load(path, weights_only=True))

    def flat(self) -> Pictures:
        """The transformer's training set."""
        count, averaged = self.plan.pictures, self.kind.latents.averaged
        return self.pictures(
            "flat", lambda progress: make_pictures(count, self.plan.seed, ("flat",), 0, progress, averaged)
        )

    def edits(self) -> Pictures:
        """Its second one, for models that change pictures."""
        count, averaged = self.plan.pictures // 2, self.kind.latents.averaged
        return self.pictures("edits", lambda progress: make_edits(count, self.plan.seed + 2, progress, averaged))

    def mixed(self) -> Pictures:
        """The decoder's: every style, so that LoRAs can be drawn too."""
        count, averaged = max(16, self.plan.pictures // 10), self.kind.latents.averaged
        styles = tuple(s for style in self.kind.styles for s in ("flat", style))
        return self.pictures("mixed", lambda progress: make_pictures(count, 1, styles, count, progress, averaged))

    def styled(self, recipe: Recipe) -> Pictures:
        """A LoRA's."""
        styles = (recipe.style, f"{recipe.over} {recipe.style}") if recipe.over else (recipe.style,)
        count, seed, averaged = self.plan.lora_pictures, self.plan.seed + 1, self.kind.latents.averaged
        return self.pictures(
            recipe.style, lambda progress: make_pictures(count, seed, styles, 0, progress, averaged)
        )

    def whitening(self) -> autoencoder.Whitening:
        """Of the mixed pictures."""
        return self.kind.latents.whitening(self.mixed().averages / 255.0)

    def examples(self, pictures: Pictures) -> Examples:
        """Pictures as the transformer sees them."""
        whitening, encode = self.whitening(), self.kind.latents.encode
        before = encode(pictures.before / 255.0, whitening) if len(pictures.before) else None
        tokens = self.tokenizer(pictures.prompts, None if before is not None else self.kind.text.length)
        return Examples(encode(pictures.averages / 255.0, whitening), tokens, before)
