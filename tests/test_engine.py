"""The engine without ComfyUI: one compiled transformer, any LoRA, no recompile, nothing lost when a swap fails."""

import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor

import accel.lora.hold.device
from accel.checkpoint import inspect_checkpoint
from accel.compile.tracing import batch_can_be_unbacked
from accel.engine import Engine
from accel.errors import EngineStateError, LoraError, SettingsError
from accel.families.flux1 import Flux1Inputs
from accel.families.streams.inputs import Residuals
from accel.lora.pack.flat import flatten
from accel.lora.stack import LoraStack
from accel.observer import Silent
from accel.settings import EngineSettings
from harness.lora_files import in_attention, write_lora

CHECKPOINT = "diffusion_models/tiny-flux-dev-fp32.safetensors"
# fp32 against the same arithmetic in another order.
TOLERANCE = 2e-5


def make_inputs(batch: int = 1, height: int = 16, width: int = 16, text: int = 77, seed: int = 0) -> Flux1Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Flux1Inputs(
        latent=normal(batch, 16, height, width),
        timestep=torch.full((batch,), 0.7367),
        encoder_hidden_states=normal(batch, text, 768),
        pooled_projections=normal(batch, 768),
        guidance=torch.full((batch,), 3.5),
    )


def distance(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def spec(models):
    return inspect_checkpoint(str(models / CHECKPOINT))


@pytest.fixture(scope="module")
def eager(spec):
    engine = Engine(spec, EngineSettings(compile="off"))
    engine.load()
    return engine


@pytest.fixture(scope="module")
def compiled(spec):
    """An engine that has done one forward of batch 1: all that warm-up is."""
    engine = Engine(spec, EngineSettings(compile="regional"))
    engine.load()
    engine(make_inputs())
    assert (engine.compiler.count, engine.compiler.recompiles) == (2, 0)
    return engine


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """LoRA files by name: ranks of each kind, alphas, a subset of layers, each format."""
    folder = tmp_path_factory.mktemp("loras")
    kinds = {
        "rank1": {"format": "kohya", "rank": 1, "alpha": 1.0},
        "rank7": {"format": "diffusers", "rank": 7},
        "rank11": {"format": "kohya", "rank": 11, "alpha": 5.0},
        "rank11b": {"format": "native", "rank": 11, "seed": 3},
        "rank13": {"format": "native", "rank": 13},
        "rank16": {"format": "diffusers", "rank": 16, "seed": 5},
        "rank128": {"format": "kohya", "rank": 128, "alpha": 64.0},
        "attention": {"format": "kohya", "rank": 8, "targets": in_attention},
        "half": {"format": "diffusers", "rank": 8, "dtype": torch.float16},
    }
    return {
        name: str(write_lora(folder / f"{name}.safetensors", options.pop("format"), **options))
        for name, options in kinds.items()
    }


def stack_of(engine: Engine, loras: dict[str, str], *entries: tuple[str, float]) -> LoraStack:
    stack = LoraStack()
    for name, strength in entries:
        stack = stack.with_lora(engine.read_lora(loras[name]), strength)
    return stack


def both(eager: Engine, compiled: Engine, loras, entries, inputs) -> tuple[Tensor, Tensor]:
    """Swap on both engines, run both; the compiled one must not compile."""
    eager.swap(stack_of(eager, loras, *entries))
    reference = eager(inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.swap(stack_of(compiled, loras, *entries))
        return compiled(inputs), reference


SWAPS = {
    "same rank 11 to 11": [[("rank11", 1.0)], [("rank11b", 1.0)]],
    "rank 7 to 13": [[("rank7", 1.0)], [("rank13", 1.0)]],
    "rank 13 to 7": [[("rank13", 1.0)], [("rank7", 1.0)]],
    "rank 1 to 128 to 16": [[("rank1", 1.0)], [("rank128", 1.0)], [("rank16", 1.0)]],
    "strengths": [[("rank11", 0.0)], [("rank11", 0.5)], [("rank11", -1.0)]],
    "two LoRAs": [[("rank7", 0.7), ("rank128", -0.4)], [("rank128", -0.4), ("rank7", 0.7)]],
    "the same file twice": [[("rank7", 0.5), ("rank7", 0.25)]],
    "a subset of layers": [[("attention", 1.0)], [("rank16", 1.0)], [("attention", 1.0)]],
    "half precision file": [[("half", 1.0)]],
}


@pytest.mark.parametrize("sequence", SWAPS.values(), ids=SWAPS)
def test_swaps_equal_eager_and_do_not_recompile(eager, compiled, loras, sequence):
    base, _ = both(eager, compiled, loras, [], make_inputs())
    for entries in sequence:
        output, reference = both(eager, compiled, loras, entries, make_inputs())
        assert distance(output, reference) < TOLERANCE
        if any(strength for _, strength in entries):
            assert distance(output, base) > 0.01
        else:
            assert torch.equal(output, base)
    back, _ = both(eager, compiled, loras, [], make_inputs())
    assert torch.equal(back, base)
    assert (compiled.compiler.count, compiled.compiler.recompiles) == (2, 0)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    ("height", "width", "text"),
    # 512 tokens of 256 channels, and 256 text tokens: sizes that equal the hidden size or one another.
    [(17, 23, 154), (32, 32, 256), (32, 64, 77), (64, 8, 128), (2, 4, 2)],
)
def test_sizes_and_batches_do_not_recompile(eager, compiled, loras, batch, height, width, text):
    if batch > 1 and not batch_can_be_unbacked():
        pytest.skip("before torch 2.11 batch 1 and larger ones are two graphs: that compiles once more")
    output, reference = both(eager, compiled, loras, [("rank7", 1.0)], make_inputs(batch, height, width, text))
    assert output.shape == (batch, 16, height, width)
    assert distance(output, reference) < TOLERANCE
    assert compiled.compiler.recompiles == 0


def test_grad_mode_of_the_caller_does_not_matter(compiled):
    inputs = make_inputs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        expected = compiled(inputs)
        with torch.inference_mode():
            assert torch.equal(compiled(inputs), expected)
        with torch.no_grad():
            assert torch.equal(compiled(inputs), expected)


def test_unload_and_reload_does_not_recompile(compiled, loras):
    inputs, stack = make_inputs(), stack_of(compiled, loras, ("rank11", 0.8))
    compiled.swap(stack)
    expected, reads = compiled(inputs), compiled.load_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.offload()
        assert not compiled.loaded
        compiled.load()
        assert compiled.load_count == reads
        assert not compiled.applied(stack)
        compiled.swap(stack)
        assert torch.equal(compiled(inputs), expected)

        compiled.release()
        with pytest.raises(EngineStateError, match="load"):
            compiled(inputs)
        with pytest.raises(EngineStateError, match="load"):
            compiled.swap(stack)
        compiled.load()
        assert compiled.load_count == reads + 1
        compiled.swap(stack)
        assert torch.equal(compiled(inputs), expected)


def test_two_engines_do_not_share_compiled_code(spec, compiled):
    inputs = make_inputs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.swap(LoraStack())
        expected = compiled(inputs)
        other = Engine(spec, EngineSettings(compile="regional"))
        other.load()
        assert torch.equal(other(inputs), expected)
        assert (other.compiler.count, other.compiler.recompiles) == (2, 0)
        del other
        assert torch.equal(compiled(inputs), expected)
    assert compiled.compiler.count == 2


@pytest.mark.slow
def test_control_ordinary_peft_recompiles(spec):
    """The same sequence of LoRAs, added the ordinary way to the same model, does recompile."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    torch.manual_seed(0)
    config = spec.config
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=config.in_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        pooled_projection_dim=config.pooled_dim,
        guidance_embeds=True,
    ).eval()
    model.requires_grad_(False)
    inputs = {
        "hidden_states": torch.randn(1, 64, 64),
        "encoder_hidden_states": torch.randn(1, 77, 768),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.randn(64, 3),
        "txt_ids": torch.zeros(77, 3),
    }
    targets = ["to_q", "to_k", "to_v", "proj_mlp"]
    with torch.inference_mode():
        model.add_adapter(LoraConfig(r=7, target_modules=targets), "first")
        model.compile_repeated_blocks(fullgraph=True, dynamic=True)
        model(**inputs)
        model.add_adapter(LoraConfig(r=13, target_modules=targets), "second")
        model.set_adapter("second")
        with (
            torch._dynamo.config.patch(error_on_recompile=True),
            pytest.raises(torch._dynamo.exc.RecompileError),
        ):
            model(**inputs)


def test_hot_warm_cold(eager, loras):
    eager.release()
    eager.load()
    first, second = (stack_of(eager, loras, (name, 1.0)) for name in ("rank7", "rank13"))
    assert eager.swap(first).source == "cold"
    assert eager.swap(first).source == "unchanged"
    assert eager.swap(second).source == "cold"
    assert eager.swap(first).source == "hot"
    assert eager.swap(LoraStack()).source == "hot"
    eager.offload()
    eager.load()
    assert eager.swap(second).source == "warm"


def test_device_buffers_are_reused_and_the_bound_one_is_not_overwritten(eager, loras):
    """Under a budget of one LoRA, alternating three of one layout copies into two buffers, and each comes out right."""
    names = ("rank11", "rank11b", "rank11")
    stacks = [stack_of(eager, loras, (name, strength)) for name, strength in zip(names, (1.0, 1.0, 0.5), strict=True)]
    inputs = make_inputs()
    expected = []
    for stack in stacks:
        eager.swap(stack)
        expected.append(eager(inputs))
    flats = [flatten(stack.active, eager.dtype, pin=False) for stack in stacks]
    slots = eager.assembled.slots
    pool = accel.lora.hold.device.DeviceLoras(slots, torch.device("cpu"), flats[0].bytes, share_host=False)
    buffers = set()
    for _ in range(3):
        for stack, flat, reference in zip(stacks, flats, expected, strict=True):
            before = pool._bound
            kept = None if before is None else pool._residents[before].flat.buffer.clone()
            pool.upload(stack.key, accel.lora.hold.device.Prepared(flat))
            if before is not None:
                assert torch.equal(pool._residents[before].flat.buffer, kept)
            pool.bind(stack.key)
            buffers.add(pool._residents[stack.key].flat.buffer.data_ptr())
            assert torch.equal(eager(inputs), reference)
    # rank11 and rank11b are of different formats, so of two layouts and sizes; reuse needs at most one more buffer.
    assert len(buffers) <= 3
    eager.swap(LoraStack())


class Boom(Exception):
    pass


FAILURES = {
    "flatten": ("accel.lora.hold.library.flatten", Boom, 0.31),
    "copy to the device": ("accel.lora.hold.device.DeviceLoras.upload", torch.OutOfMemoryError, 0.32),
    "before the binding": ("accel.lora.hold.device.DeviceLoras.bind", KeyboardInterrupt, 0.33),
}


@pytest.mark.parametrize(("target", "error", "strength"), FAILURES.values(), ids=FAILURES)
def test_a_failed_swap_leaves_the_output_bit_identical(eager, loras, monkeypatch, target, error, strength):
    eager.release()  # so that nothing finds the stack prepared
    eager.load()
    old, new = stack_of(eager, loras, ("rank7", 1.0)), stack_of(eager, loras, ("rank128", strength))
    inputs = make_inputs()
    eager.swap(old)
    expected = eager(inputs)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(error):
            eager.swap(new)
    assert torch.equal(eager(inputs), expected)
    assert not eager.applied(new)
    eager.swap(new)
    assert distance(eager(inputs), expected) > 0.01
    eager.swap(old)
    assert torch.equal(eager(inputs), expected)


def test_an_interrupt_half_way_through_the_binding_is_repaired(eager, loras):
    old, new = stack_of(eager, loras, ("rank7", 1.0)), stack_of(eager, loras, ("rank128", 0.5))
    inputs = make_inputs()
    eager.swap(old)
    expected = eager(inputs)
    slots = eager.assembled.slots._slots

    class Interrupting:
        def __setattr__(self, name, value):
            raise KeyboardInterrupt

    middle = slots[len(slots) // 2]
    slots[len(slots) // 2] = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        eager.swap(new)
    slots[len(slots) // 2] = middle
    assert not eager.applied(old)
    assert not eager.applied(new)
    eager.swap(old)
    assert torch.equal(eager(inputs), expected)


@pytest.mark.parametrize("strength", [math.inf, -math.inf, math.nan])
def test_a_strength_that_is_no_number_is_refused(eager, loras, strength):
    with pytest.raises(LoraError, match=r"rank7\.safetensors.*finite"):
        LoraStack().with_lora(eager.read_lora(loras["rank7"]), strength)


def test_a_strength_that_overflows_is_refused_and_changes_nothing(eager, loras):
    eager.swap(stack_of(eager, loras, ("rank7", 1.0)))
    expected = eager(make_inputs())
    with pytest.raises(LoraError, match=r"rank11\.safetensors.*overflows"):
        eager.swap(stack_of(eager, loras, ("rank11", 1e39)))
    assert torch.equal(eager(make_inputs()), expected)


def test_a_changed_lora_file_is_read_again(eager, tmp_path):
    path = write_lora(tmp_path / "changing.safetensors", "kohya", rank=4, seed=1)
    first = eager.read_lora(str(path))
    assert eager.read_lora(str(path)) is first
    write_lora(path, "kohya", rank=4, seed=2)
    second = eager.read_lora(str(path))
    assert second.identity != first.identity
    assert not torch.equal(second.layers[0].lora_A, first.layers[0].lora_A)


@pytest.mark.parametrize("name", ["dtype", "attention", "compile"])
def test_unknown_settings_are_refused(name):
    with pytest.raises(SettingsError, match=f"{name} is 'bogus', expected one of"):
        dataclasses.replace(EngineSettings(), **{name: "bogus"})


@pytest.mark.slow
def test_a_machine_without_a_compiler_goes_on_eagerly_and_is_told_what_to_do(spec, eager):
    from torch._inductor.utils import fresh_cache

    class Listener(Silent):
        def __init__(self):
            self.warnings = []

        def notice(self, text, warning):
            self.warnings += [text] if warning else []

    listener, inputs = Listener(), make_inputs()
    engine = Engine(spec, EngineSettings(compile="regional"), listener)
    engine.load()
    eager.swap(LoraStack())
    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert torch.equal(engine(inputs), eager(inputs))
        assert torch.equal(engine(inputs), eager(inputs))
    (warning,) = listener.warnings
    assert re.search(r"could not compile the double blocks.*goes on without.*C\+\+ compiler.*'off'", warning)
    assert engine.compiler.failure
    assert (engine.compiler.count, engine.compiler.recompiles) == (0, 0)


def test_process_wide_settings_are_left_alone(compiled):
    before = (
        torch._dynamo.config.specialize_float,
        torch._dynamo.config.recompile_limit,
        torch.fx.experimental._config.use_duck_shape,
        torch.is_grad_enabled(),
    )
    compiled(make_inputs())
    after = (
        torch._dynamo.config.specialize_float,
        torch._dynamo.config.recompile_limit,
        torch.fx.experimental._config.use_duck_shape,
        torch.is_grad_enabled(),
    )
    assert before == after == (False, before[1], True, True)


# What changes between two calls


def residuals(seed: int = 4) -> Residuals:
    """What a ControlNet adds: after the first double and the second single block of the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(1, 64, 256, generator=generator) for _ in range(2)]
    return Residuals(double=[tokens[0]], single=[None, tokens[1]])


@pytest.mark.parametrize("change", ["a ControlNet", "no guidance", "a reference picture", "no pooled text"])
def test_what_can_change_while_sampling_compiles_nothing(eager, compiled, change):
    inputs = {
        "a ControlNet": dataclasses.replace(make_inputs(), residuals=residuals()),
        "no guidance": dataclasses.replace(make_inputs(), guidance=None),
        "a reference picture": dataclasses.replace(make_inputs(), references=[make_inputs(1, 8, 12, seed=2).latent]),
        "no pooled text": dataclasses.replace(make_inputs(), pooled_projections=None),
    }[change]
    count = compiled.compiler.count
    output, reference = both(eager, compiled, {}, [], inputs)
    assert distance(output, reference) < TOLERANCE
    assert distance(reference, eager(make_inputs())) > 10 * TOLERANCE
    assert compiled.compiler.count == count


@pytest.mark.slow
def test_all_blocks_in_one_piece(spec, eager, loras):
    engine = Engine(spec, EngineSettings(compile="full"))
    engine.load()
    engine(make_inputs())
    assert (engine.compiler.count, engine.compiler.recompiles) == (1, 0)
    for entries in ([("rank1", 1.0)], [("rank128", 0.5), ("rank7", -1.0)], []):
        for inputs in (make_inputs(), make_inputs(2 if batch_can_be_unbacked() else 1, 12, 20, 33)):
            output, reference = both(eager, engine, loras, entries, inputs)
            assert distance(output, reference) < TOLERANCE
    assert (engine.compiler.count, engine.compiler.recompiles) == (1, 0)
    # Something between the blocks: the block types are compiled after all, once.
    inputs = dataclasses.replace(make_inputs(), residuals=residuals())
    for _ in range(2):
        assert distance(engine(inputs), eager(inputs)) < TOLERANCE
    assert (engine.compiler.count, engine.compiler.recompiles) == (3, 0)
