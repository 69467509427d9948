"""Weights in oneDNN's order: the same numbers bit for bit, in the same compiled code, and never where they must move.

On a CPU that does not multiply bfloat16 nothing is packed; then the first test alone says so.
"""

import dataclasses

import pytest
import torch
from torch import nn

import accel.offload.group
from accel.checkpoint import inspect_checkpoint
from accel.compile.cache import CompileCache
from accel.engine import Engine
from accel.families.flux1 import Flux1Inputs
from accel.linear import packed
from accel.lora.stack import LoraStack
from accel.offload.plan import OffloadPlan
from accel.settings import EngineSettings
from harness.lora_files import kind_state_dict, write_lora
from harness.tensor_files import write_tensors

CPU, BF16 = torch.device("cpu"), torch.bfloat16
CHECKPOINT = "diffusion_models/tiny-flux-dev-bf16.safetensors"
needs_bf16 = pytest.mark.skipif(not packed.packs(CPU, BF16), reason="this CPU does not multiply bfloat16")


def test_what_is_packed(monkeypatch):
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert packed.packs(CPU, BF16) == supported
    assert not packed.packs(CPU, torch.float32)
    assert not packed.packs(CPU, torch.float16)
    assert not packed.packs(torch.device("cuda"), BF16)


@pytest.mark.parametrize("flaw", ["gone", "wrong"])
@needs_bf16
def test_operators_that_are_not_what_they_were_are_left_alone(monkeypatch, flaw):
    def gone(*args):
        raise AttributeError("no such operator")

    reorder = torch.ops.mkldnn._reorder_linear_weight
    replacement = gone if flaw == "gone" else lambda weight, rows: reorder(weight * 2, rows)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", replacement)
    packed._works.cache_clear()
    try:
        assert not packed.packs(CPU, BF16)
    finally:
        packed._works.cache_clear()


@pytest.mark.parametrize("rows", [1, 2, 17, 592])
@pytest.mark.parametrize("bias", [True, False])
@needs_bf16
def test_products_and_weights_are_the_same_bits(rows, bias):
    torch.manual_seed(rows)
    linear = nn.Linear(192, 320, dtype=BF16).requires_grad_(False)
    x, weight, added = torch.randn(rows, 192, dtype=BF16), linear.weight.clone(), linear.bias if bias else None
    expected = torch.nn.functional.linear(x, weight, added)
    packed.pack(linear)
    assert packed.is_packed(linear.weight)
    assert (linear.weight.shape, linear.weight.dtype) == (weight.shape, BF16)
    if rows > 1 or not packed.one_row_differs():
        assert torch.equal(packed.multiply(x, linear.weight, added), expected)
    assert linear(x).isnan().all()  # what does not know of it
    packed.unpack(linear)
    assert torch.equal(linear.weight, weight)


# In an engine.


def make_inputs(batch: int = 1, size: int = 16, text: int = 77) -> Flux1Inputs:
    generator = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(BF16)

    return Flux1Inputs(
        normal(batch, 16, size, size), torch.full((batch,), 0.75), normal(batch, text, 768), normal(batch, 768),
        torch.full((batch,), 3.5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def spec(models):
    return inspect_checkpoint(str(models / CHECKPOINT))


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [
        str(write_lora(folder / "plain.safetensors", "kohya", rank=7)),
        str(write_tensors(folder / "dora.safetensors", kind_state_dict("DoRA", targets=lambda name: "qkv" in name))),
    ]


def load(spec, **options) -> Engine:
    engine = Engine(spec, EngineSettings(dtype="bf16", compile="off"), **options)
    engine.load()
    return engine


def packed_weights(engine: Engine) -> list[str]:
    return [name for name, value in engine.assembled.model.named_parameters() if packed.is_packed(value)]


def outputs(engine: Engine, loras: list[str]) -> list[torch.Tensor]:
    """Without a LoRA, with each, with all, and without again."""
    found = []
    for names in ([], *([name] for name in loras), loras, []):
        stack = LoraStack()
        for name in names:
            stack = stack.with_lora(engine.read_lora(name), 0.7)
        engine.swap(stack)
        found.append(engine(make_inputs()))
    assert torch.equal(found[0], found[-1])
    return found


@needs_bf16
def test_an_engine_computes_the_same_from_packed_weights(spec, loras, monkeypatch):
    engine = load(spec)
    linears = sum(isinstance(module, nn.Linear) for module in engine.assembled.model.modules())
    assert len(packed_weights(engine)) == linears > 40
    assert engine.device_bytes == pytest.approx(engine.bytes, rel=0.001)
    monkeypatch.setattr(accel.offload.group, "packs", lambda device, dtype: False)
    plain = load(spec)
    assert packed_weights(plain) == []
    assert plain.device_bytes == engine.device_bytes
    for ours, theirs in zip(outputs(engine, loras), outputs(plain, loras), strict=True):
        assert torch.equal(ours, theirs)


@needs_bf16
def test_weights_that_move_are_not_packed_or_unpacked_first(spec, loras):
    blocks = len(spec.layout.blocks)
    resident = OffloadPlan("none", blocks, blocks, 0, 0, "")
    plans = iter([resident, dataclasses.replace(resident, mode="stream", resident_blocks=1), resident])
    plan = next(plans)
    engine = load(spec, plan=lambda: plan)
    expected = outputs(engine, loras)
    assert packed_weights(engine)
    for plan in plans:  # noqa: B007 - what the engine asks for
        engine.replan()
        assert packed_weights(engine) == []
        for ours, theirs in zip(outputs(engine, loras), expected, strict=True):
            assert torch.equal(ours, theirs)
    engine.offload()
    assert engine.device_bytes == 0
    engine.release()
    engine.load()
    assert packed_weights(engine)
    assert torch.equal(engine(make_inputs()), expected[0])


@pytest.mark.slow
@needs_bf16
def test_compiled_code_takes_packed_weights_and_is_stored(spec, loras, tmp_path):
    counts, found = [], []
    for _ in range(2):
        cache = CompileCache(str(tmp_path))
        engine = Engine(spec, EngineSettings(dtype="bf16", compile="regional"), compile_cache=cache)
        engine.load()
        assert packed_weights(engine)
        engine(make_inputs())
        with torch._dynamo.config.patch(error_on_recompile=True):
            found.append([*outputs(engine, loras), engine(make_inputs(2, 24, 40))])
        counts.append((engine.compiler.count, engine.compiler.recompiles, engine.compiler.failure))
    assert counts == [(2, 0, None), (0, 0, None)]
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
