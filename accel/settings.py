"""What a user chooses once per engine. Everything here is part of the engine's identity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .errors import SettingsError
from .hardware import DTYPES

ATTENTION_BACKENDS = (
    "auto", "sdpa", "cudnn", "flash_2", "flash_3", "flash_4", "sage", "xformers", "flex", "onednn",
)
COMPILE_MODES = ("regional", "regional max-autotune", "full", "off")
OFFLOAD_MODES = ("auto", "none", "model", "stream")
QUANTIZATION_MODES = (
    "none", "fp8", "fp8_weight_only", "int8", "int8_weight_only", "int4", "nvfp4", "mxfp8", "nf4",
)


@dataclass(frozen=True)
class QuantizedCache:
    """Where quantized weights are kept for the next start.

    Attributes:
        folder: made when it is first written to.
        limit_bytes: what all its files may take; the least recently used ones are deleted.
    """

    folder: str
    limit_bytes: int


@dataclass(frozen=True)
class Quantization:
    """How the weights of the transformer's blocks are stored.

    Attributes:
        mode: one of `QUANTIZATION_MODES`; what "auto" means on a device is asked from `accel.quantize.choose`.
        cache: where the result is kept, or None. It changes how a model is loaded, not what it becomes, so it is no
            part of an engine's identity.
    """

    mode: str = "none"
    cache: QuantizedCache | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Reject unknown names."""
        if self.mode not in QUANTIZATION_MODES:
            raise SettingsError(
                f"quantization is '{self.mode}', expected one of: {', '.join(QUANTIZATION_MODES)}."
            )


@dataclass(frozen=True)
class Offload:
    """What an engine may take of the device's memory.

    Attributes:
        mode: one of `OFFLOAD_MODES`; "auto" plans from what is free.
        vram_budget_gb: what the engine may take in all, in GB (1e9 bytes); 0: what is free.
        reserve_gb: what of the free memory stays for others.
    """

    mode: str = "auto"
    vram_budget_gb: float = 0.0
    reserve_gb: float = 1.0

    def __post_init__(self) -> None:
        """Reject unknown names and impossible sizes."""
        if self.mode not in OFFLOAD_MODES:
            raise SettingsError(f"offload is '{self.mode}', expected one of: {', '.join(OFFLOAD_MODES)}.")
        for name, value in (("vram_budget_gb", self.vram_budget_gb), ("reserve_gb", self.reserve_gb)):
            if not 0 <= value < math.inf:
                raise SettingsError(f"offload: {name} is {value}, expected a size in GB of 0 or more.")


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built.

    Attributes:
        dtype: a key of `hardware.DTYPES`; "auto" takes the checkpoint's own where the device computes in it.
        attention: one of `ATTENTION_BACKENDS`.
        compile: one of `COMPILE_MODES`.
        device: where the transformer runs, such as "cuda:0" or "cpu".
        quantization: how its weights are stored.
        offload: what it may take of the device's memory.
    """

    dtype: str = "auto"
    attention: str = "auto"
    compile: str = "regional"
    device: str = "cpu"
    quantization: Quantization = Quantization()
    offload: Offload = Offload("none")

    def __post_init__(self) -> None:
        """Reject unknown names, before anything is built with them."""
        for name, value, known in (
            ("dtype", self.dtype, tuple(DTYPES)),
            ("attention", self.attention, ATTENTION_BACKENDS),
            ("compile", self.compile, COMPILE_MODES),
        ):
            if value not in known:
                raise SettingsError(f"{name} is '{value}', expected one of: {', '.join(known)}.")
