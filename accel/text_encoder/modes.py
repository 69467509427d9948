"""The quantizations of a text encoder's linears: what each needs, what it takes, and which one `auto` is."""

from __future__ import annotations

import torch

from ..errors import SettingsError
from ..quantize import refusal
from ..quantize.bitsandbytes_modes import NF4
from ..spec import StoredTensor
from .linear import Nf4, RowScaled, WeightFormat
from .spec import EncoderSpec

MODES = ("auto", "none", "nf4", "int8", "fp8")
FORMATS: dict[str, WeightFormat] = {
    "nf4": Nf4(),
    "int8": RowScaled(torch.int8),
    "fp8": RowScaled(torch.float8_e4m3fn),
}
# What a file may store a linear in for a mode to keep it: to quantize it again would only lose.
KEPT: dict[str, tuple[torch.dtype, ...]] = {"fp8": (torch.float8_e4m3fn, torch.float8_e5m2), "int8": (torch.int8,)}
# What `auto` prefers, best first. int8 per row stands before fp8: as many bytes, a third of the error.
PREFERRED = ("none", "int8", "nf4")
# The part of the free memory that `auto` lets a text encoder take: the transformer wants the rest.
SHARE = 0.5


def check_mode(mode: str, device: torch.device) -> None:
    """Make sure that a mode is known and runs here.

    Raises:
        SettingsError: it does not; the message names the nearest one that does.
    """
    if mode not in MODES:
        raise SettingsError(f"quantization is '{mode}', expected one of: {', '.join(MODES)}.")
    reason = refusal(NF4, device) if mode == "nf4" else None
    if reason is not None:
        raise SettingsError(f"quantization 'nf4' {reason}. Or choose 'int8'.")
    if mode == "fp8" and device.type == "mps":
        raise SettingsError("quantization is 'fp8', which Apple GPUs (mps) do not have. Choose 'int8'.")


def resident_format(mode: str, stored: StoredTensor, is_linear: bool) -> WeightFormat | None:
    """How a weight is kept: in a format, or (None) as a plain tensor of `resident_dtype`.

    Embeddings, norms and the position bias stay as stored. So do the linears of an fp8 file under `none` and `fp8`, and
    those of an int8 file under `none` and `int8`, with the file's scales.
    """
    if not is_linear:
        return None
    if mode in FORMATS and stored.info.dtype not in KEPT.get(mode, ()):
        return FORMATS[mode]
    if stored.scale is None:
        return None
    return RowScaled(stored.info.dtype, per_tensor=stored.scale_numel == 1)


def resident_dtype(stored: StoredTensor) -> torch.dtype:
    """What a plain tensor is kept in: as stored; GGUF blocks as float16, and scaled embeddings as bfloat16."""
    if stored.scale is not None:
        return torch.bfloat16
    return torch.float16 if stored.info.packed else stored.info.dtype


def resident_bytes(spec: EncoderSpec, mode: str) -> int:
    """Bytes that the encoder takes when it is loaded in `mode`."""
    linears = {f"{name}.weight" for name in spec.config.linears}
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
        spec: the text encoder that may be quantized.
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
