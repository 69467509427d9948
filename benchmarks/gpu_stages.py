"""What `python -m benchmarks gpu` measures beside whole models."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from accel.attention import BACKENDS, Target
from accel.attention.correctness import make_inputs, verify
from accel.quantize.modes import MODES, refusal
from accel.selftest import Row, try_everything, usual_heads

from . import offload, offload_case, offload_report, step, swap
from .block_steps import NAMES
from .gpu_job import Job
from .kernel_profile import profile_kernels
from .report import BenchmarkError
from .switch import LORA_COUNT
from .timing import Stopwatch, interleave_timed, median

BF16 = torch.bfloat16
LIBRARIES = (
    "torch", "triton", "diffusers", "peft", "torchao", "bitsandbytes", "flash-attn", "flash-attn-4", "xformers",
    "sageattention",
)  # fmt: skip
# FLUX.1's attention for a picture of 1024 × 1024 and a prompt.
HEADS, HEAD_DIM = usual_heads()
TOKENS = 4_608
QUICK_HEADS, QUICK_TOKENS = 2, 64
DOWNLOADS = "is not installed, and would be fetched from the network when it is chosen"
SWAP_ROUNDS, QUICK_SWAP_ROUNDS = 5, 2
# Runs on end: each is checked, and what memory on a CPU needs more of does not matter to a device.
SWAP_RUNS = 3
STEP_ROUNDS, QUICK_STEP_ROUNDS = 15, 2
OFFLOAD_SCALE = 0.25
# What a row needs at its end for what it reports.
RESERVE_S = 5.0


def device(job: Job) -> None:
    """What it is, and what it gives at most: one product, one copy, one upload."""
    job.add(machine=machine(job.device))
    watch, on = Stopwatch(job.device), job.device
    size, elements = (256, 2**16) if job.quick else (8192, 2**30)
    a, b = (torch.randn(size, size, device=on).to(BF16) for _ in range(2))
    job.add(bf16_product_tflops=2 * size**3 / watch.median(lambda: a @ b, 10).device_ms / 1e9)
    source = torch.ones(elements, device=on, dtype=torch.uint8)
    target = torch.empty_like(source)
    job.add(copy_gb_per_s=2 * elements / watch.median(lambda: target.copy_(source), 10).device_ms / 1e6)
    for name, pin in (("pinned", on.type == "cuda"), ("pageable", False)):
        host = torch.ones(elements // 4, dtype=torch.uint8, pin_memory=pin)
        there = torch.empty_like(host, device=on, pin_memory=False)
        took = watch.median(lambda host=host, there=there: there.copy_(host, non_blocking=True), 5)
        job.add(**{f"upload_{name}_gb_per_s": host.nbytes / took.done_ms / 1e6})


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: results of another machine, or of other versions, are measured again."""
    found: dict[str, Any] = {"device": str(device.type), "python": platform.python_version(), "os": platform.platform()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def selftests(job: Job) -> None:
    """Each part on small random data against a plain reference."""
    rows = []
    for row in try_everything(job.device, compiled=not job.quick):
        rows.append(_tried(row))
        states = [each["state"] for each in rows]
        job.add(rows=rows, works=states.count("works"), failed=states.count("FAILED"))


def _tried(row: Row) -> dict[str, Any]:
    if row.proof is None:
        return {"name": row.name, "state": row.state, "why": row.reason}
    proof = row.proof
    figures = {"ms": proof.ms, "deviation": proof.deviation}
    return {"name": row.name, "state": row.state, **figures, "why": proof.refusal or ""}


def _missing(name: str, target: Target) -> str | None:
    """Why an attention backend does not run here, or None; nothing is fetched from the network to find out."""
    backend = BACKENDS[name]
    return backend.missing(target) or (DOWNLOADS if backend.downloads() else None)


def _target(device: torch.device, quick: bool) -> Target:
    # Compiled: FlexAttention is nothing otherwise; it takes a CPU half a minute.
    return Target(device, BF16, QUICK_HEADS if quick else HEADS, HEAD_DIM, compiled=not quick)


def attention(job: Job, name: str) -> None:
    """One backend at FLUX.1's shape."""
    target, backend = _target(job.device, job.quick), BACKENDS[name]
    missing = _missing(name, target)
    if missing is not None:
        job.add(missing=missing)
        return
    verdict = verify(name, target)
    if verdict.refusal is not None:
        raise BenchmarkError(f"attention '{name}' {verdict.refusal}")
    tokens = QUICK_TOKENS if job.quick else TOKENS
    with torch.inference_mode():
        inputs = make_inputs(target, 1, tokens)
        function = backend.make()
        if name == "flex":  # nothing until it is compiled
            function = torch.compile(function, fullgraph=True)
        took = Stopwatch(job.device).median(lambda: function(*inputs, None), 15)
    flops = 4 * target.heads * HEAD_DIM * tokens**2
    job.add(ms=took.device_ms, host_ms=took.host_ms, tflops=flops / took.device_ms / 1e9, deviation=verdict.deviation)


def switches(job: Job, group: str) -> None:
    """One group of `swap`."""
    with swap.Swaps.made(job.quick, job.device) as swaps:
        variants = [replace(each, runs=min(each.runs, SWAP_RUNS)) for each in swaps.group(group)]
        rounds, ends = QUICK_SWAP_ROUNDS if job.quick else SWAP_ROUNDS, job.ends - RESERVE_S
        timed = interleave_timed(variants, rounds, LORA_COUNT, Stopwatch(job.device), ends)
        for name, samples in timed.items():
            took = median(samples)
            job.add(**{f"{name}_ms": took.done_ms, f"{name}_host_ms": took.host_ms})
        done = {name: [sample.done_ms for sample in samples] for name, samples in timed.items()}
        if group == "pack":
            job.add(
                lora_mb=swaps.switch.lora_bytes / 1e6,
                warm_over_memcpy=swap.over(done, "warm", ["memcpy"]),
                hot_over_memcpy=swap.over(done, "hot", ["memcpy"]),
                cold_over_read_plus_memcpy=swap.over(done, "cold", ["read", "memcpy"]),
                cold_files=swaps.switch.files.describe(),
            )
        elif group == "prefetching":
            job.add(slowdown=swap.slowdown(done))


def steps(job: Job, mode: str, resolution: int) -> None:
    """`step`: one double and one single block, with and without LoRAs."""
    if mode != "none" and (missing := refusal(MODES[mode], job.device)) is not None:
        job.add(missing=missing)
        return
    case = step.case_of(job.quick, job.device, None if job.quick else resolution, mode)
    if job.quick:
        case = replace(case, rounds=QUICK_STEP_ROUNDS, compile="off")
    else:
        case = replace(case, rounds=STEP_ROUNDS)
    measured = step.measure(case, job.ends - 4 * RESERVE_S)
    job.add(**step.figures(measured.samples), attention=measured.steps.attention, tokens=case.tokens.all)
    watch = Stopwatch(job.device)
    for name in NAMES[:1] + NAMES[2:3]:
        job.add(**{f"{name}_profile": profile_kernels(lambda name=name: measured.steps.step(name), watch)})


def offloaded(job: Job) -> None:
    """`offload`: a step whose blocks are copied while it computes, beside the resident model's."""
    case = offload_case.case_of(job.quick, OFFLOAD_SCALE, job.device)
    planned = offload_case.plan_of(case)
    memory = offload_case.memory_for(case, planned.plan)
    samples = offload.Steps(case, planned.plan, memory).measure(job.ends - RESERVE_S)
    job.add(**offload_report.figures(case, planned, memory, samples))
