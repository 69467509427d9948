"""The quantizations of a T5: what each needs, what it takes, and which one `auto` is."""

from __future__ import annotations

import importlib.util

import torch

from ..errors import SettingsError
from .linear import Nf4, RowScaled, WeightFormat
from .spec import EncoderSpec, T5Config
from .weight_file import FP8, StoredWeight

MODES = ("auto", "none", "nf4", "int8", "fp8")
FORMATS: dict[str, WeightFormat] = {
    "nf4": Nf4(),
    "int8": RowScaled(torch.int8),
    "fp8": RowScaled(torch.float8_e4m3fn),
}
# What `auto` prefers, best first. int8 per row stands before fp8: as many bytes, a third of the error.
PREFERRED = ("none", "int8", "nf4")
# The part of the free memory that `auto` lets a T5 take: the transformer wants the rest.
SHARE = 0.5


def check_mode(mode: str, device: torch.device) -> None:
    """Make sure that a mode is known and runs here.

    Raises:
        SettingsError: it does not; the message names the nearest one that does.
    """
    if mode not in MODES:
        raise SettingsError(f"quantization is '{mode}', expected one of: {', '.join(MODES)}.")
    if mode == "nf4" and not has_bitsandbytes():
        raise SettingsError(
            "quantization is 'nf4', and the Python package 'bitsandbytes' that it needs is not installed. Install it "
            "where ComfyUI runs (python -m pip install bitsandbytes), or choose 'int8'."
        )
    if mode == "fp8" and device.type == "mps":
        raise SettingsError("quantization is 'fp8', which Apple GPUs (mps) do not have. Choose 'int8'.")


def has_bitsandbytes() -> bool:
    """Whether `nf4` can run."""
    try:
        return importlib.util.find_spec("bitsandbytes") is not None
    except ValueError:  # it is in sys.modules without a spec
        return False


def resident_format(mode: str, stored: StoredWeight, is_linear: bool) -> WeightFormat | None:
    """How a weight is kept: in a format, or (None) as a plain tensor of `resident_dtype`.

    Embeddings, norms and the position bias stay as stored. Linears of an fp8 file stay as stored under `none` and
    `fp8`: to quantize them again would only lose.
    """
    if not is_linear:
        return None
    if mode in FORMATS and not (mode == "fp8" and stored.dtype in FP8):
        return FORMATS[mode]
    if stored.scale_key is None:
        return None
    return RowScaled(stored.dtype, per_tensor=stored.scale_numel == 1)


def resident_dtype(stored: StoredWeight) -> torch.dtype:
    """What a plain tensor is kept in: as stored; GGUF blocks as float16, and scaled embeddings as bfloat16."""
    if stored.scale_key is not None:
        return torch.bfloat16
    return stored.dtype or torch.float16


def resident_bytes(spec: EncoderSpec, mode: str) -> int:
    """Bytes that the encoder takes when it is loaded in `mode`."""
    linears = {f"{name}.weight" for name in spec.config.linears} if isinstance(spec.config, T5Config) else set()
    total = 0
    for name, stored in spec.weights.items():
        weight_format = resident_format(mode, stored, name in linears)
        if weight_format is None:
            parts = [(stored.shape, resident_dtype(stored))]
        else:
            parts = list(weight_format.shapes(stored.shape).values())
        total += sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts)
    return total


def choose_mode(spec: EncoderSpec, free_bytes: int, where: str, bitsandbytes: bool) -> tuple[str, str]:
    """What `auto` is here: the most exact mode that takes at most half of the memory.

    Args:
        spec: the T5.
        free_bytes: memory that it may share with the rest.
        where: a name for that memory, such as "free RAM", for the reason.
        bitsandbytes: whether `nf4` can run.

    Returns:
        The mode, and the reason for people to read.
    """
    modes = [mode for mode in PREFERRED if mode != "nf4" or bitsandbytes]
    sizes = {mode: resident_bytes(spec, mode) for mode in modes}
    available = f"of {free_bytes / 1e9:.1f} GB {where}"
    for mode in modes:
        if sizes[mode] <= SHARE * free_bytes:
            return mode, f"{sizes[mode] / 1e9:.1f} GB {available}"
    smallest = min(modes, key=sizes.get)
    hint = "" if bitsandbytes else "; nf4 would be smaller, and needs the package bitsandbytes"
    return smallest, f"the smallest, {sizes[smallest] / 1e9:.1f} GB {available}{hint}"
