"""Switching a LoRA, at FLUX.1-dev's sizes: every way to do it, side by side in one run.

The base weights are on the meta device, the LoRAs are real. Each switch is checked: what is bound afterwards must be,
bit for bit, the LoRA that was asked for, and must not have been bound before.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from accel.families.flux1 import Flux1Config
from accel.files import FileIdentity
from accel.lora.device import DeviceLoras
from accel.lora.file import LoraLayer, LoraWeights, read_lora
from accel.lora.slots import ADAPTER, LoraSlots
from accel.lora.stack import FlatLora, LoraStack, flatten
from harness.paths import CACHE

from . import flux_loras
from .cold_files import ColdFiles, read_into
from .flux_loras import DTYPE, KEY_PREFIX, RANK, STRENGTH, RandomLora, check_bound, random_lora, same_bits, spec_of
from .peers import DiffusersHotswap, PeftHotswap
from .report import BenchmarkError, Goal, Report, Row, Variant, figure, interleave, spread
from .stock_merge import StockMerge

CPU = torch.device("cpu")
ROUNDS = 21
QUICK_ROUNDS = 3
# Two fit on the device and three take turns, so that every `put` finds its LoRA gone.
LORA_COUNT = 3
RESIDENT_COUNT = 2
NOTES = (
    "No GPU: a second buffer in CPU memory stands in for the device (share_host=False). hot is the same on a GPU; warm "
    "and memcpy_ms show what the code adds to a copy, not how long a copy over PCIe takes.",
    "The base weights are on the meta device for hot, warm, cold, PEFT and diffusers: all of them accept it, so all "
    "work on the whole model. One model each for the pack, PEFT and diffusers.",
    "PEFT and diffusers get their tensors in memory and are not prepared for torch.compile; cold alone reads a file.",
)


def run(quick: bool) -> Report:
    """Measure all variants in turn.

    Args:
        quick: a small model and few rounds.

    Raises:
        BenchmarkError: a variant did not do its work.
    """
    config, rounds = (flux_loras.QUICK, QUICK_ROUNDS) if quick else (flux_loras.DEV, ROUNDS)
    loras = [random_lora(config, f"lora-{seed}", seed) for seed in range(LORA_COUNT)]
    CACHE.mkdir(parents=True, exist_ok=True)  # not the system's temporary folder, which may be a RAM disk
    with (
        tempfile.TemporaryDirectory(prefix="bench-swap-", dir=CACHE) as folder,
        closing(StockMerge(config, {lora.name: lora for lora in loras})) as stock,
    ):
        files = ColdFiles(Path(folder))
        switch = Switch(config, loras, files)
        variants = [*switch.variants(), *_peer_variants(config, loras), _stock_variant(stock, loras)]
        samples = interleave(variants, rounds, warm_up=LORA_COUNT)
        return _report(config, quick, samples, switch.lora_bytes, stock, files)


class Switch:
    """The pack's three ways to switch, and what they are measured against: one copy, one read."""

    def __init__(self, config: Flux1Config, loras: Sequence[RandomLora], files: ColdFiles) -> None:
        """Prepare the LoRAs on the host, two of them on the device."""
        self._loras, self._files = loras, files
        self._spec = spec_of(config)
        self._model, self._slots = flux_loras.slots_of(config)
        self._flats = {lora.name: _flatten(lora) for lora in loras}
        self.lora_bytes = self._flats[loras[0].name].bytes
        self._hot = self._device_loras()
        for lora in loras[:RESIDENT_COUNT]:
            self._hot.put(lora.name, self._flats[lora.name])
        self._warm, self._cold = self._device_loras(), self._device_loras()
        # Two targets: what a device that holds two LoRAs has, so that memcpy and warm touch as much memory.
        self._targets = itertools.cycle([torch.zeros_like(self._flats[loras[0].name].buffer) for _ in range(2)])
        self._read_target = memoryview(bytearray())
        self._held: object = None

    def variants(self) -> Iterator[Variant]:
        """memcpy, hot, warm, read, cold."""
        yield self._memcpy()
        yield self._bound("hot", self._loras[:RESIDENT_COUNT], self._hot.bind)
        yield self._bound("warm", self._loras, self._run_warm, self._check_warm)
        yield self._read()
        yield self._bound("cold", self._loras, self._run_cold, self._check_cold, self._write_cold)
