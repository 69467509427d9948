"""The demo, run as a user runs it, and what it says when something fails."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from PIL import Image, ImageChops

from harness import demo
from harness.demo_report import SHOWN_PX, DemoFailed, Report, Row, read_report
from harness.paths import REPO
from pocket.draw import SIZE_PX

ROW = re.compile(
    rf"^(?P<name>{'|'.join(sorted((re.escape(prompt.name) for prompt in demo.PROMPTS), key=len, reverse=True))}) .*?"
    r"(?P<seconds>\d+\.\d\d) +(?P<compile>[\d.]+|–) +(?P<swap_ms>\d+\.\d\d)  (?P<source>[a-z ]*?) +(?P<recompiles>\d+)"
    r"  (?P<image>\S+\.png)$",
    re.MULTILINE,
)
SUMMARY = "[INFO] Flux Hotswap: LoRAs {} | swap {} ms ({}) | compiled 2 | recompiles {} | sampling 1.50 s\n"
# Tiny tensors gain nothing from threads, and lose seconds to them when other programs run.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments):
    return [sys.executable, "-m", "harness.demo", *arguments]


def allow_ctrl_c():
    # A shell's background job ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "pictures"


@pytest.fixture(scope="module")
def interrupted(output):
    """A run that was stopped with Ctrl-C in the middle of its first prompt: (exit code, stdout, stderr)."""
    process = subprocess.Popen(
        command("--output", str(output)),
        cwd=REPO,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=allow_ctrl_c if os.name != "nt" else None,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Loading" in line:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    return process.returncode, "".join(lines) + out, err


@pytest.fixture(scope="module")
def finished(output, interrupted):
    """The run after it, with every prompt queued twice."""
    done = subprocess.run(
        command("--output", str(output), "--rounds", "2"),
        cwd=REPO,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_ctrl_c_ends_the_demo_and_its_server(interrupted, output):
    code, out, err = interrupted

    assert code == 130, out + err
    assert "Interrupted; the server was ended" in err
    assert "Traceback" not in err
    url = re.search(r"runs on (http://\S+);", out)[1]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)
    assert not list(output.glob("*.png"))


def test_table(finished, output):
    rows = [match.groupdict() for match in ROW.finditer(finished)]

    names = [[prompt.name for prompt in demo.PROMPTS if prompt.workflow == name] for name in demo.TITLES]
    assert [row["name"] for row in rows] == [name for of_model in names for name in of_model * 2]
    assert {row["recompiles"] for row in rows} == {"0"}
    assert all(float(row["seconds"]) > 0 for row in rows)
    start = 0
    for of_model in names:
        count = len(of_model)
        first, *others = rows[start : start + 2 * count]
        assert first["compile"] == "–" or float(first["compile"]) > 0, "it compiles, unless an earlier demo did"
        assert {row["compile"] for row in others} == {"–"}, "no other prompt does"
        in_memory = {"hot", "strength", "already bound"}
        assert {row["source"] for row in others[count - 1 :]} <= in_memory, "by then every stack is"
        start += 2 * count
    assert all((REPO / row["image"]).is_file() for row in rows)
    assert str(output / "contact_sheet.png") in finished
    assert "pocket-neon-diffusers (1) + pocket-stripes-comfyui (1)" in finished


def test_pictures(finished, output):
    def picture(name):
        return Image.open(output / name).convert("RGB")

    first = [picture(prompt.file_name) for prompt in demo.PROMPTS]
    second = [picture(f"round2_{prompt.file_name}") for prompt in demo.PROMPTS]
    for a, b in zip(first, second, strict=True):
        assert a.size == (SIZE_PX, SIZE_PX)
        assert a.tobytes() == b.tobytes(), "the same LoRAs again give the same picture, whatever came between"
    by_name = dict(zip((prompt.name for prompt in demo.PROMPTS), first, strict=True))
    assert by_name.pop("none again").tobytes() == by_name["none"].tobytes(), "without LoRAs it is as it was"
    different = list(by_name.values())
    for index, a in enumerate(different):
        for b in different[index + 1 :]:
            difference = ImageChops.difference(a, b)
            assert max(high for _, high in difference.getextrema()) > 40, "a person can tell the pictures apart"
    width, height = picture("contact_sheet.png").size
    assert width > 4 * SHOWN_PX
    assert height > 3 * SHOWN_PX
    assert not list(output.glob("*.partial"))


def test_unwritable_output_fails_with_its_reason(capsys, tmp_path):
    (tmp_path / "file").write_text("")

    assert demo.main(["--output", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_recompiles_fail_the_demo(tmp_path):
    prompt = demo.PROMPTS[0]
    good, bad = (Row(prompt, 1.0, Report("x", 1.0, "hot", count, 0.0), tmp_path / "x.png") for count in (0, 2))

    demo.check_recompiles([good])
    with pytest.raises(DemoFailed, match=rf"'{re.escape(prompt.name)}': 2.*expected 0"):
        demo.check_recompiles([good, bad])


def test_report_is_read_from_the_log():
    log = (
        "got prompt\n[INFO] Flux Hotswap: compiled the double blocks in 12.5 s (compile 1 of this engine)\n"
        "[INFO] Flux Hotswap: compiled the single blocks in 3.0 s (compile 2 of this engine)\n"
        + SUMMARY.format("a (x).safetensors × 1 + b.safetensors × 0.5", "20.73", "cold", 3)
    )
    assert read_report(log) == Report("a (x).safetensors × 1 + b.safetensors × 0.5", 20.73, "cold", 3, 15.5)


@pytest.mark.parametrize("count", [0, 2])
def test_a_log_without_exactly_one_sampling_is_an_error(count):
    with pytest.raises(DemoFailed, match=f"found {count}"):
        read_report("got prompt\n" + SUMMARY.format("none", "0.1", "hot", 0) * count)


# The adapted workflow


@pytest.fixture
def workflow():
    return json.loads((demo.WORKFLOWS / "flux_hotswap_pocket.json").read_text(encoding="utf-8"))


def by_class(graph, class_type):
    return [entry["inputs"] for entry in graph.values() if entry["class_type"] == class_type]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_adapt_bypasses_what_is_left_over(workflow, count):
    untouched = json.dumps(workflow)
    loras = [("first.safetensors", 0.5), ("second.safetensors", -1.0)][:count]

    adapted = demo.adapt(workflow, loras)

    assert json.dumps(workflow) == untouched
    assert [(n["lora_name"], n["strength"]) for n in by_class(adapted, "FluxHotswapLora")] == loras
    for entry in adapted.values():
        for value in entry["inputs"].values():
            assert not isinstance(value, list) or value[0] in adapted, "a link points to a node that is gone"
    (sampler,), (text,) = by_class(adapted, "KSampler"), by_class(adapted, "CLIPTextEncode")
    ends = ("FluxHotswapLora", "FluxHotswapLora") if count else ("FluxAccelLoader", "FluxTextEncoderLoader")
    assert (adapted[sampler["model"][0]]["class_type"], adapted[text["clip"][0]]["class_type"]) == ends
    assert sampler["seed"] == demo.SEED
    assert by_class(adapted, "FluxAccelLoader")[0]["compile"] == "regional"


def test_adapt_refuses_more_loras_than_nodes(workflow):
    with pytest.raises(ValueError, match="3 LoRAs, but the workflow has 2"):
        demo.adapt(workflow, [("x.safetensors", 1.0)] * 3)
