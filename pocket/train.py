"""`python -m pocket.train`: draw pictures, train the decoder, the transformer with its text encoder, and LoRAs.

Everything follows from the seed. Each stage writes its state every minute; the same command goes on from there, and
stages that are done are skipped. Sample sheets (PNG) and progress lines show how far it is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.paths import CACHE

from . import autoencoder, loras, model
from .draw import prompt, random_scene
from .files import MODELS, load_decoder, load_trained, lora_path, tokenizer_of_comfyui, write
from .kind import Kind
from .kinds import KINDS
from .loop import Loop, Stage
from .quality import edit_requests, pictures_before
from .sets import Plan, Sets
from .sheet import draw_prompts, write_sheet

CROP_PX = 48  # what the decoder is trained on


PLANS = {"flux1": Plan(), "flux2": Plan(steps=5000, cooldown=1600, again=2000, batch=48, lora_steps=500)}


class Training:
    """The stages, in order, with what they share: a folder for states and sheets, and a plan."""

    def __init__(self, kind: Kind, work: Path, models: Path, plan: Plan, say: Callable[[str], None]):
        """Make the folders."""
        self.kind, self.work, self.models, self.plan, self.say = kind, work, models, plan, say
        self.tokenizer = tokenizer_of_comfyui(kind)
        work.mkdir(parents=True, exist_ok=True)
        self.sets = Sets(kind, self.tokenizer, work, plan, say)
        self._loop = Loop(work, plan.seed, say)

    def run(self) -> None:
        """All stages; a second run finds them done."""
        self.train_decoder()
        self.train_model()
        for recipe in sorted(self.kind.recipes, key=lambda recipe: bool(recipe.over)):
            self.train_lora(recipe)
        took = self._loop.total_min()
        self.say(f"All of it took {took['cpu_s']:.1f} CPU minutes, {took['wall_s']:.1f} minutes on the clock")

    # Stages

    def train_decoder(self) -> None:
        """The autoencoder's file."""
        path, kind = self.models / self.kind.files["vae"], self.kind.latents
        if path.exists():
            return
        mixed, whitening = self.sets.mixed(), self.sets.whitening()
        latents = kind.encode(mixed.averages / 255.0, whitening)
        torch.manual_seed(self.plan.seed)
        decoder = kind.decoder().to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, weight_decay=0.0)
        unit, crop = kind.pixels, CROP_PX // kind.pixels
        places = self.kind.side - crop + 1

        def step(index: int, random: torch.Generator) -> Tensor:
            rows = torch.randint(len(latents), (16,), generator=random)
            top, left = (int(value) for value in torch.randint(places, (2,), generator=random))
            crops = mixed.full[rows, :, unit * top :, unit * left :][:, :, :CROP_PX, :CROP_PX] / 255.0
            clean = latents[rows, :, top : top + crop, left : left + crop]
            noise = torch.randn(clean.shape, generator=random)
            noise *= 0.3 * torch.rand(len(rows), 1, 1, 1, generator=random)
            return autoencoder.decoder_loss(decoder, crops, clean, noise)

        steps = self.plan.decoder_steps
        self._loop.run(Stage("decoder", steps, steps // 2, [decoder], [optimizer], step, autocast=False))
        write(path, kind.checkpoint(decoder, whitening))
        with torch.no_grad():
            shown = decoder(latents[:24])
        tiles = torch.stack([mixed.full[:24] / 255.0, shown], dim=1).flatten(0, 1)
        write_sheet(self.work / "decoder.png", tiles, columns=8)

    def train_model(self) -> None:
        """The files of the transformer and of the text encoder."""
        kind, paths = self.kind, [self.models / self.kind.files[part] for part in ("model", "text")]
        if all(path.exists() for path in paths):
            return
        drawn = self.sets.examples(self.sets.flat())
        changed = self.sets.examples(self.sets.edits()) if kind.edits else drawn
        tokens = torch.cat([drawn.tokens.flatten(), changed.tokens.flatten()])
        transformer, encoder = model.build(kind.transformer, self.plan.seed), kind.text.new(self.tokenizer, tokens)
        both = nn.ModuleList([transformer, encoder])
        average = torch.optim.swa_utils.AveragedModel(
            both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
        )
        embedding, frozen_from = encoder.embedding, self.plan.steps - self.plan.cooldown

        def step(index: int, random: torch.Generator) -> Tensor:
            embedding.requires_grad_(index < frozen_from)
            examples = changed if kind.edits and not index % kind.edits else drawn
            rows = torch.randint(len(examples.latents), (self.plan.batch,), generator=random)
            encoded = encoder(examples.tokens[rows])
            return kind.flow_loss(transformer, examples.latents[rows], encoded, random, examples.references(rows))

        def after(index: int) -> None:
            encoder.after_step()
            average.update_parameters(both)
            if index + 1 == frozen_from:  # from here on, the embeddings are what the file will hold
                embedding.data = embedding.data.to(torch.float8_e4m3fn).float()
                average.module[1].embedding.data.copy_(embedding.data)

        def show(index: int) -> None:
            self.sheet("model", *average.module)
            if kind.edits:
                self.sheet_of_edits("edits", *average.module)

        plan, modules, optimizers = self.plan, [both, average], _optimizers(transformer, encoder)
        steps = plan.steps + plan.again
        stage = Stage("model", steps, plan.cooldown, modules, optimizers, step, after, show, again=plan.again)
        self._loop.run(stage)
        write(paths[0], model.checkpoint(kind.transformer, average.module[0]))
        write(paths[1], kind.text.checkpoint(average.module[1]))
        show(steps)

    def train_lora(self, recipe: loras.Recipe) -> None:
        """One LoRA's file, trained on the finished files of the others."""
        path = lora_path(self.models, recipe)
        if path.exists():
            return
        examples = self.sets.examples(self.sets.styled(recipe))
        transformer, encoder = load_trained(self.kind, self.models)
        with torch.no_grad():
            encoded = torch.cat([encoder(part) for part in examples.tokens.split(256)])
        loras.attach(transformer, recipe, self.plan.seed)
        bases = [transformer]
        if recipe.over:
            (over,) = (other for other in self.kind.recipes if other.style == recipe.over)
            bases.append(load_trained(self.kind, self.models)[0])
            loras.merge(bases[1], over, load_file(lora_path(self.models, over)))
            loras.attach(bases[1], recipe, self.plan.seed)
            loras.share(transformer, bases[1])
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)

        def step(index: int, random: torch.Generator) -> Tensor:
            base = index % len(bases)
            rows = torch.randint(len(encoded) // len(bases), (self.plan.batch // 2,), generator=random)
            rows = rows * len(bases) + base
            return self.kind.flow_loss(bases[base], examples.latents[rows], encoded[rows], random)

        name, steps = f"lora-{recipe.style}", self.plan.lora_steps * recipe.length
        self._loop.run(Stage(name, steps, steps // 2, [transformer], [optimizer], step))
        write(path, loras.checkpoint(transformer, recipe), recipe.metadata)
        self.sheet(name, transformer, encoder)

    # Sample sheets

    def sheet(self, name: str, transformer: nn.Module, encoder: nn.Module) -> None:
        """Draw prompts, half of them with pairs that training never shows, and write them as one picture."""
        random = np.random.default_rng(3)
        prompts = [prompt(random_scene(random, held_out=bool(index % 2)), random) for index in range(self.plan.shown)]
        decoder = load_decoder(self.kind, self.models)
        pictures = draw_prompts(self.kind, transformer, encoder, decoder, self.tokenizer, prompts, seed=1)
        self._write(name, pictures, prompts)

    def sheet_of_edits(self, name: str, transformer: nn.Module, encoder: nn.Module) -> None:
        """The same for changes, each picture beside what was to be changed."""
        requests = edit_requests(self.plan.shown, seed=3)
        prompts, decoder = [request.prompt for request in requests], load_decoder(self.kind, self.models)
        before, kind = pictures_before(requests), self.kind.latents
        latents = kind.encode(autoencoder.average(before, kind.averaged), self.sets.whitening())
        drawn = draw_prompts(
            self.kind, transformer, encoder, decoder, self.tokenizer, prompts, seed=1, before=latents
        )
        self._write(name, torch.stack([before, drawn], dim=1).flatten(0, 1), prompts)

    def _write(self, name: str, pictures: Tensor, prompts: list[str]) -> None:
        path = self.work / f"{name}.png"
        write_sheet(path, pictures, columns=8)
        path.with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def _optimizers(transformer: nn.Module, encoder: nn.Module) -> list[torch.optim.Optimizer]:
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
    parser.add_argument("--model", choices=KINDS, default="flux1", help="which model to train")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the files")
    parser.add_argument(
        "--work", type=Path, help="folder of states and sample sheets; default: one of the model's in the cache"
    )
    options = parser.parse_args(arguments)
    # Sums over several threads are not the same bits every time.
    torch.set_num_threads(1)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{(time.monotonic() - started) / 60:5.1f} min  {line}", flush=True)

    work = options.work or CACHE / f"pocket-{options.model}"
    Training(KINDS[options.model], work, options.models, PLANS[options.model], say).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
