"""One process of the restart benchmark: `python -m benchmarks.restart_stage STAGE FILE CACHE STEPS LATENT`."""

from __future__ import annotations

import json
import sys
import time

import torch

from accel.checkpoint import inspect_checkpoint
from accel.compile.cache import CompileCache
from accel.engine import Engine
from accel.settings import EngineSettings

from .load_stage import Notices, inputs

WARM_IMAGES = 3


def main(arguments: list[str]) -> dict:
    """Load; then, unless only that is wanted, draw one image and some more."""
    import diffusers.models.transformers.transformer_flux  # noqa: F401 - takes seconds, and is not what is measured

    stage, file, cache, steps, latent = *arguments[:3], *map(int, arguments[3:])
    spec = inspect_checkpoint(file)
    given, notices = inputs(spec, latent), Notices()

    def draw() -> torch.Tensor:
        for _ in range(steps):
            output = engine(given)
        return output

    start = time.perf_counter()
    settings = EngineSettings(dtype="bf16", compile="regional")
    engine = Engine(spec, settings, notices, compile_cache=CompileCache(cache))
    engine.load()
    result = {"load_s": time.perf_counter() - start}
    if stage == "load":
        return result
    output = draw()
    result["first_image_s"] = time.perf_counter() - start
    times = []
    for _ in range(WARM_IMAGES):
        start = time.perf_counter()
        draw()
        times.append(time.perf_counter() - start)
    return result | {
        "warm_image_s": sorted(times)[WARM_IMAGES // 2],
        "compiles": engine.compiler.count,
        "warnings": notices.warnings,
        "finite": bool(torch.isfinite(output).all()),
        "checksum": float(output.double().abs().sum()),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])), flush=True)
