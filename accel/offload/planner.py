"""Keeps an engine's plan up to date: what it may take of the device changes whenever another model comes or goes."""

from __future__ import annotations

import math

from ..memory.budgets import GB
from ..settings import Offload
from .plan import Demand, OffloadPlan, Room, lora_share, make_plan, refit

# What the engine leaves free in addition after each time that memory ran out.
SPARE_BYTES = GB


class Planner:
    """Answers each load of one engine with a plan.

    Attributes:
        demand: what the engine asks for.
        offload: what the user chose.
        wanted: the plan for an undisturbed device, made when the engine was.
        plan: the present one.
        shared: whether the device is the host itself.
    """

    def __init__(self, demand: Demand, offload: Offload, room: Room) -> None:
        """Plan for a device as it is now.

        Raises:
            SettingsError: see `make_plan`.
        """
        self.demand = demand
        self.offload = offload
        self.wanted = self.plan = make_plan(demand, offload, room)
        self.shared = room.shared
        self._spare_bytes = 0
        self._cap_bytes = math.inf
        if offload.vram_budget_gb:
            self._cap_bytes = offload.vram_budget_gb * GB - demand.activation_bytes - lora_share(0)

    def __call__(self) -> OffloadPlan:
        """The present plan: what `Engine` asks for at each load."""
        return self.plan

    @property
    def adapts(self) -> bool:
        """Whether the engine can go on with fewer blocks on the device."""
        return not self.shared and self.offload.mode in ("auto", "stream")

    @property
    def wanted_bytes(self) -> int:
        """What weights and LoRAs take of the device when nothing disturbs."""
        return self.wanted.device_bytes + (0 if self.shared else self.wanted.lora_bytes)

    def allow(self, device_bytes: float, lora_bytes: int = 0) -> bool:
        """Plan anew for a load.

        Args:
            device_bytes: what weights and LoRAs may take of the device now; infinity for whatever the user chose.
            lora_bytes: what LoRAs take there already.

        Returns:
            Whether another number of blocks than before is to stay on the device.
        """
        before = self.plan.resident_blocks
        if self.adapts:
            loras = max(lora_bytes, lora_share(0))
            limit = min(device_bytes - loras - self._spare_bytes, self._cap_bytes)
            self.plan = self.wanted if limit == math.inf else refit(self.demand, self.offload, limit)
        return self.plan.resident_blocks != before

    def give(self, size: int) -> bool:
        """Plan for `size` bytes less than now. Returns False, and changes nothing, when so much cannot be given."""
        if not self.adapts:
            return False
        smaller = refit(self.demand, self.offload, self.plan.device_bytes - size)
        if self.plan.device_bytes - smaller.device_bytes < size:
            return False
        self.plan = smaller
        return True

    def ran_out(self) -> bool:
        """Leave more room from the next load on. Returns whether that is possible."""
        if self.adapts:
            self._spare_bytes += SPARE_BYTES
        return self.adapts
