"""What a user chooses once per engine. Everything here is part of the engine's identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention import BACKENDS
from .errors import SettingsError

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COMPILE_MODES = ("regional", "off")


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built.

    Attributes:
        dtype: one of `DTYPES`; "auto" takes the checkpoint's own where the device computes in it.
        attention: a name of `accel.attention.BACKENDS`, or "auto".
        compile: one of `COMPILE_MODES`.
        device: where the transformer runs, such as "cuda:0" or "cpu".
    """

    dtype: str = "auto"
    attention: str = "auto"
    compile: str = "regional"
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Reject unknown names, before anything is built with them."""
        for name, value, known in (
            ("dtype", self.dtype, tuple(DTYPES)),
            ("attention", self.attention, ("auto", *BACKENDS)),
            ("compile", self.compile, COMPILE_MODES),
        ):
            if value not in known:
                raise SettingsError(f"{name} is '{value}', expected one of: {', '.join(known)}.")
