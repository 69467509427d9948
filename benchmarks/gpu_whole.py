"""Whole FLUX.1-dev with random weights, in the hands of one library: images, switches, memory, kernels."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from accel.lora.stack import LoraStack
from accel.memory.budgets import GB
from accel.offload.plan import demand_of
from accel.quantize.modes import MODES, refusal
from harness.comfyui import source_path

from .ablation_report import distance
from .device_memory import free_bytes, peak_bytes, start_peak
from .families.flux1 import DEV, QUICK
from .flux_loras import DTYPE, KEY_PREFIX, RANK, STRENGTH, lora_weights, visible_lora
from .gpu_job import Job
from .kernel_profile import profile_kernels
from .make_subject import make_subject
from .pack_subject import PackSubject
from .report import BenchmarkError
from .sampling import Clock, Prompt, prompt_for
from .subjects import Setup, Subject, Work
from .timing import Stopwatch

LATENT, TEXT_TOKENS, STEPS = 128, 512, 8
QUICK_LATENT, QUICK_TEXT_TOKENS, QUICK_STEPS = 8, 8, 2
FULL_STEPS = 28
IMAGES, SWITCHES, ENGINE_SWITCHES = 2, 2, 8
WIDE_RANK = 128
# A LoRA that changes an image by less was not applied.
LEAST_CHANGE = 0.01
# What a row needs at its end for the profile.
PROFILE_S = 12.0


def whole(job: Job, setup: Setup) -> None:
    """Load, draw, switch, draw with other stacks, look at the kernels."""
    work, setup = _work(job), replace(setup, compile="off") if job.quick else setup
    missing = _missing(job, setup, work)
    if missing is not None:
        job.add(missing=missing)
        return
    drawn = Drawing(job, setup, work)
    drawn.first_image()
    drawn.images()
    if setup.lora:
        drawn.switches()
    if isinstance(drawn.subject, PackSubject):
        drawn.stacks()
        drawn.engine_switches()
    drawn.check()
    if job.left_s > PROFILE_S:
        drawn.profile()


class Drawing:
    """One subject, and the figures of its images. Call order: `first_image`, then the others in any.

    Attributes:
        subject: what draws.
    """

    def __init__(self, job: Job, setup: Setup, work: Work) -> None:
        """Read nothing yet."""
        self._job = job
        self._setup = setup
        self._work = work
        self._stopwatch = Stopwatch(job.device)
        self._prompt: Prompt = prompt_for(work.spec().config, work.latent, work.text_tokens, work.steps)
        self._first, self._second = work.loras if setup.lora else (None, None)
        self._latent = self._prompt.noise
        self.subject: Subject = make_subject(setup, work)

    def first_image(self) -> None:
        """Load, bind a LoRA, compile, draw."""
        add, device, seconds = self._job.add, self._job.device, self._stopwatch.seconds
        start_peak(device)
        load_s, _ = seconds(self.subject.load)
        add(load_s=load_s, load_peak_gb=_gb(peak_bytes(device)))
        start_peak(device)
        use_s, _ = seconds(lambda: self.subject.use(self._first))
        image_s, self._latent = seconds(self._draw)
        add(first_use_s=use_s, first_image_s=image_s, steps=self._work.steps, peak_gb=_gb(peak_bytes(device)))
        if not bool(self._latent.isfinite().all()):
            raise BenchmarkError("the image is not finite.")
        if isinstance(self.subject, PackSubject):
            engine = self.subject.engine
            add(compiles=engine.compiler.count, compile_s=engine.compiler.seconds, attention=engine.attention)
            if engine.compiler.failure is not None:
                raise BenchmarkError(f"it runs uncompiled: {engine.compiler.failure}")
        self._compare()

    def images(self) -> None:
        """Further images with the same LoRA."""
        step_ms = statistics.median(self._step_ms() for _ in range(IMAGES))
        self._job.add(step_ms=step_ms, s_28_steps_extrapolated=step_ms * FULL_STEPS / 1e3)

    def switches(self) -> None:
        """To the other LoRA and back, as a node does it, each with the image after it."""
        use_ms, image_s = [], []
        for number in range(SWITCHES):
            lora = (self._second, self._first)[number % 2]
            used_s, _ = self._stopwatch.seconds(lambda lora=lora: self.subject.use(lora))
            drawn_s, latent = self._stopwatch.seconds(self._draw)
            use_ms.append(used_s * 1e3)
            image_s.append(used_s + drawn_s)
            if number == 0:
                changed = distance(self._change(latent), self._change(self._latent))
                if not changed > LEAST_CHANGE:
                    raise BenchmarkError(f"the other LoRA changes the image by {changed:.2g}: it was not applied.")
        self._job.add(
            switch_ms=statistics.median(use_ms), switched_image_s=statistics.median(image_s), switches_ms=use_ms
        )

    def stacks(self) -> None:
        """Steps with nothing bound, rank 16, rank 128, two LoRAs."""
        engine, stacks = self.subject.engine, self._stacks()
        figures: dict[str, float] = {}
        for name, stack in stacks.items():
            engine.swap(stack)
            self._draw()  # kernels are chosen at the first call
            figures[f"{name}_step_ms"] = self._step_ms()
            self._job.add(**figures)
        bare = figures["none_step_ms"]
        self._job.add(**{f"{name}_over_none": figures[f"{name}_step_ms"] / bare for name in stacks if name != "none"})

    def engine_switches(self) -> None:
        """The engine's own switches, of LoRAs that it knows."""
        engine = self.subject.engine
        one, other = (LoraStack().with_lora(engine.read_lora(path), STRENGTH) for path in self._work.loras)
        hot = [one, other] * ENGINE_SWITCHES
        strengths = [
            LoraStack().with_lora(engine.read_lora(self._first), 0.3 + 0.05 * number) for number in range(len(hot))
        ]
        for name, stacks in (("hot", hot), ("strength", strengths)):
            took = [self._stopwatch.seconds(lambda stack=stack: engine.swap(stack)) for stack in stacks]
            counted = took[len(took) // 2 :]
            sources = sorted({report.source for _, report in counted})
            job_ms = statistics.median(used_s for used_s, _ in counted) * 1e3
            self._job.add(**{f"{name}_switch_ms": job_ms, f"{name}_switch_sources": sources})

    def check(self) -> None:
        """Nothing was compiled again, everything was applied; and the memory that it took."""
        if isinstance(self.subject, PackSubject):
            self._job.add(recompiles=self.subject.engine.compiler.recompiles)
        elif self._setup.library == "diffusers":
            # More graphs than block types: it compiled again.
            self._job.add(graphs=torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))
        self.subject.check()
        self._job.add(peak_gb=_gb(peak_bytes(self._job.device)))

    def profile(self) -> None:
        """Kernels of one image."""
        self.subject.use(self._first)
        self._job.add(profile=profile_kernels(self._draw, self._stopwatch, self._work.steps))

    def _stacks(self) -> dict[str, LoraStack]:
        engine = self.subject.engine
        first, second = (engine.read_lora(path) for path in self._work.loras)
        wide = lora_weights(visible_lora(engine.spec.config, "wide", 3, WIDE_RANK, self._job.device))
        one = LoraStack().with_lora(first, STRENGTH)
        return {
            "none": LoraStack(),
            "rank16": one,
            "two": one.with_lora(second, STRENGTH),
            "rank128": LoraStack().with_lora(wide, STRENGTH),
        }

    def _draw(self) -> Tensor:
        clock = Clock(lambda: None)  # a sampler does not wait for the device between two steps
        clock.begin()
        return self.subject.sample(self._prompt, clock)

    def _step_ms(self) -> float:
        return self._stopwatch.seconds(self._draw)[0] * 1e3 / self._work.steps

    def _change(self, latent: Tensor) -> np.ndarray:
        return (latent - self._prompt.noise).numpy()

    def _compare(self) -> None:
        """With what the first library that got so far made of the same noise, with or without the same LoRA."""
        path = self._job.folder / f"change-{'lora' if self._setup.lora else 'none'}.npy"
        change = self._change(self._latent)
        if path.is_file():
            self._job.add(distance_from_the_first_row=distance(change, np.load(path)))
        else:
            np.save(path, change)


def _work(job: Job) -> Work:
    config = QUICK if job.quick else DEV
    paths = tuple(job.folder / f"lora-{seed}.safetensors" for seed in (1, 2))
    for seed, path in enumerate(paths, start=1):
        if not path.is_file():
            _save(path, visible_lora(config, path.stem, seed, RANK, job.device).state_dict(KEY_PREFIX))
    sizes = (QUICK_LATENT, QUICK_TEXT_TOKENS, QUICK_STEPS) if job.quick else (LATENT, TEXT_TOKENS, STEPS)
    tree = source_path()
    comfyui = str(tree) if (tree / "main.py").is_file() else ""
    return Work(config, (str(paths[0]), str(paths[1])), str(job.device), comfyui, *sizes)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Whole or not at all: a row may be ended while it writes."""
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def _missing(job: Job, setup: Setup, work: Work) -> str | None:
    """Why a setup cannot run here, or None."""
    if setup.quantization != "none" and (reason := refusal(MODES[setup.quantization], job.device)) is not None:
        return f"quantization {setup.quantization} {reason}"
    if setup.library == "diffusers" and setup.quantization == "fp8" and job.device.type == "cpu":
        return "torchao's own float8 configuration refuses a CPU"
    if setup.library == "comfyui" and not work.comfyui:
        return "needs a ComfyUI: python -m harness.comfyui fetches one"
    free = free_bytes(job.device)
    if free is not None:
        # The pack quantizes weight by weight while it loads; the others need the weights as they are first.
        stored = setup.quantization if setup.library == "pack" else "none"
        demand = demand_of(work.spec(), DTYPE, stored, setup.compile != "off")
        needed = demand.weights.total + demand.activation_bytes
        if needed > free:
            return f"needs {needed / GB:.1f} GB of the card, {free / GB:.1f} GB are free"
    return None


def _gb(size: int | None) -> float | None:
    return None if size is None else size / GB
