"""What of a model stays on the device, and what comes block by block: decided before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OffloadPlan:
    """Where an engine's weights go.

    Attributes:
        mode: "none" (all on the device), "model" (all on the device while it samples, on the host between phases) or
            "stream" (some blocks on the device, the others copied there one after another in every step).
        resident_blocks: how many blocks stay on the device under "stream"; the others share a ring of staging buffers.
        total_blocks: blocks of the model, double and single.
        device_bytes: what the engine will take of the device: resident weights and staging, without LoRAs and
            activations.
        copied_bytes_per_step: host-to-device bytes of one forward.
        sentence: one line that says what it does and why.
    """

    mode: str
    resident_blocks: int
    total_blocks: int
    device_bytes: int
    copied_bytes_per_step: int
    sentence: str
