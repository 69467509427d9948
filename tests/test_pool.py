"""The LoRA pools: budgets, what is dropped, and strengths that change without preparing anything anew."""

import os
import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import accel.lora.hold.library
import accel.memory.budgets
from accel.checkpoint import inspect_checkpoint
from accel.engine import Engine
from accel.errors import LoraError
from accel.families.flux1 import Flux1Inputs
from accel.lora.hold.device import DeviceLoras, Prepared
from accel.lora.hold.slots import LoraSlots
from accel.lora.pack.flat import FlatLora, flatten
from accel.lora.pack.strength import UnscaledB
from accel.lora.pack.truncate import truncate
from accel.lora.read.file import read_lora
from accel.lora.stack import LoraStack
from accel.memory.budgets import GIB, MIB, PoolBudgets, available_host_bytes, pinned_bytes
from accel.memory.buffers import HostBuffers
from accel.prefetch import Prefetcher, WantedLora
from accel.settings import EngineSettings
from harness.lora_files import in_attention, kind_state_dict, write_lora
from harness.tensor_files import write_tensors

CHECKPOINT = "diffusion_models/tiny-flux-dev-fp32.safetensors"
STRENGTH = st.floats(-4.0, 4.0, width=32).filter(bool)
KINDS = {
    "kohya": {"format": "kohya", "rank": 7, "alpha": 3.0},
    "diffusers": {"format": "diffusers", "rank": 16, "seed": 1},
    "native": {"format": "native", "rank": 5, "seed": 2, "alpha": 2.0},
    "attention": {"format": "kohya", "rank": 4, "targets": in_attention, "seed": 3},
    "half": {"format": "diffusers", "rank": 8, "dtype": torch.float16, "seed": 4},
    "bf16": {"format": "kohya", "rank": 12, "alpha": 5.0, "dtype": torch.bfloat16, "seed": 5},
    "fp32": {"format": "kohya", "rank": 12, "alpha": 5.0, "dtype": torch.float32, "seed": 6},
}
# Kronecker products: in every linear, and in those inside some blocks, whose files have other sizes and dtypes.
KRONECKERS = {
    "lokr": {"format": "native", "alpha": 3.0, "dtype": torch.bfloat16, "seed": 7},
    "lokr split": {"format": "diffusers", "targets": in_attention, "dtype": torch.float16, "seed": 8},
}


@pytest.fixture(scope="module")
def spec(models):
    return inspect_checkpoint(str(models / CHECKPOINT))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    kroneckers = {name: kind_state_dict("LoKr full", **kind) for name, kind in KRONECKERS.items()}
    return {
        **{name: str(write_lora(folder / f"{name}.safetensors", **kind)) for name, kind in KINDS.items()},
        **{name: str(write_tensors(folder / f"{name}.safetensors", kind)) for name, kind in kroneckers.items()},
    }


@pytest.fixture(scope="module")
def loras(spec, paths):
    return {name: read_lora(path, spec) for name, path in paths.items()}


def stack_of(loras, *entries):
    stack = LoraStack()
    for name, strength in entries:
        stack = stack.with_lora(loras[name], strength)
    return stack


def make_engine(spec, pools=None):
    engine = Engine(spec, EngineSettings(compile="off"), pools=pools)
    engine.load()
    return engine


def output(engine):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    one = torch.ones(1)
    return engine(Flux1Inputs(normal(1, 16, 4, 4), 0.7 * one, normal(1, 8, 768), normal(1, 768), 3.5 * one))


class UsedBuffers(HostBuffers):
    """Memory that others have written to: every byte is set, which is NaN in every dtype."""

    def take(self, size):
        return super().take(size).fill_(255)


# Strengths.


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from([*KINDS, *KRONECKERS]), min_size=1, max_size=3),
    strengths=st.lists(st.tuples(STRENGTH, STRENGTH), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_another_strength_is_bit_for_bit_what_flatten_gives(loras, names, strengths, dtype):
    first = stack_of(loras, *((name, pair[0]) for name, pair in zip(names, strengths, strict=False)))
    second = stack_of(loras, *((name, pair[1]) for name, pair in zip(names, strengths, strict=False)))
    used = UsedBuffers(0)
    flat, expected = (flatten(stack.active, dtype, pin=False, buffers=used) for stack in (first, second))
    assert expected.buffer.isfinite().all()
    UnscaledB(first.active, flat, buffers=used).multiply(second.active, flat)
    assert (flat.placed, flat.kroneckers) == (expected.placed, expected.kroneckers)
    assert torch.equal(flat.buffer, expected.buffer)


@pytest.mark.parametrize("on_device", [False, True], ids=["on the CPU", "with a device of its own"])
def test_kronecker_products_are_pooled_as_loras_are(spec, loras, on_device):
    """Every way to the device; layouts that alternate in one buffer; strengths of both at once."""
    engine = make_engine(spec)
    if on_device:
        engine.library._loras = DeviceLoras(engine.assembled.slots, torch.device("cpu"), 0, share_host=False)
    empty = output(engine)
    stacks = [
        stack_of(loras, ("lokr", 0.8)),
        stack_of(loras, ("lokr", -0.3)),
        stack_of(loras, ("lokr split", 0.5), ("kohya", 0.4), ("lokr", 0.6)),
        stack_of(loras, ("lokr split", 0.9), ("kohya", -0.4), ("lokr", 0.1)),
        stack_of(loras, ("kohya", 0.7)),
        stack_of(loras, ("lokr", 0.8)),
        stack_of(loras, ("lokr", 0.8), ("lokr", -0.3)),
    ]
    sources = []
    for stack in stacks:
        report = engine.swap(stack)
        sources.append(report.source)
        fresh = make_engine(spec)
        fresh.swap(stack)
        drawn = output(engine)
        assert torch.equal(drawn, output(fresh))
        assert float((drawn - empty).norm() / empty.norm()) > 0.01
        assert report.bytes >= engine.library.prepare(stack)[0].flat.bytes
    found = sources[5] if on_device else "strength"
    assert sources == ["cold", "strength", "cold", "strength", "cold", found, "cold"]
    assert found in ("warm", "strength")
    engine.swap(LoraStack())
    assert torch.equal(output(engine), empty)


def test_left_matrices_of_a_file_are_one_stretch(loras):
    stack = stack_of(loras, ("lokr split", 1.0))
    flat = flatten(stack.active, torch.float32, pin=False)
    assert not flat.placed
    assert len(UnscaledB(stack.active, flat)._runs) == 1


def test_lora_B_of_a_file_of_one_rank_is_one_stretch(loras):
    """So that another strength is one product; lora_A is never written."""
    stack = stack_of(loras, ("diffusers", 1.0))
    flat = flatten(stack.active, torch.float32, pin=False)
    assert len(UnscaledB(stack.active, flat)._runs) == 1


def test_another_strength_flattens_nothing_and_keeps_the_parameters(spec, loras, monkeypatch):
    engine, bindings = make_engine(spec), []
    bind = LoraSlots.bind
    monkeypatch.setattr(LoraSlots, "bind", lambda self, made: (bindings.append(made), bind(self, made)))
    engine.swap(stack_of(loras, ("kohya", 0.8), ("bf16", 0.3)))
    monkeypatch.setattr(accel.lora.hold.library, "flatten", None)
    assert engine.swap(stack_of(loras, ("kohya", -0.4), ("bf16", 0.7))).source == "strength"
    assert bindings[0] is bindings[1]
    after = output(engine)
    monkeypatch.undo()
    fresh = make_engine(spec)
    fresh.swap(stack_of(loras, ("kohya", -0.4), ("bf16", 0.7)))
    assert torch.equal(after, output(fresh))


def test_a_stack_that_was_prepared_at_another_strength_comes_from_the_host_right(spec, loras):
    """With a device of its own, the host's buffer keeps its strengths and the device's gets others."""
    engine = make_engine(spec)
    shared, engine.library._loras = engine.library._loras, None
    engine.library._loras = DeviceLoras(engine.assembled.slots, torch.device("cpu"), 0, share_host=False)
    assert shared is not engine.library._loras
    for strength, source in ((0.5, "cold"), (0.7, "strength"), (0.5, "strength")):
        assert engine.swap(stack_of(loras, ("kohya", strength))).source == source
    engine.swap(stack_of(loras, ("bf16", 1.0)))
    engine.swap(stack_of(loras, ("fp32", 1.0)))
    assert engine.swap(stack_of(loras, ("kohya", 0.7))).source == "warm"
    fresh = make_engine(spec)
    fresh.swap(stack_of(loras, ("kohya", 0.7)))
    assert torch.equal(output(engine), output(fresh))


@pytest.mark.parametrize("name", ["kohya", "lokr"])
def test_a_strength_that_overflows_is_refused_before_anything_changes(spec, loras, name):
    engine = make_engine(spec)
    good, bad = stack_of(loras, (name, 0.8)), stack_of(loras, (name, 1e39))
    engine.swap(good)
    before = output(engine)
    with pytest.raises(LoraError, match=rf"{name}\.safetensors' × 1e\+39 overflows"):
        engine.swap(bad)
    assert engine.applied(good)
    assert torch.equal(output(engine), before)


@pytest.mark.parametrize("kind", ["DoRA", "GLoRA", "OFT", "bias"])
def test_what_strength_changes_beyond_lora_B_is_flattened_anew(tmp_path, spec, kind):
    """A mixing matrix, replaced vectors, or a lora_B that depends on the weight so far; also on top of another LoRA."""
    path = write_tensors(tmp_path / "kind.safetensors", kind_state_dict(kind, rms=0.01))
    before = write_lora(tmp_path / "before.safetensors", "kohya", rank=4)
    engine, files = make_engine(spec), {"kind": read_lora(str(path), spec), "before": read_lora(str(before), spec)}
    for entries in ((("kind", 1.0),), (("before", 0.8), ("kind", 0.6))):
        stacks = [stack_of(files, *((name, factor * own) for name, own in entries)) for factor in (0.5, 0.7, 0.5)]
        assert [engine.swap(stack).source for stack in stacks] == ["cold", "cold", "hot"]
        fresh = make_engine(spec)
        fresh.swap(stacks[0])
        assert torch.equal(output(engine), output(fresh))


def test_the_values_of_one_layout_are_not_written_into_another(spec, paths):
    """The same file twice, read once or read twice: one stack, one key, and two layouts of the buffer."""
    engine = make_engine(spec, PoolBudgets(1000, 1000, 1000))
    once = engine.read_lora(paths["lokr"])

    def drawn(*entries):
        stack = LoraStack()
        for weights, strength in entries:
            stack = stack.with_lora(weights, strength)
        engine.swap(stack)
        fresh = make_engine(spec)
        fresh.swap(stack)
        return torch.equal(output(engine), output(fresh))

    assert drawn((once, 1.0), (once, 1.0))
    assert drawn((once, 0.5), (once, 0.25))
    for name in ("kohya", "fp32"):  # pools of this size drop the LoKr
        engine.swap(LoraStack().with_lora(engine.read_lora(paths[name]), 1.0))
    again = engine.read_lora(paths["lokr"])
    assert again is not once
    assert drawn((once, 1.0), (again, 1.0))
    assert drawn((once, 0.5), (again, 0.25))
    assert drawn((once, 0.7), (again, 0.7))


def test_what_is_in_use_when_all_is_given_back_is_not_kept_later():
    buffers = HostBuffers(GIB)
    held = buffers.take(2**23)
    buffers.clear()
    del held
    assert buffers.free_bytes == 0
    buffers.take(2**23)
    assert buffers.free_bytes == 2**23


# Stacks that are cut to a rank.


def test_a_cut_stack_reports_the_error_of_its_truncation(spec, loras):
    engine, stack = make_engine(spec), stack_of(loras, ("kohya", 0.8), ("bf16", 0.6)).with_max_rank(6)
    order = tuple(part.module for linear in spec.layout.linears for part in linear.parts)
    cut = truncate(flatten(stack.active, torch.float32, pin=False, order=order), 6)
    report = engine.swap(stack)
    assert 0.0 < report.error < 1.0
    assert report.error == cut.overall_error
    assert engine.swap(stack).source == "unchanged"
    assert report.bytes == cut.flat.bytes


def test_kronecker_products_are_not_cut(spec, loras):
    """Beside low-rank matrices that are, and alone, whatever rank they have."""
    stack = stack_of(loras, ("lokr", 0.8), ("kohya", 0.6), ("lokr split", 0.5))
    flat = flatten(stack.active, torch.float32, pin=False)
    cut = truncate(flat, 3)
    alone = flatten(stack_of(loras, ("kohya", 0.6)).active, torch.float32, pin=False)
    assert (cut.max_error, cut.overall_error) == (truncate(alone, 3).max_error, truncate(alone, 3).overall_error)
    assert cut.flat.kroneckers == flat.kroneckers
    first = min(place.a_start for place in flat.placed.values())
    assert torch.equal(cut.flat.buffer[:first], flat.buffer[:first])
    engine, lokr = make_engine(spec), stack_of(loras, ("lokr", 0.8))
    engine.swap(lokr)
    exact = output(engine)
    assert engine.swap(lokr.with_max_rank(1)).error == 0.0
    assert torch.equal(output(engine), exact)


def test_another_strength_of_a_cut_stack_is_cut_anew(spec, loras):
    """Which singular values are the largest depends on the strengths."""
    engine, fresh = make_engine(spec), make_engine(spec)
    reports = [
        engine.swap(stack_of(loras, ("kohya", 0.8), ("bf16", strength)).with_max_rank(6))
        for strength in (0.1, 3.0, 0.1)
    ]
    assert [report.source for report in reports] == ["cold", "cold", "hot"]
    assert reports[0].error == reports[2].error != reports[1].error
    fresh.swap(stack_of(loras, ("kohya", 0.8), ("bf16", 0.1)).with_max_rank(6))
    assert torch.equal(output(engine), output(fresh))


def test_a_max_rank_above_the_summed_rank_changes_no_bit(spec, loras):
    engine, stack = make_engine(spec), stack_of(loras, ("kohya", 0.8), ("bf16", 0.6))
    engine.swap(stack)
    exact = output(engine)
    engine.swap(LoraStack())
    report = engine.swap(stack.with_max_rank(stack.cost.max_rank + 13))
    assert report.source == "cold"
    assert report.error == 0.0
    assert torch.equal(output(engine), exact)
    engine.swap(stack.with_max_rank(6))
    assert not torch.equal(output(engine), exact)


def test_lora_A_of_linears_that_read_the_same_input_adjoin(spec, loras):
    """In a diffusers file, whose keys come in another order: one product then serves q, k, v (and the MLP)."""
    engine, stack = make_engine(spec), stack_of(loras, ("diffusers", 1.0))
    engine.swap(stack)
    placed = engine.library.prepare(stack)[0].flat.placed
    groups = {
        "transformer_blocks.0.attn": ("to_q", "to_k", "to_v"),
        "transformer_blocks.1.attn": ("add_q_proj", "add_k_proj", "add_v_proj"),
        "single_transformer_blocks.1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    }
    for block, names in groups.items():
        places = [placed[f"{block}.{name}"] for name in names]
        for place, following in pairwise(places):
            assert following.a_start == place.a_start + place.a_shape[0] * place.a_shape[1]
    alphabetical = flatten(stack.active, torch.float32, pin=False).placed
    single = "single_transformer_blocks.1"
    assert alphabetical[f"{single}.attn.to_k"].a_start < alphabetical[f"{single}.attn.to_q"].a_start


def test_linears_that_an_order_does_not_name_come_behind_it(loras):
    active = stack_of(loras, ("kohya", 1.0), ("attention", 0.5)).active
    free = flatten(active, torch.float32, pin=False)
    order = [*reversed(free.placed)][:3]
    ordered = flatten(active, torch.float32, pin=False, order=["of another model", *order])
    assert list(ordered.placed) == [*order, *(module for module in free.placed if module not in order)]
    assert ordered.buffer.abs().sum() == pytest.approx(float(free.buffer.abs().sum()))


# What is kept.


def test_a_changed_file_drops_what_was_made_of_the_old_one(spec, tmp_path):
    engine = make_engine(spec)
    path = write_lora(tmp_path / "changing.safetensors", "kohya", rank=4, seed=1)
    old = LoraStack().with_lora(engine.read_lora(str(path)), 1.0)
    engine.swap(old)
    assert engine.library.prepared(old)
    write_lora(path, "kohya", rank=4, seed=2)
    os.utime(path, ns=(1, 1))
    new = LoraStack().with_lora(engine.read_lora(str(path)), 1.0)
    assert not engine.library.prepared(old)
    assert engine.swap(new).source == "cold"
    fresh = make_engine(spec)
    fresh.swap(new)
    assert torch.equal(output(engine), output(fresh))


def test_the_host_pool_holds_what_its_budget_allows(spec, loras):
    size = flatten(stack_of(loras, ("kohya", 1.0)).active, torch.float32, pin=False).bytes
    engine = make_engine(spec, PoolBudgets(10 * MIB, 2 * size, 0))
    stacks = [stack_of(loras, ("kohya", 1.0)), stack_of(loras, ("native", 1.0)), stack_of(loras, ("diffusers", 1.0))]
    for stack in stacks:
        engine.swap(stack)
        assert engine.library.host_bytes <= 2 * size
    assert [engine.library.prepared(stack) for stack in stacks] == [False, False, True]
    assert engine.swap(stacks[0]).source == "cold"


def test_release_gives_everything_back(spec, loras):
    engine = make_engine(spec)
    stack = stack_of(loras, ("kohya", 1.0))
    engine.swap(stack)
    engine.swap(stack_of(loras, ("kohya", 0.5)))
    library = engine.library
    assert min(library.host_bytes, library.pools["other strengths"][0]) > 0
    engine.release()
    assert {name: used for name, (used, _) in library.pools.items()} == {"files": 0, "prepared": 0}


# Prefetch, as far as the engine goes.


def test_prefetch_leaves_only_the_binding_and_changes_nothing_bound(spec, loras):
    engine = make_engine(spec)
    now, later = stack_of(loras, ("kohya", 0.8)), stack_of(loras, ("bf16", 0.6), ("half", 0.2))
    engine.swap(now)
    before = output(engine)
    engine.prefetch(later)
    assert engine.applied(now)
    assert torch.equal(output(engine), before)
    assert engine.swap(later).source == "hot"


def test_prefetch_reads_once_what_there_is_no_room_for(spec, paths, monkeypatch):
    """It looks at the queue four times a second while a prompt samples."""
    engine, reads, looks = make_engine(spec, PoolBudgets(1000, 1000, 1000)), [], threading.Semaphore(0)
    read_lora = engine.read_lora
    monkeypatch.setattr(engine, "read_lora", lambda path: reads.append(path) or read_lora(path))
    engine.swap(LoraStack().with_lora(read_lora(paths["bf16"]), 1.0))
    stack = tuple(WantedLora(paths[name], 0.5) for name in ("kohya", "fp32"))
    prefetcher = Prefetcher(engine, lambda: looks.release() or [stack], poll_s=0.0)
    prefetcher.start()
    try:
        assert all(looks.acquire(timeout=30) for _ in range(20))
    finally:
        prefetcher.stop()
        prefetcher.join(30)
    assert reads == [paths["kohya"], paths["fp32"]]


def test_prefetch_of_another_strength_of_what_is_bound_does_not_touch_it(spec, loras):
    engine = make_engine(spec)
    engine.swap(stack_of(loras, ("kohya", 0.8)))
    before = output(engine)
    engine.prefetch(stack_of(loras, ("kohya", 0.3)))
    assert torch.equal(output(engine), before)


def test_prefetch_does_not_push_others_off_the_device(spec, loras):
    size = flatten(stack_of(loras, ("kohya", 1.0)).active, torch.float32, pin=False).bytes
    engine = make_engine(spec, PoolBudgets(10 * MIB, 10 * MIB, size))
    now, later = stack_of(loras, ("kohya", 0.8)), stack_of(loras, ("native", 0.6))
    engine.swap(now)
    engine.prefetch(later)
    assert engine.swap(now).source == "unchanged"
    assert engine.swap(LoraStack()).source == engine.swap(now).source == "hot"
    assert engine.swap(later).source == "warm"


def test_prefetch_before_loading_prepares_on_the_host(spec, loras):
    engine = Engine(spec, EngineSettings(compile="off"))
    engine.prefetch(stack_of(loras, ("kohya", 0.8)))
    engine.load()
    assert engine.swap(stack_of(loras, ("kohya", 0.8))).source == "warm"


# Budgets.


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (0, PoolBudgets(256 * MIB, 512 * MIB, 512 * MIB)),
        (16 * GIB, PoolBudgets(1 * GIB, 2 * GIB, 2 * GIB)),
        (1024 * GIB, PoolBudgets(4 * GIB, 16 * GIB, 16 * GIB)),
    ],
)
def test_budgets_follow_the_free_memory(monkeypatch, free, expected):
    monkeypatch.setattr(accel.memory.budgets, "available_host_bytes", lambda: free)
    assert PoolBudgets.of_free_memory(torch.device("cpu")) == expected


def test_the_device_budget_follows_its_own_memory(monkeypatch):
    monkeypatch.setattr(accel.memory.budgets, "available_host_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(accel.memory.budgets, "free_device_bytes", lambda device: 10 * GIB)
    assert PoolBudgets.of_free_memory(torch.device("cuda"), 2 * GIB) == PoolBudgets(1 * GIB, 2 * GIB, 1 * GIB)


def test_a_container_with_little_memory_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(accel.memory.budgets, "CGROUP", tmp_path)
    whole = available_host_bytes()
    assert whole > GIB
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("1000\n", encoding="ascii")
    assert available_host_bytes() > GIB
    (tmp_path / "memory.max").write_text("51000\n", encoding="ascii")
    assert available_host_bytes() == 50000


def test_pinned_memory_is_counted_as_torch_takes_it():
    assert [pinned_bytes(size) for size in (1, 4096, 4097, 172 * 10**6)] == [1, 4096, 8192, 2**28]


def test_a_buffer_is_used_again_only_where_it_is_large_enough():
    """A stack with large vectors beside a small buffer makes room for one with a larger buffer."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 96)).requires_grad_(False)
    slots = LoraSlots(model, ["0"], torch.device("cpu"))
    slots.bind(slots.empty)
    loras = DeviceLoras(slots, torch.device("cpu"), 0, share_host=False)
    loras.upload("first", Prepared(FlatLora(torch.zeros(64), {}, {}, {"0.bias": torch.zeros(96)})))
    larger = FlatLora(torch.arange(128.0), {})
    loras.upload("second", Prepared(larger))
    assert torch.equal(loras.get("second").flat.buffer[:128], larger.buffer)
