"""How much sampling slows down while LoRAs are prepared behind it, without pause."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from accel.lora.adapter import Adapter
from accel.lora.hold.library import LoraLibrary
from accel.lora.stack import LoraStack
from accel.memory.budgets import GIB, PoolBudgets
from accel.prefetch import Prefetcher, WantedLora

from . import flux_loras
from .families.base import Config
from .flux_loras import DTYPE, KEY_PREFIX, STRENGTH, RandomLora
from .random_checkpoint import random_spec
from .report import BenchmarkError
from .timing import Stopwatch, Variant

BUDGETS = PoolBudgets(1, 1 * GIB, 1 * GIB)
TOKENS = 512
# Long enough that a LoRA is prepared meanwhile.
STEP_S, QUICK_STEP_S = 2.0, 0.2
# A quick step may be over on a busy machine before its thread has begun.
QUICK_WAIT_S = 60.0


class Prefetching:
    """Matrix products of the model's width in turn with and without a `Prefetcher` at work.

    It stands for the engine, of which it has what a `Prefetcher` asks for.

    Attributes:
        prepared_count: LoRAs that were prepared while the products ran.
    """

    def __init__(
        self, config: Config, loras: Sequence[RandomLora], folder: Path, quick: bool, device: torch.device
    ) -> None:
        """Write the LoRAs' files, and find out how many products are long enough."""
        self.prepared_count = 0
        self._wait_s = QUICK_WAIT_S if quick else 0.0
        self._paths = [str(folder / f"prefetch-{lora.name}.safetensors") for lora in loras]
        for path, lora in zip(self._paths, loras, strict=True):
            save_file(lora.state_dict(KEY_PREFIX), path)
        # Held: the library refers to its layers.
        self._model, self._slots = flux_loras.slots_of(config, device)
        self._library = LoraLibrary(random_spec(config), DTYPE, device, BUDGETS)
        self._library.attach(self._slots, BUDGETS)
        self._stopwatch = Stopwatch(device)
        self._weight = torch.randn(config.hidden_size, config.hidden_size, device=device) / config.hidden_size**0.5
        self._x = torch.randn(TOKENS, config.hidden_size, device=device)
        self._products = 1
        self._done = threading.Event()
        self._prefetcher: Prefetcher | None = None
        self._products = max(1, round((QUICK_STEP_S if quick else STEP_S) / self._time(32) * 32))

    def variants(self) -> list[Variant]:
        """step_alone, step_prefetching."""
        return [
            Variant("step_alone", self._step),
            Variant("step_prefetching", self._step, self._start, self._stop),
        ]

    def read_lora(self, path: str) -> Adapter:
        """See `Engine.read_lora`."""
        weights = self._library.read(path)
        self._done.set()  # a thread that is stopped ends before it prepares what it has read
        return weights

    def prefetch_room(self, stack: LoraStack) -> bool:
        """See `Engine.prefetch_room`."""
        return True

    def prefetch(self, stack: LoraStack) -> None:
        """See `Engine.prefetch`; then forgets the stack, so that there is always more to do."""
        self._library.prepare(stack, background=True)
        self._library._host.clear()
        self._library._files.clear()
        self.prepared_count += 1
        self._prefetcher._done.clear()

    def _start(self) -> None:
        self._done.clear()
        wanted = [(WantedLora(path, STRENGTH),) for path in self._paths]
        self._prefetcher = Prefetcher(self, lambda: wanted, poll_s=0.0)
        self._prefetcher.start()

    def _stop(self) -> None:
        self._done.wait(self._wait_s)
        self._prefetcher.stop()
        self._prefetcher.join(60)
        if not self._done.is_set():
            raise BenchmarkError("step_prefetching: no LoRA was read.")

    def _step(self) -> None:
        x = self._x
        for _ in range(self._products):
            x = x @ self._weight

    def _time(self, products: int) -> float:
        self._products = products
        self._step()
        return self._stopwatch.seconds(self._step)[0]


def slowdown(samples: Mapping[str, Sequence[float]]) -> float:
    """How much longer a step takes: the median over rounds, each of which has both right after one another."""
    pairs = zip(samples["step_prefetching"], samples["step_alone"], strict=True)
    return statistics.median(busy / alone for busy, alone in pairs) - 1.0
