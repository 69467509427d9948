"""`python -m benchmarks step` at a small size: its figures fit together; a variant that computes wrongly is noticed."""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from accel.lora.hold.slots import LoraSlots
from benchmarks import block_steps, step
from benchmarks.block_variants import block_modules, without_lora_layers
from benchmarks.report import BenchmarkError
from benchmarks.timing import CPU, Stopwatch, Variant, interleave_timed
from harness.paths import REPO


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "step.json"
    command = [sys.executable, "-m", "benchmarks", "step", "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8")), done.stdout


def test_every_key_is_there_and_follows_from_the_samples(finished):
    figures, stdout = finished
    assert set(figures["samples_ms"]) == set(block_steps.NAMES)
    bare = figures["samples_ms"]["none"]
    for name, samples in figures["samples_ms"].items():
        assert len(samples) == figures["rounds"] == step.QUICK_ROUNDS
        assert figures[f"{name}_ms"] == pytest.approx(statistics.median(samples), abs=1e-3)
        assert f"  {name} " in stdout
        if name != "none":
            ratio = statistics.median(each / other for each, other in zip(samples, bare, strict=True))
            assert figures[f"{name}_over_none"] == pytest.approx(ratio, rel=1e-3)
            assert math.isfinite(ratio)
    assert {"machine", "date", "notes"} <= set(figures)
    assert len(figures["goals"]) == 3


class FakeRegions:
    """Adds a number to the input in place of the compiled blocks: what is checked here is the check."""

    def __init__(self, added):
        self.added = added
        self.compiler = type("Counter", (), {"count": 2})()

    def __call__(self, image, *others):
        return image + self.added


def rotated(variants, rounds):
    return interleave_timed(variants, rounds, step.WARM_UP, Stopwatch(), rotate=True)


RIGHT = {"none": 0, "empty": 0, "rank16": 1, "rank128": 2, "stack4": 3, "peft_rank16": 1}


@pytest.fixture(params=["flux1-dev", "flux2-klein-9b"])
def case(request):
    return step.case_of(True, CPU, None, "none", request.param)


@pytest.fixture
def steps(case):
    with torch.no_grad():
        made = block_steps.Steps(case)
    made.regions = {name: FakeRegions(added) for name, added in RIGHT.items()}
    return made


def test_right_variants_pass(steps):
    steps.check_relations()
    steps.check_compiles()
    samples = rotated(steps.variants(), rounds=2)
    assert {len(each) for each in samples.values()} == {2}


@pytest.mark.parametrize(
    ("name", "added"), [("empty", 1), ("peft_rank16", 0), ("rank16", 0), ("rank128", 1), ("stack4", 1)]
)
def test_a_variant_that_computes_something_else_is_noticed(steps, name, added):
    steps.regions[name].added = added
    with pytest.raises(BenchmarkError, match=name):
        steps.check_relations()


def test_an_output_that_moves_between_rounds_is_noticed(steps):
    steps.check_relations()
    steps.regions["rank128"].added = 5
    with pytest.raises(BenchmarkError, match="rank128: its output moved"):
        rotated(steps.variants(), rounds=1)


def test_a_recompile_is_noticed(steps):
    steps.regions["rank16"].compiler.count = 3
    with pytest.raises(BenchmarkError, match="rank16: 3 compiles"):
        steps.check_compiles()


def test_each_round_begins_with_another_variant():
    calls = []
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in block_steps.NAMES]
    rotated(variants, rounds=3)
    rounds = [calls[start : start + 6] for start in range(0, len(calls), 6)][step.WARM_UP :]
    assert [each[0] for each in rounds] == list(block_steps.NAMES[:3])
    assert all(sorted(each) == sorted(block_steps.NAMES) for each in rounds)


@pytest.mark.parametrize("mode", ["none", "int8"])
def test_the_blocks_themselves_compute_what_they_should(case, mode):
    """Bare, with LoRA layers and with PEFT's; eager, which is what takes a minute otherwise."""
    with torch.no_grad():
        made = block_steps.Steps(replace(case, compile="off", mode=mode))
    made.check_relations()
    made.check_compiles()


def test_all_variants_share_their_base_weights_and_peft_holds_the_lora_of_rank_16(case):
    config = case.config
    bare = block_steps.random_model(config, CPU)
    ours = block_steps.sharing_weights(bare, config)
    LoraSlots(ours, ["transformer_blocks.0.attn.to_q"], CPU)
    assert ours.transformer_blocks[0].attn.to_q.base.weight is bare.transformer_blocks[0].attn.to_q.weight
    peft = block_steps.sharing_weights(bare, config)
    block_steps.add_peft(peft, block_modules(config), 16)
    lora = block_steps.random_lora(config, 16, 0)
    block_steps.fill_peft(peft, lora, CPU)
    layer = peft.transformer_blocks[0].attn.to_q
    assert layer.base_layer.weight is bare.transformer_blocks[0].attn.to_q.weight
    matrices = next(each for each in lora.layers if each.module == "transformer_blocks.0.attn.to_q")
    assert torch.equal(layer.lora_A["default"].weight, matrices.lora_A)
    assert torch.equal(layer.lora_B["default"].weight, (matrices.lora_B.float() * block_steps.STRENGTH).bfloat16())


def test_a_function_without_lora_layers_calls_each_linear():
    from accel.families.flux1.blocks import single_block
    from accel.families.streams.blocks import single_stream

    function = without_lora_layers(single_block)
    called = function.__globals__["single_stream"]
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    assert torch.equal(called.__globals__["linears"](x, linear)[0], linear(x))
    assert single_stream.__globals__["linears"] is not called.__globals__["linears"]
    assert (function.__code__, called.__code__) == (single_block.__code__, single_stream.__code__)
