"""What an engine is and did, as text for a person: complete enough for a bug report, without paths or prompts."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .build import conversion_of
from .engine import Engine
from .hardware import dtype_name
from .history import Sampling
from .lora.read.report import together
from .lora.schedule import ScheduledStack
from .lora.stack import describe, grouped
from .memory.budgets import available_host_bytes, free_device_bytes
from .prove import proofs
from .quantize import find_mode
from .step_cache import StepCacheSettings

# What changes how an engine computes, or whether it can.
LIBRARIES = (
    "triton", "triton-windows", "diffusers", "torchao", "bitsandbytes", "gguf", "safetensors", "transformers",
    "peft", "numpy", "flash-attn", "sageattention", "xformers", "kernels",
)
SHOWN_SWAPS = 8
Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Reported:
    """What a report is about.

    Attributes:
        engine: the engine.
        loras: the stack that it is, or will be, used with.
        step_cache: likewise; None: no steps are skipped.
        samplings: the last ones, oldest first.
        last_load_s: what bringing the weights to the device took last; None: not known.
        host: what it runs in: name -> version.
    """

    engine: Engine
    loras: ScheduledStack = ScheduledStack()
    step_cache: StepCacheSettings | None = None
    samplings: Sequence[Sampling] = ()
    last_load_s: float | None = None
    host: Mapping[str, str] = field(default_factory=dict)


def write_report(reported: Reported) -> str:
    """The report: a fenced block, which keeps its columns where Markdown is read."""
    lines = ["```", "Flux Hotswap report"]
    for title, section in SECTIONS:
        rows = section(reported)
        if not rows:
            continue
        lines += ["", title]
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:<{width}}  {value}".rstrip() for name, value in rows]
    return "\n".join([*lines, "```"])


def _model(reported: Reported) -> Rows:
    engine = reported.engine
    spec, config = engine.spec, engine.spec.config
    loaded = f"loaded {engine.load_count} time(s)"
    if reported.last_load_s is not None:
        loaded += f", the last time in {reported.last_load_s:.2f} s"
    return [
        ("file", f"{Path(spec.file.name).name}, {_gb(spec.file.identity.size_bytes)}, {dtype_name(spec.stored_dtype)}"),
        ("family", f"{spec.family.name} {config.variant}, {spec.parameter_count / 1e6:,.0f} million parameters"),
        ("blocks", config.sizes),
        ("computes in", f"{dtype_name(engine.dtype)} (dtype: {engine.settings.dtype})"),
        ("weights", f"{_gb(engine.bytes)} on {engine.device}; {loaded if engine.load_count else 'not loaded yet'}"),
        ("now", "on the device" if engine.loaded else "not on the device"),
    ]


def _quantization(reported: Reported) -> Rows:
    engine = reported.engine
    mode = find_mode(engine.settings.quantization.mode)
    if mode is None:
        return [("mode", "none")]
    return [
        ("mode", f"{mode.name}: {mode.summary}"),
        ("library", ", ".join(mode.libraries)),
        ("weights", str(conversion_of(engine.spec, mode))),
    ]


def _attention(reported: Reported) -> Rows:
    engine = reported.engine
    chosen = "" if engine.attention == engine.settings.attention else f" ({engine.settings.attention})"
    asked = engine.spec.asks_for_attention
    return [
        ("backend", f"{engine.attention}{chosen}"),
        *([("asked for", f"{asked} by the file; not used")] if asked else []),
    ]


def _compile(reported: Reported) -> Rows:
    engine = reported.engine
    failure = [] if engine.compiler.failure is None else [("WITHOUT IT", engine.compiler.failure)]
    return [
        ("mode", engine.settings.compile),
        *failure,
        ("compiles", f"{engine.compiler.count}, in {engine.compiler.seconds:.1f} s"),
        ("recompiles", f"{engine.compiler.recompiles}" + (" (0 is expected)" if engine.compiler.recompiles else "")),
    ]


def _offload(reported: Reported) -> Rows:
    engine, offload = reported.engine, reported.engine.settings.offload
    budget = f", at most {offload.vram_budget_gb:g} GB" if offload.vram_budget_gb else ""
    plan = [] if engine.plan is None else [("plan", engine.plan.sentence)]
    return [
        ("mode", f"{offload.mode}{budget}"),
        *plan,
        ("on the device", f"{_gb(engine.device_bytes)} of weights, {_gb(engine.library.device_bytes)} of LoRAs"),
    ]


def _loras(reported: Reported) -> Rows:
    loras, engine = reported.loras, reported.engine
    entries = loras.stack.entries
    if not entries:
        return [("stack", "none")]
    rows = [("stack", str(loras)), ("bound now", "yes" if engine.applied(loras.stack) else "no")]
    for number, group in enumerate(grouped(entries), start=1):
        rows.append((f"{number}", describe(group)))
        rows.append(("", str(together([entry.adapter.report for entry in group]))))
    cost = loras.stack.cost
    cut = f", cut to {loras.stack.max_rank}" if loras.stack.max_rank else ""
    rows.append(
        (
            "cost",
            f"{cost}{cut}, {cost.megabytes(engine.dtype):,.1f} MB, "
            f"{cost.step_share(engine.spec.parameter_count):.1%} more arithmetic per step",
        )
    )
    return rows


def _swaps(reported: Reported) -> Rows:
    swaps = [swap for sampling in reported.samplings for swap in sampling.swaps][-SHOWN_SWAPS:]
    rows = []
    for swap in swaps:
        error = f", error {swap.error:.2%}" if swap.error else ""
        rows.append((swap.source, f"{swap.swap_ms:.2f} ms, {swap.bytes / 1e6:,.1f} MB{error}: {swap.loras}"))
    return rows


def _step_cache(reported: Reported) -> Rows:
    settings = reported.step_cache
    if settings is None:
        return [("mode", "off")]
    in_a_row = f", at most {settings.max_skips} in a row" if settings.max_skips else ""
    return [
        ("threshold", f"{settings.threshold:g}{in_a_row}"),
        ("from", f"{settings.start_percent * 100:g} to {settings.end_percent * 100:g} % of the sampling"),
    ]


def _samplings(reported: Reported) -> Rows:
    rows = []
    for number, sampling in enumerate(reported.samplings, start=1):
        parts = [sampling.picture, f"{sampling.steps} steps in {sampling.seconds:.2f} s"]
        if sampling.stopped:
            parts.append(f"{sampling.stopped} in the last of them")
        if sampling.calls != sampling.steps:
            parts.append(f"{sampling.calls} calls")
        if sampling.steps_s and sampling.steps:
            parts.append(f"{sampling.steps / sampling.steps_s:.2f} steps/s")
        parts.append(f"switch {sampling.swap_s * 1e3:.2f} ms" if sampling.swaps else "no switch")
        if sampling.compiles:
            parts.append(f"compiled {sampling.compiles} in {sampling.compile_s:.1f} s")
        if sampling.recompiles:
            parts.append(f"RECOMPILES {sampling.recompiles}")
        if sampling.step_cache:
            parts.append(f"step cache {sampling.step_cache}")
        rows.append((f"{number}", ", ".join(parts)))
        rows.append(("", f"LoRAs {sampling.loras}"))
    return rows


def _memory(reported: Reported) -> Rows:
    import psutil  # as in memory.py

    used, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    rows = [("host", f"this process {_gb(used)}, available {_gb(available_host_bytes())} of {_gb(total)}")]
    device = reported.engine.device
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        rows.append(
            (
                "device",
                f"PyTorch uses {_gb(torch.cuda.memory_allocated(device))} and keeps "
                f"{_gb(torch.cuda.memory_reserved(device))} (peak {_gb(torch.cuda.max_memory_allocated(device))}), "
                f"free {_gb(free_device_bytes(device))} of {_gb(total)}",
            )
        )
    for name, (used, budget) in reported.engine.library.pools.items():
        rows.append((f"LoRAs, {name}", f"{used / 1e6:,.1f} of {budget / 1e6:,.0f} MB"))
    return rows


def _proofs(reported: Reported) -> Rows:
    """What was tried on the device before it was used; see `prove`."""
    return [(proof.name, proof.sentence) for proof in proofs().all if proof.device == str(reported.engine.device)]


def _machine(reported: Reported) -> Rows:
    device = reported.engine.device
    rows = [*reported.host.items(), ("system", f"{platform.system()} {platform.release()}, {platform.machine()}")]
    rows += [("python", platform.python_version()), ("processor", f"{_processor()}, {os.cpu_count()} cores")]
    if device.type == "cuda":
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        rows.append(("device", f"{torch.cuda.get_device_name(device)}, compute capability {capability}"))
        toolkit = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
        rows.append(("toolkit", toolkit))
    return rows


def _libraries(reported: Reported) -> Rows:
    rows = [("torch", torch.__version__)]  # with its CUDA, which the package's own version leaves out
    for name in LIBRARIES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return rows


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"


# What a report has, in order. A section gives (name, value) rows; one without rows is left out.
SECTIONS: tuple[tuple[str, Callable[[Reported], Rows]], ...] = (
    ("Model", _model),
    ("Quantization", _quantization),
    ("Attention", _attention),
    ("Compile", _compile),
    ("Offload", _offload),
    ("LoRAs", _loras),
    ("Last switches of LoRAs", _swaps),
    ("Step cache", _step_cache),
    ("Last samplings", _samplings),
    ("Memory", _memory),
    ("What proved itself on this device", _proofs),
    ("Machine", _machine),
    ("Libraries", _libraries),
)
