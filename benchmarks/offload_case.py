"""What the step that does not fit the device is measured with: the model, its plan, and the memory it has."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from accel.families.flux1 import Flux1Config
from accel.memory.base import DeviceMemory
from accel.memory.budgets import GB
from accel.memory.cpu import HostMemory
from accel.memory.device import memory_of
from accel.offload.plan import OffloadPlan, Room, demand_of, lora_share, make_plan
from accel.quantize import find_mode, refusal
from accel.settings import Offload

from .families.flux1 import DEV, QUICK
from .flux_loras import DTYPE
from .load import scaled
from .random_checkpoint import random_spec
from .timing import CPU

# Eager fp8 is emulated on a CPU, a hundred times slower than int8; either takes as many bytes.
MODE = "int8"
ROUNDS = 5
QUICK_ROUNDS = 3
# What stays of FLUX.1-dev in 8 bits on a card of 8 GB.
RESIDENT_SHARE = 15 / 57
GOAL_PEAK = 1.02
NAMES = ("copy", "compute", "streamed")


@dataclass(frozen=True)
class Case:
    """What is measured: the model, tokens, rounds, and on which device with which quantization."""

    config: Flux1Config
    latent: int
    text_tokens: int
    compile: str
    rounds: int
    device: torch.device = CPU
    mode: str = MODE


QUICK_CASE = Case(QUICK, 16, 16, "off", QUICK_ROUNDS)


def case_of(quick: bool, scale: float, device: torch.device) -> Case:
    """The case for a device: a picture of 320 × 320 on a CPU, of 1024 × 1024 elsewhere."""
    if quick:
        return replace(QUICK_CASE, device=device)
    if device.type == "cpu":
        return Case(scaled(DEV, scale), 40, 192, "regional", ROUNDS)
    mode = next((name for name in ("fp8", "int8") if refusal(find_mode(name), device) is None), "int8_weight_only")
    return Case(scaled(DEV, scale), 128, 512, "regional", ROUNDS, device, mode)


def memory_for(case: Case, plan: OffloadPlan) -> DeviceMemory:
    """The device's memory; on a CPU a pool for what was planned."""
    if case.device.type == "cpu":
        return HostMemory(math.floor(plan.device_bytes * GOAL_PEAK), flat=True)
    return memory_of(case.device)


@dataclass(frozen=True)
class Planned:
    """A plan, the card that it is for, and all weights."""

    plan: OffloadPlan
    card_bytes: int
    weights_bytes: int


def plan_of(case: Case) -> Planned:
    """The plan for a card on which the same share of the blocks stays as of FLUX.1-dev on one of 8 GB."""
    demand = demand_of(random_spec(case.config), DTYPE, case.mode, case.compile != "off")
    weights = demand.weights
    offload = Offload("stream")
    taken = weights.on_device(round(RESIDENT_SHARE * len(weights.blocks)))
    card = taken + lora_share(0) + demand.activation_bytes + round(offload.reserve_gb * GB)
    return Planned(make_plan(demand, offload, Room(card)), card, weights.total)
