"""`python -m pocket.train`: draw pictures, train the decoder, the transformer with its T5, and three LoRAs.

Everything follows from the seed. Each stage writes its state every minute; the same command goes on from there, and
stages that are done are skipped. Sample sheets (PNG) and progress lines show how far it is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.paths import CACHE

from . import autoencoder, loras, model, text
from .data import Pictures, make_pictures
from .draw import SIZE_PX, prompt, random_scene
from .files import MODELS, NAMES, load_decoder, load_trained, lora_path, tokenizer_of_comfyui, write
from .loop import Loop, Stage, save_whole

LENGTH = 18  # text tokens of a training prompt, the last for all the padding
STEPS = 16


@dataclass(frozen=True)
class Plan:
    """How much of everything; the tests train a plan of a few steps.

    Attributes:
        pictures: of the transformer's training set.
        decoder_steps: with 16 crops of 48 pixels each.
        steps: of the transformer.
        cooldown: of its steps, the last ones, over which learning rates fall to zero.
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
    batch: int = 64
    lora_pictures: int = 1200
    lora_steps: int = 500
    shown: int = 24
    seed: int = 7


class Training:
    """The stages, in order, with what they share: a folder for states and sheets, and a plan."""

    def __init__(self, work: Path, models: Path, tokenizer: text.Tokenizer, plan: Plan, say: Callable[[str], None]):
        """Make the folders."""
        self.work, self.models, self.tokenizer, self.plan, self.say = work, models, tokenizer, plan, say
        work.mkdir(parents=True, exist_ok=True)
        self._loop = Loop(work, plan.seed, say)

    def run(self) -> None:
        """All stages; a second run finds them done."""
        self.train_decoder()
        self.train_model()
        for recipe in sorted(loras.RECIPES, key=lambda recipe: bool(recipe.over)):
            self.train_lora(recipe)
        took = self._loop.total_min()
        self.say(f"All of it took {took['cpu_s']:.1f} CPU minutes, {took['wall_s']:.1f} minutes on the clock")

    # Pictures

    def pictures(self, name: str, count: int, styles: tuple[str, ...], full: int, seed: int) -> Pictures:
        """Draw a set once; later runs read it."""
        path = self.work / f"{name}.pt"
        if not path.exists():
            made = make_pictures(
                count, seed, styles, full, lambda done, total: self.say(f"{name}: {done} of {total} pictures drawn")
            )
            save_whole(path, (made.quarters, made.prompts, made.full))
        return Pictures(*torch.load(path, weights_only=True))

    def flat(self) -> Pictures:
        """The transformer's training set."""
        return self.pictures("flat", self.plan.pictures, ("flat",), 0, self.plan.seed)

    def mixed(self) -> Pictures:
        """The decoder's: every style, so that LoRAs can be drawn too."""
        count = max(16, self.plan.pictures // 10)
        styles = ("outline", "neon", "stripes", "neon outline")
        return self.pictures("mixed", count, tuple(s for style in styles for s in ("flat", style)), count, 1)

    def whitening(self) -> autoencoder.Whitening:
        """Of the mixed pictures."""
        return autoencoder.Whitening.of(self.mixed().quarters / 255.0)

    # Stages

    def train_decoder(self) -> None:
        """The autoencoder's file."""
        path = self.models / NAMES["vae"]
        if path.exists():
            return
        mixed, whitening = self.mixed(), self.whitening()
        latents = autoencoder.encode(mixed.quarters / 255.0, whitening)
        torch.manual_seed(self.plan.seed)
        decoder = autoencoder.Decoder().to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, weight_decay=0.0)

        def step(index: int, random: torch.Generator) -> Tensor:
            rows = torch.randint(len(latents), (16,), generator=random)
            top, left = (int(value) for value in torch.randint(7, (2,), generator=random))
            crops = mixed.full[rows, :, 8 * top : 8 * top + 48, 8 * left : 8 * left + 48] / 255.0
            clean = latents[rows, :, top : top + 6, left : left + 6]
            noise = torch.randn(clean.shape, generator=random)
            noise *= 0.3 * torch.rand(len(rows), 1, 1, 1, generator=random)
            return autoencoder.decoder_loss(decoder, crops, clean, noise)

        steps = self.plan.decoder_steps
        self._loop.run(Stage("decoder", steps, steps // 2, [decoder], [optimizer], step, autocast=False))
        write(path, autoencoder.checkpoint(decoder, whitening))
        with torch.no_grad():
            shown = decoder(latents[:24])
        tiles = torch.stack([mixed.full[:24] / 255.0, shown], dim=1).flatten(0, 1)
        write_sheet(self.work / "decoder.png", tiles, columns=8)

    def train_model(self) -> None:
        """The transformer's file and the T5's."""
        paths = [self.models / NAMES[part] for part in ("model", "text")]
        if all(path.exists() for path in paths):
            return
        pictures, tokens = self.flat(), None
        latents = autoencoder.encode(pictures.quarters / 255.0, self.whitening())
        tokens = self.tokenizer(pictures.prompts, LENGTH)
        bias = text.attention_bias(LENGTH, latents.shape[2] * latents.shape[3] // 4)
        transformer, encoder = model.build(self.plan.seed), text.T5()
        both = nn.ModuleList([transformer, encoder])
        average = torch.optim.swa_utils.AveragedModel(
            both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
        )
        optimizers = _optimizers(transformer, encoder)
        embedding, frozen_from = encoder.shared.weight, self.plan.steps - self.plan.cooldown

        def step(index: int, random: torch.Generator) -> Tensor:
            embedding.requires_grad_(index < frozen_from)
            rows = torch.randint(len(latents), (self.plan.batch,), generator=random)
            encoded = encoder(tokens[rows])
            return flow_loss(transformer, latents[rows], encoded, bias, random)

        def after(index: int) -> None:
            encoder.freeze_bias()
            average.update_parameters(both)
            if index + 1 == frozen_from:  # from here on, the embeddings are what the file will hold
                embedding.data = embedding.data.to(torch.float8_e4m3fn).float()
                average.module[1].shared.weight.data.copy_(embedding.data)

        def show(index: int) -> None:
            self.sheet(self.work / "model.png", average.module[0], average.module[1])

        steps, modules = self.plan.steps, [both, average]
        self._loop.run(Stage("model", steps, self.plan.cooldown, modules, optimizers, step, after, show))
        write(paths[0], model.checkpoint(average.module[0]))
        write(paths[1], text.checkpoint(average.module[1]))
        show(self.plan.steps)

    def train_lora(self, recipe: loras.Recipe) -> None:
        """One LoRA's file, trained on the finished files of the others."""
        path = lora_path(self.models, recipe)
        if path.exists():
            return
        styles = (recipe.style, f"{recipe.over} {recipe.style}") if recipe.over else (recipe.style,)
        pictures = self.pictures(recipe.style, self.plan.lora_pictures, styles, 0, self.plan.seed + 1)
        latents = autoencoder.encode(pictures.quarters / 255.0, self.whitening())
        tokens = self.tokenizer(pictures.prompts, LENGTH)
        bias = text.attention_bias(LENGTH, latents.shape[2] * latents.shape[3] // 4)
        transformer, encoder = load_trained(self.models)
        with torch.no_grad():
            encoded = torch.cat([encoder(part) for part in tokens.split(256)])
        loras.attach(transformer, recipe, self.plan.seed)
        bases = [transformer]
        if recipe.over:
            (over,) = (other for other in loras.RECIPES if other.style == recipe.over)
            bases.append(load_trained(self.models)[0])
            loras.merge(bases[1], load_file(lora_path(self.models, over)))
            loras.attach(bases[1], recipe, self.plan.seed)
            loras.share(transformer, bases[1])
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)

        def step(index: int, random: torch.Generator) -> Tensor:
            base = index % len(bases)
            rows = torch.randint(len(latents) // len(bases), (self.plan.batch // 2,), generator=random)
            rows = rows * len(bases) + base
            return flow_loss(bases[base], latents[rows], encoded[rows], bias, random)

        name, steps = f"lora-{recipe.style}", self.plan.lora_steps * recipe.length
        self._loop.run(Stage(name, steps, steps // 2, [transformer], [optimizer], step))
        write(path, loras.checkpoint(transformer, recipe), recipe.metadata)
        self.sheet(self.work / f"{name}.png", transformer, encoder)

    def sheet(self, path: Path, transformer: nn.Module, encoder: text.T5) -> None:
        """Draw prompts, half of them with pairs that training never shows, and write them as one picture."""
        decoder = load_decoder(self.models)
        random = np.random.default_rng(3)
        prompts = [prompt(random_scene(random, held_out=bool(index % 2)), random) for index in range(self.plan.shown)]
        pictures = draw_prompts(transformer, encoder, decoder, self.tokenizer, prompts, seed=1)
        write_sheet(path, pictures, columns=8)
        path.with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def flow_loss(
    transformer: nn.Module, latents: Tensor, encoded: Tensor, bias: Tensor, random: torch.Generator
) -> Tensor:
    """Rectified flow: the velocity from pictures to noise, at times that prefer the middle and the noisy end.

    Source: Esser et al., Scaling Rectified Flow Transformers, 2024, https://arxiv.org/abs/2403.03206.
    """
    noise = torch.randn(latents.shape, generator=random)
    times = torch.sigmoid(0.4 + 1.2 * torch.randn(len(latents), generator=random))
    at = times[:, None, None, None]
    velocity = model.forward(transformer, (1 - at) * latents + at * noise, times, encoded, bias)
    return (velocity.float() - (noise - latents)).square().mean()


def draw_prompts(
    transformer: nn.Module,
    encoder: text.T5,
    decoder: nn.Module,
    tokenizer: text.Tokenizer,
    prompts: Sequence[str],
    seed: int,
    steps: int = STEPS,
) -> Tensor:
    """Pictures (N, 3, 96, 96) in 0–1."""
    side = SIZE_PX // 8
    noise = torch.randn(len(prompts), autoencoder.CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        encoded = encoder(tokenizer(prompts, LENGTH))
        latents = model.sample(transformer, noise, encoded, text.attention_bias(LENGTH, side * side // 4), steps)
        return decoder(latents).clamp(0, 1)


def write_sheet(path: Path, pictures: Tensor, columns: int) -> None:
    """Write pictures (N, 3, h, w) in 0–1 side by side, in rows of `columns`."""
    pixels = (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(pixels[i : i + columns], axis=1) for i in range(0, len(pixels), columns)]
    Image.fromarray(np.concatenate(rows)).resize((rows[0].shape[1] * 2, len(rows) * rows[0].shape[0] * 2), 1).save(path)


def _optimizers(transformer: nn.Module, encoder: text.T5) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, which takes a half of the steps, and AdamW for everything else."""
    matrices = [
        value for name, value in transformer.named_parameters() if value.ndim == 2 and "transformer_blocks" in name
    ]
    chosen = {id(value) for value in matrices}
    others = [value for value in transformer.parameters() if id(value) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": others, "lr": 2e-3},
                {"params": list(encoder.parameters()), "lr": 2e-3},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.0,
            foreach=True,
        ),
    ]


def main(arguments: Iterable[str] | None = None) -> int:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(prog="python -m pocket.train", description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the files")
    parser.add_argument("--work", type=Path, default=CACHE / "pocket", help="folder of states and sample sheets")
    options = parser.parse_args(arguments)
    # Sums over several threads are not the same bits every time.
    torch.set_num_threads(1)
    tokenizer = tokenizer_of_comfyui()
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{(time.monotonic() - started) / 60:5.1f} min  {line}", flush=True)

    Training(options.work, options.models, tokenizer, Plan(), say).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
