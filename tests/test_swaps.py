"""Many swaps, and swaps that are interrupted anywhere: nothing recompiles, nothing grows, nothing is wrong after."""

import gc
import json
import linecache
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

import accel
from accel.checkpoint import inspect_checkpoint
from accel.engine import Engine
from accel.families.flux1 import Flux1Inputs
from accel.lora.hold.device import DeviceLoras
from accel.lora.hold.library import BUFFERS_BYTES
from accel.lora.stack import LoraStack
from accel.memory.budgets import MIB, PoolBudgets
from accel.settings import EngineSettings
from harness.lora_files import in_attention, kind_state_dict, lora_state_dict, norm_state_dict, write_lora
from harness.paths import CACHE, REPO
from harness.tensor_files import write_tensors
from harness.tiny_models import TinyFluxConfig, tiny_flux_state_dict

CHECKPOINT = "diffusion_models/tiny-flux-dev-fp32.safetensors"
ACCEL = str(Path(accel.__file__).parent)


@pytest.fixture(scope="module")
def spec(models):
    return inspect_checkpoint(str(models / CHECKPOINT))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    kinds = [("kohya", rank, {"alpha": rank / 2}) for rank in (1, 4, 16, 40)]
    kinds += [("diffusers", rank, {}) for rank in (8, 16, 64)] + [("native", 12, {"targets": in_attention})]
    kroneckers = [kind_state_dict("LoKr full"), kind_state_dict("LoKr", "diffusers", rank=16, targets=in_attention)]
    return [
        str(write_lora(folder / f"{number}.safetensors", format, rank=rank, seed=number, **more))
        for number, (format, rank, more) in enumerate(kinds)
    ] + [str(write_tensors(folder / f"lokr{number}.safetensors", file)) for number, file in enumerate(kroneckers)]


def inputs(seed=0, size=8, tokens=16):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    one = torch.ones(1)
    return Flux1Inputs(normal(1, 16, size, size), 0.7 * one, normal(1, tokens, 768), normal(1, 768), 3.5 * one)


def stack_of(engine, *entries):
    stack = LoraStack()
    for path, strength in entries:
        stack = stack.with_lora(engine.read_lora(path), strength)
    return stack


def random_stack(engine, paths, choose):
    count = choose.choice([0, 1, 1, 1, 2, 3])
    return stack_of(engine, *((choose.choice(paths), choose.choice([-1.0, 0.0, 0.3, 0.8, 1.2])) for _ in range(count)))


# Small budgets, so that all pools overflow all the time; the largest stack still fits the host's.
TIGHT = PoolBudgets(files_bytes=2 * MIB, host_bytes=32 * MIB, device_bytes=6 * MIB)


def own_device(engine, budget_bytes=TIGHT.device_bytes):
    """Let a second buffer in host memory stand in for a GPU, which takes the paths that a CPU leaves out."""
    engine.library._loras = DeviceLoras(engine.assembled.slots, torch.device("cpu"), budget_bytes, share_host=False)


def empty_pools(engine, device, **budget):
    """As release and load do, without reading the checkpoint again."""
    engine.library.clear()
    engine.library.attach(engine.assembled.slots, TIGHT)
    engine._applied = None
    if device:
        own_device(engine, **budget)


def loaded(spec, *, compile="off", device=False, pools=TIGHT):
    engine = Engine(spec, EngineSettings(compile=compile), pools=pools)
    engine.load()
    if device:
        own_device(engine)
    return engine


# Many swaps.


@pytest.mark.slow
@pytest.mark.parametrize("device", [False, True], ids=["on the CPU", "with a device of its own"])
def test_a_thousand_random_swaps_leave_no_trace(paths, device):
    # A process of its own, whose allocator gives freed tensors back to the system: else they count as resident.
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.test_swaps import main; main({paths!r}, {device})"],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["sources"]) == {"unchanged", "hot", "strength", "warm", "cold"}
    assert found["identical"]
    assert max(found["host_bytes"]) <= TIGHT.host_bytes
    assert max(found["free_bytes"]) <= BUFFERS_BYTES
    sizes = found["resident_bytes"]
    assert max(sizes[1:]) <= 1.01 * sizes[1], f"resident memory after each hundred swaps: {sizes}"
    counts = found["objects"]
    assert max(counts[1:]) <= 1.001 * counts[1], f"Python objects after each hundred swaps: {counts}"


def main(paths, device):
    """A thousand swaps; prints what was seen as JSON."""
    engine = loaded(inspect_checkpoint(str(CACHE / "models" / CHECKPOINT)), device=device)
    choose, process = random.Random(7), psutil.Process()
    first = stack_of(engine, (paths[2], 0.7), (paths[5], -0.4))
    engine.swap(first)
    expected = engine(inputs())
    found = {"sources": [], "host_bytes": [], "free_bytes": [], "resident_bytes": [], "objects": []}
    for number in range(1000):
        found["sources"].append(engine.swap(random_stack(engine, paths, choose)).source)
        found["host_bytes"].append(engine.library.host_bytes)
        found["free_bytes"].append(engine.library._buffers.free_bytes)
        if number % 100 == 99:
            engine(inputs(number))
            # With empty pools and nothing bound, so that the same is held each time: how full pools happen to be is a
            # matter of their budgets, and stacks differ in size (up to 10 MB here).
            engine.swap(LoraStack())
            empty_pools(engine, device)
            gc.collect()
            found["resident_bytes"].append(process.memory_info().rss)
            found["objects"].append(len(gc.get_objects()))
    engine.swap(first)
    found["identical"] = torch.equal(engine(inputs()), expected)
    print(json.dumps(found))


@pytest.mark.slow
def test_random_swaps_do_not_recompile(spec, paths):
    engine, choose = loaded(spec, compile="regional"), random.Random(8)
    eager = loaded(spec)
    engine.swap(stack_of(engine, (paths[2], 0.7)))
    expected = engine(inputs())
    compiles = engine.compiler.count
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(150):
            stack = random_stack(engine, paths, choose)
            engine.swap(stack)
            output = engine(inputs(number))
            if number % 10 == 0:
                eager.swap(stack)
                reference = eager(inputs(number))
                assert float((output - reference).norm() / reference.norm()) < 2e-5
        engine.swap(stack_of(engine, (paths[2], 0.7)))
        assert torch.equal(engine(inputs()), expected)
    assert (engine.compiler.count, engine.compiler.recompiles) == (compiles, 0)


# Interrupted swaps.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The smallest model that has every kind of block, so that a forward takes milliseconds; engine -> its stacks.

    Each LoRA changes two linears: the lines that run once for each linear run twice.
    """
    folder, config = tmp_path_factory.mktemp("small"), TinyFluxConfig(hidden=128, depth=1, depth_single=1)
    checkpoint = write_tensors(folder / "model.safetensors", tiny_flux_state_dict(config))
    few = {"targets": lambda module: module in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear2")}
    files = {
        "a": lora_state_dict("kohya", config, rank=4, alpha=2.0, **few),
        "b": lora_state_dict("diffusers", config, rank=8, seed=1, **few),
        "c": lora_state_dict("native", config, rank=8, seed=2, **few),
        "dora": {**kind_state_dict("DoRA", config=config, **few), **norm_state_dict(config)},
        "bias": kind_state_dict("bias", config=config, **few),
        "lokr": kind_state_dict("LoKr full", config=config, **few),
        "lokr2": kind_state_dict("LoKr full DoRA", config=config, seed=1, **few),
    }
    for name, tensors in files.items():
        write_tensors(folder / f"{name}.safetensors", tensors)

    def stack(engine, *entries):
        return stack_of(engine, *((str(folder / f"{name}.safetensors"), strength) for name, strength in entries))

    return inspect_checkpoint(str(checkpoint)), stack


@pytest.fixture
def one_thread():
    """Operations of microseconds wait for milliseconds for a second thread on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(engine):
    """The smallest forward."""
    return engine(inputs(size=4, tokens=4))


class InterruptProcessing(BaseException):
    """As comfy.model_management.InterruptProcessingException: no Exception, may rise from anywhere."""


class Lines:
    """Follows the lines of the package's own code that a thread runs, and may raise at one of them.

    Attributes:
        seen: (file, line) of each, in order. The second visit of a `with` line, where its block has ended, is none:
            Python looks for signals only behind calls and jumps, so nothing rises between such a block and its end.
    """

    def __init__(self, number=None, error=None):
        self.seen = []
        self._number, self._error = number, error
        self._blocks = set()

    def __enter__(self):
        self._previous = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *raised):
        sys.settrace(self._previous)

    def _trace(self, frame, event, argument):
        place = frame.f_code.co_filename, frame.f_lineno
        if not place[0].startswith(ACCEL):
            return None
        if event == "line" and not self._ends_a_block(frame, *place):
            self.seen.append(place)
            if len(self.seen) == self._number:
                raise self._error
        return self._trace

    def _ends_a_block(self, frame, file, line):
        if not linecache.getline(file, line).lstrip().startswith("with "):
            return False
        self._blocks ^= {(frame, line)}
        return (frame, line) not in self._blocks


A, B, C, DORA, BIAS = ("a", 0.8), ("b", 0.5), ("c", -0.6), ("dora", 0.7), ("bias", 0.9)
LOKR, LOKR2 = ("lokr", 0.8), ("lokr2", 0.6)
# What happens -> (stacks that were swapped to, the last of them bound; the swap; bytes of a device of its own or None).
INTERRUPTED = {
    "cold": ([[B]], [A, C], MIB),
    "cold on the CPU": ([[B]], [A, C], None),
    "warm": ([[A], [C], [B]], [A], 0),
    "hot": ([[A], [B]], [A], MIB),
    "strength": ([[A]], [("a", -0.3)], MIB),
    "strength on the CPU": ([[A]], [("a", -0.3)], None),
    "strength again": ([[("a", 0.2)], [A]], [("a", -0.3)], MIB),
    "none": ([[A]], [], MIB),
    "mixing and vectors": ([[A]], [B, DORA], MIB),
    "mixing and vectors, warm": ([[BIAS], [DORA], [B], [A]], [DORA], 0),
    "other vectors": ([[DORA]], [BIAS], None),
    "no more vectors": ([[BIAS, DORA]], [A], MIB),
    "Kronecker": ([[A]], [LOKR, B], MIB),
    "Kronecker on the CPU": ([[LOKR2]], [LOKR], None),
    "Kronecker, warm": ([[LOKR], [A], [LOKR2]], [LOKR], 0),
    "Kronecker, mixed": ([[LOKR]], [LOKR, LOKR2], MIB),
    "no more Kronecker": ([[LOKR, LOKR2]], [A], MIB),
    "Kronecker, strength": ([[LOKR, A]], [("lokr", -0.5), A], MIB),
}
ERRORS = (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, InterruptProcessing)


@pytest.mark.parametrize(("earlier", "wanted", "budget_bytes"), INTERRUPTED.values(), ids=INTERRUPTED)
def test_a_swap_interrupted_at_any_line_is_made_good_by_the_next(small, one_thread, earlier, wanted, budget_bytes):
    """The errors take turns. The next sampling swaps to the stack that it wants, old or new, and draws right."""
    spec, stack = small
    engine, device = loaded(spec), budget_bytes is not None
    earlier, wanted = [stack(engine, *entries) for entries in earlier], stack(engine, *wanted)
    before, expected = earlier[-1], {}
    for one in (before, wanted):
        engine.swap(one)
        expected[one.key] = draw(engine)
    assert not torch.equal(expected[before.key], expected[wanted.key])

    def prepare():
        empty_pools(engine, device, budget_bytes=budget_bytes)
        for one in earlier:
            engine.swap(one)

    prepare()
    with Lines() as lines:
        engine.swap(wanted)
    # Every line when it runs first, and when it runs last.
    first = {place: number for number, place in reversed(list(enumerate(lines.seen, 1)))}
    last = {place: number for number, place in enumerate(lines.seen, 1)}
    assert len(first) > 20
    points = [(number, wanted) for number in first.values()] + [(number, before) for number in last.values()]
    for number, next_one in points:
        prepare()
        with pytest.raises(ERRORS), Lines(number, ERRORS[number % len(ERRORS)]("injected")):
            engine.swap(wanted)
        where = lines.seen[number - 1]
        assert gc.isenabled(), where
        # What is applied is what is computed with, or nothing is said to be applied.
        for one in (before, wanted):
            if engine.applied(one):
                assert torch.equal(draw(engine), expected[one.key]), (where, "applied")
        other_thread = threading.Thread(target=engine.prefetch, args=(before,), daemon=True)
        other_thread.start()
        other_thread.join(timeout=20)
        assert not other_thread.is_alive(), (where, "a lock is left behind")
        engine.swap(next_one)
        assert torch.equal(draw(engine), expected[next_one.key]), (where, "after the next swap")


# From another thread.


def test_prefetching_meanwhile_changes_no_swap(small, one_thread):
    spec, stack = small
    engine, choose = loaded(spec), random.Random(9)

    def random_entries(choose):
        names = choose.choices(["a", "b", "c", "dora", "bias", "lokr", "lokr2"], k=choose.choice([0, 1, 1, 2]))
        return [(name, choose.choice([-1.0, 0.3, 0.8])) for name in names]

    stacks = [stack(engine, *random_entries(choose)) for _ in range(24)]
    expected = {}
    for one in stacks:
        engine.swap(one)
        expected[one.key] = draw(engine)
    assert len(expected) > 6
    stopped, errors, count = threading.Event(), [], [0]

    def prefetch():
        own = random.Random(10)
        try:
            while not stopped.is_set():
                if not own.randrange(20):
                    engine.library._host.clear()
                engine.prefetch(stack(engine, *random_entries(own)))
                count[0] += 1
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=prefetch, daemon=True)
    thread.start()
    try:
        for number in range(200):
            one = stacks[number % len(stacks)]
            engine.swap(one)
            assert torch.equal(draw(engine), expected[one.key])
    finally:
        stopped.set()
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert errors == []
    assert count[0] > 10
