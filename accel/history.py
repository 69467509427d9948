"""What an engine did: switches of LoRAs, and whole samplings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SwapReport:
    """What one switch of LoRAs did.

    Attributes:
        loras: the stack, as `LoraStack.__str__` writes it.
        source: "unchanged", "hot" (was on the device: bound), "strength" (was on the device: lora_B multiplied anew,
            then bound), "warm" (was prepared on the host: one copy, then bound) or "cold" (prepared now).
        swap_ms: wall-clock time of the switch.
        bytes: size of the bound LoRA on the device.
        error: relative error of a stack that was cut to a lower rank; 0 for an exact one.
    """

    loras: str
    source: str
    swap_ms: float
    bytes: int
    error: float = 0.0


@dataclass(frozen=True)
class Sampling:
    """One sampling that is over.

    Attributes:
        loras: as `ScheduledStack.__str__` writes them.
        size: (batch, height, width) of the pictures, in pixels; empty without a call.
        steps: noise levels at which the transformer was called; one that was stopped has fewer than were asked for.
        calls: of the transformer; more than steps where conditions were not joined.
        seconds: from before the LoRAs were bound to the end, with compiling.
        swaps: every switch of LoRAs.
        compiles: of these, `recompiles` were of a region that was compiled before.
        recompiles: see there.
        compile_s: what the calls that compiled took.
        step_cache: as `StepCache.__str__` writes it; empty without one.
        stopped: "interrupted" or "failed"; empty when it came to its end.
    """

    loras: str
    size: tuple[int, ...]
    steps: int
    calls: int
    seconds: float
    swaps: tuple[SwapReport, ...] = ()
    compiles: int = 0
    recompiles: int = 0
    compile_s: float = 0.0
    step_cache: str = ""
    stopped: str = ""

    @property
    def swap_s(self) -> float:
        """What the switches of LoRAs took."""
        return sum(swap.swap_ms for swap in self.swaps) / 1e3

    @property
    def steps_s(self) -> float:
        """What is left without compiling and switching."""
        return max(0.0, self.seconds - self.compile_s - self.swap_s)

    @property
    def picture(self) -> str:
        """Size and number of the pictures, such as `1024 × 768, batch of 2`."""
        if not self.size:
            return "no call"
        batch, height, width = self.size
        return f"{width} × {height}" + (f", batch of {batch}" if batch > 1 else "")
