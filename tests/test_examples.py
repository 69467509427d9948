"""The examples run as their docstrings say, and draw what they say; the README shows them as they are."""

import ast
import re
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from accel.lora import kinds
from harness.paths import REPO
from pocket import measure
from pocket.draw import SIZE_PX

EXAMPLES = sorted(path for path in (REPO / "examples").glob("*.py") if path.name != "pocket_files.py")


def run(name, path, monkeypatch):
    """Run an example as `python -m` does, and read its pictures as float32 (96, 96, 3) in 0–1."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(path)])
    runpy.run_module(f"examples.{name}", run_name="__main__")
    sheet = Image.open(path)
    pixels = np.asarray(sheet.reduce(sheet.height // SIZE_PX), np.float32) / 255
    return [pixels[:, left : left + SIZE_PX] for left in range(0, pixels.shape[1], SIZE_PX)]


@pytest.mark.slow
def test_switching_loras(tmp_path, monkeypatch, capsys):
    plain, striped, glowing, again = run("switch_loras", tmp_path / "out.png", monkeypatch)
    seen = measure.see(plain)
    assert (seen.shape, seen.colour) == ("heart", "green")
    assert measure.striped(striped, plain) > 0.4 > measure.striped(plain, plain)
    assert measure.darkness(glowing, plain) > 0.4 > measure.darkness(striped, plain)
    inside = slice(4, -4)  # the sheet is drawn twice as large, which mixes neighbours' edges
    assert np.array_equal(again[:, inside], plain[:, inside])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines] == ["unchanged", "cold", "cold", "hot"]


@pytest.mark.slow
def test_in_a_diffusers_pipeline(tmp_path, monkeypatch):
    outlined, glowing, striped = run("diffusers_pipeline", tmp_path / "out.png", monkeypatch)
    plain = np.full_like(outlined, 0.9)
    assert measure.see(striped).colour == "green"
    assert measure.darkness(glowing, plain) > 0.4 > measure.darkness(outlined, plain)
    assert not np.array_equal(outlined, striped)


def test_a_new_lora_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kinds, "KINDS", kinds.KINDS)  # the example exchanges the table
    whole, half, without = run("new_lora_kind", tmp_path / "out.png", monkeypatch)
    assert measure.see(whole).shape == "heart"
    distances = [float(np.abs(picture - whole).mean()) for picture in (half, without)]
    assert 0.0 < distances[0] < distances[1]
    assert "row scale" in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"python -m examples.{path.stem}" in docstring


def test_the_readme_shows_examples_as_they_are():
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    sources = [path.read_text(encoding="utf-8") for path in EXAMPLES]
    assert [block for block in blocks if not any(block in source for source in sources)] == []
