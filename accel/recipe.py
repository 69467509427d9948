"""What an engine will be: decided from a checkpoint's header, its settings and the machine, before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .attention import Target
from .build import model_bytes
from .hardware import resolve_dtype
from .quantize import Mode, check, find_mode
from .settings import EngineSettings
from .spec import ModelSpec


@dataclass(frozen=True)
class Recipe:
    """How one engine is made.

    Attributes:
        spec: the checkpoint.
        settings: what the user chose.
        device: where the weights go.
        dtype: what it computes in.
        mode: how the linears of its blocks are stored; None: as they are.
    """

    spec: ModelSpec
    settings: EngineSettings
    device: torch.device
    dtype: torch.dtype
    mode: Mode | None

    @classmethod
    def of(cls, spec: ModelSpec, settings: EngineSettings) -> Recipe:
        """Resolve every "auto" but attention's, which takes measuring; and try a quantization on the device.

        Raises:
            SettingsError: the machine cannot do what the settings ask for.
        """
        device = torch.device(settings.device)
        dtype = resolve_dtype(settings.dtype, spec.stored_dtype, device)
        mode = find_mode(settings.quantization.mode)
        if mode is not None:
            dtype = mode.compute_dtype(dtype, device, explicit=settings.dtype != "auto")
            check(mode, device, dtype)
        return cls(spec, settings, device, dtype, mode)

    @cached_property
    def weight_bytes(self) -> int:
        """What the weights take."""
        return model_bytes(self.spec, self.dtype, self.mode)

    @cached_property
    def attention_target(self) -> Target:
        """What its attention has to run on."""
        heads = self.spec.family.heads(self.spec.config)
        return Target(self.device, self.dtype, *heads, compiled=self.settings.compile != "off")

    def code_key(self, attention: str) -> dict[str, str]:
        """What compiled code depends on, with the attention that was chosen."""
        return {
            "family": self.spec.family.name,
            "config": repr(self.spec.config),
            "dtype": str(self.dtype),
            "quantization": self.settings.quantization.mode,
            "attention": attention,
            "compile": self.settings.compile,
            "device": str(self.device),
        }
