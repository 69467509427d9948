"""Many swaps, and swaps that are interrupted anywhere: nothing recompiles, nothing grows, nothing is wrong after."""

import gc
import json
import os
import random
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

import accel
from accel.checkpoint import inspect_checkpoint
from accel.engine import Engine
from accel.families.flux1 import Flux1Inputs
from accel.lora.device import DeviceLoras
from accel.lora.stack import LoraStack
from accel.memory import MIB, PoolBudgets
from accel.settings import EngineSettings
from harness.lora_files import in_attention, write_lora
from harness.paths import CACHE, REPO

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
    return [
        str(write_lora(folder / f"{number}.safetensors", format, rank=rank, seed=number, **more))
        for number, (format, rank, more) in enumerate(kinds)
    ]


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    one = torch.ones(1)
    return Flux1Inputs(normal(1, 16, 8, 8), 0.7 * one, normal(1, 16, 768), normal(1, 768), 3.5 * one)


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


def own_device(engine):
    """Let a second buffer in host memory stand in for a GPU, which takes the paths that a CPU leaves out."""
    engine._library._loras = DeviceLoras(
        engine._slots, torch.device("cpu"), TIGHT.device_bytes, share_host=False
    )


def empty_pools(engine, device):
    """As release and load do, without reading the checkpoint again."""
    engine._library.clear()
    engine._library.attach(engine._slots, TIGHT)
    engine._applied = None
    if device:
        own_device(engine)


def loaded(spec, *, compile="off", device=False, pools=TIGHT):
    engine = Engine(spec, EngineSettings(compile=compile), pools=pools)
    engine.load()
    if device:
        own_device(engine)
    return engine


# Many swaps.


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
    sizes = found["resident_bytes"]
    # The second half against the first; single figures differ by as much as the allocator's free pages do.
    assert max(sizes[5:]) <= 1.01 * max(sizes[:5]), f"resident memory after each hundred swaps: {sizes}"


def main(paths, device):
    """A thousand swaps; prints what was seen as JSON."""
    engine = loaded(inspect_checkpoint(str(CACHE / "models" / CHECKPOINT)), device=device)
    choose, process = random.Random(7), psutil.Process()
    first = stack_of(engine, (paths[2], 0.7), (paths[5], -0.4))
    engine.swap(first)
    expected = engine(inputs())
    found = {"sources": [], "host_bytes": [], "resident_bytes": []}
    for number in range(1000):
        found["sources"].append(engine.swap(random_stack(engine, paths, choose)).source)
        found["host_bytes"].append(engine._library.host_bytes)
        if number % 100 == 99:
            engine(inputs(number))
            # With empty pools: how full they happen to be is a matter of their budgets.
            empty_pools(engine, device)
            gc.collect()
            found["resident_bytes"].append(process.memory_info().rss)
    engine.swap(first)
    found["identical"] = torch.equal(engine(inputs()), expected)
    print(json.dumps(found))


def test_random_swaps_do_not_recompile(spec, paths):
    engine, choose = loaded(spec, compile="regional"), random.Random(8)
    eager = loaded(spec)
    engine.swap(stack_of(engine, (paths[2], 0.7)))
    expected = engine(inputs())
    compiles = engine.compile_count
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
    assert (engine.compile_count, engine.recompile_count) == (compiles, 0)


# Interrupted swaps.


class InterruptProcessing(BaseException):
    """As comfy.model_management.InterruptProcessingException: no Exception, may rise from anywhere."""


@contextmanager
def raising_at(line_number, error):
    """Raise at the n-th line of the package's own code that runs; yields a list that gets how many lines ran."""
    seen = [0]

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(ACCEL):
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == line_number:
                raise error
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(previous)


def swap_kinds(engine, paths):
    """Kind -> (what is bound before, what was swapped to before that, the swap): each takes other lines."""
    small, other = (paths[0], 0.8), (paths[7], 0.5)
    return {
        "cold": ([other], None, [small, other]),
        "hot": ([other], [small], [small]),
        "strength, bound": ([small], None, [(paths[0], -0.3)]),
        "strength, bound, prepared": ([small], [(paths[0], 0.2)], [(paths[0], -0.3)]),
        "none": ([small], None, []),
    }


KINDS = tuple(swap_kinds(None, ["0"] * 8))
ERRORS = (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, InterruptProcessing)


@pytest.mark.parametrize("device", [False, True], ids=["on the CPU", "with a device of its own"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_interrupted_at_any_line_is_made_good_by_the_next(spec, paths, kind, device):
    """The errors take turns. The next sampling swaps to the stack that it wants, old or new, and draws right."""
    engine = loaded(spec, device=device)
    before, earlier, wanted = (
        None if entries is None else stack_of(engine, *entries) for entries in swap_kinds(engine, paths)[kind]
    )
    expected = {}
    for stack in (before, wanted):
        engine.swap(stack)
        expected[stack.key] = engine(inputs())
    assert not torch.equal(expected[before.key], expected[wanted.key])

    def prepare():
        empty_pools(engine, device)
        for stack in (earlier, before):
            if stack is not None:
                engine.swap(stack)

    prepare()
    with raising_at(None, None) as seen:
        engine.swap(wanted)
    lines = seen[0]
    assert lines > 10
    # Where lines repeat for each of the model's linears, every linear's would only say the same thing again.
    points = range(1, lines + 1) if lines < 150 else sorted({*range(1, 60), *range(60, lines, lines // 60), lines})
    for number in points:
        for next_one in (wanted, before):
            prepare()
            with pytest.raises(ERRORS), raising_at(number, ERRORS[number % len(ERRORS)]("injected")):
                engine.swap(wanted)
            # What is applied is what is computed with, or nothing is said to be applied.
            for stack in (before, wanted):
                if engine.applied(stack):
                    assert torch.equal(engine(inputs()), expected[stack.key]), (number, "applied")
            engine.swap(next_one)
            assert torch.equal(engine(inputs()), expected[next_one.key]), (number, "after the next swap")


# From another thread.


def test_prefetching_meanwhile_changes_no_swap(spec, paths):
    engine, choose = loaded(spec), random.Random(9)
    expected = {}
    stacks = [random_stack(engine, paths, choose) for _ in range(12)]
    for stack in stacks:
        engine.swap(stack)
        expected[stack.key] = engine(inputs())
    stopped, errors = threading.Event(), []

    def prefetch():
        own = random.Random(10)
        try:
            while not stopped.is_set():
                engine.prefetch(random_stack(engine, paths, own))
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=prefetch)
    thread.start()
    try:
        for number in range(60):
            stack = stacks[number % len(stacks)]
            engine.swap(stack)
            assert torch.equal(engine(inputs()), expected[stack.key])
    finally:
        stopped.set()
        thread.join()
    assert errors == []
