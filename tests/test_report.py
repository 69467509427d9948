"""The report as text and as a picture, from a script, without ComfyUI."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from accel.chart import COMPILE, HEAD, LEFT, RIGHT, ROW, STEPS, SWAP, draw_samplings
from accel.checkpoint import inspect_checkpoint
from accel.engine import Engine
from accel.history import Sampling, SwapReport
from accel.lora.schedule import ScheduledStack, between
from accel.report import SECTIONS, Reported, write_report
from accel.settings import EngineSettings, Offload, Quantization
from accel.step_cache import StepCacheSettings
from harness.lora_files import write_lora

COLD = SwapReport("a.safetensors × 0.8", "cold", 143.21, 172_000_000, 0.0123)
FIRST = Sampling("none", (1, 1024, 1024), 28, 28, 50.0, (), 2, 0, 45.0)
SECOND = Sampling("a.safetensors × 0.8", (2, 768, 1344), 20, 40, 4.0, (COLD,), step_cache="18 of 40 skipped")


@pytest.fixture(scope="module")
def engine(models):
    spec = inspect_checkpoint(str(models / "diffusion_models/tiny-flux-dev-fp32.safetensors"))
    settings = EngineSettings(
        compile="off", quantization=Quantization("int8_weight_only"), offload=Offload("none", vram_budget_gb=6.5)
    )
    engine = Engine(spec, settings)
    engine.load()
    return engine


@pytest.fixture(scope="module")
def loras(engine, tmp_path_factory):
    path = write_lora(tmp_path_factory.mktemp("loras") / "style.safetensors", "kohya", rank=7, alpha=3.0)
    return ScheduledStack().with_lora(engine.read_lora(str(path)), 0.8, between(0.2, 0.6))


def sections(text):
    """Title -> its lines."""
    found, title = {}, None
    for line in text.strip("`\n").splitlines()[1:]:
        if line and not line.startswith(" "):
            title = line
        elif line:
            found.setdefault(title, []).append(line.strip())
    return found


def test_every_part_is_there(engine, loras, tmp_path):
    engine.swap(loras.stack)
    text = write_report(
        Reported(engine, loras, StepCacheSettings(0.12, 0.1, 0.9, 3), (FIRST, SECOND), 1.25, {"ComfyUI": "0.30.0"})
    )
    found = sections(text)
    assert list(found) == [title for title, _ in SECTIONS]
    whole = {title: re.sub(r" +", " ", " / ".join(lines)) for title, lines in found.items()}
    assert "file tiny-flux-dev-fp32.safetensors, " in whole["Model"]
    assert "family FLUX.1 dev, " in whole["Model"]
    assert "2 double, 2 single, hidden size 256" in whole["Model"]
    assert f"{engine.bytes / 1e6:.1f} MB on cpu; loaded 1 time(s), the last time in 1.25 s" in whole["Model"]
    assert "mode int8_weight_only: " in whole["Quantization"]
    assert re.search(r"\d+ of \d+ linears quantized", whole["Quantization"])
    assert whole["Compile"] == "mode off / compiles 0, in 0.0 s / recompiles 0"
    assert whole["Attention"] == "backend sdpa (auto)"
    assert whole["Offload"] == (
        "mode none, at most 6.5 GB / plan everything on the device / "
        f"on the device {engine.device_bytes / 1e6:.1f} MB of weights, 0.0 MB of LoRAs"
    )
    assert engine.device_bytes == pytest.approx(engine.bytes, rel=0.02)
    assert "style.safetensors × 0.8 (20–60 %) / bound now yes / 1 style.safetensors × 0.8 / Kohya" in whole["LoRAs"]
    assert "rank 7 at most on " in whole["LoRAs"]
    assert whole["Last switches of LoRAs"] == "cold 143.21 ms, 172.0 MB, error 1.23%: a.safetensors × 0.8"
    assert whole["Step cache"] == "threshold 0.12, at most 3 in a row / from 10 to 90 % of the sampling"
    assert whole["Last samplings"] == (
        "1 1024 × 1024, 28 steps in 50.00 s, 5.60 steps/s, no switch, compiled 2 in 45.0 s / LoRAs none / "
        "2 1344 × 768, batch of 2, 20 steps in 4.00 s, 40 calls, 5.19 steps/s, switch 143.21 ms, "
        "step cache 18 of 40 skipped / LoRAs a.safetensors × 0.8"
    )
    assert re.search(r"host this process [\d.]+ GB, available", whole["Memory"])
    assert re.search(r"LoRAs, device [\d.]+ of [\d,]+ MB", whole["Memory"])
    assert "ComfyUI 0.30.0 / " in whole["Machine"]
    assert f"torch {torch.__version__}" in whole["Libraries"]


def test_it_tells_no_folder(engine, loras, models):
    text = write_report(Reported(engine, loras))
    assert str(models) not in text
    assert not re.search(r"(^|\s)(/|[A-Z]:\\)\w", text)


def test_without_anything_done(models):
    engine = Engine(inspect_checkpoint(str(models / "diffusion_models/tiny-flux-dev-fp32.safetensors")),
                    EngineSettings(compile="off"))
    found = sections(write_report(Reported(engine)))
    assert "not loaded yet" in " ".join(found["Model"])
    assert found["LoRAs"] == ["stack  none"]
    assert found["Step cache"] == ["mode  off"]
    assert not {"Last samplings", "Last switches of LoRAs"} & set(found)


def test_a_sampling_that_was_stopped_is_said_to_be_so(engine):
    found = sections(write_report(Reported(engine, samplings=[dataclasses.replace(FIRST, stopped="interrupted")])))
    assert "28 steps in 50.00 s, interrupted in the last of them, " in found["Last samplings"][0]


def test_an_unbound_stack_is_said_to_be_so(engine, loras):
    engine.swap(ScheduledStack().stack)
    assert "bound now  no" in sections(write_report(Reported(engine, loras)))["LoRAs"]


def widths(picture, row):
    """Pixels of each colour in a sampling's bar."""
    line = np.asarray(picture)[HEAD + row * ROW + 20, LEFT : RIGHT + 1]
    return {
        name: int((line == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).sum())
        for name, colour in (("steps", STEPS), ("swap", SWAP), ("compile", COMPILE))
    }


def test_the_chart_shows_where_the_time_went():
    picture = draw_samplings([FIRST, SECOND, Sampling("x", (1, 64, 64), 4, 4, 2.0, (COLD,))], "model")
    assert picture.mode == "RGB"
    first, second, third = (widths(picture, row) for row in range(3))
    assert first["compile"] > 100
    assert first["swap"] == second["compile"] == 0
    assert second["steps"] / first["steps"] == pytest.approx(SECOND.steps_s / FIRST.steps_s, abs=0.02)
    assert third["swap"] / third["steps"] == pytest.approx(0.143 / 1.857, abs=0.02)
    # 45 s of compiling beside 5 s of steps: the bar is cut at the end of the axis, and still shows the steps.
    assert first["steps"] > 300


def test_the_chart_of_nothing_and_of_any_name():
    assert draw_samplings([], "model").size[0] == 1280
    drawn = draw_samplings([Sampling("水彩画风格" * 40 + ".safetensors × 1", (), 0, 0, 0.0)], "模型" * 100)
    assert drawn.size[0] == 1280
