"""Tests and demo with another torch: what is installed, where, and how a matrix of runs is written down."""

import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from harness import matrix, paths, setup, torch_versions
from harness.matrix import HEADER, RULE, Counts, MatrixError
from harness.paths import REPO


def test_companions_of_a_torch():
    assert torch_versions.requirements("2.14.1") == ("torch==2.14.1", "torchvision==0.29.1")
    assert torch_versions.requirements("2.11.0") == ("torch==2.11.0", "torchvision==0.26.0", "numpy<2.4")
    assert torch_versions.requirements("2.16.0") == ("torch==2.16.0", "torchvision")
    assert torch_versions.torchaudio("2.9.1") == "torchaudio==2.9.1"
    assert torch_versions.torchaudio("2.15.0") == "torchaudio==2.11.0"
    assert torch_versions.instead("2.10.0") == ("torchao==0.17.0",)
    assert torch_versions.instead("2.11.0") == ()
    assert torch_versions.TESTED in torch_versions.TORCHVISION


@pytest.mark.slow
def test_what_is_no_version_is_an_error_without_a_traceback():
    command = [sys.executable, "-m", "harness.setup", "--torch", "newest"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: torch version 'newest': expected a release such as 2.11.0 (known: 2.15.0, ")


@pytest.mark.slow
def test_an_extension_of_torchaudio_that_refuses_the_torch_is_removed(monkeypatch, tmp_path, capsys):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    python = tmp_path / paths.VENV_PYTHON.relative_to(paths.VENV)
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    package = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip()) / "torchaudio"
    extension = package / "lib" / "_torchaudio.so"
    extension.parent.mkdir(parents=True)
    extension.write_bytes(b"")
    (package / "__init__.py").write_text(f"import os\nif os.path.exists({str(extension)!r}):\n    raise RuntimeError\n")
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "VENV_PYTHON", python)

    assert not setup.imports("torchaudio")
    setup.drop_extension_of_torchaudio()

    assert setup.imports("torchaudio")
    assert "removed _torchaudio.so of torchaudio" in capsys.readouterr().out
    (package / "__init__.py").write_text("raise RuntimeError\n")
    with pytest.raises(setup.SetupError, match="torchaudio does not load"):
        setup.drop_extension_of_torchaudio()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the paths are those of other systems")
def test_each_torch_has_an_environment_of_its_own():
    def commands(*arguments: str, **environment: str) -> str:
        outer = {name: text for name, text in os.environ.items() if name != "FLUX_HOTSWAP_VENV" and "MAKE" not in name}
        command = ["make", "--dry-run", "demo", f"PYTHON={sys.executable}", *arguments]
        return subprocess.run(command, cwd=REPO, env=outer | environment, capture_output=True, text=True).stdout

    version = ".".join(map(str, sys.version_info[:2]))
    assert commands().splitlines()[-1] == ".venv/bin/python -m harness.demo"
    first, last = commands("TORCH=2.11.0").splitlines()
    assert first.split()[1:] == ["-m", "harness.setup", "--torch", "2.11.0", "--for", "demo"]
    assert last == f".venv-torch-2.11.0-py{version}/bin/python -m harness.demo"
    assert "/elsewhere/bin/python" in commands("TORCH=2.11.0", FLUX_HOTSWAP_VENV="/elsewhere")


@pytest.mark.slow
def test_the_counts_of_a_run_are_those_of_pytest(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise RuntimeError\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "def test_has_an_error(broken): pass\n"
        "@pytest.mark.skip\ndef test_is_skipped(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)

    counts = matrix.read((tmp_path / "report.xml").read_text())

    assert (counts.passed, counts.failed, counts.skipped) == (1, 2, 1)
    assert counts.seconds > 0


def test_a_row_replaces_the_one_of_the_same_versions():
    def row(torch: str, passed: int) -> str:
        return matrix.row(torch, "3.12", date(2026, 11, 26), "abc1234", Counts(passed, 0, 2, 90.0))

    text = f"Before.\n\n{HEADER}\n{RULE}\n\nAfter.\n"
    for each in (row("2.9.1", 1), row("2.11.0", 2), row("2.9.1", 3)):
        text = matrix.with_row(text, each)

    assert text == f"Before.\n\n{HEADER}\n{RULE}\n{row('2.11.0', 2)}\n{row('2.9.1', 3)}\n\nAfter.\n"
    assert row("2.9.1", 3) == "| 2.9.1 | 3.12 | 2026-11-26 | abc1234 | 3 | 0 | 2 | 2 |"
    with pytest.raises(MatrixError, match="has no table with the heading"):
        matrix.with_row("Before.\n", row("2.9.1", 1))
