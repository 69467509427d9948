"""Run one benchmark by name. To add one: write a module with `run(quick) -> Report`, and a line in `BENCHMARKS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One entry of the command line.

    Attributes:
        summary: one line, for `--help`.
        module: where its `run(quick: bool) -> report.Report` is; imported only when it runs.
        options: what else `run` takes: flag -> how argparse reads it.
        saves: whether it also takes `save`, for what is known before its end.
    """

    summary: str
    module: str
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    saves: bool = False


DEVICE = {"--device": {"default": "cpu", "help": "where it runs, such as cuda (default cpu)"}}
SCALE = {"--scale": {"type": float, "default": 1.0, "help": "share of the model's blocks (default 1)"}}
FAMILY = {
    "--family": {
        "default": "flux1-dev",
        "metavar": "NAME",
        "help": "a published model of these sizes, such as flux2-dev or flux2-klein-9b (default flux1-dev)",
    }
}
BENCHMARKS: Mapping[str, Benchmark] = {
    "swap": Benchmark(
        "switch a LoRA at a model's real sizes: hot, warm, cold, beside PEFT, diffusers and, on a CPU, ComfyUI's merge",
        "benchmarks.swap",
        options={**DEVICE, **FAMILY},
    ),
    "load": Benchmark(
        "load a checkpoint of a model's real size into fp8 and int8: memory, time, and the next start from the cache; "
        "needs 40 GB of disk for FLUX.1-dev's in the current folder, which it gives back",
        "benchmarks.load",
        options={**SCALE, **FAMILY},
    ),
    "step": Benchmark(
        "what LoRA layers cost per compiled step: none bound, ranks 16 and 128, a stack, beside PEFT",
        "benchmarks.step",
        options={
            **DEVICE,
            "--resolution": {"type": int, "help": "of the picture (default 1024; on a CPU 320, and a short prompt)"},
            "--quantization": {"default": "none", "help": "of the blocks' linears, such as fp8 or int8 (default none)"},
            **FAMILY,
        },
    ),
    "restart": Benchmark(
        "the first image after a restart, from compiled code that was kept, beside the first one ever and a warm one",
        "benchmarks.restart",
    ),
    "offload": Benchmark(
        "a step of FLUX.1-dev whose blocks are copied to the device while it computes: copies, computation, both; "
        "needs 15 GB of memory",
        "benchmarks.offload",
        options={**SCALE, **DEVICE},
    ),
    "gpu_code": Benchmark(
        "what the code generated for an H100 reads and writes, with and without LoRA, beside PEFT; needs no GPU",
        "benchmarks.gpu_code",
        options=FAMILY,
    ),
    "gpu": Benchmark(
        "everything that a GPU is to show, in the order of its worth: self-tests, switches, steps, whole images, "
        "offload, attention; a second call goes on",
        "benchmarks.gpu",
        options={
            "--minutes": {"type": float, "default": 8.0, "help": "for all of it (default 8)"},
            "--out": {
                "type": Path,
                "metavar": "DIR",
                "default": Path("bench-output/gpu"),
                "help": "gets results.jsonl, gpu.json, gpu.md and logs after each row (default bench-output/gpu)",
            },
            "--stages": {"nargs": "+", "metavar": "STAGE", "help": "only these (default all)"},
            "--device": {"help": "where it runs (default cuda; with --quick also cpu)"},
        },
    ),
    "ablation": Benchmark(
        "the published table: baseline, compile, fp8, flash_3, hotswap, all, each left out; two LoRAs in turn; also "
        "writes Markdown beside --json FILE",
        "benchmarks.ablation",
        options={
            "--peers": {"action": "store_true", "help": "also stock ComfyUI and diffusers, from the same files"},
            "--model": {"type": Path, "metavar": "FILE", "help": "a FLUX.1 checkpoint; default: two blocks, random"},
            "--lora": {"type": Path, "metavar": "FILE", "action": "append", "help": "twice: the LoRAs for --model"},
            "--steps": {"type": int, "help": "of an image (default 28 with --model, else 2)"},
            "--resolution": {"type": int, "default": 1024, "help": "of an image with --model (default 1024)"},
            "--random": {"action": "store_true", "help": "in place of --model: random weights, made on the GPU"},
            "--rows": {"nargs": "+", "metavar": "ROW", "help": "only these, and the baseline (default all)"},
            "--minutes": {"type": float, "help": "for all of it; what it is too short for says so (default no limit)"},
        },
        saves=True,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the command line names; print its table, write its JSON."""
    options = _parser().parse_args(arguments)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        print(f"error: --json {options.json}: there is no folder {options.json.parent}.", file=sys.stderr)
        return 2

    from .report import BenchmarkError, print_report, save  # imports torch: not for --help

    try:
        benchmark = BENCHMARKS[options.name]
        extra = {name: getattr(options, name) for name in (flag.lstrip("-") for flag in benchmark.options)}
        if benchmark.saves and options.json is not None:
            extra["save"] = partial(save, path=options.json)
        report = import_module(benchmark.module).run(quick=options.quick, **extra)
    except BenchmarkError as error:
        print(f"error: {options.name}: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        save(report, options.json)  # first: printing fails when stdout is a pipe that was closed
        if report.picture is not None:
            report.picture(options.json.with_suffix(".png"))
    print_report(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure one thing, side by side.")
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, benchmark in BENCHMARKS.items():
        one = names.add_parser(name, help=benchmark.summary, description=benchmark.summary)
        one.add_argument(
            "--json", type=Path, metavar="FILE", help="also write the figures to FILE, and a plot beside it"
        )
        one.add_argument("--quick", action="store_true", help="small sizes: shows that it works, says nothing of speed")
        for flag, how in benchmark.options.items():
            one.add_argument(flag, **how)
    return parser


if __name__ == "__main__":
    sys.exit(main())
