"""The modes by name, and what "auto" is on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import SettingsError
from .bitsandbytes_modes import NF4
from .mode import Mode
from .torchao_modes import FP8, FP8_WEIGHT_ONLY, INT4, INT8, INT8_WEIGHT_ONLY, MXFP8, NVFP4

MODES: Mapping[str, Mode] = {
    mode.name: mode for mode in (FP8, FP8_WEIGHT_ONLY, INT8, INT8_WEIGHT_ONLY, INT4, NVFP4, MXFP8, NF4)
}

# 4 bits lose visibly more, so "auto" is 8 bits, with the products that the device is fastest at.
PREFERENCES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "cuda": (
        ("fp8", "half the memory, and this card is fastest in fp8"),
        ("int8", "half the memory; this card does not multiply in fp8, but in int8"),
        ("int8_weight_only", "half the memory; this card multiplies neither in fp8 nor in int8"),
    ),
    "cpu": (("int8", "half the memory, and the fastest on a CPU"),),
    "xpu": (("int8_weight_only", "half the memory"),),
    "mps": (("int8_weight_only", "half the memory"),),
}


@dataclass(frozen=True)
class Choice:
    """The mode that a setting became on a device, and why, for a user to read."""

    mode: str
    reason: str


def find_mode(name: str) -> Mode | None:
    """The mode of that name; None for "none"."""
    return MODES.get(name)


def choose(name: str, device: torch.device) -> Choice:
    """Decide the mode for a device.

    Args:
        name: one of `settings.QUANTIZATION_MODES`, or "auto": the best that the device and the libraries run.

    Raises:
        SettingsError: the name is unknown, or the mode does not run on this device.
    """
    if name == "auto":
        return _best(device)
    if name == "none":
        return Choice(name, "the weights keep their precision")
    if name not in MODES:
        raise SettingsError(f"quantization is '{name}', expected one of: auto, none, {', '.join(MODES)}.")
    check(MODES[name], device)
    return Choice(name, MODES[name].summary)


def check(mode: Mode, device: torch.device) -> None:
    """Make sure that a mode runs on a device.

    Raises:
        SettingsError: it does not; with the reason, and the nearest mode that does.
    """
    reason = mode.missing(device)
    if reason is None:
        return
    nearest = next((name for name in mode.instead if MODES[name].missing(device) is None), "none")
    raise SettingsError(f"quantization '{mode.name}' {reason}. The nearest mode that runs here is '{nearest}'.")


def _best(device: torch.device) -> Choice:
    reasons = []
    for name, why in PREFERENCES.get(device.type, ()):
        missing = MODES[name].missing(device)
        if missing is None:
            return Choice(name, f"{MODES[name].summary}; {why}")
        reasons.append(f"{name} {missing}")
    return Choice("none", "; ".join(reasons) or f"no mode is known to run on {device}")
