"""Which configurations the ablation has on a machine, and why some of them cannot run there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from accel.engine import Engine
from accel.errors import SettingsError
from accel.quantize import choose
from accel.settings import EngineSettings
from accel.spec import ModelSpec

from .subjects import Setup

BASELINE = "baseline"
ALL = "all"
# huggingface/lora-fast, FLUX.1-dev, 1024 × 1024, 28 steps, two LoRAs in turn: seconds per image. On the RTX 4090 "all"
# is without FlashAttention 3, and has its T5 in NF4.
PUBLISHED_S: Mapping[str, Mapping[str, float]] = {
    "H100": {
        BASELINE: 7.891,
        ALL: 3.546,
        "all but fp8": 4.352,
        "all but flash_3": 4.302,
        "all but fp8 and flash_3": 5.085,
        "all but compile": 10.434,
    },
    "RTX 4090": {BASELINE: 23.606, ALL: 11.572},
}


@dataclass(frozen=True)
class Configuration:
    """One line of the table.

    Attributes:
        name: in the table and the JSON file.
        what: for a reader.
        setup: how it runs, or None.
        reason: why it does not run, where `setup` is None.
    """

    name: str
    what: str
    setup: Setup | None
    reason: str = ""


def quantization_of(device: torch.device) -> str:
    """The mode that "fp8" of the published table is on a device: what "auto" chooses, fp8 or int8."""
    mode = choose("auto", device).mode
    return mode if mode in ("fp8", "int8") else "int8"


def published_on(device: torch.device) -> str:
    """Which card's published figures stand beside those of a device; "" for a CPU."""
    if device.type != "cuda":
        return ""
    return "RTX 4090" if "4090" in torch.cuda.get_device_name(device) else "H100"


def flash_3_reason(device: torch.device, spec: ModelSpec) -> str:
    """Why FlashAttention 3 cannot run a checkpoint here; "" where it can."""
    if device.type != "cuda":
        return f"flash_3 needs an NVIDIA card of compute capability 9.0; this is the device {device}"
    found = torch.cuda.get_device_capability(device)
    if found < (9, 0):
        return f"flash_3 needs compute capability 9.0; {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
    try:
        settings = EngineSettings(dtype="bf16", attention="flash_3", device=str(device))
        Engine(spec, settings)
    except SettingsError as exc:
        return str(exc)
    return ""


def table(device: torch.device, spec: ModelSpec) -> list[Configuration]:
    """The published rows for a checkpoint: each optimization alone, all, each left out."""
    quantized, no_flash = quantization_of(device), flash_3_reason(device, spec)
    attention = "auto" if no_flash else "flash_3"
    peft, pack = "diffusers, LoRAs loaded anew by PEFT", "this pack"
    rows = [
        Configuration(BASELINE, f"{peft}, eager, bf16", Setup("diffusers")),
        Configuration("compile", f"{peft}, compiled by region", Setup("diffusers", "regional")),
        Configuration(quantized, f"{peft}, torchao {quantized} dynamic, eager", Setup("diffusers", "off", quantized)),
        _or_reason("flash_3", f"{peft}, eager", Setup("diffusers", attention="flash_3"), no_flash),
        Configuration("hotswap", f"{pack}, eager, bf16", Setup("pack", hotswap=True)),
        Configuration(ALL, f"{pack}: compile, {quantized}, hotswap{'' if no_flash else ', flash_3'}",
                      Setup("pack", "regional", quantized, attention, hotswap=True)),
        Configuration("all but compile", pack, Setup("pack", "off", quantized, attention, hotswap=True)),
        Configuration(f"all but {quantized}", pack, Setup("pack", "regional", "none", attention, hotswap=True)),
        _or_reason("all but flash_3", pack, Setup("pack", "regional", quantized, hotswap=True),
                   no_flash and "'all' is without flash_3 on this machine"),
        _or_reason(f"all but {quantized} and flash_3", pack, Setup("pack", "regional", hotswap=True),
                   no_flash and f"the same as 'all but {quantized}' on this machine"),
        Configuration("all but hotswap", f"{peft}, compiled by region, torchao {quantized}",
                      Setup("diffusers", "regional", quantized, attention)),
    ]  # fmt: skip
    if quantized != "fp8":
        why = "PyTorch only emulates fp8 products on a CPU" if device.type == "cpu" else "this card has no fp8 products"
        rows.insert(2, Configuration("fp8", "", None, f"{why}: {quantized} takes its place in this table"))
    return rows


def peers(device: torch.device) -> list[Configuration]:
    """What is installed beside this pack, each with the same files."""
    stock = "stock ComfyUI, LoRA merged"
    rows = [
        Configuration("stock bf16", f"{stock}, eager, computes in bf16", Setup("comfyui")),
        Configuration("stock default", f"{stock}, as it starts on a CPU: bf16 weights, computes in fp32",
                      Setup("comfyui", fp32_compute=True)),
        Configuration("stock compile", f"{stock}, TorchCompileModel, bf16", Setup("comfyui", "full")),
        Configuration("plain compile", "torch.compile of the diffusers model, bf16, without any LoRA",
                      Setup("diffusers", "full", lora=False)),
        Configuration("diffusers hotswap", "enable_lora_hotswap, compile_repeated_blocks, bf16",
                      Setup("diffusers", "regional", hotswap=True)),
    ]  # fmt: skip
    if device.type != "cpu":
        return [row for row in rows if row.name != "stock default"]
    return rows


def runnable(rows: Sequence[Configuration]) -> list[Configuration]:
    """Those that can run here."""
    return [row for row in rows if row.setup is not None]


def _or_reason(name: str, what: str, setup: Setup, reason: str) -> Configuration:
    return Configuration(name, what, None, reason) if reason else Configuration(name, what, setup)
