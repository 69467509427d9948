"""The rows of `python -m benchmarks gpu`, in the order of their worth: the time may end before them."""

from __future__ import annotations

from collections.abc import Sequence

from accel.attention import BACKENDS

from . import gpu_stages
from .gpu_job import Row
from .gpu_whole import whole
from .report import BenchmarkError
from .subjects import Setup

# Always run: it says which earlier results still count. The first one, so the libraries' import is in its time.
DEVICE = Row("device", "device", gpu_stages.device, 120)


def _whole(name: str, limit_s: float, setup: Setup) -> Row:
    return Row("whole", name, whole, limit_s, (setup,), least_s=25, cold=True)


def _steps(mode: str, resolution: int) -> Row:
    name = f"{'bf16' if mode == 'none' else mode}, {resolution} × {resolution}"
    return Row("step", name, gpu_stages.steps, 100, (mode, resolution), least_s=20)


ROWS = (
    Row("selftest", "selftest", gpu_stages.selftests, 60),
    Row("swap", "pack", gpu_stages.switches, 60, ("pack",)),
    Row("swap", "pools", gpu_stages.switches, 60, ("pools",)),
    Row("swap", "peers", gpu_stages.switches, 45, ("peers",)),
    _steps("none", 1024),
    _steps("fp8", 1024),
    _whole("pack, bf16, compiled", 120, Setup("pack", "regional", hotswap=True)),
    _whole("diffusers, bf16, eager, PEFT", 70, Setup("diffusers")),
    _whole("pack, fp8, compiled", 120, Setup("pack", "regional", "fp8", hotswap=True)),
    _whole("diffusers, bf16, compiled, hotswap", 110, Setup("diffusers", "regional", hotswap=True)),
    Row("offload", "streamed", gpu_stages.offloaded, 90, least_s=30),
    *(Row("attention", name, gpu_stages.attention, 30, (name,)) for name in BACKENDS),
    _steps("none", 512),
    _steps("fp8", 512),
    Row("swap", "prefetching", gpu_stages.switches, 45, ("prefetching",), least_s=20),
    _whole("diffusers, bf16, compiled, without LoRA", 90, Setup("diffusers", "regional", lora=False)),
    _whole("stock ComfyUI, bf16", 150, Setup("comfyui")),
    _whole("pack, bf16, eager", 70, Setup("pack", hotswap=True)),
    _whole("diffusers, fp8, compiled, hotswap", 110, Setup("diffusers", "regional", "fp8", hotswap=True)),
)
STAGES = tuple(dict.fromkeys(row.stage for row in ROWS))


def rows_of(stages: Sequence[str] | None) -> list[Row]:
    """The rows of some stages, or all.

    Raises:
        BenchmarkError: there is no such stage.
    """
    unknown = [name for name in stages or () if name not in STAGES]
    if unknown:
        raise BenchmarkError(f"--stages names {', '.join(unknown)}, expected some of: {', '.join(STAGES)}.")
    return [row for row in ROWS if not stages or row.stage in stages]
