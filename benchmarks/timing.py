"""Fair timing: variants in turn, on a CPU or beside a device that computes on its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timed:
    """What one run took, in milliseconds. On a CPU all three are the same.

    Attributes:
        done_ms: until all of its work was done, as a user waits for it.
        host_ms: until the call returned; the device may still have computed.
        device_ms: between two events around it in the device's own order.
    """

    done_ms: float
    host_ms: float
    device_ms: float


class Stopwatch:
    """Times what a device does.

    Attributes:
        device: which one.
    """

    def __init__(self, device: torch.device = CPU, streams: Any = None) -> None:
        """Measure nothing yet.

        Args:
            device: where the work is done.
            streams: what has `Event` and `synchronize`; by default the device's torch module.
        """
        self.device = device
        self._streams = streams or (None if device.type == "cpu" else getattr(torch, device.type))

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self._streams is not None:
            self._streams.synchronize()

    def time(self, run: Callable[[], float | None]) -> Timed:
        """Run it once. What it returns is taken as its own measurement in ms, for all three; None: it is timed."""
        if self._streams is None:
            start = time.perf_counter()
            own_ms = run()
            elapsed_ms = (time.perf_counter() - start) * 1e3
            return _alike(elapsed_ms if own_ms is None else own_ms)
        begin, end = (self._streams.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        start = time.perf_counter()
        begin.record()
        own_ms = run()
        end.record()
        returned = time.perf_counter()
        self.synchronize()
        if own_ms is not None:
            return _alike(own_ms)
        done = time.perf_counter()
        return Timed((done - start) * 1e3, (returned - start) * 1e3, begin.elapsed_time(end))

    def seconds(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Run it once: the seconds until all of its work was done, and what it returned."""
        self.synchronize()
        start = time.perf_counter()
        result = run()
        self.synchronize()
        return time.perf_counter() - start, result

    def median(self, run: Callable[[], Any], repeats: int, warm_up: int = 2) -> Timed:
        """The median of several runs, each by itself."""
        runs = [self.time(lambda: _ignore(run())) for _ in range(warm_up + repeats)]
        return median(runs[warm_up:])


def _alike(elapsed_ms: float) -> Timed:
    return Timed(elapsed_ms, elapsed_ms, elapsed_ms)


def _ignore(result: Any) -> None:
    pass


def median(runs: Sequence[Timed]) -> Timed:
    """The median of each of the three."""
    return Timed(
        statistics.median(run.done_ms for run in runs),
        statistics.median(run.host_ms for run in runs),
        statistics.median(run.device_ms for run in runs),
    )


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """One thing to time among others.

    Attributes:
        name: key of its samples.
        run: the work. What it returns is taken as its own measurement in ms; None: it is timed from outside.
        before: not timed, before each run.
        check: not timed, after each run; raises BenchmarkError when the work was not done.
        runs: in each turn. Memory that lay idle while the others had theirs is slow at first (half as long again, on a
            virtual machine), so the turn's sample is the median of the second half.
    """

    name: str
    run: Callable[[], float | None]
    before: Callable[[], None] = _nothing
    check: Callable[[], None] = _nothing
    runs: int = 1


def interleave(variants: Sequence[Variant], rounds: int, warm_up: int) -> dict[str, list[float]]:
    """`interleave_timed` on a CPU: variant name -> milliseconds, one per round."""
    timed = interleave_timed(variants, rounds, warm_up, Stopwatch())
    return {name: [sample.done_ms for sample in samples] for name, samples in timed.items()}


def interleave_timed(
    variants: Sequence[Variant],
    rounds: int,
    warm_up: int,
    stopwatch: Stopwatch,
    ends: float | None = None,
    rotate: bool = False,
) -> dict[str, list[Timed]]:
    """Time variants in turn, A B C A B C …, so that drift of the machine hits all of them alike; see `Variant.runs`.

    Args:
        rounds: samples of each.
        warm_up: rounds before them that are checked but not kept.
        stopwatch: of the device that they run on.
        ends: begin no further round after this time (`time.monotonic`), if each has a sample.
        rotate: each round begins with another variant, so that none always follows the same one.

    Returns:
        Variant name -> one sample per round.

    Raises:
        BenchmarkError: from a variant's check.
    """
    samples: dict[str, list[Timed]] = {variant.name: [] for variant in variants}
    for number in range(warm_up + rounds):
        if number > warm_up and ends is not None and time.monotonic() > ends:
            break
        first = max(0, number - warm_up) % len(variants) if rotate else 0
        for variant in (*variants[first:], *variants[:first]):
            sample = median(counted([_time(variant, stopwatch) for _ in range(variant.runs)]))
            if number >= warm_up:
                samples[variant.name].append(sample)
    return samples


def counted(turn: Sequence[Any]) -> Sequence[Any]:
    """What counts of a turn's runs, see `Variant.runs`."""
    return turn[len(turn) // 2 :]


def _time(variant: Variant, stopwatch: Stopwatch) -> Timed:
    variant.before()
    timed = stopwatch.time(variant.run)
    variant.check()
    return timed
