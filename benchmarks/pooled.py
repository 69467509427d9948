"""What the engine's LoRA pools save: another strength, a stack, a LoRA that was prefetched, higher ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from accel.lora.adapter import Adapter
from accel.lora.hold.library import LoraLibrary
from accel.lora.stack import LoraStack
from accel.memory.budgets import GIB, PoolBudgets
from accel.memory.buffers import HostBuffers

from . import flux_loras
from .families.base import Config
from .flux_loras import DTYPE, STRENGTH, Pairs, RandomLora, check_bound, lora_weights, pairs_on, random_lora, same_bits
from .random_checkpoint import random_spec
from .report import BenchmarkError
from .timing import Variant

BUDGETS = PoolBudgets(1, 16 * GIB, 16 * GIB)
RANKS = (64, 128)
STRENGTHS = (STRENGTH, -0.6)
BETWEEN = 0.3
# Of what takes milliseconds, see `Variant.runs`.
SHORT_RUNS = 10
# Variant -> the remark in the table.
POOLED = {
    "stack3": "a stack of three on the device: bind",
    "multiply": "one product over the same lora_B, for comparison",
    "strength": "on the device, another strength: multiply lora_B, bind",
    "prefetched": "prepared while another one sampled: bind",
    **{f"rank{rank}_hot": f"rank {rank} on the device: bind" for rank in RANKS},
}


class Pooled:
    """The pack's `LoraLibrary` over a model on the meta device. On a CPU, host memory is the device."""

    def __init__(self, config: Config, loras: Sequence[RandomLora], device: torch.device) -> None:
        """Prepare nothing yet but what is compared with."""
        self._config = config
        self._device = device
        self._loras = loras
        self._weights: dict[str, Adapter] = {}
        self._expected: dict[tuple[str, float], Pairs] = {}
        self._model, self._slots = flux_loras.slots_of(config, device)
        self._library = self._new_library()
        lora_B = torch.cat([b.flatten() for _, b in loras[0].pairs.values()])
        buffers = HostBuffers(0)  # where the library's memory comes from
        source, target = (buffers.take(lora_B.nbytes).view(lora_B.dtype).to(device) for _ in range(2))
        self._product = source.copy_(lora_B), target
        self._other = self._stack((loras[-1], STRENGTH))

    def variants(self) -> list[Variant]:
        """One for each of `POOLED`."""
        variants = [
            self._hot("stack3", self._stack(*((lora, STRENGTH) for lora in self._loras)), self._stacked()),
            self._multiplied(),
            self._strength(),
            self._prefetched(),
        ]
        for rank in RANKS:
            lora = random_lora(self._config, f"rank-{rank}", rank, rank, self._device)
            variants.append(self._hot(f"rank{rank}_hot", self._stack((lora, STRENGTH)), self._there(lora)))
        return variants

    def _hot(self, name: str, stack: LoraStack, expected: Pairs) -> Variant:
        def before() -> None:
            self._switch(stack)  # as the step before the last would have
            self._switch(self._other)

        return Variant(name, lambda: self._switch(stack), before, lambda: self._check(name, expected), SHORT_RUNS)

    def _strength(self) -> Variant:
        lora, turns = self._loras[0], itertools.cycle(STRENGTHS)
        strength, stack = STRENGTHS[-1], LoraStack()

        def before() -> None:
            nonlocal strength, stack
            strength = next(turns)
            stack = self._stack((lora, strength))
            # Another one than `run` leaves there: so this writes lora_B too, over the same memory.
            self._switch(self._stack((lora, BETWEEN)))

        def check() -> None:
            self._check("strength", self._there(lora, strength))

        return Variant("strength", lambda: self._switch(stack), before, check, SHORT_RUNS)

    def _multiplied(self) -> Variant:
        """The product alone, among the same work as in `_strength`."""
        lora, turns = self._loras[0], itertools.cycle(STRENGTHS)
        strength = STRENGTHS[-1]

        def before() -> None:
            nonlocal strength
            strength = next(turns)
            self._switch(self._stack((lora, BETWEEN)))
            self._multiply(BETWEEN)

        def check() -> None:
            self._check("multiply", self._there(lora, BETWEEN))
            source, target = self._product
            if not same_bits(target, source * strength):
                raise BenchmarkError(f"multiply: the target does not hold the product with {strength}.")

        return Variant("multiply", lambda: self._multiply(strength), before, check, SHORT_RUNS)

    def _prefetched(self) -> Variant:
        lora = self._loras[1]
        stack = self._stack((lora, STRENGTH))
        library = self._new_library()

        def before() -> None:
            library.clear()
            library.attach(self._slots, BUDGETS)
            library.bind(library.make_resident(self._other))
            # What `Engine.prefetch` does.
            library.prepare(stack, background=True)
            library.make_resident(stack, evict=False)
            self._slots.bind(self._slots.empty)
            # As the step that sampled meanwhile has touched every layer, see `Switch._step`.
            library.bind(library.make_resident(self._other))

        def run() -> None:
            library.bind(library.make_resident(stack))

        return Variant("prefetched", run, before, lambda: self._check("prefetched", self._there(lora)), SHORT_RUNS)

    def _multiply(self, strength: float) -> None:
        source, target = self._product
        torch.mul(source, strength, out=target)

    def _switch(self, stack: LoraStack) -> None:
        self._library.bind(self._library.make_resident(stack))

    def _check(self, name: str, expected: Pairs) -> None:
        check_bound(name, self._model, None, expected)

    def _there(self, lora: RandomLora, strength: float = STRENGTH) -> Pairs:
        """What has to be bound of a LoRA, on the device; made once."""
        key = lora.name, strength
        if key not in self._expected:
            self._expected[key] = pairs_on(self._device, lora.scaled_by(strength))
        return self._expected[key]

    def _stacked(self) -> Pairs:
        """What a stack of all has to bind."""
        scaled = [self._there(lora) for lora in self._loras]
        return {
            module: (
                torch.cat([pairs[module][0] for pairs in scaled]),
                torch.cat([pairs[module][1] for pairs in scaled], dim=1),
            )
            for module in scaled[0]
        }

    def _stack(self, *entries: tuple[RandomLora, float]) -> LoraStack:
        stack = LoraStack()
        for lora, strength in entries:
            if lora.name not in self._weights:  # an engine reads a file once, whatever strengths follow
                self._weights[lora.name] = lora_weights(lora)
            stack = stack.with_lora(self._weights[lora.name], strength)
        return stack

    def _new_library(self) -> LoraLibrary:
        library = LoraLibrary(random_spec(self._config), DTYPE, self._device, BUDGETS)
        library.attach(self._slots, BUDGETS)
        return library
