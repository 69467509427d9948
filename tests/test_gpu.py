"""The engine on a GPU: `pytest -m gpu`. Every test but one also runs on the CPU, so that it is known to run at all.

On a machine without a CUDA device the `cuda` half of each is skipped. Nothing here depends on time: what is fast is for
`python -m benchmarks ablation`.
"""

import dataclasses
import gc
import threading
from contextlib import contextmanager, suppress

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel.checkpoint import inspect_checkpoint
from accel.engine import Engine
from accel.hardware import hardware_of
from accel.linear import autotune, kernels
from accel.linear.autotune import autotuner
from accel.lora.stack import LoraStack
from accel.memory.budgets import MIB, PoolBudgets
from accel.quantize.modes import MODES
from accel.selftest import try_everything
from accel.settings import EngineSettings, Quantization
from harness.lora_files import write_lora
from tests.test_engine import CHECKPOINT, distance, make_inputs

on_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOTH = ["cpu", pytest.param("cuda", marks=on_cuda)]
# Of a whole forward against float32 on the CPU. CUDA's float32 is exact unless someone allowed TF32.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.03}
# Of quantized modes, relative distance of a whole forward of the tiny model without and with two LoRAs; on a CPU
# (2026-11-22) fp8 0.089, 0.096; fp8_weight_only 0.065, 0.088; int8 0.033, 0.057; int8_weight_only 0.027, 0.034; nf4
# 0.27, 0.34. The 4-bit modes that only a GPU has are held to nf4's, mxfp8 to fp8's.
QUANTIZED = {"fp8": 0.13, "fp8_weight_only": 0.12, "int8": 0.08, "int8_weight_only": 0.05, "mxfp8": 0.15}
QUANTIZED_4_BIT = 0.45
SWAPS = 50
# In float32 the LoRAs below take 2.6, 2.4 and 18.9 MiB on the device: each two fit, the third pushes one out.
POOLS = PoolBudgets(64 * MIB, 64 * MIB, 22 * MIB)


@pytest.fixture(scope="module")
def spec(models):
    return inspect_checkpoint(str(models / CHECKPOINT))


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    kinds = {
        "rank7": ("diffusers", {"rank": 7}),
        "rank16": ("kohya", {"rank": 16, "alpha": 4.0, "seed": 3}),
        "rank128": ("native", {"rank": 128, "seed": 5}),
    }
    return {name: str(write_lora(folder / f"{name}.safetensors", *kind[:1], **kind[1])) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def reference(spec):
    """What everything is compared with: float32, eager, on the CPU."""
    engine = Engine(spec, EngineSettings(dtype="fp32", compile="off"))
    engine.load()
    return engine


def engine_on(device, spec, **settings):
    engine = Engine(spec, EngineSettings(device=device, **settings), pools=POOLS)
    engine.load()
    return engine


@pytest.fixture(scope="module", params=BOTH)
def eager(request, spec):
    return engine_on(request.param, spec, dtype="fp32", compile="off")


@pytest.fixture(scope="module", params=BOTH)
def compiled(request, spec, loras):
    """A compiled engine that has drawn once with a LoRA of each rank, so that no kernel is still to be chosen."""
    engine = engine_on(request.param, spec, dtype="fp32" if request.param == "cpu" else "bf16")
    for name in ("rank7", "rank16", "rank128"):
        draw(engine, stack_of(engine, loras, (name, 1.0)))
    assert (engine.compiler.count, engine.compiler.recompiles) == (2, 0)
    return engine


def stack_of(engine, loras, *entries):
    stack = LoraStack()
    for name, strength in entries:
        stack = stack.with_lora(engine.read_lora(loras[name]), strength)
    return stack


def on_device(engine, inputs):
    """Inputs as ComfyUI hands them over: on the engine's device, the timestep in float32."""
    exact = ("timestep", "guidance")
    moved = {
        field.name: value.to(engine.device, None if field.name in exact else engine.dtype)
        for field in dataclasses.fields(inputs)
        if isinstance(value := getattr(inputs, field.name), torch.Tensor)
    }
    return dataclasses.replace(inputs, **moved)


def draw(engine, stack, *sizes):
    engine.swap(stack)
    return engine(on_device(engine, make_inputs(*sizes)))


def compare(engine, reference, loras, entries, *sizes):
    """Relative distance of an engine from the reference, with the same LoRAs and inputs."""
    output = draw(engine, stack_of(engine, loras, *entries), *sizes)
    assert output.device.type == engine.device.type
    return distance(output.cpu().float(), draw(reference, stack_of(reference, loras, *entries), *sizes))


STACKS = {
    "none": [],
    "one": [("rank7", 1.0)],
    "negative": [("rank128", -0.5)],
    "two": [("rank16", 0.7), ("rank128", 0.4)],
}


@pytest.mark.parametrize("entries", STACKS.values(), ids=STACKS)
def test_forward_equals_float32_on_the_cpu(eager, reference, loras, entries):
    assert compare(eager, reference, loras, entries) < TOLERANCES["fp32"]


@pytest.mark.parametrize("device", BOTH)
def test_forward_in_bf16_is_near(device, spec, reference, loras):
    engine = engine_on(device, spec, dtype="bf16", compile="off")
    assert compare(engine, reference, loras, STACKS["two"]) < TOLERANCES["bf16"]


def test_a_lora_that_is_not_bound_would_be_noticed(eager, reference, loras):
    output = draw(eager, LoraStack()).cpu().float()
    assert distance(output, draw(reference, stack_of(reference, loras, ("rank7", 1.0)))) > 0.01


def test_swaps_sizes_and_batches_do_not_recompile(compiled, reference, loras):
    tolerance = TOLERANCES["fp32" if compiled.dtype == torch.float32 else "bf16"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for entries in STACKS.values():
            assert compare(compiled, reference, loras, entries) < tolerance
        for sizes in ((2, 16, 16, 77), (1, 17, 23, 154), (3, 8, 40, 9)):
            assert compare(compiled, reference, loras, STACKS["one"], *sizes) < tolerance
    assert (compiled.compiler.count, compiled.compiler.recompiles) == (2, 0)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("mode", MODES)
def test_quantized_modes(mode, device, spec, reference, loras):
    missing = MODES[mode].missing(hardware_of(torch.device(device)))
    if missing is not None:
        pytest.skip(f"{mode} {missing}")
    engine = engine_on(device, spec, dtype="bf16", compile="off", quantization=Quantization(mode))
    for entries in (STACKS["none"], STACKS["two"]):
        assert compare(engine, reference, loras, entries) < QUANTIZED.get(mode, QUANTIZED_4_BIT)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_quantized_and_compiled_is_quantized_and_eager(mode, device, spec, loras):
    missing = MODES[mode].missing(hardware_of(torch.device(device)))
    if missing is not None:
        pytest.skip(f"{mode} {missing}")
    engines = [
        engine_on(device, spec, dtype="bf16", compile=compile, quantization=Quantization(mode))
        for compile in ("off", "regional")
    ]
    for entries in STACKS.values():
        outputs = [draw(engine, stack_of(engine, loras, *entries)).float() for engine in engines]
        # Where the two round an activation differently, fp8 lands a sixteenth apart.
        assert distance(*outputs) < TOLERANCES["bf16"] * (2 if mode == "fp8" else 1)
    assert (engines[1].compiler.count, engines[1].compiler.recompiles) == (2, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_proves_itself():
    """What the rules allow should work; float8 products by rows are known to be missing on some systems."""
    failed = {row.name: row.proof.sentence for row in try_everything(torch.device("cuda")) if row.state == "FAILED"}
    failed.pop("float8 product scaled by row", None)
    assert not failed


def test_prefetch_on_another_thread_while_the_engine_computes(eager, loras):
    eager.release()
    eager.load()
    stacks = {name: stack_of(eager, loras, (name, 0.8)) for name in ("rank7", "rank16")}
    expected = {}
    for name, stack in stacks.items():
        expected[name] = draw(eager, stack)
    eager.release()  # nothing is prepared any more
    eager.load()
    draw(eager, stacks["rank7"])
    thread = threading.Thread(target=eager.prefetch, args=(stacks["rank16"],))
    thread.start()
    meanwhile = [draw(eager, stacks["rank7"]) for _ in range(5)]
    thread.join()
    assert all(torch.equal(output, expected["rank7"]) for output in meanwhile)
    prepared, ready = eager.library.prepare(stacks["rank16"])
    assert ready
    assert prepared.flat.buffer.is_pinned() == (eager.device.type == "cuda")
    assert eager.swap(stacks["rank16"]).source == "hot"
    assert torch.equal(draw(eager, stacks["rank16"]), expected["rank16"])


def test_offload_to_the_host_and_back(compiled, loras):
    stack = stack_of(compiled, loras, ("rank16", 0.8))
    expected, reads, before = draw(compiled, stack), compiled.load_count, live_bytes(compiled.device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.offload()
        assert not compiled.loaded
        if compiled.device.type == "cuda":
            assert live_bytes(compiled.device) <= before - 0.95 * compiled.bytes
        compiled.load()
        assert torch.equal(draw(compiled, stack), expected)
    assert compiled.load_count == reads
    assert compiled.compiler.recompiles == 0


def test_memory_stays_flat_over_many_swaps(eager, loras):
    cycle = 6  # three LoRAs at two strengths
    sizes = {}
    for number in range(SWAPS):
        name = ("rank7", "rank16", "rank128")[number % 3]
        draw(eager, stack_of(eager, loras, (name, 0.5 + 0.1 * (number % 2))))
        if cycle <= number < 2 * cycle or number >= SWAPS - cycle:
            sizes[number] = live_bytes(eager.device)
    first, last = list(sizes.values())[:cycle], list(sizes.values())[cycle:]
    assert max(last) <= max(first)


def test_a_swap_that_runs_out_of_memory_changes_nothing(eager, loras, monkeypatch):
    expected = draw(eager, stack_of(eager, loras, ("rank7", 1.0)))
    new = stack_of(eager, loras, ("rank128", 0.77))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("accel.lora.hold.device.DeviceLoras.upload", full)
        with pytest.raises(torch.OutOfMemoryError):
            eager.swap(new)
    assert torch.equal(eager(on_device(eager, make_inputs())), expected)


def test_an_eager_step_does_not_wait_for_the_device(eager, loras):
    step_without_waiting(eager, loras)


def test_a_compiled_step_does_not_wait_for_the_device(compiled, loras):
    if compiled.device.type == "cpu":
        pytest.skip("what a CPU waits for is only seen in eager code; tests/test_gpu_code.py reads the compiled one")
    step_without_waiting(compiled, loras)


def step_without_waiting(engine, loras):
    engine.swap(stack_of(engine, loras, *STACKS["two"]))
    inputs = on_device(engine, make_inputs())
    engine(inputs)  # tables of positions are made, kernels chosen
    with no_waiting(engine.device):
        output = engine(inputs)
    assert torch.isfinite(output).all()


def test_waiting_would_be_noticed():
    with pytest.raises(RuntimeError, match="waits"), no_waiting(torch.device("cpu")):
        torch.ones(1).item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["rank7", "rank16"])
def test_an_engine_with_the_fused_kernel_draws_what_separate_products_draw(spec, loras, monkeypatch, name):
    engine = engine_on("cuda", spec, dtype="bf16", compile="off")
    stack, outputs = stack_of(engine, loras, (name, 1.0)), []
    for choice in (None, kernels.CONFIGS[2]):
        monkeypatch.setattr(autotune, "choose", lambda candidates, separate, seconds, choice=choice: choice)
        autotuner.cache_clear()
        outputs.append(draw(engine, stack).float())
        assert set(autotuner().chosen.values()) == {choice}
    autotuner.cache_clear()
    assert distance(*outputs) < TOLERANCES["bf16"]


def live_bytes(device):
    """What tensors take on a device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    storages = {}
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            with suppress(NotImplementedError):  # what vmap leaves behind has no storage of its own
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class _Waiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: reading a value, or a shape that depends on values."""

    REFUSED = frozenset({
        torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
    })  # fmt: skip

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.REFUSED:
            raise RuntimeError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device):
    """Make it an error that the host waits for the device."""
    if device.type == "cpu":
        with _Waiting():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
