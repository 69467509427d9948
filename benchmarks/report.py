"""What every benchmark shares: the machine's description, the table and the JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

SAMPLE_DIGITS = 4


class BenchmarkError(Exception):
    """A benchmark could not run, or what it measured did not do its work."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, one figure, a remark."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Goal:
    """What the product promises; a missed goal is shown, it does not fail the benchmark.

    Attributes:
        value: what was measured; at most `limit`, or at least it.
    """

    statement: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the promise is kept."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Report:
    """What one benchmark found.

    Attributes:
        values: the JSON file's own keys; machine, date, goals, notes and samples_ms are added to them.
        samples_ms: every sample behind the medians.
        notes: what a reader must know to judge the figures.
        picture: draws the figures into a PNG file.
        columns: headings of `lines`, a table too wide for `rows`; it goes into a Markdown file.
        lines: its cells.
    """

    title: str
    rows: Sequence[Row]
    values: Mapping[str, Any]
    goals: Sequence[Goal] = ()
    notes: Sequence[str] = ()
    samples_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    picture: Callable[[Path], None] | None = None
    columns: Sequence[str] = ()
    lines: Sequence[Sequence[str]] = ()
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": _ram_gib(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


class OtherLoad:
    """How busy other processes kept the CPUs: on a machine that was not quiet, figures are too high."""

    def __init__(self) -> None:
        """Start counting."""
        self._start = _cpu_seconds()

    def share(self, own_s: float = 0.0) -> float | None:
        """Share of all CPU time that others used since; None where the system does not tell.

        Call it when the benchmark's own child processes have ended: only then does their time count as own.

        Args:
            own_s: CPU time of processes that are the benchmark's, but not its children.
        """
        now = _cpu_seconds()
        if now is None or self._start is None:
            return None
        (busy, all_), (busy_before, all_before) = now, self._start
        return max(0.0, (busy - busy_before - own_s) / (all_ - all_before)) if all_ > all_before else None


def _cpu_seconds() -> tuple[float, float] | None:
    """(seconds that others were busy, seconds in all) since the machine started, summed over its CPUs (Linux)."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; what follows is part of user and nice.
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in first.split()[1:9]]
    own = os.times()
    own_s = own.user + own.system + own.children_user + own.children_system
    return sum(ticks) - ticks[3] - ticks[4] - own_s, sum(ticks)


def spread(samples: Sequence[float]) -> str:
    """The range of the middle half of the samples, for a remark."""
    if len(samples) < 2:
        return ""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return f"{figure(low)} – {figure(high)}"


def figure(value: float) -> str:
    """Three significant digits, no exponents."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def print_report(report: Report) -> None:
    """Write the table, the goals, the notes and the machine to stdout."""
    described = report.machine
    print(f"{report.title}\n")
    columns = [max(len(getattr(row, name)) for row in report.rows) for name in ("label", "value")]
    for row in report.rows:
        print(f"  {row.label:<{columns[0]}}  {row.value:>{columns[1]}}  {row.remark}".rstrip())
    if report.goals:
        print("\nGoals")
        for goal in report.goals:
            verdict = "met" if goal.met else "MISSED"
            sign = "≥" if goal.at_least else "≤"
            print(f"  {verdict:<6}  {goal.statement}: {figure(goal.value)}, goal {sign} {figure(goal.limit)}")
    if report.notes:
        print("\nNotes")
        for note in report.notes:
            print(f"  - {note}")
    print(
        f"\n{described['cpu']}, {described['cores']} cores, {described['ram_gib']} GiB, torch {described['torch']}, "
        f"{report.date}"
    )


def write_markdown(report: Report, path: Path) -> None:
    """Write the wide table, the goals, the notes and the machine, for a page or an issue."""
    described = report.machine
    text = [f"**{report.title}**", "", _markdown_row(report.columns), _markdown_row(["---"] * len(report.columns))]
    text += [_markdown_row(line) for line in report.lines]
    if report.goals:
        text += ["", "| goal | measured | | |", "| --- | --- | --- | --- |"]
    for goal in report.goals:
        sign, verdict = "≥" if goal.at_least else "≤", "met" if goal.met else "**missed**"
        text.append(_markdown_row([goal.statement, figure(goal.value), f"{sign} {figure(goal.limit)}", verdict]))
    text += ["", *(f"- {note}" for note in report.notes), ""]
    text.append(f"{described['cpu']}, {described['cores']} cores, torch {described['torch']}, {report.date}")
    write_text("\n".join(text) + "\n", path)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def write_json(report: Report, path: Path) -> None:
    """Write everything that the report holds, for comparison and plots."""
    content = {
        "title": report.title,
        **report.values,
        "goals": [
            {"statement": goal.statement, "value": goal.value, "limit": goal.limit, "met": goal.met}
            for goal in report.goals
        ],
        "notes": list(report.notes),
        "machine": dict(report.machine),
        "date": report.date,
        "samples_ms": {
            name: [round(sample, SAMPLE_DIGITS) for sample in samples] for name, samples in report.samples_ms.items()
        },
    }
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)


def save(report: Report, path: Path) -> None:
    """Write the JSON file, and the Markdown file beside it where there is a wide table."""
    write_json(report, path)
    if report.lines:
        write_markdown(report, path.with_suffix(".md"))


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all: who reads it while it is written anew finds the old one."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
