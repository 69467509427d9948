"""One command that measures a GPU: row after row in the order of their worth, each in its own process and time box.

Every row is in the results as soon as it ends, whatever becomes of the next one. A second call with the same folder
goes on where the first one ended: what was measured on the same device with the same versions is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import gpu_report
from .child import Child, ChildError, OutOfTimeError
from .gpu_job import DONE, FAILED, NO_DEVICE, VALUES, Row, serve
from .gpu_rows import DEVICE, rows_of
from .report import BenchmarkError, Report, write_json, write_text

OUT = Path("bench-output/gpu")
MINUTES = 8.0
# Of the folder that rows share: what cold ones compiled.
COMPILED = "compiled"
RESULTS, JSON, MARKDOWN = "results.jsonl", "gpu.json", "gpu.md"
# A row ends by itself a little before it is ended.
GRACE_S = 3.0
STOP_S = 5.0
# On a CPU, where a row is to show that it runs, and the machine may be busy with others.
PATIENCE = 4.0
# What a process takes to import the libraries where it cannot be forked from one that has them.
IMPORTS_S = 25.0


def run(
    quick: bool,
    minutes: float = MINUTES,
    out: Path = OUT,
    stages: Sequence[str] | None = None,
    device: str | None = None,
) -> Report:
    """Measure what there is time for.

    Args:
        quick: small sizes; on a CPU too.
        minutes: for all of it.
        out: gets results.jsonl, gpu.json, gpu.md and a log of each row.
        stages: names of stages; None for all.
        device: where it runs; by default the GPU.

    Raises:
        BenchmarkError: there is no GPU, no such stage, or the device does not work at all.
    """
    rows = rows_of(stages)
    if minutes <= 0:
        raise BenchmarkError(f"--minutes is {minutes:g}, expected more than 0.")
    if device is None:
        with _asking_nvml():
            device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cpu" and not quick:
        raise BenchmarkError("there is no GPU here that torch knows: --quick shows on a CPU that the command works.")
    out.mkdir(parents=True, exist_ok=True)
    run = Measurement(out, device, quick, time.monotonic() + 60 * minutes)
    with _asking_nvml():
        run.measure(rows)
    return run.report()


@contextmanager
def _asking_nvml() -> Iterator[None]:
    """Let this process and those that it starts ask NVML for GPUs: one that asked CUDA itself could not be forked."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class Measurement:
    """The rows of one folder.

    Attributes:
        forks: whether a row's process is forked from this one; not any more once a forked one had no device.
    """

    def __init__(self, out: Path, device: str, quick: bool, ends: float) -> None:
        """Read what earlier calls found.

        Args:
            out: the folder.
            device: such as "cuda" or "cpu".
            quick: small sizes.
            ends: when all of it must be over (`time.monotonic`).
        """
        self._out = out
        self._device = device
        self._quick = quick
        self._ends = ends
        self.forks = True
        self._machine: Mapping[str, Any] = {}
        lines = _lines(out / RESULTS)
        write_text("".join(lines), out / RESULTS)
        self._records = [json.loads(line) for line in lines]
        self._shared = out

    def measure(self, rows: Sequence[Row]) -> None:
        """The device first, then each row that is not known and that there is time for.

        Raises:
            BenchmarkError: the device does not work.
        """
        (self._out / "logs").mkdir(exist_ok=True)
        found = self.run_row(DEVICE)
        if "machine" not in found["values"]:
            raise BenchmarkError(f"the device {self._device} does not work: {found['error']}")
        self._machine = found["values"].pop("machine")
        digest = hashlib.sha256(json.dumps([self._machine, self._quick]).encode()).hexdigest()
        self._shared = self._out / f"shared-{digest[:8]}"
        self._shared.mkdir(exist_ok=True)
        self._keep(found)
        known = {(each["stage"], each["row"]) for each in self._current() if each["ok"]}
        try:
            for row in rows:
                if (row.stage, row.name) not in known:
                    self._keep(self._begin(row))
        finally:
            for file in self._shared.glob("lora-*"):
                file.unlink()
            shutil.rmtree(self._shared / COMPILED, ignore_errors=True)

    def report(self) -> Report:
        """Everything that is known of this device with these versions, the latest of each row."""
        return gpu_report.report(self._current(), self._machine, self._quick)

    def _current(self) -> list[dict[str, Any]]:
        latest: dict[tuple[str, str], dict[str, Any]] = {}
        for record in self._records:
            if record["machine"] == self._machine and record["quick"] == self._quick:
                key = record["stage"], record["row"]
                if record["ok"] or not latest.get(key, {}).get("ok"):
                    latest[key] = record
        return list(latest.values())

    def _keep(self, record: dict[str, Any]) -> None:
        record |= {"machine": dict(self._machine), "quick": self._quick}
        self._records.append(record)
        with open(self._out / RESULTS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        report = self.report()
        write_json(report, self._out / JSON)
        write_text(gpu_report.markdown(report), self._out / MARKDOWN)
        print(f"  {gpu_report.sentence(record)}", file=sys.stderr, flush=True)

    def _begin(self, row: Row) -> dict[str, Any]:
        left = self._ends - time.monotonic()
        if left < row.least_s:
            error = f"{gpu_report.NOT_BEGUN}: {max(0.0, left):.0f} s were left, it takes {row.least_s:.0f} or more"
            return _record(row, {}, error, 0.0)
        return self.run_row(row)

    def run_row(self, row: Row) -> dict[str, Any]:
        """Run one row in a process of its own; returns what is known of it, failed or not."""
        start = time.monotonic()
        values: dict[str, Any] = {}
        error = self._answers(row, values, self._limit_s(row))
        if error == NO_DEVICE:
            self.forks = False
            error = self._answers(row, values, self._limit_s(row))
        return _record(row, values, error, time.monotonic() - start)

    def _limit_s(self, row: Row) -> float:
        limit_s = row.limit_s * (PATIENCE if self._quick else 1.0) + (0.0 if self.forks else IMPORTS_S)
        return min(limit_s, max(row.least_s, self._ends - time.monotonic()))

    def _answers(self, row: Row, values: dict[str, Any], limit_s: float) -> str:
        """Run a row; fill in what it reports. Returns why it failed, or ""."""
        name = f"{row.stage} {row.name}"
        log = self._out / "logs" / f"{''.join(letter if letter.isalnum() else '-' for letter in name)}.log"
        arguments = (row, self._device, self._quick, str(self._shared), limit_s - GRACE_S, self.forks)
        child = Child(name, serve, arguments, log, self.forks, self._environment(row))
        ends = time.monotonic() + limit_s
        try:
            while True:
                kind, content = child.receive(max(0.0, ends - time.monotonic()))
                if kind == VALUES:
                    values.update(content)
                elif kind == DONE:
                    return ""
                elif kind == FAILED:
                    return content
                else:
                    return NO_DEVICE
        except OutOfTimeError:
            return f"out of time: it was ended after {limit_s:.0f} s"
        except ChildError as error:
            return str(error)
        finally:
            child.close(STOP_S)

    def _environment(self, row: Row) -> dict[str, str]:
        """Variables of a row: whoever measures a first image compiles as on a machine that never did."""
        if not row.cold or self._quick:
            return {}
        folder = self._shared / COMPILED / f"{time.time_ns()}"
        return {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}


def _record(row: Row, values: Mapping[str, Any], error: str, seconds: float) -> dict[str, Any]:
    return {
        "stage": row.stage,
        "row": row.name,
        "ok": not error,
        "error": error,
        "values": dict(values),
        "seconds": round(seconds, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _lines(path: Path) -> list[str]:
    """Whole lines of a file: the last one of a call that was cut off may not be."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n") and line.strip()]
