"""The published table of FLUX optimizations: each alone, all together, each left out; two LoRAs in turn; and peers.

Every configuration runs in a process of its own. On a CPU those of the table take turns with the baseline, and the
peers with one another, so that what else the machine does hits both sides of a ratio. On a GPU one model fills the
card, so they run one after another.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from harness.paths import CACHE

from . import ablation_report, ablation_rows
from .ablation_report import Measured, check_changes
from .ablation_rows import ALL, BASELINE, Configuration, published_on, quantization_of, runnable
from .ablation_work import RESOLUTION, check_files, comfyui_folder, make_work, title_of
from .report import BenchmarkError, OtherLoad, Report
from .subject_process import SubjectFailedError, SubjectProcess
from .subjects import Work
from .timing import Variant, interleave

SWITCHES = 3
ROUNDS, PEER_ROUNDS = 3, 7


def run(
    quick: bool,
    peers: bool = False,
    model: Path | None = None,
    lora: Sequence[Path] | None = None,
    steps: int | None = None,
    resolution: int = RESOLUTION,
    random: bool = False,
    rows: Sequence[str] | None = None,
    minutes: float | None = None,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Measure the table, and the peers if asked for.

    Args:
        quick: a narrow model and few rounds.
        peers: also measure ComfyUI and diffusers.
        model: a FLUX.1 checkpoint in place of the small model.
        lora: two LoRA files for it.
        steps: of an image.
        resolution: of an image with `model` or `random`.
        random: in place of a file, random weights of FLUX.1-dev's sizes that are made on the GPU, and two LoRAs.
        rows: only these, and the baseline.
        minutes: for all of it; rows that it is too short for say so.
        save: gets what is known, after each row.

    Raises:
        BenchmarkError: arguments that do not go together, or a configuration computed something else than the baseline.
    """
    loras = tuple(lora or ())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_files(model, loras)
    if random and (model is not None or (device.type == "cpu" and not quick)):
        raise BenchmarkError("--random is in place of --model, and needs a GPU, on which it makes 24 GB of weights.")
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    load = OtherLoad()
    CACHE.mkdir(parents=True, exist_ok=True)  # not the system's temporary folder, which may be a RAM disk
    with tempfile.TemporaryDirectory(prefix="bench-ablation-", dir=CACHE) as folder:
        work = make_work(Path(folder), model, loras, quick, device, steps, resolution, random)
        if peers:
            work = replace(work, comfyui=comfyui_folder())

        def report(measured: Mapping[str, Measured]) -> Report:
            title, share = title_of(work, model, quick), load.share(bench.cpu_s)
            mode, card = quantization_of(device), published_on(device)
            return ablation_report.report(title, measured, mode, work.steps, card, share)

        table = ablation_rows.table(device, work.spec())
        others = ablation_rows.peers(device) if peers else []
        table, others = _chosen(table, rows, [*table, *others]), _chosen(others, rows, [*table, *others])
        with closing(Ablation(work, Path(folder), quick, ends, lambda measured: save(report(measured)))) as bench:
            kept = {ALL, f"all but {quantization_of(device)}"} if peers and bench.together else set()
            measured = bench.table(table, kept, unadapted=peers)
            if peers:
                measured |= bench.peers(others, measured)
    check_changes(measured)
    return report(measured)


def _chosen(
    rows: Sequence[Configuration], names: Sequence[str] | None, everything: Sequence[Configuration]
) -> list[Configuration]:
    """Those of the names, and the baseline, which all are compared with.

    Raises:
        BenchmarkError: a name that no row has.
    """
    known = [row.name for row in everything]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise BenchmarkError(f"--rows names {', '.join(unknown)}, expected some of: {', '.join(known)}.")
    return [row for row in rows if names is None or row.name in names or row.name == BASELINE]


class Ablation:
    """Runs configurations, one process each.

    Attributes:
        together: whether several models fit at a time.
        cpu_s: what its processes took that have ended.
    """

    def __init__(
        self,
        work: Work,
        folder: Path,
        quick: bool,
        ends: float | None = None,
        save: Callable[[Mapping[str, Measured]], None] = lambda measured: None,
    ) -> None:
        """Start nothing yet.

        Args:
            work: what each does.
            folder: for logs and compile caches.
            quick: few rounds, and compiled code of earlier runs.
            ends: when all of it must be over (`time.monotonic`), or None.
            save: gets what is known after each row.
        """
        self._ends = ends
        self._save = save
        self.together = work.device == "cpu"
        self._work = work
        self._folder = folder
        self._quick = quick
        self._open: dict[str, SubjectProcess] = {}
        self.cpu_s = 0.0

    def close(self) -> None:
        """End all processes."""
        for name in list(self._open):
            self._close(name)

    def table(self, rows: Sequence[Configuration], keep: set[str], unadapted: bool) -> dict[str, Measured]:
        """Measure the rows in order, the baseline first.

        Args:
            rows: all of them; those that cannot run are passed over.
            keep: names of those whose processes stay.
            unadapted: whether the baseline also draws without any LoRA, for a peer to be compared with.
        """
        measured = {row.name: Measured(row, row.reason) for row in rows}
        for row in runnable(rows):
            self._measure(measured[row.name], unadapted and row.name == BASELINE)
            if not self.together:
                _compare(measured[BASELINE], measured[row.name])
            if row.name not in keep and not (row.name == BASELINE and self.together):
                self._close(row.name)
            self._save({name: each for name, each in measured.items() if each.failed or each.image_ms})
        self._close(BASELINE)
        return measured

    def peers(self, rows: Sequence[Configuration], measured: Mapping[str, Measured]) -> dict[str, Measured]:
        """Measure the peers; where memory allows in turn with the rows that stayed, whose samples begin anew."""
        found = {row.name: Measured(row, row.reason) for row in rows}
        for row in runnable(rows):
            if self.together:
                self._first(found[row.name])
            else:
                self._measure(found[row.name], unadapted=False)
                _compare(measured[BASELINE], found[row.name])
                self._close(row.name)
                done = {name: each for name, each in found.items() if each.failed or each.image_ms}
                self._save({**measured, **done})
        if self.together:
            turns = {name: measured[name] if name in measured else found[name] for name in self._open}
            for each in turns.values():
                each.switch_ms, each.image_ms, each.steps_ms = [], [], []
            print("in turn", file=sys.stderr, flush=True)
            switching = [self._switching(each) for each in turns.values() if each.configuration.setup.lora]
            interleave(switching, self._rounds(SWITCHES), warm_up=0)
            interleave([self._imaging(each) for each in turns.values()], self._rounds(PEER_ROUNDS), warm_up=0)
            for name, each in turns.items():
                self._close(name, each)
        return found

    def _measure(self, measured: Measured, unadapted: bool) -> None:
        """All of one configuration; what fails on the way is its reason."""
        name = measured.configuration.name
        self._first(measured)
        try:
            if unadapted and not measured.failed:
                self._open[name].switch(None)
                measured.changes["none"] = self._open[name].change()
            if not measured.failed:
                self._steady(measured)
        except SubjectFailedError as error:
            measured.failed = str(error)
            self._close(name)

    def _first(self, measured: Measured) -> None:
        configuration = measured.configuration
        if self._ends is not None and time.monotonic() > self._ends:
            measured.failed = "not begun: the time was over"
            return
        print(configuration.name, file=sys.stderr, flush=True)
        try:
            process = SubjectProcess(
                configuration.name, configuration.setup, self._work, self._folder, not self._quick, self._ends
            )
            self._open[configuration.name] = process
            answer = process.first(self._lora(configuration, 0))
            measured.first_ms, measured.peak_bytes = answer["ms"], answer["peak_bytes"]
            measured.changes["A" if configuration.setup.lora else "none"] = process.change()
        except SubjectFailedError as error:
            measured.failed = str(error)
            self._close(configuration.name)

    def _steady(self, own: Measured) -> None:
        """Switch, then draw in turn with the baseline where both fit."""
        name = own.configuration.name
        if own.configuration.setup.lora:
            interleave([self._switching(own)], self._rounds(SWITCHES), warm_up=0)
        turns = [self._imaging(own)]
        if name != BASELINE and BASELINE in self._open:
            turns.insert(0, Variant(BASELINE, lambda: own.baseline_ms.append(self._open[BASELINE].image()["ms"])))
        interleave(turns, self._rounds(ROUNDS), warm_up=0)
        if own.baseline_ms:
            ratios = (theirs / ours for theirs, ours in zip(own.baseline_ms, own.image_ms, strict=True))
            own.over_baseline = statistics.median(ratios)
        process = self._open[name]
        process.check()
        own.peak_bytes = process.peak_bytes()

    def _switching(self, measured: Measured) -> Variant:
        """To the second LoRA and back, and so on; ends with either."""

        def run() -> float:
            number = len(measured.switch_ms) + 1
            process = self._open[measured.configuration.name]
            answer = process.switch(self._lora(measured.configuration, number % 2))
            measured.switch_ms.append(answer["ms"])
            measured.changes["AB"[number % 2]] = process.change()
            return answer["ms"]

        return Variant(measured.configuration.name, run)

    def _imaging(self, measured: Measured) -> Variant:
        def run() -> float:
            answer = self._open[measured.configuration.name].image()
            measured.image_ms.append(answer["ms"])
            measured.steps_ms.append(float(np.median(answer["steps_ms"] or [answer["ms"]])))
            return answer["ms"]

        return Variant(measured.configuration.name, run)

    def _lora(self, configuration: Configuration, number: int) -> str | None:
        return self._work.loras[number] if configuration.setup.lora else None

    def _rounds(self, rounds: int) -> int:
        return 2 if self._quick else rounds

    def _close(self, name: str, measured: Measured | None = None) -> None:
        process = self._open.pop(name, None)
        if process is not None:
            try:
                if measured is not None:
                    process.check()
                    measured.peak_bytes = process.peak_bytes()
            finally:
                process.close()
                self.cpu_s += process.cpu_s


def _compare(baseline: Measured, own: Measured) -> None:
    """How many times faster it is than a baseline that it did not take turns with."""
    if own is not baseline and not own.failed and not baseline.failed:
        own.over_baseline = statistics.median(baseline.image_ms) / statistics.median(own.image_ms)
