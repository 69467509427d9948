"""The first image after a restart: what is left of compiling when compiled code was kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.families.flux1 import Flux1Config
from accel.memory.budgets import GB

from .families.flux1 import DEV, QUICK
from .random_checkpoint import write_checkpoint
from .report import BenchmarkError, Goal, Report, Row

# Real width, few blocks: compiled code is the same for 2 blocks of a kind as for 38.
FEW = replace(DEV, depth=2, depth_single=4)
FACTOR = 1.3
STEPS, QUICK_STEPS = 8, 2
LATENT, QUICK_LATENT = 64, 16


def run(quick: bool) -> Report:
    """Measure at real width; `quick` takes a narrow model.

    Raises:
        BenchmarkError: a process failed, compiled when it should not have, or drew another picture.
    """
    config, steps, latent = (QUICK, QUICK_STEPS, QUICK_LATENT) if quick else (FEW, STEPS, LATENT)
    with tempfile.TemporaryDirectory(prefix="flux-hotswap-restart-", dir=Path.cwd()) as folder:
        values = _measure(Path(folder), config, steps, latent)
    return Report(
        title=f"The first image after a restart, {values['file_bytes'] / GB:.2f} GB of bf16 weights",
        rows=_rows(values),
        values=values,
        # Of a model that loads in milliseconds, fixed costs are all there is.
        goals=() if quick else (
            Goal(
                "first image after a restart over a warm image and a load",
                values["restart_first_image_s"] / (values["warm_image_s"] + values["load_s"]),
                FACTOR,
            ),
        ),
        notes=[
            f"Random weights of FLUX.1-dev's {'architecture' if quick else 'width'} with {config.depth} double and "
            f"{config.depth_single} single blocks; an image is {steps} steps on a latent of {latent} × {latent} with "
            "512 text tokens, on the CPU; no text encoder, no VAE.",
            "Every figure but the warm image comes from a process of its own, which has imported torch and diffusers "
            "before the clock starts, and has an empty temporary folder. The first image is load, compile and steps; "
            "load_s is a load alone, warm_image_s the median of three images in the restarted process.",
            "The weights are in the system's page cache in all of them.",
        ],
    )


def _measure(folder: Path, config: Flux1Config, steps: int, latent: int) -> dict[str, Any]:
    file, cache = folder / "random.safetensors", folder / "cache"
    size = write_checkpoint(file, config)

    def stage(name: str) -> dict[str, Any]:
        temporary = folder / f"temp-{name}"
        temporary.mkdir()
        return _stage(name, file, cache, temporary, steps, latent)

    load = stage("load")
    cold, restart = stage("cold"), stage("restart")
    if cold["compiles"] == 0 or restart["compiles"] or restart["warnings"]:
        raise BenchmarkError(
            f"the first process compiled {cold['compiles']} regions, the restarted one {restart['compiles']} "
            f"({restart['notices']}): compiled code was not kept."
        )
    if not cold["finite"] or cold["checksum"] != restart["checksum"]:
        raise BenchmarkError("the image after the restart is not that of the first process.")
    return {
        "file_bytes": size,
        "kept_bytes": sum(path.stat().st_size for path in cache.iterdir()),
        "steps": steps,
        "latent": latent,
        "blocks": [config.depth, config.depth_single],
        "cold_first_image_s": cold["first_image_s"],
        "restart_first_image_s": restart["first_image_s"],
        "warm_image_s": restart["warm_image_s"],
        "load_s": load["load_s"],
    }


def _stage(name: str, checkpoint: Path, cache: Path, temporary: Path, steps: int, latent: int) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHINDUCTOR_")}
    environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    command = [sys.executable, "-m", "benchmarks.restart_stage", "load" if name == "load" else "draw"]
    command += [str(checkpoint), str(cache), str(steps), str(latent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BenchmarkError(f"the {name} process failed: {last[0]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _rows(values: dict[str, Any]) -> list[Row]:
    return [
        Row("first image ever, compiling", f"{values['cold_first_image_s']:.2f} s"),
        Row(
            "first image after a restart",
            f"{values['restart_first_image_s']:.2f} s",
            f"compiled code on disk: {values['kept_bytes'] / 1e6:.1f} MB",
        ),
        Row("a later image", f"{values['warm_image_s']:.2f} s"),
        Row("load alone", f"{values['load_s']:.2f} s"),
    ]
