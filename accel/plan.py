"""What fits which GPU, before anything is loaded: `python -m accel.plan FILE --vram 12 --quantization fp8`.

FILE is any checkpoint that the loader reads, of which only the header is read; or the name of a model, see `published`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch

from .checkpoint import inspect_checkpoint
from .errors import AccelError, FileError, SettingsError
from .families import registry
from .families.base import Family, FamilyConfig
from .files import FileIdentity, TensorFile, TensorInfo
from .hardware import DTYPES, dtype_name
from .memory.budgets import GB
from .offload.plan import Demand, Room, demand_of, gb, make_plan
from .offload.sizes import Workload
from .settings import OFFLOAD_MODES, QUANTIZATION_MODES, Offload
from .spec import ModelSpec

CARDS_GB = (8.0, 10.0, 12.0, 16.0, 24.0, 32.0, 48.0, 80.0)


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
    width, height = options.resolution
    workload = Workload(width, height, options.batch)
    demand = demand_of(spec, dtype, options.quantization, options.compile != "off", workload)
    around = _Around.of(spec, options.text_encoder, workload)
    lines = [
        f"{spec.file.name}: {spec.parameter_count / 1e9:.2f} billion weights, quantization {options.quantization}, "
        f"computes in {dtype_name(dtype)}",
        f"  weights {gb(demand.weights.total)} ({len(demand.weights.blocks)} blocks of "
        f"{gb(min(demand.weights.blocks))} to {gb(max(demand.weights.blocks))}, {gb(demand.weights.rest)} outside), "
        f"a step of {workload} {gb(demand.activation_bytes)}",
        f"  {around.encoders} {gb(around.text_bytes)}, VAE {gb(around.vae_bytes)} and {gb(around.decode_bytes)} to "
        f"decode; with the weights {gb(demand.weights.total + around.kept_bytes)} in all",
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
    """What else a picture needs, before and after the engine.

    Attributes:
        encoders: the text encoders, and how they are kept.
        largest: the name of the largest of them.
    """

    encoders: str
    largest: str
    text_bytes: int
    vae_bytes: int
    decode_bytes: int

    @classmethod
    def of(cls, spec: ModelSpec, quantization: str, workload: Workload) -> _Around:
        """What a model needs beside it, with those text encoders quantized that can be."""
        encoders, vae = spec.family.text_encoders(spec.config), spec.family.autoencoder
        unknown = [encoder.name for encoder in encoders if len(encoder.bytes) > 1 and quantization not in encoder.bytes]
        if unknown:
            raise SettingsError(f"--text-encoder is '{quantization}', which is not known of {unknown[0]}.")
        parts = [f"{encoder.name} ({quantization})" if len(encoder.bytes) > 1 else encoder.name for encoder in encoders]
        text_bytes = sum(encoder.bytes.get(quantization, encoder.bytes["none"]) for encoder in encoders)
        pixels = workload.width * workload.height * workload.batch
        return cls(" and ".join(parts), encoders[0].name, text_bytes, vae.bytes, vae.decode_bytes_per_pixel * pixels)

    @property
    def kept_bytes(self) -> int:
        """Of weights that stay when nothing has to give way."""
        return self.text_bytes + self.vae_bytes

    def fitting(self, left_bytes: int, activation_bytes: int) -> str:
        """What can stay on the device beside the engine, when so much is left."""
        if left_bytes >= self.kept_bytes + max(activation_bytes, self.decode_bytes):
            return f"{self.largest} and VAE"
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


@dataclass(frozen=True)
class _NoFile(TensorFile):
    """What a published model's header would say."""

    device: ClassVar[torch.device] = torch.device("cpu")

    def open(self) -> NoReturn:
        """There are no weights to read."""
        raise FileError(f"'{self.name}' is the name of a model, not a file with its weights.")


def published() -> dict[str, tuple[Family, FamilyConfig]]:
    """The models that can be asked for by name."""
    return {name: (family, config) for family in registry.FAMILIES for name, config in family.published.items()}


def _spec(file: str) -> ModelSpec:
    models = published()
    if file not in models:
        return inspect_checkpoint(file)
    family, config = models[file]
    tensors = {key: TensorInfo(shape, torch.bfloat16) for key, shape in family.layout(config).expected_shapes().items()}
    return ModelSpec(_NoFile(FileIdentity(file, 0, 0), tensors), family, config, torch.bfloat16)


def _encoder_forms() -> tuple[str, ...]:
    """How the text encoders of any model can be kept."""
    encoders = (encoder for family, config in published().values() for encoder in family.text_encoders(config))
    return tuple(dict.fromkeys(form for encoder in encoders for form in encoder.bytes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m accel.plan", description="What fits which GPU.")
    parser.add_argument("file", metavar="FILE", help=f"a checkpoint, or one of: {', '.join(published())}")
    parser.add_argument("--vram", type=_size, metavar="GB", help="a card of this size too, with a sentence why")
    parser.add_argument("--quantization", choices=QUANTIZATION_MODES, default="none")
    parser.add_argument("--mode", choices=OFFLOAD_MODES, default="auto", help="of Offload Config (default auto)")
    parser.add_argument("--reserve", type=_size, metavar="GB", default=1.0, help="for others (default 1)")
    parser.add_argument("--resolution", type=_resolution, metavar="WxH", default=(1024, 1024))
    parser.add_argument("--batch", type=_count, default=1, help="twice as many where CFG is not 1")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="auto")
    parser.add_argument("--compile", choices=("regional", "off"), default="regional")
    parser.add_argument(
        "--text-encoder", choices=_encoder_forms(), default="none", help="how it is kept (default none: as published)"
    )
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
