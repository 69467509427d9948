"""`python -m harness.matrix 2.9.1=python3.10 2.11.0=python3.12 2.15.0`: the tests with several versions of torch.

Runs `make test TORCH=… PYTHON=…` for each, one after the other, and writes what came out into the table of
docs/versions.md: a row for each torch and Python, which replaces an older row of the same.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from harness import torch_versions
from harness.paths import REPO

TABLE = REPO / "docs" / "versions.md"
HEADER = "| torch | Python | date | commit | passed | failed | skipped | minutes |"
RULE = "| --- | --- | --- | --- | --- | --- | --- | --- |"


class MatrixError(RuntimeError):
    """A run came to no result; the message says what to do."""


@dataclass(frozen=True)
class Counts:
    """What pytest counted. Errors while a test was set up count as failed."""

    passed: int
    failed: int
    skipped: int
    seconds: float


def run(torch: str, python: str, pytest_arguments: str) -> Counts:
    """Run the tests with a version of torch in an environment of its own.

    Raises:
        MatrixError: `make test` ended before the tests did.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        arguments = f"{pytest_arguments} --junitxml={report}".strip()
        command = ["make", "test", f"TORCH={torch}", f"PYTHON={python}", f"PYTEST_ARGS={arguments}"]
        code = subprocess.call(command, cwd=REPO)
        if not report.is_file():
            raise MatrixError(f"`{' '.join(command)}` ended with exit code {code} before it ran the tests, see above.")
        return read(report.read_text(encoding="utf-8"))


def read(report: str) -> Counts:
    """The counts of a JUnit report of pytest."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))

    def total(name: str) -> int:
        return sum(int(suite.get(name, 0)) for suite in suites)

    failed, skipped = total("failures") + total("errors"), total("skipped")
    seconds = sum(float(suite.get("time", 0)) for suite in suites)
    return Counts(total("tests") - failed - skipped, failed, skipped, seconds)


def row(torch: str, python: str, day: date, commit: str, counts: Counts) -> str:
    """A row of the table."""
    cells = (torch, python, day, commit, counts.passed, counts.failed, counts.skipped, f"{counts.seconds / 60:.0f}")
    return f"| {' | '.join(map(str, cells))} |"


def with_row(text: str, new: str) -> str:
    """A text whose table has a row, instead of an older one of the same torch and Python, newest torch first.

    Raises:
        MatrixError: there is no table.
    """
    before, header, rest = text.partition(f"{HEADER}\n{RULE}\n")
    if not header:
        raise MatrixError(f"{TABLE} has no table with the heading {HEADER!r}: restore it, then run again.")
    table = re.match(r"(?:\|.*\n)*", rest).group()
    rows = [line for line in table.splitlines() if _named(line) != _named(new)]
    rows = sorted([*rows, new], key=lambda line: [int(n) for n in re.findall(r"\d+", line)[:5]], reverse=True)
    return before + header + "".join(f"{line}\n" for line in rows) + rest[len(table) :]


def _named(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:3]]


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; returns 1 if a test failed or a run came to no result."""
    parser = argparse.ArgumentParser(prog="python -m harness.matrix", description="Run the tests with several torch.")
    parser.add_argument("versions", nargs="+", metavar="TORCH[=PYTHON]", help="such as 2.11.0=python3.12")
    parser.add_argument("--pytest-args", default="", help="more arguments for pytest")
    chosen = parser.parse_args(arguments)
    failed = False
    for version in chosen.versions:
        torch, _, python = version.partition("=")
        python = python or sys.executable
        try:
            torch_versions.requirements(torch)
            counts = run(torch, python, chosen.pytest_args)
        except (MatrixError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        named = _output(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
        new = row(torch, named, date.today(), _output("git", "rev-parse", "--short", "HEAD"), counts)
        TABLE.write_text(with_row(TABLE.read_text(encoding="utf-8"), new), encoding="utf-8")
        print(f"{HEADER}\n{RULE}\n{new}", flush=True)
        failed |= counts.failed > 0
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
