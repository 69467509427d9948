"""The pack's three ways to switch a LoRA, hot, warm and cold, and what they are measured against."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from accel.lora.hold.device import DeviceLoras, Prepared
from accel.lora.hold.library import LoraLibrary
from accel.lora.pack.flat import FlatLora, flatten
from accel.lora.stack import LoraStack
from accel.memory.budgets import PoolBudgets
from accel.memory.cpu import HostMemory
from accel.memory.device import memory_of

from . import flux_loras
from .cold_files import ColdFiles, read_into
from .families.base import Config
from .flux_loras import (
    DTYPE,
    KEY_PREFIX,
    NATIVE_PREFIX,
    STRENGTH,
    Pairs,
    RandomLora,
    check_bound,
    lora_weights,
    pairs_on,
)
from .pooled import SHORT_RUNS
from .random_checkpoint import random_spec
from .report import BenchmarkError
from .timing import Variant

# Two fit on the device and three take turns, so that each comes to find itself gone.
RESIDENT_COUNT = 2
LORA_COUNT = RESIDENT_COUNT + 1
# Of the pool that stands for the device's memory on a CPU: no limit.
POOL_BYTES = 2**40
# See `Variant.runs`. Of what takes tens of milliseconds: the first ones use every buffer; of three others one may find
# the disk busy.
LONG_RUNS = RESIDENT_COUNT + 3
# Formats of the cold files beside the main one, diffusers': sd-scripts' and ComfyUI's, of the original linears.
FUSED_FORMATS: Mapping[str, Callable[[RandomLora], dict[str, torch.Tensor]]] = {
    "kohya": RandomLora.kohya_state_dict,
    "native": lambda lora: lora.state_dict(NATIVE_PREFIX),
}


def in_turn(
    name: str,
    loras: Sequence[Any],
    run: Callable[[Any], float | None],
    check: Callable[[Any], None] = lambda lora: None,
    prepare: Callable[[Any], None] = lambda lora: None,
    runs: int = 1,
) -> Variant:
    """A variant that takes another LoRA each time, in order."""
    turns, lora = itertools.cycle(loras), loras[0]

    def before() -> None:
        nonlocal lora
        lora = next(turns)
        prepare(lora)

    return Variant(name, lambda: run(lora), before, lambda: check(lora), runs)


class Switch:
    """The pack's three ways to switch, and what they are measured against: one copy, one read.

    Attributes:
        layer_count: linears that a LoRA changes.
        lora_bytes: what one switch brings to the device.
        files: the cold files.
        cold_phases_ms: where the time of `cold` goes; for each of its runs, those that do not count included.
    """

    def __init__(
        self, config: Config, loras: Sequence[RandomLora], files: ColdFiles, device: torch.device
    ) -> None:
        """Prepare the LoRAs on the host, two of them on the device.

        On a CPU a second buffer in its memory stands in for the device.
        """
        self.files = files
        self._device = device
        self._memory = memory_of(device)
        self.cold_phases_ms: dict[str, list[float]] = defaultdict(list)
        self._loras = loras
        self._spec = random_spec(config)
        self._model, self._slots = flux_loras.slots_of(config, device)
        self._flats = {lora.name: _flatten(lora, self._memory.pin) for lora in loras}
        for lora in loras:
            files.add(lora.name, lora.state_dict(KEY_PREFIX))
        self.layer_count = len(loras[0].pairs)
        self.lora_bytes = self._flats[loras[0].name].bytes
        self._hot, self._warm = (self._device_loras() for _ in range(2))
        self._cold = self._library()
        for lora in loras[:RESIDENT_COUNT]:
            self._hot.upload(lora.name, Prepared(self._flats[lora.name]))
        # As many targets as the device has buffers: memcpy and warm then touch equally much memory.
        like = self._flats[loras[0].name].buffer
        targets = [torch.zeros_like(like, device=device, pin_memory=False) for _ in range(RESIDENT_COUNT)]
        self._targets = itertools.cycle(targets)
        self._target = targets[0]
        self._read_target = memoryview(bytearray())
        self._bound: Sequence[torch.Tensor] = ()
        self._warm_storages: set[int] = set()
        self._expected: dict[str, Pairs] = {}
        self._fused = [flux_loras.fused_lora(config, f"fused-{seed}", seed) for seed in range(LORA_COUNT)]
        for lora, format in itertools.product(self._fused, FUSED_FORMATS):
            files.add(f"{format}-{lora.name}", FUSED_FORMATS[format](lora))

    def variants(self) -> list[Variant]:
        """hot, warm, memcpy, read, cold and cold by format."""
        residents = self._loras[:RESIDENT_COUNT]
        return [
            in_turn("hot", residents, self._bind_hot, lambda lora: self._check("hot", lora), self._step, SHORT_RUNS),
            in_turn("warm", self._loras, self._put_and_bind, self._check_warm, self._expect_absent, SHORT_RUNS),
            in_turn("memcpy", self._loras, self._copy, self._check_copy, self._choose_target, SHORT_RUNS),
            in_turn("read", self._loras, self._read, lambda lora: self.files.note_read(), self._drop, LONG_RUNS),
            in_turn("cold", self._loras, self._read_and_bind, self._check_cold, self._drop, LONG_RUNS),
            *(self._cold_fused(format) for format in FUSED_FORMATS),
        ]

    def _cold_fused(self, format: str) -> Variant:
        name = f"cold_{format}"

        def drop(lora: RandomLora) -> None:
            self.files.drop(f"{format}-{lora.name}")

        def bind(lora: RandomLora) -> None:
            self._bind_file(name)

        def check(lora: RandomLora) -> None:
            self.files.note_read()
            self._check(name, lora)

        return in_turn(name, self._fused, bind, check, drop, LONG_RUNS)

    def _choose_target(self, lora: RandomLora) -> None:
        self._target = next(self._targets)

    def _copy(self, lora: RandomLora) -> None:
        self._target.copy_(self._flats[lora.name].buffer, non_blocking=True)

    def _check_copy(self, lora: RandomLora) -> None:
        if not flux_loras.same_bits(self._target.cpu(), self._flats[lora.name].buffer):
            raise BenchmarkError(f"memcpy: the target does not hold '{lora.name}'.")

    def _step(self, lora: RandomLora) -> None:
        """Touch what a step touches: a switch follows a step, whose guards have just read every LoRA layer.

        Without this, hot measures how long the operating system takes to bring back pages that lay idle while the other
        variants ran (0.3 to 2.7 ms here, from run to run).
        """
        other = next(resident for resident in self._loras[:RESIDENT_COUNT] if resident.name != lora.name)
        self._hot.bind(other.name)

    def _bind_hot(self, lora: RandomLora) -> None:
        self._hot.bind(lora.name)

    def _expect_absent(self, lora: RandomLora) -> None:
        if self._warm.get(lora.name) is not None:
            raise BenchmarkError(f"warm: '{lora.name}' is still on the device, so there would be nothing to copy.")

    def _put_and_bind(self, lora: RandomLora) -> None:
        self._warm.upload(lora.name, Prepared(self._flats[lora.name]))
        self._warm.bind(lora.name)

    def _check_warm(self, lora: RandomLora) -> None:
        self._check("warm", lora)
        storage = self._bound[0].untyped_storage().data_ptr()
        self._warm_storages.add(storage)
        if storage == self._flats[lora.name].buffer.untyped_storage().data_ptr():
            raise BenchmarkError("warm: the host buffer itself is bound; nothing was copied.")
        if len(self._warm_storages) > RESIDENT_COUNT:
            raise BenchmarkError(f"warm: a buffer was allocated though {RESIDENT_COUNT} could be reused.")

    def _drop(self, lora: RandomLora) -> None:
        path = self.files.drop(lora.name)
        if len(self._read_target) != path.stat().st_size:
            self._read_target = memoryview(bytearray(b"\1" * path.stat().st_size))  # written, so it is really there

    def _read(self, lora: RandomLora) -> None:
        count = read_into(self.files.path, self._read_target)
        if count != len(self._read_target):
            raise BenchmarkError(f"read: {count:,} of {len(self._read_target):,} bytes came.")

    def _read_and_bind(self, lora: RandomLora) -> None:
        for phase, phase_ms in self._bind_file("cold").items():
            self.cold_phases_ms[phase].append(phase_ms)

    def _bind_file(self, variant: str) -> dict[str, float]:
        """What `Engine.read_lora` and `Engine.swap` do, by the library that they do it with: phase -> ms."""
        times = [time.perf_counter()]
        stack = LoraStack().with_lora(self._cold.read(str(self.files.path)), STRENGTH)
        times.append(time.perf_counter())
        self._cold.prepare(stack)
        times.append(time.perf_counter())
        resident = self._cold.make_resident(stack)
        self._cold.bind(resident)
        times.append(time.perf_counter())
        if resident.source == "hot":
            raise BenchmarkError(f"{variant}: the LoRA was still on the device, so there was nothing to read.")
        phases = zip(("read_lora", "flatten", "put_and_bind"), times, times[1:], strict=False)
        return {phase: (end - start) * 1e3 for phase, start, end in phases}

    def _check_cold(self, lora: RandomLora) -> None:
        self.files.note_read()
        self._check("cold", lora)

    def _check(self, variant: str, lora: RandomLora) -> None:
        if lora.name not in self._expected:
            self._expected[lora.name] = pairs_on(self._device, lora.scaled)
        bound = check_bound(variant, self._model, None, self._expected[lora.name])
        if any(new is old for new, old in zip(bound, self._bound, strict=False)):
            raise BenchmarkError(f"{variant}: Parameters that were bound before are still bound.")
        self._bound = bound

    def _device_loras(self) -> DeviceLoras:
        budget_bytes, upload = RESIDENT_COUNT * self.lora_bytes, None
        if self._memory.separate:
            upload = self._memory.upload
        return DeviceLoras(self._slots, self._device, budget_bytes, share_host=False, upload=upload)

    def _library(self) -> LoraLibrary:
        """An engine's library that keeps of files and prepared stacks only the last one."""
        budgets = PoolBudgets(1, 1, RESIDENT_COUNT * self.lora_bytes)
        memory = HostMemory(POOL_BYTES) if self._device.type == "cpu" else self._memory
        library = LoraLibrary(self._spec, DTYPE, self._device, budgets, memory=memory)
        library.attach(self._slots, budgets)
        return library


def _flatten(lora: RandomLora, pin: bool) -> FlatLora:
    return flatten(LoraStack().with_lora(lora_weights(lora), STRENGTH).active, DTYPE, pin=pin)
