"""`python -m pocket.evaluate`: what a pocket model draws, measured from pixels, through this pack's engine.

Prompts ask for pairs of shape and colour that training never showed. Every setting of the engine that changes numbers
draws the same prompts from the same noise, and is compared with bfloat16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from accel import settings as engine_settings
from accel.checkpoint import inspect_checkpoint
from accel.engine import Engine
from accel.errors import AccelError
from accel.lora.kinds.lowrank import Factors, compress
from accel.lora.stack import LoraStack
from accel.settings import EngineSettings, Quantization
from accel.step_cache import StepCache, StepCacheSettings
from benchmarks.report import machine

from . import measure
from .autoencoder import average
from .draw import Pixels
from .files import MODELS, load_decoder, load_trained, lora_path, names, tokenizer_of_comfyui, write
from .kind import Kind
from .kinds import KINDS
from .quality import Request, edit_requests, effects, following, held_out_requests, pictures_before, plain_requests
from .report import markdown
from .sheet import STEPS
from .stock_merge import evaluate_merge

BATCH = 16
# FLUX.1 is drawn with about so many steps, which are closer to one another than those of `STEPS`.
CACHED_STEPS = 28
CACHED_PROMPTS = 48
EDITS = 96


class Pocket:
    """Draws with the files in a folder of models."""

    def __init__(self, kind: Kind, models: Path) -> None:
        """Read the text encoder and the decoder; engines come with each call."""
        self.kind, self.models = kind, models
        self._tokenizer = tokenizer_of_comfyui(kind)
        _, self._encoder = load_trained(kind, models)
        self._decoder = load_decoder(kind, models)

    def engine(self, settings: EngineSettings, file: Path | None = None) -> Engine:
        """An engine with the transformer, or with another file of its sizes."""
        engine = Engine(inspect_checkpoint(str(file or self.models / self.kind.files["model"])), settings)
        engine.load()
        return engine

    def draw(
        self, engine: Engine, requests: Sequence[Request], loras: Sequence[tuple[Path, float]] = (), steps: int = STEPS
    ) -> list[Pixels]:
        """Pictures (96, 96, 3), 0–1, as ComfyUI draws them with `euler`, cfg 1 and the kind's sigmas.

        One text token stands for all the padding, see `padding`: a sixth of the time.

        Args:
            engine: loaded.
            requests: what to draw; all of them change a picture, or none.
            loras: (file, strength), first applied first.
            steps: of the sampler.
        """
        stack = LoraStack()
        for path, strength in loras:
            stack = stack.with_lora(engine.read_lora(str(path)), strength)
        engine.swap(stack)
        pictures = []
        for start in range(0, len(requests), BATCH):
            pictures += self._draw_batch(engine, requests[start : start + BATCH], steps)
        return pictures

    def draw_cached(
        self, engine: Engine, requests: Sequence[Request], settings: StepCacheSettings, steps: int
    ) -> tuple[list[Pixels], float]:
        """As `draw`, with a step cache, picture by picture, as in a batch the one that changes most decides for all.

        Returns:
            The pictures, and the share of steps that were skipped.
        """
        pictures, caches = [], [StepCache(settings) for _ in requests]
        for request, cache in zip(requests, caches, strict=True):
            pictures += self._draw_batch(engine, [request], steps, cache)
        return pictures, sum(cache.skipped for cache in caches) / (steps * len(requests))

    def _draw_batch(
        self, engine: Engine, requests: Sequence[Request], steps: int, cache: StepCache | None = None
    ) -> list[Pixels]:
        latents = torch.cat([self.kind.noise(request.seed) for request in requests])
        sigmas, length = self.kind.sigmas(steps), self.kind.text.length
        with torch.inference_mode():
            encoded = self._encoder(self._tokenizer([request.prompt for request in requests], length))
            before = requests[0].before is not None
            references = (self._encode(pictures_before(requests)).to(engine.dtype),) if before else ()
            bias = self.kind.bias(length, 1 + len(references)).to(engine.dtype)
            for now, after in pairwise(sigmas):
                timestep = now.expand(len(requests))
                inputs = self.kind.transformer.inputs(
                    latents.to(engine.dtype),
                    timestep,
                    encoded.to(engine.dtype),
                    references=references,
                    attention_mask=bias,
                    step_cache=None if cache is None else cache.call(timestep),
                )
                latents = latents + (after - now) * engine(inputs).float()
            decoded = self._decoder(latents).clamp(0, 1).permute(0, 2, 3, 1)
        return list(decoded.numpy().copy())

    def _encode(self, pictures: Tensor) -> Tensor:
        latents = self.kind.latents
        if latents.read is None:
            raise ValueError(f"{self.kind.title} changes no pictures: leave out what is to be changed.")
        whitening = latents.read(load_file(self.models / self.kind.files["vae"]))
        return latents.encode(average(pictures, latents.averaged), whitening)


def evaluate_loras(pocket: Pocket, requests: Sequence[Request]) -> dict[str, Any]:
    """Each LoRA off, at half and at full strength, and pairs of them."""
    engine = pocket.engine(EngineSettings(dtype="bf16", compile="off"))
    plain = pocket.draw(engine, requests)
    result: dict[str, Any] = {"none": effects(plain, plain)}
    paths = {recipe.style: lora_path(pocket.models, recipe) for recipe in pocket.kind.recipes}
    for style, path in paths.items():
        for strength in (0.5, 1.0):
            drawn = pocket.draw(engine, requests, [(path, strength)])
            result[f"{style} × {strength:g}"] = effects(drawn, plain)
    for first, second in combinations(paths, 2):
        drawn = pocket.draw(engine, requests, [(paths[first], 1.0), (paths[second], 1.0)])
        result[f"{first} + {second}"] = effects(drawn, plain)
    after = pocket.draw(engine, requests)
    result["none again is bit-identical"] = all(np.array_equal(a, b) for a, b in zip(after, plain, strict=True))
    return result


def evaluate_edits(pocket: Pocket, requests: Sequence[Request]) -> dict[str, Any]:
    """Pictures in another colour: what they show, and how like the reference is what should stay."""
    engine = pocket.engine(EngineSettings(dtype="bf16", compile="off"))
    drawn = pocket.draw(engine, requests)
    overlaps = [measure.same_place(picture, request.before) for picture, request in zip(drawn, requests, strict=True)]
    return {"follows": following(drawn, requests), "overlap": round(float(np.mean(overlaps)), 4)}


def evaluate_modes(pocket: Pocket, requests: Sequence[Request], compile: str) -> dict[str, Any]:
    """Every dtype and quantization of the engine: PSNR against bfloat16, with and without a LoRA, and what it draws."""
    lora = [(lora_path(pocket.models, pocket.kind.recipes[0]), 1.0)]
    reference: tuple[list[Pixels], list[Pixels]] | None = None
    result: dict[str, Any] = {}
    for name, settings in engine_modes(compile):
        try:
            engine = pocket.engine(settings)
            start = time.perf_counter()
            drawn = pocket.draw(engine, requests)
            seconds = time.perf_counter() - start
            with_lora = pocket.draw(engine, requests[:32], lora)
        except AccelError as exc:
            result[name] = {"cannot run here": str(exc)}
            continue
        if reference is None:
            reference = (drawn, with_lora)
        result[name] = {
            "psnr_db": measure.psnr(drawn, reference[0]),
            "psnr_db_with_lora": measure.psnr(with_lora, reference[1]),
            "follows": following(drawn, requests),
            "picture_s": seconds / len(requests),
            "weight_bytes": engine.bytes,
        }
    return result


def engine_modes(compile: str) -> Iterator[tuple[str, EngineSettings]]:
    """bfloat16 first, then every other dtype and quantization that the engine's settings know."""
    yield "bf16", EngineSettings(dtype="bf16", compile=compile)
    for dtype in engine_settings.DTYPES:
        if dtype not in ("auto", "bf16"):
            yield dtype, EngineSettings(dtype=dtype, compile=compile)
    for mode in engine_settings.QUANTIZATION_MODES:
        if mode != "none":
            yield mode, EngineSettings(dtype="bf16", compile=compile, quantization=Quantization(mode))


def evaluate_step_cache(pocket: Pocket, requests: Sequence[Request]) -> dict[str, Any]:
    """The step cache at several thresholds: PSNR against every step computed, what it draws, and what it skips."""
    engine = pocket.engine(EngineSettings(dtype="bf16", compile="off"))
    result: dict[str, Any] = {}
    for steps in (STEPS, CACHED_STEPS):
        reference: list[Pixels] | None = None
        for threshold in (0.0, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.3):
            drawn, skipped = pocket.draw_cached(engine, requests, StepCacheSettings(threshold), steps)
            reference = drawn if reference is None else reference
            result[f"{steps} steps, threshold {threshold:g}"] = {
                "skipped": round(skipped, 4),
                "psnr_db": measure.psnr(drawn, reference),
                "follows": following(drawn, requests),
            }
    return result


def evaluate_ranks(pocket: Pocket, requests: Sequence[Request]) -> dict[str, Any]:
    """LoRAs truncated to lower ranks by SVD: PSNR against the whole LoRA, and what is left of its effect."""
    engine = pocket.engine(EngineSettings(dtype="bf16", compile="off"))
    plain = pocket.draw(engine, requests)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in pocket.kind.recipes:
            whole = lora_path(pocket.models, recipe)
            reference = pocket.draw(engine, requests, [(whole, 1.0)])
            for rank in [rank for rank in (1, 2, 4, 8) if rank < recipe.rank]:
                path = Path(folder) / f"{rank}-{recipe.file}"
                write(path, truncated(load_file(whole), rank))
                drawn = pocket.draw(engine, requests, [(path, 1.0)])
                result[f"{recipe.style}, rank {rank} of {recipe.rank}"] = {
                    "psnr_db": measure.psnr(drawn, reference),
                    "effect": effects(drawn, plain)[recipe.style],
                    "effect_of_whole": effects(reference, plain)[recipe.style],
                }
    return result


def truncated(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A LoRA file's tensors at a lower rank: the nearest product of each pair of matrices.

    A kohya alpha is scaled with the rank, so that alpha / rank stays.
    """
    result = {}
    for name, down in tensors.items():
        for a, b in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if f".{a}." in name:
                other = name.replace(f".{a}.", f".{b}.")
                cut = compress(Factors(down.float(), tensors[other].float()), 0.0, rank)
                result[name] = cut.lora_A.to(down.dtype).contiguous()
                result[other] = cut.lora_B.to(down.dtype).contiguous()
                alpha = name.split(f".{a}.")[0] + ".alpha"
                if alpha in tensors:
                    scaled = tensors[alpha].float() * len(cut.lora_A) / len(down)
                    result[alpha] = scaled.to(tensors[alpha].dtype)
    return result


def main(arguments: Iterable[str] | None = None) -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m pocket.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=KINDS, default="flux1", help="which model to measure")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the files")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--markdown", type=Path, help="also write them here as tables")
    parser.add_argument("--prompts", type=int, default=192, help="held-out prompts per mode")
    parser.add_argument("--compile", choices=engine_settings.COMPILE_MODES, default="off")
    parser.add_argument("--merge", action="store_true", help="also compare with ComfyUI's merge into fp8 weights")
    options = parser.parse_args(arguments)
    kind = KINDS[options.model]
    if options.merge and options.model != "flux1":
        parser.error("--merge draws with Pocket FLUX alone; leave --model out")
    pocket = Pocket(kind, options.models)
    held_out, plain = held_out_requests(options.prompts), plain_requests(32)
    figures: dict[str, Any] = {"bytes": sum((options.models / name).stat().st_size for name in names(kind))}
    cached, merged = held_out[:CACHED_PROMPTS], plain[:8]
    prompts = {"modes": len(held_out), "step cache": len(cached), "loras": len(plain), "fp8 merge": len(merged)}
    figures |= {"prompts": prompts, "made on": {"machine": machine(), "date": date.today().isoformat()}}
    figures["modes"] = evaluate_modes(pocket, held_out, options.compile)
    figures["loras"] = evaluate_loras(pocket, plain)
    if kind.edits:
        edits = edit_requests(EDITS)
        figures["prompts"]["edits"] = len(edits)
        figures["edits"] = evaluate_edits(pocket, edits)
    figures["step cache"] = evaluate_step_cache(pocket, cached)
    figures["svd"] = evaluate_ranks(pocket, plain)
    if options.merge:
        figures["fp8 merge"] = evaluate_merge(options.models, merged)
    report = json.dumps(figures, indent=2, ensure_ascii=False)
    print(report)
    if options.json:
        options.json.write_text(report + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
