"""The step cache: when it skips, what it adds then, and everything that makes it compute."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from accel.checkpoint import inspect_checkpoint
from accel.engine import Engine
from accel.errors import SettingsError
from accel.families.flux1 import Flux1Inputs
from accel.families.streams.inputs import Hooks, Residuals
from accel.lora.stack import LoraStack
from accel.settings import EngineSettings, Quantization
from accel.step_cache import StepCache, StepCacheSettings
from harness.lora_files import write_lora

CHECKPOINT = "diffusion_models/tiny-flux-dev-fp32.safetensors"
SHAPE = (2, 6, 8)  # batch, image tokens, hidden
ALWAYS = StepCacheSettings(1e9)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sigma(value: float, batch: int = 1) -> Tensor:
    return torch.full((batch,), value)


# The cache alone, on residuals that are made for it.

EMBEDDED, FIRST = normal(1, *SHAPE), normal(2, *SHAPE)


def ask(cache, level, change=0.0, rest=None, kind=(), state=(), structure=(), first=FIRST, step=None):
    """One call whose first block adds `first`, up to a relative change. Returns what the cache adds, or None."""
    call = cache.call(sigma(level) if step is None else step, kind, state)
    after = EMBEDDED + first * (1.0 + change)
    skipped = call.skip(EMBEDDED, after, structure)
    if skipped is None:
        call.keep(after + (torch.zeros(SHAPE) if rest is None else rest))
        return None
    return skipped - after


def decisions(settings, calls, **arguments):
    cache = StepCache(settings, **arguments)
    return "".join("c" if ask(cache, *call) is None else "s" for call in calls), cache


def test_the_difference_from_the_last_computed_step_decides():
    levels = [1.0 - 0.1 * index for index in range(8)]
    # Each step changes by 3 %: three of them are skipped, the fourth is 12 % away from the computed one.
    path, cache = decisions(StepCacheSettings(0.1), [(level, 0.03 * index) for index, level in enumerate(levels)])
    assert path == "cssscsss"
    assert (cache.calls, cache.skipped, str(cache)) == (8, 6, "6 of 8 skipped")
    assert decisions(StepCacheSettings(0.02), [(level, 0.03 * i) for i, level in enumerate(levels)])[0] == "c" * 8
    assert decisions(StepCacheSettings(0.0), [(level, 0.0) for level in levels])[0] == "c" * 8


def test_a_row_of_skips_has_an_end():
    calls = [(1.0 - 0.1 * index,) for index in range(9)]
    assert decisions(StepCacheSettings(0.1, max_skips=2), calls)[0] == "csscsscss"
    assert decisions(StepCacheSettings(0.1), calls)[0] == "cssssssss"


def test_only_within_the_range():
    calls = [(level,) for level in (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)]
    path, _ = decisions(StepCacheSettings(0.1), calls, start_sigma=0.8, end_sigma=0.3)
    assert path == "ccsssc"


def test_what_is_added_lies_on_the_line_through_the_last_two_computed_steps():
    cache = StepCache(StepCacheSettings(0.1))
    older, newer = normal(3, *SHAPE), normal(4, *SHAPE)
    assert ask(cache, 1.0, rest=older) is None
    torch.testing.assert_close(ask(cache, 0.95), older)  # one step known: its own
    assert ask(cache, 0.9, 0.5, rest=newer) is None
    torch.testing.assert_close(ask(cache, 0.85, 0.5), newer + 0.5 * (newer - older))
    torch.testing.assert_close(ask(cache, 0.7, 0.5), newer + 2.0 * (newer - older))


def test_two_computed_steps_at_one_noise_level_have_no_line():
    cache = StepCache(StepCacheSettings(0.1))
    newer = normal(4, *SHAPE)
    assert ask(cache, 0.9, rest=normal(3, *SHAPE)) is None
    assert ask(cache, 0.9, 0.5, rest=newer) is None
    torch.testing.assert_close(ask(cache, 0.8, 0.5), newer)


def test_the_worst_picture_of_a_batch_decides():
    cache = StepCache(StepCacheSettings(0.1))
    one_moves = torch.stack([FIRST[0], FIRST[1] * 1.15])
    assert ask(cache, 1.0) is None
    assert (FIRST - one_moves).norm(1) / FIRST.norm(1) < 0.1
    assert ask(cache, 0.9, first=one_moves) is None


@pytest.mark.parametrize("first", [torch.zeros(SHAPE), torch.full(SHAPE, torch.nan)], ids=["nothing", "NaN"])
def test_what_cannot_be_compared_is_computed(first):
    cache = StepCache(ALWAYS)
    assert ask(cache, 1.0, first=first) is None
    assert ask(cache, 0.9, first=first) is None


def test_kinds_of_calls_are_remembered_apart():
    cache = StepCache(StepCacheSettings(0.1))
    rests = {"cond": normal(5, *SHAPE), "uncond": normal(6, *SHAPE)}
    for level in (1.0, 0.9, 0.8):
        step = sigma(level)
        for kind, first in (("cond", FIRST), ("uncond", -FIRST)):
            added = ask(cache, level, kind=kind, first=first, rest=rests[kind], step=step)
            if level < 1.0:
                torch.testing.assert_close(added, rests[kind])
    assert str(cache) == "4 of 6 skipped"


def test_calls_of_one_step_are_computed_together():
    cache = StepCache(StepCacheSettings(0.1))
    path = ""
    for level, change in ((1.0, 0.0), (0.9, 0.0), (0.8, 0.5), (0.7, 0.5)):
        step = sigma(level)
        for kind, by in (("cond", change), ("uncond", 0.0)):  # uncond never moves
            path += "c" if ask(cache, level, by, kind=kind, step=step) is None else "s"
    assert path == "cc" "ss" "cc" "ss"


@pytest.mark.parametrize("change", ["state", "structure"])
def test_another_state_is_computed_once_and_then_the_reference(change):
    cache = StepCache(ALWAYS)
    path = ""
    for level, value in ((1.0, 1), (0.9, 1), (0.8, 2), (0.7, 2), (0.6, 1)):
        path += "c" if ask(cache, level, **{change: value}) is None else "s"
    assert path == "cscsc"


def test_an_interrupted_call_leaves_what_was_known():
    cache = StepCache(StepCacheSettings(0.1))
    rest = normal(5, *SHAPE)
    ask(cache, 1.0, rest=rest)
    assert cache.call(sigma(0.9)).skip(EMBEDDED, EMBEDDED + 2 * FIRST, ()) is None  # and `keep` is never called
    torch.testing.assert_close(ask(cache, 0.8), rest)


class Reads(TorchDispatchMode):
    """Counts what is read from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_one_scalar_is_read_where_there_is_a_choice_and_none_elsewhere():
    def reads(cache, *arguments, **options):
        with Reads() as mode:
            ask(cache, *arguments, **options)
        return mode.count

    cache = StepCache(StepCacheSettings(0.1, max_skips=1), start_sigma=0.95, end_sigma=0.05)
    assert reads(cache, 1.0) == 0  # nothing is known
    assert reads(cache, 0.9) == 1  # skipped
    assert reads(cache, 0.8) == 0  # one in a row is enough
    assert reads(cache, 0.7, 0.9) == 1  # computed
    assert reads(cache, 0.6, 0.9, state="other") == 0
    step = sigma(0.5)
    assert reads(cache, 0.5, 0.1, state="other", step=step) == 1
    assert reads(cache, 0.5, 0.1, state="other", step=step, kind="uncond") == 0  # the step is being computed
    assert reads(StepCache(StepCacheSettings(0.0)), 1.0) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-0.1,), "threshold is -0.1, expected 0"),
        ((float("nan"),), "threshold is nan"),
        ((float("inf"),), "threshold is inf"),
        ((0.1, 0.6, 0.2), "start_percent is 0.6 and end_percent is 0.2"),
        ((0.1, 0.0, 1.5), "end_percent is 1.5"),
        ((0.1, 0.0, 1.0, -1), "max_skips is -1"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        StepCacheSettings(*values)


# In the transformer.


def make_inputs(batch: int = 1, side: int = 16, text: int = 77, seed: int = 0, **others) -> Flux1Inputs:
    return Flux1Inputs(
        latent=normal(seed, batch, 16, side, side),
        timestep=torch.full((batch,), 0.7367),
        encoder_hidden_states=normal(seed + 1, batch, text, 768),
        pooled_projections=normal(seed + 2, batch, 768),
        guidance=torch.full((batch,), 3.5),
        **others,
    )


def moved(inputs: Flux1Inputs, by: float, level: float) -> Flux1Inputs:
    """The same picture a step later."""
    noise = normal(99, *inputs.latent.shape)
    return replace(inputs, latent=inputs.latent + by * noise, timestep=torch.full_like(inputs.timestep, level))


def load(models, **settings) -> Engine:
    engine = Engine(inspect_checkpoint(str(models / CHECKPOINT)), EngineSettings(**settings))
    engine.load()
    return engine


@pytest.fixture(scope="module")
def eager(models):
    return load(models, compile="off")


@pytest.fixture(scope="module")
def compiled(models):
    engine = load(models, compile="regional")
    engine(make_inputs())
    return engine


def run(engine, inputs, cache, **call):
    """The output, and whether the cache skipped."""
    before = cache.skipped
    output = engine(replace(inputs, step_cache=cache.call(inputs.timestep, state=engine.bound, **call)))
    return output, cache.skipped > before


def test_threshold_0_is_bit_for_bit_no_cache(eager):
    steps = [moved(make_inputs(), 0.01 * index, 1.0 - 0.1 * index) for index in range(5)]
    for threshold in (0.0, 1e-12):  # the second one compares, and remembers
        cache = StepCache(StepCacheSettings(threshold))
        for inputs in steps:
            output, skipped = run(eager, inputs, cache)
            assert not skipped
            assert torch.equal(output, eager(inputs))
    assert cache.calls == len(steps)


@pytest.mark.parametrize("others", [{}, {"references": [normal(50, 1, 16, 8, 12)]}], ids=["plain", "with a reference"])
def test_a_skipped_step_runs_the_first_block_and_adds_the_rest_of_the_last_one(eager, monkeypatch, others):
    ran, firsts, finals = [], [], []
    regions = eager._forward._regions

    def run_double(*arguments):
        out = regions.double(*arguments)
        firsts.extend([out[0][:, :64].clone()] if ran.count("double") % 2 == 0 else [])
        ran.append("double")
        return out

    def run_single(*arguments):
        ran.append("single")
        return regions.single(*arguments)

    watched = replace(regions, double=run_double, single=run_single)
    monkeypatch.setattr(eager._forward, "_regions", watched)
    norm_out = eager.assembled.model.norm_out
    monkeypatch.setattr(
        norm_out, "forward",
        lambda tokens, temb, f=norm_out.forward: (finals.append(tokens.clone()), f(tokens, temb))[1],
    )
    start, cache = make_inputs(**others), StepCache(ALWAYS)
    computed, skipped = run(eager, start, cache)
    assert (skipped, ran) == (False, ["double", "double", "single", "single"])
    output, skipped = run(eager, moved(start, 0.02, 0.72), cache)
    assert (skipped, ran[4:]) == (True, ["double"])
    assert output.shape == computed.shape
    assert finals[1].shape == firsts[1].shape
    assert torch.equal(finals[1], firsts[1] + (finals[0] - firsts[0]))
    assert not torch.equal(firsts[0], firsts[1])


def test_the_same_step_again_is_the_same_picture(eager):
    cache, inputs = StepCache(ALWAYS), make_inputs()
    computed, _ = run(eager, inputs, cache)
    again, skipped = run(eager, replace(inputs, timestep=inputs.timestep.clone()), cache)
    assert skipped
    torch.testing.assert_close(again, computed, rtol=1e-4, atol=1e-4)


RESIDUAL = 0.1 * normal(60, 1, 64, 256)
CHANGES = {
    "size": {"side": 20},
    "prompt length": {"text": 90},
    "batch": {"batch": 2},
    "a ControlNet sets in": {"residuals": Residuals(double=[RESIDUAL])},
    "a ControlNet at another block": {"residuals": Residuals(single=[None, RESIDUAL])},
    "a reference": {"references": [normal(50, 1, 16, 8, 12)]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_inputs_is_computed(eager, change):
    cache = StepCache(ALWAYS)
    run(eager, make_inputs(), cache)
    for inputs, expected in ((make_inputs(**change), False), (make_inputs(**change), True), (make_inputs(), False)):
        output, skipped = run(eager, inputs, cache)
        assert skipped == expected
        if not skipped:
            assert torch.equal(output, eager(inputs))


def test_patched_blocks_run_in_every_step(eager):
    seen = []

    def patch(state, run_block):
        seen.append(state.hidden_states.shape)
        return run_block(state)

    cache = StepCache(ALWAYS)
    inputs = make_inputs(hooks=Hooks(around_block={("single", 1): patch}))
    for _ in range(3):
        output, skipped = run(eager, replace(inputs, timestep=inputs.timestep.clone()), cache)
        assert not skipped
        assert torch.equal(output, eager(replace(inputs, hooks=Hooks())))
    assert len(seen) == 3


def test_other_loras_are_computed(eager, tmp_path):
    path = write_lora(tmp_path / "lora.safetensors", "kohya", rank=8, alpha=4.0)
    weights, inputs, cache = eager.read_lora(str(path)), make_inputs(), StepCache(ALWAYS)
    try:
        for strength, expected in ((1.0, False), (1.0, True), (0.5, False), (0.0, False), (0.0, True), (1.0, False)):
            eager.swap(LoraStack().with_lora(weights, strength))
            step = replace(inputs, timestep=inputs.timestep.clone())
            output, skipped = run(eager, step, cache)
            assert skipped == expected
            if not skipped:
                assert torch.equal(output, eager(step))
    finally:
        eager.swap(LoraStack())


def test_compiled_blocks_are_skipped_without_compiling(compiled, eager):
    cache = StepCache(ALWAYS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index, inputs in enumerate((make_inputs(2), moved(make_inputs(2), 0.01, 0.7), make_inputs(1, 20))):
            output, skipped = run(compiled, inputs, cache)
            assert skipped == (index == 1)
            if not skipped:
                torch.testing.assert_close(output, eager(inputs), rtol=1e-3, atol=1e-4)
    assert (compiled.compiler.count, compiled.compiler.recompiles) == (2, 0)


def test_quantized_blocks_are_skipped(models):
    engine = load(models, compile="off", quantization=Quantization("int8_weight_only"))
    cache, inputs = StepCache(ALWAYS), make_inputs()
    computed, _ = run(engine, inputs, cache)
    assert torch.equal(computed, engine(inputs))
    again, skipped = run(engine, replace(inputs, timestep=inputs.timestep.clone()), cache)
    assert skipped
    torch.testing.assert_close(again, computed, rtol=1e-3, atol=1e-3)
