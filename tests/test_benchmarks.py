"""`python -m benchmarks` at a small size: it works, its figures fit together, and it notices work that was not done."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from accel.lora.hold.device import DeviceLoras, Prepared
from accel.lora.hold.slots import LoraSlots
from accel.lora.pack.strength import UnscaledB
from benchmarks import flux_loras, peers
from benchmarks.__main__ import main
from benchmarks.cold_files import ColdFiles
from benchmarks.families.registry import config_of, of, published
from benchmarks.pooled import Pooled
from benchmarks.report import BenchmarkError, Goal, OtherLoad
from benchmarks.swap import peer_variants
from benchmarks.switch import LORA_COUNT, Switch
from benchmarks.timing import CPU, Variant, interleave
from harness.paths import REPO

# One of each family.
FAMILIES = ("flux1-dev", "flux2-klein-4b")
MS_KEYS = {"memcpy_ms", "read_ms", "hot_ms", "warm_ms", "cold_ms", "peft_ms", "diffusers_ms", "stock_merge_ms",
           "cold_kohya_ms", "cold_native_ms", "step_alone_ms", "step_prefetching_ms",
           "stack3_ms", "multiply_ms", "strength_ms", "prefetched_ms", "rank64_hot_ms", "rank128_hot_ms"}
RATIOS = {
    "warm_over_memcpy": ("warm_ms", ("memcpy_ms",)),
    "hot_over_memcpy": ("hot_ms", ("memcpy_ms",)),
    "peft_over_hot": ("peft_ms", ("hot_ms",)),
    "diffusers_over_hot": ("diffusers_ms", ("hot_ms",)),
    "strength_over_multiply": ("strength_ms", ("multiply_ms",)),
    "stock_over_hot": ("stock_merge_ms", ("hot_ms",)),
    "cold_over_read_plus_memcpy": ("cold_ms", ("read_ms", "memcpy_ms")),
}
LOAD_KEYS = (
    "engine_bytes", "peak_rss_bytes", "load_s", "read_s", "cached_load_s", "cached_read_s", "cached_file_bytes",
    "swap_ms", "forward_s",
)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def config(family):
    """The narrow model that is measured."""
    return config_of(family, quick=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, family):
    path = tmp_path_factory.mktemp("bench") / "swap.json"
    done = command("swap", "--quick", "--family", family, "--json", path)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8")), done.stdout


def test_swap_writes_every_key(finished):
    figures, _ = finished
    numbers = MS_KEYS | set(RATIOS) | {"lora_bytes", "stock_merge_sampled_layers", "stock_merge_layers"}
    assert numbers | {"machine", "date", "notes"} <= set(figures)
    for key in numbers:
        assert math.isfinite(figures[key]), key
        assert figures[key] > 0, key
    assert figures["cold_diffusers_ms"] == figures["cold_ms"]
    pairs = zip(*(figures["samples_ms"][name] for name in ("step_prefetching", "step_alone")), strict=True)
    ratios = sorted(busy / alone for busy, alone in pairs)
    assert figures["prefetch_slowdown"] == pytest.approx(ratios[len(ratios) // 2] - 1.0, abs=1e-3)


def test_swap_ratios_follow_from_their_parts(finished):
    figures, _ = finished
    samples = {f"{name}_ms": values for name, values in figures["samples_ms"].items()}
    for ratio, (dividend, divisors) in RATIOS.items():
        sums = [sum(values) for values in zip(*(samples[key] for key in divisors), strict=True)]
        ratios = sorted(own / whole for own, whole in zip(samples[dividend], sums, strict=True))
        # The samples are written with fewer digits.
        assert figures[ratio] == pytest.approx(ratios[len(ratios) // 2], rel=0.05), ratio


def test_swap_medians_come_from_its_samples(finished):
    figures, _ = finished
    assert {f"{name}_ms" for name in figures["samples_ms"]} == MS_KEYS
    for name, samples in figures["samples_ms"].items():
        assert len(samples) == figures["rounds"]
        # The samples are written with fewer digits.
        assert sorted(samples)[len(samples) // 2] == pytest.approx(figures[f"{name}_ms"], abs=1e-3)


# The original linears of a double and of a single block; those of FLUX.2 have no modulation.
WEIGHTS = {"FLUX.1": (10, 3), "FLUX.2": (8, 2)}


def test_swap_counts_bytes_and_layers(finished, config):
    figures, _ = finished
    lora = flux_loras.random_lora(config, "one", 0)
    assert lora.bytes <= figures["lora_bytes"] <= lora.bytes + 64 * (1 + 2 * len(lora.pairs))
    double, single = WEIGHTS[figures["model"]["family"]]
    assert figures["stock_merge_sampled_layers"] == double + single
    assert figures["stock_merge_layers"] == double * config.depth + single * config.depth_single


def test_swap_prints_figures_goals_and_what_stood_in_for_what(finished):
    figures, stdout = finished
    for name in figures["samples_ms"]:
        assert f"  {name} " in stdout
    assert len(figures["goals"]) == 8
    for goal in figures["goals"]:
        assert goal["met"] == (goal["value"] <= goal["limit"])
        assert goal["statement"] in stdout
    assert all(note in stdout for note in figures["notes"])
    notes = " ".join(figures["notes"])
    merged = f"{figures['stock_merge_sampled_layers']} of {figures['stock_merge_layers']} weights"
    for word in ("stands in for the device", "meta device", merged, "cold file"):
        assert word in notes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="only Linux tells what other processes use")
def test_load_by_others_is_told_from_own():
    load = OtherLoad()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 60
        while not (share := load.share()) and time.monotonic() < deadline:  # a child is another's until waited for
            time.sleep(0.05)
        assert 0.0 < share <= 1.0
    finally:
        busy.kill()
        busy.wait()


def test_machine_is_described(finished):
    machine = finished[0]["machine"]
    assert machine["cores"] == os.cpu_count()
    assert machine["torch"] == torch.__version__
    assert machine["cpu"]


def test_unknown_benchmark_is_a_clear_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["teleport"])
    error = capsys.readouterr().err
    assert "teleport" in error
    assert "swap" in error


def test_help_lists_each_benchmark(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert "swap" in text
    assert "switch a LoRA" in text


def test_families_are_asked_for_by_name(capsys):
    assert {type(config_of(name)) for name in published()} == {type(config_of(name)) for name in FAMILIES}
    assert of(config_of("flux2-dev")).family.name == "FLUX.2"
    assert main(["gpu_code", "--family", "flux3-dev"]) == 1
    assert "--family is 'flux3-dev', expected one of: flux1-dev, " in capsys.readouterr().err


def test_a_lora_is_on_the_linears_that_diffusers_has(loras, config):
    """PEFT trains those; where they are several here, each gets its rows."""
    modules = {name for name, module in flux_loras.diffusers_model(config).named_modules() if name in loras[0].matrices}
    assert modules == loras[0].matrices.keys()
    ours = flux_loras.meta_model(config)
    for module, (lora_A, lora_B) in loras[0].pairs.items():
        weight = ours.get_submodule(module).weight
        assert (lora_B.shape[0], lora_A.shape[1]) == weight.shape
    given = sum(lora_B.shape[0] for _, lora_B in loras[0].pairs.values())
    assert given == sum(lora_B.shape[0] for _, lora_B in loras[0].matrices.values())


def test_json_into_a_missing_folder_fails_before_measuring(tmp_path, capsys):
    assert main(["swap", "--quick", "--json", str(tmp_path / "absent" / "swap.json")]) == 2
    printed = capsys.readouterr()
    assert "absent" in printed.err
    assert not printed.out


def test_interleave_takes_turns_and_drops_the_warm_up():
    calls = []
    variants = [
        Variant("a", lambda: calls.append("a"), check=lambda: calls.append("checked")),
        Variant("b", lambda: 7.0, before=lambda: calls.append("before b")),
    ]
    samples = interleave(variants, rounds=2, warm_up=1)
    assert calls == ["a", "checked", "before b"] * 3
    assert samples["b"] == [7.0, 7.0]
    assert len(samples["a"]) == 2


def test_a_turn_of_several_runs_counts_the_median_of_its_second_half():
    took, calls = iter([9.0, 8.0, 1.0, 3.0, 2.0] * 2), []
    variant = Variant("a", lambda: next(took), lambda: calls.append("before"), lambda: calls.append("checked"), runs=5)
    assert interleave([variant], rounds=1, warm_up=1) == {"a": [2.0]}
    assert calls == ["before", "checked"] * 10


def test_goals():
    assert Goal("at the limit", 1.2, 1.2).met
    assert not Goal("over it", 1.21, 1.2).met


# What follows breaks the work that is measured: each check must be able to fail.


@pytest.fixture(scope="module")
def loras(config):
    return [flux_loras.random_lora(config, f"lora-{seed}", seed) for seed in range(LORA_COUNT)]


@pytest.fixture
def switch(config, loras, tmp_path):
    return Switch(config, loras, ColdFiles(tmp_path), CPU)


@pytest.fixture(scope="module")
def pooled(config, loras):
    """The variants, which take turns on one model in all tests, as they do when they are measured."""
    return Pooled(config, loras, CPU).variants()


def variant_of(variants, name):
    return next(variant for variant in variants if variant.name == name)


@pytest.mark.parametrize("name", ["hot", "warm", "cold", "cold_kohya", "cold_native"])
def test_a_bind_that_does_nothing_is_noticed(switch, monkeypatch, name):
    variant = variant_of(switch.variants(), name)
    interleave([variant], rounds=LORA_COUNT, warm_up=0)
    monkeypatch.setattr(LoraSlots, "bind", lambda self, bindings: None)
    with pytest.raises(BenchmarkError, match=f"^{name}: "):
        interleave([variant], rounds=1, warm_up=0)


@pytest.mark.parametrize("name", ["hot", "warm", "cold"])
def test_one_wrong_bit_is_noticed(switch, loras, monkeypatch, name):
    bind, last = LoraSlots.bind, list(loras[0].pairs)[-1]

    def bind_wrong(self, bindings):
        lora_B = bindings.loras[self.modules.index(last)].lora_B
        lora_B.view(torch.int16)[5] ^= 1
        bind(self, bindings)

    monkeypatch.setattr(LoraSlots, "bind", bind_wrong)
    with pytest.raises(BenchmarkError, match=f"lora_B of {re.escape(last)}"):
        interleave([variant_of(switch.variants(), name)], rounds=1, warm_up=0)


def test_warm_that_copies_nothing_is_noticed(switch, monkeypatch):
    variant = variant_of(switch.variants(), "warm")
    monkeypatch.setattr(switch._warm, "_share_host", True)
    with pytest.raises(BenchmarkError, match="nothing was copied"):
        interleave([variant], rounds=1, warm_up=0)


def test_warm_that_is_still_resident_is_noticed(switch, loras):
    switch._warm.upload(loras[0].name, Prepared(switch._flats[loras[0].name]))
    with pytest.raises(BenchmarkError, match="still on the device"):
        interleave([variant_of(switch.variants(), "warm")], rounds=1, warm_up=0)


def test_warm_that_allocates_is_noticed(switch, monkeypatch):
    make_room, kept = DeviceLoras._make_room, []
    monkeypatch.setattr(DeviceLoras, "_make_room", lambda self, needed: kept.append(make_room(self, needed)))
    with pytest.raises(BenchmarkError, match="could be reused"):
        interleave([variant_of(switch.variants(), "warm")], rounds=LORA_COUNT, warm_up=0)


@pytest.mark.parametrize(("name", "kind"), [("peft", peers.PeftHotswap), ("diffusers", peers.DiffusersHotswap)])
def test_a_peer_that_does_nothing_is_noticed(config, loras, monkeypatch, name, kind):
    variant = variant_of(peer_variants(config, loras, CPU), name)
    interleave([variant], rounds=LORA_COUNT, warm_up=0)
    monkeypatch.setattr(kind, "swap", lambda self: None)
    with pytest.raises(BenchmarkError, match=f"^{name}: "):
        interleave([variant], rounds=1, warm_up=0)


def test_a_layer_outside_the_lora_must_be_zero(switch, loras):
    variant = variant_of(switch.variants(), "hot")
    interleave([variant], rounds=1, warm_up=0)
    fewer = dict(list(loras[0].scaled.items())[1:])
    with pytest.raises(BenchmarkError, match="is not zero after the switch"):
        flux_loras.check_bound("hot", switch._model, None, fewer)


def test_loras_differ_by_seed_and_strength(config, loras):
    module, (_, lora_B) = next(iter(loras[0].pairs.items()))
    assert not flux_loras.same_bits(lora_B, loras[1].pairs[module][1])
    assert not flux_loras.same_bits(lora_B, loras[0].scaled[module][1])
    assert flux_loras.same_bits(lora_B, flux_loras.random_lora(config, "again", 0).pairs[module][1])
    assert not flux_loras.same_bits(lora_B, lora_B.float())


@pytest.mark.parametrize("name", ["stack3", "multiply", "strength", "prefetched", "rank64_hot", "rank128_hot"])
def test_a_pooled_switch_that_does_nothing_is_noticed(pooled, name):
    variant = variant_of(pooled, name)
    interleave([variant], rounds=2, warm_up=0)
    with pytest.raises(BenchmarkError, match=f"^{name}: "):
        interleave([dataclasses.replace(variant, run=lambda: None)], rounds=1, warm_up=0)


def test_a_product_that_is_not_made_is_noticed(pooled, monkeypatch):
    variant = variant_of(pooled, "strength")
    interleave([variant], rounds=2, warm_up=0)
    monkeypatch.setattr(UnscaledB, "multiply", lambda self, entries, flat: None)
    with pytest.raises(BenchmarkError, match=r"^strength: lora_B"):
        interleave([variant], rounds=1, warm_up=0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a process's anonymous memory")
def test_load_measures_both_modes_and_gives_the_disk_back(tmp_path, family):
    path = tmp_path / "load.json"
    before = set(REPO.iterdir())
    done = command("load", "--quick", "--family", family, "--json", path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert set(REPO.iterdir()) == before
    for mode in ("fp8", "int8"):
        values = {key: figures[f"{mode}_{key}"] for key in LOAD_KEYS}
        assert all(math.isfinite(value) and value > 0 for value in values.values()), values
        # One byte a weight in the blocks, two elsewhere; and the cache holds what the engine holds.
        assert figures["file_bytes"] / 2 < values["engine_bytes"] < figures["file_bytes"]
        assert values["cached_file_bytes"] == pytest.approx(values["engine_bytes"], rel=0.05)  # its header is 0.3 MB
        assert values["peak_rss_bytes"] > values["engine_bytes"]
    assert {key: figures[key] for key in LOAD_KEYS} == {key: figures[f"fp8_{key}"] for key in LOAD_KEYS}
