"""Which of several ways to compute a product is the fastest on this GPU: measured, once per shape.

Whether a fused kernel beats cuBLAS and a second product depends on the GPU, the sizes and the rank.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .kernels import CONFIGS, TOLERANCE, Config

log = logging.getLogger(__name__)

# Of one measurement; the fastest of them counts.
REPEATS = 5


class Autotuner:
    """Remembers the fastest way for each shape.

    Attributes:
        chosen: device, dtype, size and shape -> the tile sizes that won there, or None where separate products did.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self.chosen: dict[Hashable, Config | None] = {}

    def fastest(
        self,
        x: Tensor,
        shape: tuple,
        fused: Callable[[Config], Tensor],
        separate: Callable[[], Tensor],
        configs: tuple[Config, ...] = CONFIGS,
    ) -> Tensor:
        """Compute by whatever is fastest on this GPU: the kernel with some tile sizes, or `separate`.

        The first call with a shape measures, takes milliseconds, and waits for the GPU; a kernel that does not compile,
        or whose result is not that of `separate`, is never used.

        Args:
            x: what is read, (rows, k), for its rows, dtype and device.
            shape: what else the fastest way depends on.
            fused: runs the kernel; as often as one likes, with the same result.
            separate: likewise, without it.
            configs: tile sizes to try.
        """
        # Token counts of one resolution differ by the prompt's length; the winner changes slowly with them.
        key = (x.device, x.dtype, round(2 * math.log2(max(x.shape[0], 1))), *shape)
        if key not in self.chosen:
            candidates = {config: functools.partial(fused, config) for config in configs}
            self.chosen[key] = choose(candidates, separate, _seconds)
        config = self.chosen[key]
        return separate() if config is None else fused(config)


@functools.cache
def autotuner() -> Autotuner:
    """The one of this process.

    PyTorch calls an operator with tensors alone, so nothing else can be handed to the products in it; and what is
    measured depends on the GPU and the shape, not on whose product it is.
    """
    return Autotuner()


def choose(
    candidates: dict[Config, Callable[[], Tensor]],
    separate: Callable[[], Tensor],
    seconds: Callable[[Callable[[], Tensor]], float],
) -> Config | None:
    """The candidate that takes the fewest seconds and agrees with `separate`; None where `separate` is faster."""
    expected = separate().float()
    best, least = None, seconds(separate)
    for config, run in candidates.items():
        try:
            # Of a LoRA of zeros, 0 / 0 would be no distance.
            length = torch.linalg.vector_norm(expected).clamp(min=torch.finfo(torch.float32).tiny)
            distance = torch.linalg.vector_norm(run().float() - expected) / length
            if not distance <= TOLERANCE:  # NaN is too far, too
                log.warning("Flux Hotswap: a fused LoRA kernel is wrong on this GPU (%.3g) and is not used.", distance)
                continue
            took = seconds(run)
        except Exception as exc:  # Triton raises many kinds: no compiler, too little shared memory, an old GPU
            log.info("Flux Hotswap: a fused LoRA kernel does not run on this GPU (%s) and is not used.", exc)
            continue
        if took < least:
            best, least = config, took
    return best


def _seconds(run: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return min(times)
