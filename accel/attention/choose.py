"""From what a user asks for to the function that runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from ..errors import SettingsError
from ..hardware import dtype_name
from ..prove import proofs
from .backend import Attention, Backend, Target
from .backends import BACKENDS
from .correctness import make_inputs, verify

# What "auto" takes from: exact ones that need no compile of their own. Of two that are about equally fast it takes the
# one that stands first, in every process, so that compiled code in caches stays good.
AUTO = ("sdpa", "cudnn", "flash_3", "flash_4", "flash_2", "xformers", "onednn")
MARGIN = 0.05
# A picture of 1024 × 1024 and a prompt; on a CPU, where that would take ten seconds, one of 512 × 512 without.
MEASURED_TOKENS = {"cuda": 4_608, "cpu": 1_024}
REPEATS = 7


@dataclass(frozen=True)
class ChosenAttention:
    """The attention of an engine.

    Attributes:
        name: of the backend.
        attention: its function.
        sentence: what a user should know of the choice.
        warnings: backends that "auto" had to leave out because they are broken here, a sentence each.
    """

    name: str
    attention: Attention
    sentence: str
    warnings: tuple[str, ...] = ()


def check_attention(name: str, target: Target) -> None:
    """Say so now if a choice cannot run. Imports the library of an explicit one; computes nothing.

    Args:
        name: a name of `BACKENDS`, or "auto".
        target: what it is for.

    Raises:
        SettingsError: something is missing; it says what, how to get it, and which backend runs instead.
    """
    if name != "auto":
        reason = BACKENDS[name].missing(target)
        if reason is not None:
            raise SettingsError(_refusal(name, target, reason))


def prove_attention(name: str, target: Target) -> None:
    """Compare an explicit choice with SDPA now. Where there is no room for that yet, `choose_attention` does it.

    Args:
        name: see `check_attention`, which ran before.
        target: what it is for.

    Raises:
        SettingsError: it does not run, or computes wrong numbers.
    """
    if name not in ("auto", "sdpa"):
        with suppress(torch.OutOfMemoryError):
            choose_attention(name, target)


def choose_attention(name: str, target: Target) -> ChosenAttention:
    """Give the attention for a choice, after it was compared with SDPA.

    Args:
        name: see `check_attention`, which ran before.
        target: what it is for.

    Raises:
        SettingsError: an explicit choice is missing something, does not run, or computes wrong numbers.
    """
    if name == "auto":
        return _choose_fastest(target)
    check_attention(name, target)
    if name == "sdpa":
        return ChosenAttention(name, BACKENDS[name].make(), "attention: sdpa")
    try:
        attention = BACKENDS[name].make()
    except ImportError as exc:
        raise SettingsError(_refusal(name, target, str(exc))) from exc
    verdict = verify(name, target).verdict
    if verdict.refusal is not None:
        raise SettingsError(_refusal(name, target, verdict.refusal))
    what = f"{verdict.deviation:.2g} from float32" + ("" if BACKENDS[name].exact else ", an approximation")
    return ChosenAttention(name, attention, f"attention: {name} ({what})")


def _choose_fastest(target: Target) -> ChosenAttention:
    present = [name for name in AUTO if _usable_as_it_is(BACKENDS[name], target)]
    refusals = {name: verify(name, target).refusal for name in present if name != "sdpa"}
    names = tuple(name for name in present if refusals.get(name) is None)
    warnings = tuple(f"attention '{name}' {reason}, and is not used." for name, reason in refusals.items() if reason)
    seconds = _remembered_seconds(names, target) if len(names) > 1 else {}
    name = fastest(seconds) if seconds else "sdpa"
    return ChosenAttention(name, BACKENDS[name].make(), _sentence(name, seconds, target), warnings)


def fastest(seconds: Mapping[str, float]) -> str:
    """The first backend of `AUTO` that is within `MARGIN` of the fastest."""
    least = min(seconds.values())
    return next(name for name in AUTO if name in seconds and seconds[name] <= least * (1 + MARGIN))


def _remembered_seconds(names: tuple[str, ...], target: Target) -> Mapping[str, float]:
    heads = f"{target.heads} heads of {target.head_dim}"
    subject = f"seconds of attention, {heads}, {dtype_name(target.dtype)}: {', '.join(names)}"
    return proofs().seconds(subject, target.device, lambda: measure(names, target))


def measure(names: tuple[str, ...], target: Target) -> Mapping[str, float]:
    """Seconds of one call, per backend. Takes some tens of milliseconds each, on a CPU hundreds.

    They take turns: what else the machine does meanwhile hits them all, not the one whose turn it was.
    """
    once = _seconds_on_cpu if target.device.type == "cpu" else _seconds_on_gpu
    with torch.inference_mode():
        inputs = make_inputs(target, 1, MEASURED_TOKENS[target.device.type])
        runs = {name: functools.partial(BACKENDS[name].make(), *inputs, None) for name in names}
        for run in (*runs.values(), *runs.values()):
            run()
        rounds = [{name: once(run) for name, run in runs.items()} for _ in range(REPEATS)]
    return {name: min(seconds[name] for seconds in rounds) for name in names}


def _seconds_on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_gpu(run: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _usable_as_it_is(backend: Backend, target: Target) -> bool:
    return backend.missing(target) is None and not backend.downloads()


def _sentence(name: str, seconds: Mapping[str, float], target: Target) -> str:
    text = f"attention: {name}"
    if seconds:
        others = ", ".join(f"{other} {took * 1e3:.2f}" for other, took in seconds.items() if other != name)
        tokens = MEASURED_TOKENS[target.device.type]
        text += f", {seconds[name] * 1e3:.2f} ms a call at {tokens} tokens ({others})"
    absent = [
        other for other in AUTO
        if other not in seconds and other != name and target.dtype in BACKENDS[other].max_deviation
        and BACKENDS[other].hardware(target) is None
        and (BACKENDS[other].library() is not None or BACKENDS[other].downloads())
    ]  # fmt: skip
    return text + (f"; would run here with their libraries: {', '.join(absent)}" if absent else "")


def _refusal(name: str, target: Target, reason: str) -> str:
    nearest = next(
        (other for other in BACKENDS[name].instead if _usable_as_it_is(BACKENDS[other], target)), "sdpa"
    )
    return f"attention '{name}' {reason}. The nearest that runs here is '{nearest}'."
