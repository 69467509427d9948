"""`python -m benchmarks gpu --quick` on a CPU: every stage has its figures; what fails, hangs or dies is lost alone."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from accel.build import load_model
from accel.checkpoint import inspect_checkpoint
from accel.linear import float8
from accel.quantize.modes import MODES
from benchmarks import gpu, gpu_report, gpu_stages
from benchmarks.__main__ import main
from benchmarks.families.flux1 import one_of_each
from benchmarks.gpu_job import Row
from benchmarks.gpu_rows import ROWS, STAGES
from benchmarks.kernel_profile import profile_kernels
from benchmarks.random_checkpoint import random_spec, write_checkpoint
from benchmarks.timing import CPU, Stopwatch
from harness.paths import REPO

pytestmark = pytest.mark.slow

# What each row must report, by stage: numbers above zero.
NUMBERS = {
    ("device", "device"): ["bf16_product_tflops", "copy_gb_per_s", "upload_pinned_gb_per_s"],
    ("selftest", "selftest"): ["works"],
    ("swap", "pack"): ["hot_ms", "warm_ms", "cold_ms", "cold_kohya_ms", "memcpy_ms", "read_ms", "warm_over_memcpy",
                       "cold_over_read_plus_memcpy", "hot_host_ms", "lora_mb"],
    ("swap", "pools"): ["stack3_ms", "strength_ms", "multiply_ms", "prefetched_ms", "rank128_hot_ms"],
    ("swap", "peers"): ["peft_ms", "diffusers_ms"],
    ("swap", "prefetching"): ["step_alone_ms", "step_prefetching_ms"],
    ("offload", "streamed"): ["copy_s", "compute_s", "streamed_s", "overlap", "copied_bytes_per_step", "peak_bytes"],
    ("attention", "sdpa"): ["ms", "host_ms", "tflops", "deviation"],
}  # fmt: skip
STEP = ["none_ms", "none_host_ms", "rank16_ms", "rank16_host_ms", "rank128_ms", "empty_over_none", "rank16_over_none",
        "rank128_over_none", "stack4_over_none", "peft_rank16_over_none", "tokens"]  # fmt: skip
WHOLE = ["load_s", "first_use_s", "first_image_s", "step_ms", "s_28_steps_extrapolated", "steps"]
PACK = ["none_step_ms", "rank16_step_ms", "two_step_ms", "rank128_step_ms", "rank16_over_none", "hot_switch_ms",
        "strength_switch_ms"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks", "gpu", "--quick", "--device", "cpu", "--minutes", "10"]
    command += ["--out", str(folder / "out"), "--json", str(folder / "gpu.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny sizes gain nothing from more
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8")), done.stdout, folder / "out"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_row_runs_on_a_gpu(tmp_path):
    report = gpu.run(quick=True, minutes=10, out=tmp_path, device="cuda")
    rows = {f"{stage}: {name}": row for stage, rows in report.values["stages"].items() for name, row in rows.items()}
    assert not {name: row["error"] for name, row in rows.items() if not row["ok"]}


def positive(row, keys):
    for key in keys:
        assert math.isfinite(row[key]), key
        assert row[key] > 0, key


@pytest.fixture
def torchaos_float8():
    """What stands beside ours in two rows of `step`: on a CPU it needs products with a scale for each row."""
    if "scaled by row" in float8.way_on(CPU, torch.bfloat16).refusals:
        pytest.skip("this torch (2.11) has no such products on a CPU: the rows say so, and have no figures")


@pytest.mark.usefixtures("torchaos_float8")
def test_every_row_is_measured_or_says_what_is_missing(finished):
    figures, stdout, out = finished
    assert list(figures["stages"]) == ["device", *STAGES]
    assert {(stage, name) for stage, rows in figures["stages"].items() for name in rows} == {
        ("device", "device"), *((row.stage, row.name) for row in ROWS)
    }  # fmt: skip
    assert all(row["ok"] for rows in figures["stages"].values() for row in rows.values()), figures["stages"]
    for (stage, name), keys in NUMBERS.items():
        positive(figures["stages"][stage][name], keys)
        assert f"{stage}: {name}" in stdout
    assert figures["stages"]["attention"]["cudnn"]["missing"].startswith("needs an NVIDIA card")
    assert figures["device"]["torch"] == torch.__version__.partition("+")[0]
    assert figures["published_s"]["H100"]["all"] == 3.546
    written = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    assert written["stages"] == figures["stages"]


@pytest.mark.usefixtures("torchaos_float8")
def test_steps_have_ratios_host_times_and_kernels(finished):
    for name, row in finished[0]["stages"]["step"].items():
        positive(row, STEP)
        assert row["rank16_profile"]["top"][0]["ms_per_step"] > 0, name
        assert row["attention"] == "sdpa"


def test_whole_models_have_images_switches_and_published_figures(finished):
    rows = finished[0]["stages"]["whole"]
    for name, row in rows.items():
        if "missing" in row:
            assert name == "diffusers, fp8, compiled, hotswap" or "python -m harness.comfyui" in row["missing"]
            continue
        positive(row, WHOLE)
        assert row["s_28_steps_extrapolated"] == pytest.approx(28 * row["step_ms"] / 1e3, rel=1e-3)
        if name != "diffusers, bf16, compiled, without LoRA":
            positive(row, ["switch_ms", "switched_image_s"])
        if name.startswith("pack"):
            positive(row, PACK)
            assert row["recompiles"] == 0
            assert row["hot_switch_sources"] == ["hot"]
            assert row["strength_switch_sources"] == ["strength"]
            assert row["profile"]["device_ms_per_step"] > 0
    # Everybody draws the same picture, in bf16 nearly so.
    assert rows["diffusers, bf16, eager, PEFT"]["distance_from_the_first_row"] < 0.03
    assert rows["pack, bf16, eager"]["distance_from_the_first_row"] < 0.03
    assert rows["pack, fp8, compiled"]["published_s"] == {"H100": 4.302, "RTX 4090": 11.572}


def test_streaming_equals_the_resident_model_and_the_self_tests_name_their_parts(finished):
    stages = finished[0]["stages"]
    assert stages["offload"]["streamed"]["bit_equal"] is True
    assert 0 < stages["offload"]["streamed"]["resident_blocks"] < stages["offload"]["streamed"]["total_blocks"]
    tested = {row["name"]: row for row in stages["selftest"]["selftest"]["rows"]}
    assert tested["attention sdpa"]["state"] == tested["quantization int8"]["state"] == "works"
    assert tested["quantization nvfp4"]["state"] == "not here"
    assert {f"quantization {name}" for name in MODES} <= set(tested)
    assert all(("ms" in row) == (row["state"] != "not here") for row in tested.values())
    assert all(bool(row["why"]) == (row["state"] != "works") for row in tested.values())


def test_the_page_has_a_table_for_each_stage(finished):
    text = (finished[2] / "gpu.md").read_text(encoding="utf-8")
    for stage in STAGES:
        assert f"\n## {stage}\n" in text
    assert "| pack, bf16, compiled |" in text
    assert "ms of kernels a step" in text
    assert not list(finished[2].rglob("lora-*"))


def test_a_second_call_measures_nothing_again(finished):
    out = finished[2]
    before = (out / gpu.RESULTS).read_text(encoding="utf-8").splitlines()
    report = gpu.run(quick=True, minutes=10, out=out, stages=["swap", "whole"], device="cpu")
    after = (out / gpu.RESULTS).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in after[len(before) :]] == ["device"]
    assert set(report.values["stages"]) == {"device", *STAGES}


# Rows for a process of their own: it imports this module.


def works(job):
    job.add(answer=42)


def fails(job):
    job.add(before=1)
    raise ValueError("on purpose\nsecond line")


def dies(job):
    job.add(before=1)
    os._exit(7)


def hangs(job):
    job.add(before=1)
    time.sleep(600)


def measurement(out, seconds=600.0):
    out.mkdir(exist_ok=True)
    return gpu.Measurement(out, "cpu", True, time.monotonic() + seconds)


def test_what_fails_dies_or_hangs_is_lost_alone_and_tried_again(tmp_path):
    limit_s = 40.0 / gpu.PATIENCE
    rows = [Row("test", function.__name__, function, limit_s) for function in (fails, dies, works)]
    hanging = Row("test", "hangs", hangs, 4.0 / gpu.PATIENCE, least_s=1.0)
    first = measurement(tmp_path)
    first.measure([*rows, hanging])
    found = first.report().values["stages"]["test"]
    assert found["fails"]["error"] == "ValueError: on purpose"
    assert "exit code 7" in found["dies"]["error"]
    assert found["hangs"]["error"] == "out of time: it was ended after 4 s"
    assert [found[name]["before"] for name in ("fails", "dies", "hangs")] == [1, 1, 1]
    assert found["works"] == {"answer": 42, "ok": True, "seconds": found["works"]["seconds"]}
    text = (tmp_path / gpu.MARKDOWN).read_text(encoding="utf-8")
    assert text.index("FAILED test: fails: ValueError: on purpose") < text.index("## test")

    # A line that was cut off does not count; what had failed is tried again, what is known is not.
    with open(tmp_path / gpu.RESULTS, "a", encoding="utf-8") as stream:
        stream.write('{"stage": "te')
    second = measurement(tmp_path)
    second.measure(rows[1:])
    written = (tmp_path / gpu.RESULTS).read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line)["row"] for line in written]
    assert lines == ["device", "fails", "dies", "works", "hangs", "device", "dies"]
    assert second.report().values["stages"]["test"]["works"]["ok"]


def test_where_a_forked_process_has_no_device_a_new_one_is_started(tmp_path):
    """Reading a value of the meta device fails as a GPU does in a process that was forked from one that had it."""
    found = gpu.Measurement(tmp_path, "meta", True, time.monotonic() + 600)
    (tmp_path / "logs").mkdir()
    assert found.forks
    record = found.run_row(Row("test", "works", works, 30.0))
    assert record["ok"], record["error"]
    assert record["values"] == {"answer": 42}
    assert not found.forks


def test_what_there_is_no_time_for_is_named(tmp_path):
    late = measurement(tmp_path, seconds=0.0)
    late.measure([Row("test", "works", works, 10.0)])
    row = late.report().values["stages"]["test"]["works"]
    assert not row["ok"]
    assert row["error"].startswith(gpu_report.NOT_BEGUN)


def test_results_of_other_versions_do_not_count(tmp_path):
    first = measurement(tmp_path)
    first.measure([Row("test", "works", works, 10.0)])
    text = (tmp_path / gpu.RESULTS).read_text(encoding="utf-8")
    (tmp_path / gpu.RESULTS).write_text(text.replace(f'"torch": "{gpu_stages.machine(CPU)["torch"]}', '"torch": "2.0'))
    again = measurement(tmp_path)
    again.measure([])
    assert "test" not in again.report().values["stages"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quick", "--stages", "teleport"), "--stages names teleport, expected some of: selftest, swap"),
        (("--quick", "--minutes", "0"), "--minutes is 0, expected more than 0"),
        (("--device", "cpu"), "there is no GPU here"),
    ],
)
def test_bad_arguments_are_clear_errors(arguments, message, capsys, tmp_path):
    assert main(["gpu", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


class FakeDevice:
    """What torch.cuda has for a stopwatch; the device is busy for as long as `busy_s` says."""

    def __init__(self, busy_s):
        self.busy_s = busy_s
        self.waits = 0

    def synchronize(self):
        self.waits += 1
        if self.waits > 1:  # the first one is before the clock starts
            time.sleep(self.busy_s)

    def Event(self, enable_timing):
        assert enable_timing
        return self

    def record(self):
        pass

    def elapsed_time(self, end):
        return 5.0


def test_a_stopwatch_tells_the_host_from_the_device():
    """There is no device here that computes on its own: what its module gives is replaced."""
    fake = FakeDevice(busy_s=0.05)
    timed = Stopwatch(torch.device("cuda"), fake).time(lambda: None)
    assert timed.host_ms < 40 < 50 <= timed.done_ms
    assert timed.device_ms == 5.0
    assert fake.waits == 2


def test_a_random_checkpoint_is_the_file_that_is_written_of_it(tmp_path):
    config = one_of_each(256)
    path = tmp_path / "random.safetensors"
    size = write_checkpoint(path, config)
    assert size == path.stat().st_size
    models = [
        load_model(spec, torch.bfloat16, CPU, lambda done, total: None)
        for spec in (random_spec(config), inspect_checkpoint(path))
    ]
    made, read = (dict(model.named_parameters()) for model in models)
    assert set(made) == set(read)
    assert all(torch.equal(made[name], read[name]) for name in made)
    blocks = models[0].transformer_blocks[0]
    assert not torch.equal(blocks.attn.to_q.weight, blocks.attn.to_k.weight)
    assert blocks.ff.net[2].weight.float().std() == pytest.approx(1024**-0.5, rel=0.02)


def test_weights_on_a_device_are_converted_there(monkeypatch):
    """A checkpoint that says where it lies is not copied to the CPU first. The meta device stands in for a GPU."""
    read_to = []

    def read_weights(spec, dtype, device):
        read_to.append(device)
        return iter(())

    monkeypatch.setattr("accel.build.read_weights", read_weights)
    monkeypatch.setattr("accel.build.check_complete", lambda model, spec: None)
    for spec in (random_spec(one_of_each(256), torch.device("meta")), random_spec(one_of_each(256))):
        load_model(spec, torch.bfloat16, CPU, lambda done, total: None, MODES["int8"])
    assert [device.type for device in read_to] == ["meta", "cpu"]


def test_kernels_are_sorted_by_their_time():
    x = torch.randn(256, 256)
    found = profile_kernels(lambda: (x @ x, x + 1), Stopwatch(), steps=2)
    times = [kernel["ms_per_step"] for kernel in found["top"]]
    assert times == sorted(times, reverse=True)
    assert sum(times) <= found["device_ms_per_step"] * 1.001
    assert any("mm" in kernel["kernel"] for kernel in found["top"])
