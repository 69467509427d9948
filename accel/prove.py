"""Nothing computes before it has proved itself on its device.

A kernel may be missing from an operating system's wheels, refuse one card of those that its rules allow, or run and
give wrong numbers. So whatever an engine is about to use runs once on small random data and is compared with a plain
reference: milliseconds, once per process. What passed is remembered on the disk for this device, driver, these
libraries and this version of the package. What failed is tried again in the next process, because what ails it may have
been mended by then without any version having changed. Which of several ways is the fastest is remembered likewise.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import first_line
from .store.disk import DamagedError, DiskStore
from .store.entry import Key
from .store.machine import machine

SUFFIX = ".flux-hotswap-proofs"
# Of some twenty machines, or states of one.
LIMIT_BYTES = 500_000
# How far the product of a result with its reference may be from the square of the reference. Rounding is hardly ever
# in proportion to what is rounded, so this tells a scale that is wrong by 10 % from 4-bit weights, which the distance
# does not.
GAIN = 0.03
# A row or column of so many values may be that much further from its reference than the whole: what is wrong is often
# the last tile. Of fewer values, all may happen to be near zero.
WORST, FEWEST = 2.5, 32


@dataclass(frozen=True)
class Verdict:
    """What one comparison found.

    Attributes:
        refusal: why a thing is not used, as what the sentence after its name says; or None.
        deviation: relative L2 distance of the result from the reference.
    """

    refusal: str | None
    deviation: float = 0.0


@dataclass(frozen=True)
class Proof:
    """What is known of a thing on a device.

    Attributes:
        name: of the thing, such as "quantization fp8, bfloat16".
        device: as torch names it.
        verdict: of the comparison.
        ms: what it took, its library's import included.
        remembered: whether an earlier process ran it.
    """

    name: str
    device: str
    verdict: Verdict
    ms: float
    remembered: bool = False

    @property
    def refusal(self) -> str | None:
        """See `Verdict`."""
        return self.verdict.refusal

    @property
    def deviation(self) -> float:
        """See `Verdict`."""
        return self.verdict.deviation

    @property
    def sentence(self) -> str:
        """What it found, for a person."""
        if self.refusal is not None:
            return f"FAILED: {self.refusal}"
        away = f", {self.deviation:.2g} from the reference" if self.deviation else ""
        return f"works{away}, {self.ms:.0f} ms{' in an earlier start' if self.remembered else ''}"


class Proofs:
    """What proved itself, and what failed, in this process; and on the disk what passed. Thread-safe."""

    def __init__(self) -> None:
        """Know nothing, and remember nothing for the next process."""
        self._found: dict[tuple[str, str], Proof] = {}
        self._seconds: dict[tuple[str, str], Mapping[str, float]] = {}
        self._keys: dict[str, Key] = {}
        self._store: DiskStore | None = None
        self._lock = threading.RLock()

    def remember_in(self, folder: str | os.PathLike[str]) -> None:
        """Read what earlier processes found there, and write to it. It is made when it is first written to."""
        with self._lock:
            self._store = DiskStore(os.fspath(folder), SUFFIX, LIMIT_BYTES)

    def of(self, name: str, device: torch.device, compare: Callable[[], Verdict]) -> Proof:
        """The proof of a thing on a device.

        Args:
            name: what it is, with everything that changes how it computes, such as the dtype.
            device: where.
            compare: runs it; called if nothing is known yet. An error that it raises is a refusal.

        Raises:
            torch.OutOfMemoryError: there was no room: that says nothing of the thing.
        """
        key = (name, str(device))
        with self._lock:
            if key not in self._found:
                self._found[key] = self._recalled(key, device) or self._run(key, device, compare)
            return self._found[key]

    def seconds(
        self, name: str, device: torch.device, measure: Callable[[], Mapping[str, float]]
    ) -> Mapping[str, float]:
        """What each of several ways takes on a device, measured once a machine: what is chosen by it stays the same.

        Args:
            name: what they do, with everything that changes what they take.
            device: where.
            measure: way -> seconds; called if nothing is known yet.
        """
        key = (name, str(device))
        with self._lock:
            if key not in self._seconds:
                stored = self._read(device).get(name)
                self._seconds[key] = measure() if stored is None else stored
                if stored is None:
                    self._write(name, self._seconds[key], device)
            return self._seconds[key]

    @property
    def all(self) -> tuple[Proof, ...]:
        """Everything that was asked for in this process, in that order."""
        with self._lock:
            return tuple(self._found.values())

    def _run(self, key: tuple[str, str], device: torch.device, compare: Callable[[], Verdict]) -> Proof:
        start = time.perf_counter()
        with torch.inference_mode():
            verdict = attempt(compare)
        proof = Proof(*key, verdict, (time.perf_counter() - start) * 1e3)
        if verdict.refusal is None:
            self._write(proof.name, {"ms": proof.ms, "deviation": verdict.deviation}, device)
        return proof

    def _recalled(self, key: tuple[str, str], device: torch.device) -> Proof | None:
        name, place = key
        stored = self._read(device).get(name)
        if stored is None or not stored.keys() >= {"ms", "deviation"}:
            return None
        return Proof(name, place, Verdict(None, stored["deviation"]), stored["ms"], remembered=True)

    def _read(self, device: torch.device) -> dict[str, dict[str, float]]:
        if self._store is None:
            return {}
        try:
            entry = self._store.open(self._key(device))
        except DamagedError:  # proved again in milliseconds, which is not worth a message
            return {}
        return {} if entry is None else entry.content

    def _write(self, name: str, figures: Mapping[str, float], device: torch.device) -> None:
        if self._store is not None:
            # A disk that is full or read-only costs the next process these milliseconds again, nothing else.
            with suppress(OSError):
                self._store.put(self._key(device), {}, {**self._read(device), name: dict(figures)})

    def _key(self, device: torch.device) -> Key:
        name = str(device)
        if name not in self._keys:  # asking for it looks up a dozen packages
            self._keys[name] = Key.of(machine(name))
        return self._keys[name]


@functools.cache
def proofs() -> Proofs:
    """This process's: its devices are what they are, whichever engine asks."""
    return Proofs()


def attempt(compare: Callable[[], Verdict]) -> Verdict:
    """Run a comparison; what it raises is a refusal in the words of whoever raised it.

    Raises:
        torch.OutOfMemoryError: there was no room: that says nothing of the thing.
    """
    try:
        return compare()
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:  # a library raises what it likes
        return Verdict(f"does not run here ({type(exc).__name__}: {first_line(exc)})")


def judge(output: Tensor, reference: Tensor, error: float) -> Verdict:
    """Compare a product with what it should be.

    Args:
        output: (rows, columns), any float dtype.
        reference: likewise, float32, on the same device; `FEWEST` values or more in one direction.
        error: relative L2 distance that is allowed for the whole; rows and columns may have `WORST` times that.
    """
    if output.shape != reference.shape:
        return Verdict(f"returns {tuple(output.shape)}, expected {tuple(reference.shape)}")
    difference = output.float() - reference
    overall = float(difference.norm() / reference.norm())
    worst = max(
        float((difference.norm(dim=dim) / reference.norm(dim=dim)).max())
        for dim in (0, 1) if reference.shape[dim] >= FEWEST
    )  # fmt: skip
    gain = float((output.float() * reference).sum() / reference.square().sum())
    if overall <= error and worst <= WORST * error and abs(gain - 1) <= GAIN:  # NaN is none of these
        return Verdict(None, overall)
    return Verdict(
        f"computes wrong numbers here: {overall:.2g} from the reference (relative L2), {worst:.2g} at the worst row or "
        f"column, {gain:.3g} times as large; allowed are {error:g}, {WORST * error:g} and {1 - GAIN:g} to {1 + GAIN:g}",
        overall,
    )


def random(shape: tuple[int, ...], device: torch.device, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values: float32, the same on every device and each time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(scale).to(device)
