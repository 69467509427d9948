"""What every configuration of the ablation does: from which model, with which LoRAs, in which sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from accel.families.flux1 import Flux1Config
from harness.comfyui import FetchError, fetch

from .families.flux1 import DEV, one_of_each
from .flux_loras import KEY_PREFIX, RANK, visible_lora
from .random_checkpoint import write_checkpoint
from .report import BenchmarkError
from .subjects import Work

HIDDEN_SIZE, QUICK_HIDDEN_SIZE = DEV.hidden_size, 256
# Height of the latent and text tokens of the small model: 400 + 192 tokens; for --quick 16 + 8.
SMALL, QUICK = (40, 192), (8, 8)
TEXT_TOKENS = 512
LATENT_PIXELS = 8
SMALL_STEPS, STEPS = 2, 28
RESOLUTION = 1024


def title_of(work: Work, model: Path | None, quick: bool) -> str:
    """What was measured."""
    if model is not None:
        what = model.name
    elif isinstance(work.model, str):
        hidden_size = QUICK_HIDDEN_SIZE if quick else HIDDEN_SIZE
        what = f"one double and one single block of FLUX.1, hidden {hidden_size}"
    else:
        what = f"FLUX.1 with random weights, hidden {work.model.hidden_size}"
    return (
        f"{what}, latent {work.latent} × {work.latent}, {work.text_tokens} text tokens, {work.steps} steps an image, "
        f"two LoRAs in turn, {work.device}"
    )


def check_files(model: Path | None, loras: Sequence[Path]) -> None:
    """Make sure that the files are there and go together.

    Raises:
        BenchmarkError: they do not.
    """
    if model is None:
        if loras:
            raise BenchmarkError("--lora needs --model: without one, a small model and its LoRAs are made.")
        return
    if len(loras) != 2:
        raise BenchmarkError(f"--lora was given {len(loras)} times, expected twice: two LoRAs take turns.")
    for path in (model, *loras):
        if not path.is_file():
            raise BenchmarkError(f"there is no file {path}.")


def make_work(
    folder: Path,
    model: Path | None,
    loras: tuple[Path, ...],
    quick: bool,
    device: torch.device,
    steps: int | None,
    resolution: int,
    random: bool = False,
) -> Work:
    """What every configuration does; see `ablation.run` for the arguments.

    Raises:
        BenchmarkError: a number of steps or a resolution that cannot be drawn.
    """
    if random and not quick:
        loras = _write_loras(folder, DEV, device)
    if model is not None or (random and not quick):
        latent = resolution // LATENT_PIXELS
        if latent < 2 or latent % 2 or resolution % LATENT_PIXELS:
            raise BenchmarkError(f"--resolution is {resolution}, expected a multiple of {2 * LATENT_PIXELS} pixels.")
        paths = tuple(map(str, loras))
        return Work(DEV if random else str(model), paths, device.type, "", latent, TEXT_TOKENS, _steps(steps, STEPS))
    config = one_of_each(QUICK_HIDDEN_SIZE if quick else HIDDEN_SIZE)
    source: str | Flux1Config = config
    if not random:
        source = str(folder / "model.safetensors")
        write_checkpoint(folder / "model.safetensors", config)
    paths = tuple(map(str, _write_loras(folder, config, device)))
    latent, text_tokens = QUICK if quick else SMALL
    return Work(source, paths, device.type, "", latent, text_tokens, _steps(steps, SMALL_STEPS))


def _write_loras(folder: Path, config: Flux1Config, device: torch.device) -> tuple[Path, ...]:
    """Two LoRAs that one sees."""
    paths = tuple(folder / f"lora-{seed}.safetensors" for seed in range(2))
    for seed, path in enumerate(paths):
        save_file(visible_lora(config, path.stem, seed, RANK, device).state_dict(KEY_PREFIX), path)
    return paths


def _steps(chosen: int | None, default: int) -> int:
    if chosen is not None and chosen < 2:
        raise BenchmarkError(f"--steps is {chosen}, expected 2 or more: a step is timed from the end of another.")
    return chosen or default


def comfyui_folder() -> str:
    """ComfyUI's folder; fetched once.

    Raises:
        BenchmarkError: it cannot be fetched.
    """
    try:
        return str(fetch())
    except FetchError as exc:
        raise BenchmarkError(f"--peers needs ComfyUI: {exc}") from exc
