"""What fits which GPU, before anything is loaded: `python -m accel.plan FILE --vram 12 --quantization fp8`.

FILE is any checkpoint that the loader reads, of which only the header is read; or the name of a model, see `MODELS`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .checkpoint import inspect_checkpoint
from .errors import AccelError, SettingsError
from .families.flux1 import Flux1, Flux1Config
from .files import FileIdentity, TensorFile, TensorInfo
from .hardware import dtype_name
from .offload.plan import GB, Demand, Room, demand_of, gb, make_plan
from .offload.sizes import Workload
from .settings import DTYPES, OFFLOAD_MODES, QUANTIZATION_MODES, Offload
from .spec import ModelSpec

CARDS_GB = (8.0, 10.0, 12.0, 16.0, 24.0, 32.0, 48.0, 80.0)
MODELS = {
    "flux1-dev": Flux1Config(3072, 19, 38, 64, 64, 4096, 768, 12288, True),
    "flux1-schnell": Flux1Config(3072, 19, 38, 64, 64, 4096, 768, 12288, False),
}
# FLUX.1's text encoders: T5-XXL by how Flux Text Encoder Loader keeps it, and CLIP-L in fp16.
T5_BYTES = {"none": 9_524_621_312, "int8": 4_900_000_000, "nf4": 2_900_000_000}
CLIP_BYTES = 246_144_152
# Its autoencoder in bf16, and what ComfyUI asks for to decode one pixel in it (comfy/sd.py: 2178 · 64 / 64 elements).
VAE_BYTES = 167_666_902
VAE_BYTES_PER_PIXEL = 2178 * 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table for one checkpoint."""
    options = _parser().parse_args(arguments)
    try:
        print("\n".join(report(options)))
    except AccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def report(options: argparse.Namespace) -> list[str]:
    """The lines that `main` prints.

    Raises:
        AccelError: the file is no checkpoint that the loader reads, or an option is wrong.
    """
    spec = _spec(options.file)
    dtype = DTYPES[options.dtype] or (torch.float16 if spec.stored_dtype == torch.float16 else torch.bfloat16)
    workload = Workload(*options.resolution, options.batch)
    demand = demand_of(spec, dtype, options.quantization, options.compile != "off", workload)
    around = _Around(T5_BYTES[options.t5] + CLIP_BYTES, VAE_BYTES, VAE_BYTES_PER_PIXEL * _pixels(workload))
    lines = [
        f"{spec.file.name}: {spec.parameter_count / 1e9:.2f} billion weights, quantization {options.quantization}, "
        f"computes in {dtype_name(dtype)}",
        f"  weights {gb(demand.weights.total)} ({len(demand.weights.blocks)} blocks of "
        f"{gb(min(demand.weights.blocks))} to {gb(max(demand.weights.blocks))}, {gb(demand.weights.rest)} outside), "
        f"a step of {workload} {gb(demand.activation_bytes)}",
        f"  T5 ({options.t5}) and CLIP-L {gb(around.text_bytes)}, VAE {gb(around.vae_bytes)} and "
        f"{gb(around.decode_bytes)} to decode; with the weights {gb(demand.weights.total + around.kept_bytes)} in all",
        "",
    ]
    cards = sorted({*CARDS_GB, options.vram} if options.vram else CARDS_GB)
    rows = [HEADER, *(_row(card, demand, options, around) for card in cards)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if options.vram:
        lines += ["", _sentence(options.vram, demand, options)]
    return lines


HEADER = ("GPU", "mode", "resident blocks", "copied per step", "engine", "peak", "beside it")


@dataclass(frozen=True)
class _Around:
    """What else a picture needs, before and after the engine."""

    text_bytes: int
    vae_bytes: int
    decode_bytes: int

    @property
    def kept_bytes(self) -> int:
        """Of weights that stay when nothing has to give way."""
        return self.text_bytes + self.vae_bytes

    def fitting(self, left_bytes: int, activation_bytes: int) -> str:
        """What can stay on the device beside the engine, when so much is left."""
        if left_bytes >= self.kept_bytes + max(activation_bytes, self.decode_bytes):
            return "T5 and VAE"
        return "VAE" if left_bytes >= self.vae_bytes + self.decode_bytes else "in turn"


def _row(card: float, demand: Demand, options: argparse.Namespace, around: _Around) -> tuple[str, ...]:
    size = f"{card:g} GB"
    try:
        plan = make_plan(demand, Offload(options.mode, 0.0, options.reserve), Room(round(card * GB)))
    except SettingsError:
        return (size, "does not fit", "", "", "", "", "")
    resident = f"{plan.resident_blocks} of {plan.total_blocks}"
    copied = gb(plan.copied_bytes_per_step) if plan.copied_bytes_per_step else "0"
    left = round((card - options.reserve) * GB) - plan.device_bytes - plan.lora_bytes
    beside = around.fitting(left, plan.activation_bytes)
    return (size, plan.mode, resident, copied, gb(plan.device_bytes), gb(plan.peak_bytes), beside)


def _sentence(card: float, demand: Demand, options: argparse.Namespace) -> str:
    try:
        plan = make_plan(demand, Offload(options.mode, 0.0, options.reserve), Room(round(card * GB)))
    except SettingsError as refusal:
        return f"{card:g} GB: {refusal}"
    return f"{card:g} GB: {plan.sentence}"


def _spec(file: str) -> ModelSpec:
    if file not in MODELS:
        return inspect_checkpoint(file)
    family, config = Flux1(), MODELS[file]
    tensors = {key: TensorInfo(shape, torch.bfloat16) for key, shape in family.layout(config).expected_shapes().items()}
    return ModelSpec(TensorFile(FileIdentity(file, 0, 0), tensors), family, config, torch.bfloat16)


def _pixels(workload: Workload) -> int:
    return workload.width * workload.height * workload.batch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m accel.plan", description="What fits which GPU.")
    parser.add_argument("file", metavar="FILE", help=f"a checkpoint, or one of: {', '.join(MODELS)}")
    parser.add_argument("--vram", type=_size, metavar="GB", help="a card of this size too, with a sentence why")
    parser.add_argument("--quantization", choices=QUANTIZATION_MODES, default="none")
    parser.add_argument("--mode", choices=OFFLOAD_MODES, default="auto", help="of Offload Config (default auto)")
    parser.add_argument("--reserve", type=_size, metavar="GB", default=1.0, help="for others (default 1)")
    parser.add_argument("--resolution", type=_resolution, metavar="WxH", default=(1024, 1024))
    parser.add_argument("--batch", type=_count, default=1, help="twice as many where CFG is not 1")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="auto")
    parser.add_argument("--compile", choices=("regional", "off"), default="regional")
    parser.add_argument("--t5", choices=tuple(T5_BYTES), default="none", help="how the T5 is kept (default none: bf16)")
    return parser


def _size(text: str) -> float:
    value = float(text)
    if not 0 < value < 10_000:
        raise argparse.ArgumentTypeError(f"'{text}' is no size in GB")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of pictures")
    return value


def _resolution(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no resolution such as 1024x1024")
    return int(match.group(1)), int(match.group(2))


if __name__ == "__main__":
    sys.exit(main())
