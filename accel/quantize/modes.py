"""The modes by name, and what "auto" is on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import SettingsError
from ..hardware import Hardware, hardware_of, has_bf16
from .bitsandbytes_modes import NF4
from .mode import Mode
from .prove import prove
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
    "rocm": (("int8_weight_only", "half the memory"),),
    "cpu": (("int8", "half the memory, and the fastest on a CPU"),),
    "xpu": (("int8_weight_only", "half the memory"),),
    "mps": (("int8_weight_only", "half the memory"),),
}


@dataclass(frozen=True)
class ModeChoice:
    """The mode that a setting became on a device, and why, for a user to read."""

    mode: str
    reason: str


def find_mode(name: str) -> Mode | None:
    """The mode of that name; None for "none".

    Raises:
        SettingsError: there is none of that name.
    """
    if name == "none":
        return None
    if name not in MODES:
        raise _unknown(name, "none", *MODES)
    return MODES[name]


def choose(name: str, device: torch.device, dtype: torch.dtype | None = None) -> ModeChoice:
    """Decide the mode for a device.

    Args:
        name: one of `settings.QUANTIZATION_MODES`, or "auto": the best that proves itself on the device.
        device: where the model runs.
        dtype: of activations; None for the one that the device is best at.

    Raises:
        SettingsError: the name is unknown, or the mode does not run on this device.
    """
    if name == "auto":
        return _best(device, dtype)
    if name == "none":
        return ModeChoice("none", "the weights keep their precision")
    if name not in MODES:
        raise _unknown(name, "auto", "none", *MODES)
    check(MODES[name], device, dtype)
    return ModeChoice(name, MODES[name].summary)


def check(mode: Mode, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Make sure that a mode runs on a device: by what is known of it, and by running it.

    Args:
        mode: which.
        device: where.
        dtype: see `choose`.

    Raises:
        SettingsError: it does not; with the reason, and the nearest mode that does.
    """
    reason = refusal(mode, device, dtype)
    if reason is None:
        return
    nearest = next((name for name in mode.instead if refusal(MODES[name], device, dtype) is None), "none")
    raise SettingsError(f"quantization '{mode.name}' {reason}. The nearest mode that runs here is '{nearest}'.")


def refusal(mode: Mode, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why a mode does not run on a device: what the sentence after its name says. None: it proved itself."""
    hardware = hardware_of(device)
    reason = mode.missing(hardware)
    if reason is not None:
        return reason
    preferred = torch.bfloat16 if has_bf16(hardware) else torch.float16
    return prove(mode, device, dtype or mode.compute_dtype(preferred, device, explicit=False)).refusal


def preferences(hardware: Hardware) -> tuple[tuple[str, str], ...]:
    """Modes that "auto" tries, best first, each with why."""
    return PREFERENCES.get(hardware.kind, ())


def _unknown(name: str, *known: str) -> SettingsError:
    return SettingsError(f"quantization is '{name}', expected one of: {', '.join(known)}.")


def _best(device: torch.device, dtype: torch.dtype | None) -> ModeChoice:
    failed = []
    for name, why in preferences(hardware_of(device)):
        reason = refusal(MODES[name], device, dtype)
        if reason is None:
            return ModeChoice(name, "; ".join([f"{MODES[name].summary}; {why}", *failed]))
        failed.append(f"{name} {reason}")
    return ModeChoice("none", "; ".join(failed) or f"no mode is known to run on {device}")
