"""`python -m benchmarks ablation` at a small size: its figures fit together, and it notices work that was not done."""

import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import ablation, ablation_report, ablation_rows
from benchmarks.__main__ import main
from benchmarks.ablation_report import Measured, check_changes
from benchmarks.ablation_rows import ALL, BASELINE, Configuration
from benchmarks.ablation_work import make_work
from benchmarks.families.flux1 import one_of_each
from benchmarks.random_checkpoint import random_spec
from benchmarks.report import BenchmarkError, Goal
from benchmarks.sampling import Clock, euler, exact_sigmas, make_prompt
from benchmarks.subject_process import SubjectFailedError, SubjectProcess
from benchmarks.subjects import Setup
from harness.paths import REPO

CPU = torch.device("cpu")
KEYS = {"stock_bf16_ms", "stock_default_ms", "compiled_bf16_ms", "compiled_int8_ms", "int8_over_stock_bf16",
        "int8_over_stock_default", "switch_s", "stock_switch_s", "stock_compile_switch_s", "switch_over_stock",
        "switch_over_stock_compile"}  # fmt: skip
NO_CPU = {"fp8", "flash_3", "all but flash_3", "all but int8 and flash_3"}
# Each costs a process that imports the libraries, and two compile. What they set stays proven: compile and int8 of
# diffusers together in "all but hotswap", the pack uncompiled in the tests of random weights and of a subject.
LEFT_OUT = {"compile", "int8", "hotswap", "all but compile"}


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "ablation", *map(str, arguments)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def measured_rows():
    rows = [*ablation_rows.table(CPU, random_spec(one_of_each(256))), *ablation_rows.peers(CPU)]
    return [row.name for row in rows if row.name not in LEFT_OUT]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "ablation.json"
    done = command("--quick", "--peers", "--json", path, "--rows", *measured_rows())
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8")), done.stdout, path


def test_every_configuration_is_measured_or_says_why_not(finished):
    figures, stdout, _ = finished
    assert list(figures["configurations"]) == measured_rows()
    for name, values in figures["configurations"].items():
        assert f"  {name} " in stdout
        if name in NO_CPU:
            assert values["failed"]
            assert values["failed"] in stdout
        else:
            assert values["first_image_s"] > 0
            assert values["peak_bytes"] > 0
            assert 0 <= values["distance"] < 0.15
    assert figures["configurations"][ALL]["distance"] > 0


def test_every_key_follows_from_the_samples(finished):
    figures, _, _ = finished
    assert set(figures) >= KEYS
    samples = figures["samples_ms"]
    assert all(math.isfinite(figures[key]) and figures[key] > 0 for key in KEYS)

    def faster(kind, own, other):
        pairs = zip(samples[f"{own}: {kind}"], samples[f"{other}: {kind}"], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    assert figures["stock_bf16_ms"] == pytest.approx(statistics.median(samples["stock bf16: step"]), rel=1e-3)
    assert figures["compiled_int8_ms"] == pytest.approx(statistics.median(samples["all: step"]), rel=1e-3)
    assert figures["compiled_bf16_ms"] == pytest.approx(statistics.median(samples["all but int8: step"]), rel=1e-3)
    assert figures["switch_s"] == pytest.approx(statistics.median(samples["all: switch"]) / 1e3, rel=1e-3)
    for key, kind, other in (
        ("int8_over_stock_bf16", "step", "stock bf16"),
        ("int8_over_stock_default", "step", "stock default"),
        ("switch_over_stock", "switch", "stock bf16"),
        ("switch_over_stock_compile", "switch", "stock compile"),
    ):
        assert figures[key] == pytest.approx(faster(kind, "all", other), rel=1e-2), key
    assert figures["lora_over_plain_compile"] == pytest.approx(
        faster("step", "all but int8", "plain compile"), rel=1e-2
    )
    assert len(figures["goals"]) == 6


def test_markdown_and_picture_lie_beside_the_json_file(finished):
    figures, _, path = finished
    markdown = path.with_suffix(".md").read_text(encoding="utf-8")
    for name in figures["configurations"]:
        assert f"| {name} |" in markdown
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def changed(*values):
    return {lora: np.array(value, dtype=np.float32) for lora, value in zip("AB", values, strict=False)}


def measured(name, setup, *values, failed=""):
    return Measured(Configuration(name, "", setup), failed, changes=changed(*values))


RIGHT = {
    BASELINE: measured(BASELINE, Setup("diffusers"), [1.0, 0.0], [0.0, 1.0]),
    ALL: measured(ALL, Setup("pack"), [1.0, 0.01], [0.01, 1.0]),
}


def test_right_outputs_pass():
    check_changes(RIGHT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (([1.0, 0.2], [0.0, 1.0]), "all: with LoRA A it is 0.2 from the baseline"),
        (([1.0, 0.0], [1.0, 0.0]), "all: with LoRA B"),
        (([math.nan, 0.0], [0.0, 1.0]), "all: with LoRA A it is nan"),
    ],
)
def test_a_configuration_that_computes_something_else_is_noticed(values, message):
    with pytest.raises(BenchmarkError, match=message):
        check_changes(RIGHT | {ALL: measured(ALL, Setup("pack"), *values)})


def test_two_loras_that_do_the_same_are_noticed():
    """Otherwise a switch that does nothing would pass."""
    same = {BASELINE: measured(BASELINE, Setup("diffusers"), [1.0, 0.0], [1.0, 0.01]), ALL: RIGHT[ALL]}
    with pytest.raises(BenchmarkError):
        check_changes(same)


def test_a_configuration_that_failed_is_a_line_with_its_reason():
    failed = Measured(ablation_rows.Configuration("stock bf16", "what", Setup("comfyui")), "OutOfMemoryError: 24 GB")
    ok = replace(RIGHT[BASELINE], first_ms=1.0, image_ms=[2.0], steps_ms=[1.0])
    report = ablation_report.report("title", {BASELINE: ok, "stock bf16": failed}, "int8", 2, "H100", None)
    assert report.lines[1][0] == "stock bf16"
    assert report.lines[1][-1] == "does not run: OutOfMemoryError: 24 GB"
    assert not report.goals
    assert report.columns[-2] == "published, H100, s"
    assert report.lines[0][-2] == "7.891"


def test_goals_can_ask_for_at_least():
    assert Goal("reached", 1.6, 1.6, at_least=True).met
    assert not Goal("missed", 1.59, 1.6, at_least=True).met


@pytest.mark.parametrize("steps", [2, 4, 28])
def test_sigmas_survive_bfloat16(steps):
    sigmas = exact_sigmas(steps)
    assert len(sigmas) == steps + 1
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert (sigmas[:-1] > sigmas[1:]).all()
    assert torch.equal((sigmas.bfloat16() * 1000).float(), sigmas * 1000)
    assert (sigmas - torch.linspace(1, 0, steps + 1)).abs().max() < 0.01


def test_euler_integrates_and_tells_the_clock():
    prompt = make_prompt(4, 2, 3, 5, 4)
    clock = Clock(lambda: None)
    clock.begin()
    latent = euler(lambda latent, sigma: torch.full_like(latent, 2.0), prompt, CPU, clock)
    assert torch.allclose(latent, prompt.noise - 2.0)
    assert len(clock.ends) == 4
    assert clock.steps_ms == [pytest.approx((b - a) * 1e3) for a, b in zip(clock.ends, clock.ends[1:], strict=False)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lora", "a.safetensors"), "--lora needs --model"),
        (("--model", "absent.safetensors"), "--lora was given 0 times, expected twice"),
        (("--model", "absent.safetensors", "--lora", "a", "--lora", "b"), "there is no file absent.safetensors"),
        (("--quick", "--steps", "1"), "--steps is 1, expected 2 or more"),
        (("--quick", "--rows", "teleport"), "--rows names teleport, expected some of: baseline, compile"),
        (("--random",), "--random is in place of --model, and needs a GPU"),
    ],
)
def test_bad_arguments_are_clear_errors(arguments, message, capsys):
    assert main(["ablation", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_some_rows_with_random_weights_are_known_as_they_end():
    """No file is written of the weights; the baseline is always among the rows."""
    known = []
    report = ablation.run(quick=True, random=True, rows=["hotswap"], save=known.append)
    assert [list(each.values["configurations"]) for each in known] == [[BASELINE], [BASELINE, "hotswap"]]
    assert report.values["configurations"]["hotswap"]["distance"] < 0.05
    assert report.values["configurations"]["hotswap"]["over_baseline"] > 0
    assert report.title.startswith("FLUX.1 with random weights, hidden 256")


def test_rows_that_there_is_no_time_for_say_so():
    report = ablation.run(quick=True, random=True, rows=["hotswap"], minutes=0.0)
    failed = {name: values["failed"] for name, values in report.values["configurations"].items()}
    assert failed == dict.fromkeys((BASELINE, "hotswap"), "not begun: the time was over")


@pytest.mark.slow
def test_a_row_is_ended_when_the_time_is_over(work, tmp_path):
    with pytest.raises(SubjectFailedError, match="the time was over"):
        SubjectProcess("late", Setup("pack"), work, tmp_path, cold=False, ends=time.monotonic())


@pytest.fixture
def work(tmp_path):
    return make_work(tmp_path, None, (), True, CPU, None, 1024)


@pytest.mark.slow
def test_a_process_that_cannot_run_says_why(work, tmp_path):
    with pytest.raises(SubjectFailedError, match="odd one: SettingsError: attention is 'no such backend'"):
        SubjectProcess("odd one", Setup("pack", attention="no such backend"), work, tmp_path, cold=False)


@pytest.mark.slow
def test_a_subject_draws_switches_and_draws_the_same_again(work, tmp_path):
    process = SubjectProcess("eager", Setup("pack", hotswap=True), work, tmp_path, cold=False)
    try:
        first = process.first(work.loras[0])
        before = process.change()
        assert first["ms"] > 0
        assert len(process.switch(work.loras[1])["steps_ms"]) == work.steps - 1
        other = process.change()
        process.switch(work.loras[0])
        assert np.array_equal(process.change(), before)
        process.image()
        assert np.array_equal(process.change(), before)
        assert ablation_report.distance(other, before) > 0.02
        process.check()
    finally:
        process.close()
    assert process.cpu_s > 0
