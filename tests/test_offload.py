"""Weights that come to the device block by block: the same output, within a limit of memory, whatever fails.

The device is a pool of host memory with a hard limit (`HostMemory`), and for the CUDA path fake tensors with streams
that only write down what they are told.
"""

import contextlib
import dataclasses
import gc

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from accel.attention import sdpa
from accel.build import empty_model
from accel.checkpoint import inspect_checkpoint
from accel.engine import Engine
from accel.families.flux1 import Flux1Inputs
from accel.families.streams.inputs import Hooks
from accel.lora.hold.slots import LoraSlots
from accel.lora.stack import LoraStack
from accel.memory.budgets import PoolBudgets
from accel.memory.cpu import HostMemory
from accel.memory.gpu import CudaMemory
from accel.memory.host import HostPages
from accel.observer import Silent
from accel.offload.flat import ALIGNMENT, FlatLayout
from accel.offload.plan import OffloadPlan
from accel.offload.ring import Ring
from accel.offload.weights import Weights, streamed_blocks
from accel.quantize import find_mode
from accel.quantize.linears import stored_tensors
from accel.settings import EngineSettings, Quantization, QuantizedCache
from harness.lora_files import in_blocks, kind_state_dict, norm_state_dict, write_lora
from harness.tensor_files import write_tensors

CHECKPOINT = "diffusion_models/tiny-flux-dev-bf16.safetensors"
BLOCKS = 4
POOLS = PoolBudgets(2**26, 2**26, 2**26)
LIMIT = 10**9


@pytest.fixture(autouse=True)
def one_thread(request):
    """Threads only wait for one another where all tensors are tiny. What is compiled is shared with other tests."""
    threads = torch.get_num_threads()
    if "compiled" not in request.node.name:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def spec(models):
    return inspect_checkpoint(str(models / CHECKPOINT))


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Files by what they change: linears, linears and their lengths (which reads the weights), norms, biases."""
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "plain.safetensors", "diffusers", rank=7)
    write_tensors(folder / "dora.safetensors", kind_state_dict("DoRA", targets=lambda name: "qkv" in name))
    write_tensors(folder / "norms.safetensors", norm_state_dict())
    write_tensors(folder / "biases.safetensors", kind_state_dict("bias", targets=in_blocks))
    return {name: str(folder / f"{name}.safetensors") for name in ("plain", "dora", "norms", "biases")}


def plan_of(mode, resident=BLOCKS, device_bytes=0):
    return OffloadPlan(mode, resident, BLOCKS, device_bytes, 0, "")


def stream(resident):
    return plan_of("stream", resident)


EVERY_PLAN = [*map(stream, range(BLOCKS + 1)), plan_of("model"), plan_of("none")]


def make_engine(spec, mode="none", compile="off", memory=None, cache=None, observer=None):
    """An engine that loads by `engine.next_plan`; without `memory`, the CPU itself, where everything is resident."""
    settings = EngineSettings(compile=compile, quantization=Quantization(mode, cache))
    engine = Engine(spec, settings, observer, POOLS, memory=memory, plan=lambda: engine.next_plan)
    engine.next_plan = plan_of("none")
    return engine


def make_inputs(seed=0, **more):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    one = torch.ones(1)
    return Flux1Inputs(normal(1, 16, 8, 8), 0.7 * one, normal(1, 24, 768), normal(1, 768), 3.5 * one, **more)


def bind(engine, loras, name, strength=0.8):
    stack = LoraStack() if name is None else LoraStack().with_lora(engine.read_lora(loras[name]), strength)
    return engine.swap(stack)


def outputs_of(engine, loras, names=(None, "plain", "dora", "norms", "biases")):
    """One step with each LoRA in turn."""
    found = {}
    for name in names:
        bind(engine, loras, name)
        found[name] = engine(make_inputs())
    return found


def assert_equal(found, expected):
    for name, output in found.items():
        assert torch.equal(output, expected[name]), f"LoRA {name}"


@pytest.fixture(scope="module")
def resident(spec, loras):
    """Mode -> outputs of an engine that is on its device as a whole."""
    known = {}

    def outputs(mode):
        if mode not in known:
            engine = make_engine(spec, mode)
            engine.load()
            known[mode] = outputs_of(engine, loras)
            assert not any(torch.equal(known[mode][None], known[mode][name]) for name in loras)
        return known[mode]

    return outputs


# The same output.


@pytest.mark.parametrize(("mode", "flat"), [("none", True), ("int8", True), ("fp8", True), ("int8", False)])
def test_streamed_equals_resident(spec, loras, resident, mode, flat):
    expected, memory = resident(mode), HostMemory(LIMIT, flat=flat)
    engine = make_engine(spec, mode, memory=memory)
    for plan in EVERY_PLAN:
        engine.next_plan = plan
        engine.load()
        assert engine.device_bytes == memory.bytes
        assert_equal(outputs_of(engine, loras), expected)
        engine.offload()
        assert memory.bytes == 0
    assert engine.load_count == 1


@pytest.mark.parametrize("mode", ["nf4", "int8_weight_only", "fp8_weight_only"])
def test_other_modes_streamed_equal_resident(spec, loras, resident, mode):
    engine = make_engine(spec, mode, memory=HostMemory(LIMIT, flat=True))
    engine.next_plan = stream(1)
    engine.load()
    assert_equal(outputs_of(engine, loras), resident(mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "int8", "fp8"])
def test_compiled_streams_without_recompiling(spec, loras, mode):
    """Compiled while it streams, and compared with itself as a whole on its device."""
    engine = make_engine(spec, mode, "regional", HostMemory(LIMIT, flat=True))
    engine.next_plan = stream(2)
    engine.load()
    streamed = engine(make_inputs())
    assert (engine.compiler.count, engine.compiler.recompiles) == (2, 0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        engine.offload()
        engine.next_plan = plan_of("none")
        engine.load()
        expected = outputs_of(engine, loras)
        assert torch.equal(streamed, expected[None])
        assert not any(torch.equal(streamed, expected[name]) for name in loras)
        for plan in EVERY_PLAN:
            engine.offload()
            engine.next_plan = plan
            engine.load()
            assert_equal(outputs_of(engine, loras), expected)
        engine.release()
        engine.load()
        assert_equal(outputs_of(engine, loras, (None,)), expected)
    assert (engine.compiler.count, engine.compiler.recompiles) == (2, 0)


def test_on_the_cpu_itself(spec, loras, resident):
    """Without a limit there is nothing to copy but what the ring copies."""
    engine = make_engine(spec)
    for plan in (stream(1), plan_of("none"), plan_of("model"), stream(0)):
        engine.next_plan = plan
        engine.load()
        assert_equal(outputs_of(engine, loras), resident("none"))
        engine.offload()
    assert engine.load_count == 1


def test_from_the_cache_host_weights_are_pages_of_the_file(spec, loras, resident, tmp_path):
    cache = QuantizedCache(str(tmp_path), 10**9)
    for loads in range(2):
        memory = HostMemory(LIMIT)
        engine = make_engine(spec, "int8", memory=memory, cache=cache)
        engine.next_plan = stream(1)
        engine.load()
        assert_equal(outputs_of(engine, loras), resident("int8"))
        assert memory.host_bytes == 0
        starts = {
            tensor.untyped_storage().data_ptr()
            for group in engine.assembled.weights._blocks[1:]
            for parameter in group.on_host.parameters
            for tensor in stored_tensors(parameter)
        }
        assert (len(starts) < 5) == bool(loads)  # the mapped file, and copies of the few that lie askew in it


def calls(times):
    """A patch that calls its block so many times, and goes on with the last output."""

    def hook(state, run):
        out = state
        for _ in range(times):
            out = run(state)
        return out

    return hook


@pytest.mark.parametrize("streaming", range(BLOCKS))
def test_any_order_of_blocks(spec, loras, streaming):
    """Blocks that are left out or run twice, in one step and not in the next."""
    whole, engine = make_engine(spec), make_engine(spec, memory=HostMemory(LIMIT))
    engine.next_plan = stream(streaming)
    for each in (whole, engine):
        each.load()
        bind(each, loras, "plain")
    kinds = [("double", 0), ("double", 1), ("single", 0), ("single", 1)]
    generator = torch.Generator().manual_seed(streaming)
    for _ in range(12):
        counts = torch.randint(0, 3, (BLOCKS,), generator=generator).tolist()
        hooks = Hooks(around_block={kind: calls(count) for kind, count in zip(kinds, counts, strict=True)})
        inputs = make_inputs(hooks=hooks)
        assert torch.equal(engine(inputs), whole(inputs)), counts


# Which blocks.


def test_which_blocks_stream():
    sizes = [30] * 4 + [10] * 6
    for resident in range(len(sizes) + 1):
        streamed = streamed_blocks(sizes, OffloadPlan("stream", resident, len(sizes), 0, 0, ""))
        # As many bytes as if the first ones stayed, which is how a plan counts.
        assert sum(sizes[block] for block in streamed) == sum(sizes[resident:])
        assert max((sizes[block] for block in streamed), default=0) == max(sizes[resident:], default=0)
        assert (0 in streamed) == (resident == 0)
    # Evenly: between two of them never more resident ones than are needed.
    for resident, expected in ((2, {1, 3}), (4, {4, 5, 6, 7, 8, 9}), (7, {5, 7, 9}), (8, {6, 9}), (9, {9})):
        assert streamed_blocks(sizes, OffloadPlan("stream", resident, 10, 0, 0, "")) & set(
            range(4) if resident < 4 else range(4, 10)
        ) == expected
    for mode in ("none", "model"):
        assert not streamed_blocks(sizes, OffloadPlan(mode, 10, 10, 0, 0, ""))


@pytest.mark.parametrize("plan", [OffloadPlan("stream", 0, 3, 0, 0, ""), OffloadPlan("stream", 5, 4, 0, 0, "")])
def test_a_plan_for_another_model_is_refused(spec, plan):
    engine = make_engine(spec)
    engine.next_plan = plan
    with pytest.raises(ValueError, match="blocks, expected 4"):
        engine.load()
    assert not engine.loaded


# Flat buffers.


def test_a_flat_layout_keeps_every_bit(spec):
    linear = find_mode("int8").convert(torch.randn(48, 64), torch.randn(48), False)
    linear.register_parameter("turned", nn.Parameter(torch.randn(5, 3).t(), requires_grad=False))
    linear.register_parameter("scalar", nn.Parameter(torch.tensor(3.5), requires_grad=False))
    places = [(linear, name) for name in linear._parameters]
    expected = {name: [tensor.clone() for tensor in stored_tensors(linear._parameters[name])] for _, name in places}
    layout = FlatLayout(places)
    buffer = torch.zeros(layout.bytes, dtype=torch.uint8)
    copy = layout.views_of(buffer)
    for start, chunk in layout.as_they_are().chunks:
        buffer[start : start + chunk.numel()] = chunk
    layout.bind(copy)
    for _, name in places:
        parameter = linear._parameters[name]
        assert not parameter.requires_grad
        for tensor, before in zip(stored_tensors(parameter), expected[name], strict=True):
            assert torch.equal(tensor, before)
            assert (tensor.dtype, tensor.stride()) == (before.dtype, before.stride())
            offset = tensor.storage_offset() * tensor.element_size()
            assert offset > 0
            assert offset % ALIGNMENT == 0


def test_a_tensor_with_gaps_is_refused():
    module = nn.Module()
    module.register_parameter("sparse", nn.Parameter(torch.randn(4, 8)[:, ::2], requires_grad=False))
    with pytest.raises(ValueError, match="gaps"):
        FlatLayout([(module, "sparse")])


# Memory.


def planned_bytes(spec, mode, resident):
    """What a plan of so many resident blocks takes, from shapes alone."""
    mode = find_mode(mode)
    sizes = dict.fromkeys([None, *range(BLOCKS)], 0)
    for linear in spec.layout.linears:
        for part in linear.parts:
            block, shape = spec.layout.block_of(part.module), (part.rows, linear.in_features)
            quantized = mode is not None and block is not None and mode.fits(*shape)
            sizes[block] += mode.weight_bytes(*shape) if quantized else 2 * shape[0] * shape[1]
            sizes[block] += 2 * part.rows
    for vector in spec.layout.vectors:
        sizes[spec.layout.block_of(vector.parameter)] += 2 * vector.size
    blocks = [sizes[block] for block in range(BLOCKS)]
    return sizes[None] + sum(blocks[:resident]) + min(2, BLOCKS - resident) * max(blocks[resident:], default=0)


@pytest.mark.parametrize("resident_blocks", range(BLOCKS + 1))
@pytest.mark.parametrize(("mode", "flat"), [("none", True), ("int8", True), ("int8", False)])
def test_the_device_holds_what_was_planned(spec, loras, resident, mode, resident_blocks, flat):
    planned = planned_bytes(spec, mode, resident_blocks)
    memory = HostMemory(int(1.02 * planned), flat=flat)
    engine = make_engine(spec, mode, memory=memory)
    engine.next_plan = stream(resident_blocks)
    engine.load()
    assert_equal(outputs_of(engine, loras, (None,)), resident(mode))
    engine.offload()
    engine.load()
    assert engine.device_bytes == memory.bytes == memory.peak_bytes <= 1.02 * planned
    # A buffer is as large as the largest block that uses it: less than planned where one large block is left.
    if resident_blocks != 1:
        assert memory.peak_bytes > 0.98 * planned


def test_steps_allocate_nothing_and_copy_what_is_streamed(spec):
    memory = HostMemory(LIMIT)
    engine = make_engine(spec, memory=memory)
    engine.next_plan = stream(0)
    engine.load()
    ring = engine.assembled.weights.ring
    engine(make_inputs())
    allocations, copied = memory.allocations, ring.copied_bytes
    for _ in range(3):
        engine(make_inputs())
    assert memory.allocations == allocations
    sizes = sum(sum(chunk.numel() for _, chunk in chunks) for chunks in ring._sources.values())
    assert ring.copied_bytes - copied == 3 * sizes


def test_two_engines_in_turns_do_not_grow(spec, loras):
    """200 changes from one engine to the other on a device that has no room for both."""
    memory = HostMemory(int(1.2 * planned_bytes(spec, "none", BLOCKS)), flat=True)
    engines = [make_engine(spec, memory=memory), make_engine(spec, "int8", memory=memory)]
    engines[0].next_plan, engines[1].next_plan = plan_of("model"), stream(1)
    inputs, expected, taken = make_inputs(), [None, None], set()
    for turn in range(200):
        engine = engines[turn % 2]
        engine.load()
        if turn < 2 or turn % 20 < 2:
            bind(engine, loras, "norms")
            output = engine(inputs)
            if expected[turn % 2] is None:
                expected[turn % 2] = output
            assert torch.equal(output, expected[turn % 2])
        engine.offload()
        gc.collect(0)
        if turn >= 2:
            taken.add((memory.bytes, memory.host_bytes))
    assert len(taken) == 1
    assert min(taken)[0] == 0
    for engine in engines:
        engine.release()
    gc.collect()
    assert memory.host_bytes == 0


def test_page_locked_memory_is_bounded_and_given_back():
    locked = {}
    pages = HostPages(lambda address, size: locked.update({address: size}) is None, locked.pop, 3 * 2**20)
    buffers = [pages.take(2**20 - 100) for _ in range(5)]
    assert (pages.bytes, pages.pinned_bytes, sum(locked.values())) == (5 * 2**20, 3 * 2**20, 3 * 2**20)
    assert all(buffer.data_ptr() % 4096 == 0 for buffer in buffers)
    view = buffers[0][10:20]
    del buffers[0]
    assert pages.pinned_bytes == 3 * 2**20
    del view
    assert (pages.bytes, pages.pinned_bytes, sum(locked.values())) == (4 * 2**20, 2 * 2**20, 2 * 2**20)
    buffers.clear()
    assert (pages.bytes, pages.pinned_bytes, locked) == (0, 0, {})


def test_without_page_locked_memory_nothing_is_locked(monkeypatch):
    """What `_pin` would do needs a GPU; whether it is asked to does not."""
    asked = []
    monkeypatch.setattr("accel.memory.gpu._pin", lambda address, size: bool(asked.append(size)))
    for pin in (True, False):
        memory = CudaMemory(torch.device("cuda"), pin, streams=object())
        assert memory.flat == memory.pin == pin
        memory.host(2**20)
        assert bool(asked) == pin
        asked.clear()


# Faults.


class Failing(HostMemory):
    """A device whose n-th allocation or copy from `arm` on fails."""

    def __init__(self, **options):
        super().__init__(LIMIT, **options)
        self._left = {"empty": None, "copy": None, "host": None}

    def arm(self, kind, number):
        self._left = dict.fromkeys(self._left)
        self._left[kind] = number

    def disarm(self):
        """Whether it failed since `arm`."""
        failed = 0 in self._left.values()
        self._left = dict.fromkeys(self._left)
        return failed

    def _count(self, kind, error):
        if self._left[kind]:
            self._left[kind] -= 1
            if not self._left[kind]:
                raise error

    def empty(self, size):
        self._count("empty", torch.OutOfMemoryError("pretended"))
        return super().empty(size)

    def host(self, size):
        self._count("host", MemoryError("pretended"))
        return super().host(size)

    def copy(self, target, chunks, after):
        self._count("copy", RuntimeError("pretended"))
        return super().copy(target, chunks, after)


def each_failure(memory, kind, action, recover):
    """Let the first, the second, … allocation of an action fail, until it succeeds; recover after each."""
    for number in range(1, 1000):
        memory.arm(kind, number)
        with contextlib.suppress(torch.OutOfMemoryError, MemoryError, RuntimeError):
            action()
        failed = memory.disarm()
        recover()
        if not failed:
            return number - 1
    raise AssertionError("it never succeeds")


@pytest.mark.parametrize("plan", [stream(1), stream(3), plan_of("model"), plan_of("none")], ids=str)
def test_a_failed_load_leaves_the_next_one_right(spec, loras, resident, plan):
    memory, expected = Failing(flat=True), resident("int8")
    engine = make_engine(spec, "int8", memory=memory)
    engine.next_plan = plan

    def recover():
        if not engine.loaded:
            assert memory.bytes == 0
            engine.load()
        assert_equal(outputs_of(engine, loras, (None, "norms")), expected)

    def read():
        engine.release()
        engine.load()

    def come_back():
        engine.offload()
        engine.load()

    groups = 1 + (plan.resident_blocks if plan.mode == "stream" else BLOCKS)
    slots = min(2, BLOCKS + 1 - groups)
    assert each_failure(memory, "empty", read, recover) == groups + slots
    assert each_failure(memory, "empty", come_back, recover) == groups + slots
    assert each_failure(memory, "copy", come_back, recover) == groups
    reads = engine.load_count
    come_back()
    recover()
    assert engine.load_count == reads


def test_a_host_without_room_reads_the_file_again(spec, resident):
    class Notices(Silent):
        def __init__(self):
            self.warnings = []

        def notice(self, text, warning):
            self.warnings += [text] if warning else []

    memory, observer = Failing(flat=True), Notices()
    engine = make_engine(spec, memory=memory, observer=observer)
    engine.load()
    memory.arm("host", 3)
    engine.offload()
    assert memory.disarm()
    assert (engine.loaded, memory.bytes, memory.host_bytes) == (False, 0, 0)
    assert "no room" in observer.warnings[0]
    engine.load()
    assert engine.load_count == 2
    assert torch.equal(engine(make_inputs()), resident("none")[None])


@pytest.mark.parametrize("name", ["plain", "dora", "norms"])
def test_a_failed_swap_leaves_the_output_as_it_was(spec, loras, resident, name):
    memory, expected = Failing(), resident("int8")
    engine = make_engine(spec, "int8", memory=memory)
    engine.next_plan = stream(1)
    engine.load()
    strengths = iter(1.0 + 0.01 * number for number in range(1000))

    def swap():
        engine.offload()  # else it is there already
        engine.load()
        bind(engine, loras, "biases")
        memory.arm("empty", memory.numbered)
        bind(engine, loras, name, next(strengths))

    failures = 0
    for number in range(1, 100):
        memory.numbered = number
        with contextlib.suppress(torch.OutOfMemoryError):
            swap()
        if not memory.disarm():
            break
        failures += 1
        assert torch.equal(engine(make_inputs()), expected["biases"])
    assert failures >= (1 if name == "plain" else 4)
    bind(engine, loras, name)
    assert torch.equal(engine(make_inputs()), expected[name])


@pytest.mark.parametrize("threaded", [True, False])
def test_a_failed_step_leaves_the_next_one_right(spec, loras, resident, threaded):
    """A copy that fails, or a block that does, at every place of a step."""
    memory, expected = Failing(threaded=threaded), resident("int8")
    engine = make_engine(spec, "int8", memory=memory)
    engine.next_plan = stream(1)
    engine.load()
    bind(engine, loras, "dora")

    def recover():
        for _ in range(2):
            assert torch.equal(engine(make_inputs()), expected["dora"])

    # The second of the three streamed blocks has a buffer to itself, and is copied in the first step alone.
    assert each_failure(memory, "copy", lambda: engine(make_inputs()), recover) == 2

    def out_of_memory(state, run):
        run(state)
        raise torch.OutOfMemoryError("pretended")

    for kind in (("double", 0), ("double", 1), ("single", 0), ("single", 1)):
        with pytest.raises(torch.OutOfMemoryError):
            engine(make_inputs(hooks=Hooks(around_block={kind: out_of_memory})))
        recover()


def test_a_copy_that_fails_on_its_thread_is_told_and_made_again(spec, loras, resident, monkeypatch):
    engine = make_engine(spec, memory=HostMemory(LIMIT))
    engine.next_plan = stream(0)
    engine.load()
    expected = resident("none")[None]
    assert torch.equal(engine(make_inputs()), expected)

    def fail(target, chunks):
        raise OSError("pretended")

    with monkeypatch.context() as patch:
        patch.setattr("accel.memory.cpu._move", fail)
        with pytest.raises(OSError, match="pretended"):
            engine(make_inputs())
    for _ in range(2):
        assert torch.equal(engine(make_inputs()), expected)


def test_a_device_that_loses_memory_between_prompts(spec, loras, resident):
    """Another process takes it: the next load plans with what is left, from what is on the host."""
    expected = resident("int8")
    memory = HostMemory(LIMIT)
    engine = make_engine(spec, "int8", memory=memory)
    all_bytes, least_bytes = (planned_bytes(spec, "int8", count) for count in (BLOCKS, 0))
    middle_bytes = (all_bytes + least_bytes) / 2
    for count, room in ((BLOCKS, all_bytes), (0, least_bytes), (1, middle_bytes), (0, least_bytes)):
        memory._limit_bytes = int(1.02 * room)
        if count < BLOCKS:
            engine.next_plan = stream(BLOCKS)
            with pytest.raises(torch.OutOfMemoryError):
                engine.load()
        engine.next_plan = stream(count)
        engine.load()
        assert_equal(outputs_of(engine, loras, (None,)), expected)
        engine.offload()
    assert engine.load_count == 1


# Streams and events, on a GPU that is not there.


class Streams:
    """What torch.cuda has of streams, writing down what it is told.

    Attributes:
        trace: (what, stream, …) in the order of the calls.
    """

    def __init__(self):
        self.trace = []
        self._current = "compute"

    def Stream(self, device):
        return _Stream(self, "copies")

    def Event(self):
        return _Event(self)

    def current_stream(self, device):
        return _Stream(self, self._current)

    @contextlib.contextmanager
    def stream(self, stream):
        self._current, before = stream.name, self._current
        yield
        self._current = before


@dataclasses.dataclass
class _Stream:
    api: Streams
    name: str

    def wait_event(self, event):
        self.api.trace.append(("wait", self.name, id(event), event))

    def synchronize(self):
        self.api.trace.append(("synchronize", self.name))


@dataclasses.dataclass
class _Event:
    api: Streams

    def record(self, stream):
        self.api.trace.append(("record", stream.name, id(self), self))


class Tracing(TorchDispatchMode):
    """Writes down copies to the device and allocations there, with the stream that they run on."""

    def __init__(self, streams):
        super().__init__()
        self.streams = streams

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        stream, trace = self.streams._current, self.streams.trace
        if function is torch.ops.aten.copy_.default and args[0].device.type == "cuda" and args[1].device.type == "cpu":
            assert len(args) == 3 or kwargs["non_blocking"]
            trace.append(("copy", stream, _storage(args[0]), _storage(args[1])))
        elif function is torch.ops.aten.empty.memory_format and out.device.type == "cuda" and out.dtype == torch.uint8:
            # The allocator gives memory that earlier kernels of the stream may still use.
            trace.append(("compute", stream, _storage(out), None))
        return out


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def check_order(trace):
    """Go through a trace as a GPU may: streams run by themselves, tied together by events alone.

    Returns:
        What every block computed with: (buffer, source) pairs.

    Raises:
        AssertionError: something may run too early.
    """
    done = {"compute": {}, "copies": {}}  # stream -> what is known to be finished when its next command runs
    events, used, filled, computed = {}, {}, {}, []
    for number, (what, stream, *more) in enumerate(trace):
        if what == "record":
            events[more[0]] = {**done[stream], stream: number}
        elif what == "wait":
            for other, when in events[more[0]].items():
                done[stream][other] = max(done[stream].get(other, -1), when)
        elif what == "synchronize":
            for known in done.values():
                known[stream] = number
        else:
            buffer, source = more
            after = {stream: number, **{other: when for other, when in done[stream].items() if other != stream}}

            def finished(other, when, after=after):
                return after.get(other, -1) >= when

            if what == "copy":
                assert finished(*used.get(buffer, ("copies", -1))), f"{number}: copied into what still computes"
                filled[buffer] = (stream, number, source)
            else:
                if source is not None:
                    by, when, content = filled[buffer]
                    assert finished(by, when), f"{number}: computed before its weights were there"
                    assert content == source, f"{number}: computed with another block's weights"
                    computed.append((buffer, source))
                used[buffer] = (stream, number)
    return computed


def trace_of(spec, resident_blocks, steps, skipped=()):
    """Load fake weights and run fake steps on a fake GPU.

    Returns:
        The streams with their trace, the streamed blocks, and the blocks that were run.
    """
    streams, config, family = Streams(), spec.config, spec.family
    memory = CudaMemory(torch.device("cuda", 0), pin_limit_bytes=0, streams=streams)
    plan, ran = stream(resident_blocks), []
    with FakeTensorMode(allow_non_fake_inputs=True), Tracing(streams), torch.no_grad():
        model = empty_model(spec)
        weights = Weights(memory, plan, spec.layout.block_of, BLOCKS)
        weights.begin(model)
        for name, module in list(model.named_modules()):
            for key, value in module.named_parameters(recurse=False):
                made = torch.empty(value.shape, dtype=torch.bfloat16, device=weights.device_of(name))
                module._parameters[key] = nn.Parameter(made, requires_grad=False)
            if any(True for _ in module.parameters(recurse=False)):
                weights.placed(name)
        weights.complete()
        slots = LoraSlots(model, spec.layout.modules, memory.device, weights.own_parameters)
        weights.place(plan)
        slots.bind(slots.empty)
        sources = weights.ring._sources
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]

        def traced(region):
            def run(block, *args):
                index = blocks.index(block)
                ran.append(index)
                if index in sources:
                    source = _storage(sources[index][0][1])
                    streams.trace.append(("compute", streams._current, _storage(block.attn.norm_q.weight), source))
                return region(block, *args)

            return run

        regions = tuple(map(traced, family.regions(sdpa)))
        forward = family.forward(config, model, regions, sdpa, weights.ring)
        inputs = make_inputs()
        moved = {
            field.name: value.to(memory.device)
            for field in dataclasses.fields(inputs)
            if isinstance(value := getattr(inputs, field.name), torch.Tensor)
        }
        hooks = Hooks(around_block={key: calls(0) for key in skipped})
        inputs = dataclasses.replace(inputs, **moved, hooks=hooks)
        with torch.inference_mode():
            for _ in range(steps):
                forward(inputs)
        weights.offload()
    return streams, frozenset(sources), ran


@pytest.mark.parametrize("resident_blocks", range(BLOCKS))
def test_a_gpu_copies_and_computes_in_order(spec, resident_blocks):
    streams, streamed, ran = trace_of(spec, resident_blocks, steps=3)
    computed = check_order(streams.trace)
    assert ran == 3 * list(range(BLOCKS))
    assert len(computed) == 3 * len(streamed) == 3 * (BLOCKS - resident_blocks)
    assert len({buffer for buffer, _ in computed}) == min(2, len(streamed))
    # Nothing is copied any more when the weights have left.
    last = max(number for number, entry in enumerate(streams.trace) if entry[0] == "copy")
    assert ("synchronize", "copies") in streams.trace[last:]


@pytest.mark.parametrize("skipped", [[("double", 1)], [("double", 1), ("single", 0), ("single", 1)], [("double", 0)]])
def test_a_gpu_in_any_order(spec, skipped):
    streams, _, ran = trace_of(spec, 0, steps=3, skipped=skipped)
    assert len(check_order(streams.trace)) == len(ran) == 3 * (BLOCKS - len(skipped))


def test_every_wait_is_needed(spec):
    """The control of the two above: without any one of the waits, something may run too early."""
    trace = trace_of(spec, 0, steps=2)[0].trace
    waits = [number for number, entry in enumerate(trace) if entry[0] == "wait"]
    # The third is for what the first is for: what the two buffers were before they were the ring's.
    del waits[2]
    assert len(waits) == 2 * 2 * BLOCKS
    for wait in waits:
        with pytest.raises(AssertionError, match=r"still computes|before its weights"):
            check_order(trace[:wait] + trace[wait + 1 :])


def test_the_next_block_is_on_its_way_while_one_computes(spec):
    """Else copies and computation would take turns."""
    streams, *_ = trace_of(spec, 0, steps=2)
    steps = [entry[0] for entry in streams.trace if entry[0] in ("copy", "compute") and entry[-1] is not None]
    assert steps[:4] == ["copy", "copy", "compute", "copy"]
    first = steps.index("compute")
    assert all(steps[first:][number] != steps[first:][number + 1] for number in range(len(steps[first:]) - 1))


# The ring by itself.


def test_a_ring_holds_the_right_block_in_any_order():
    memory = HostMemory(LIMIT)
    blocks = [2, 3, 5, 7, 11]
    sources = [(block, [(0, torch.full((64,), block, dtype=torch.uint8))]) for block in blocks]
    buffers = [memory.empty(64) for _ in range(2)]
    ring = Ring(memory, buffers, sources)
    generator = torch.Generator().manual_seed(0)
    for block in torch.randint(0, 13, (500,), generator=generator).tolist():
        ring.enter(block)
        if block in blocks:
            assert bool((buffers[blocks.index(block) % 2] == block).all())
        ring.leave(block)
    ring.close()
    # Twice the same block copies once.
    before = ring.copied_bytes
    for _ in range(3):
        ring.enter(5)
        ring.leave(5)
    memory.finish()
    assert ring.copied_bytes - before == 2 * 64
