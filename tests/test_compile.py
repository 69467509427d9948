"""Compiling one region: what is kept for the next start, and what happens when it cannot be compiled."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from accel.compile.cache import KERNELS, SUFFIX, CompileCache, chosen_by_user
from accel.compile.compiler import INDUCTOR_OPTIONS, RegionCompiler
from accel.compile.region import Precompiled
from accel.linear.layers import LoraLinear, linears
from accel.linear.slot import Bound
from accel.lora.hold.slots import LoraSlots
from accel.quantize import find_mode
from accel.settings import COMPILE_MODES
from harness.paths import REPO

pytestmark = pytest.mark.slow

WIDTH = 32


class Listener:
    """Keeps what it hears."""

    def __init__(self):
        self.warnings, self.started, self.finished = [], [], []

    def notice(self, text, warning):
        assert warning
        self.warnings.append(text)

    def compiling(self, region):
        self.started.append(region)

    def compiled(self, region, seconds, count, why):
        assert seconds > 0
        self.finished.append((region, count, why))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)


def small(block: nn.Module, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    (output,) = linears(block.norm(hidden_states), block.linear)
    return hidden_states + (output if mask is None else output * mask).sin()


stores_traces = pytest.mark.skipif(
    not Precompiled.possible(small), reason="this torch (2.9, 2.11) does not store what it traced: a start traces anew"
)


def make_block() -> nn.Module:
    block = Block().requires_grad_(False)
    slots = LoraSlots(block, ["linear"], torch.device("cpu"))
    slots.bind(slots.empty)
    return block


def bind_lora(block: nn.Module, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    layer = block.linear
    assert isinstance(layer, LoraLinear)
    lora_A, lora_B = (torch.randn(size, generator=generator) for size in ((rank, WIDTH), (WIDTH, rank)))
    layer.lora.bound_lora = Bound(lora_A, lora_B)


def make_input(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(len(shape)))


class Region:
    """`small`, compiled: a new one with the same folder is what a restart makes."""

    def __init__(self, folder=None, engine=None, mode="regional"):
        self.listener = Listener()
        files = None
        if folder is not None:
            cache = CompileCache(str(folder))
            files = cache.files({"device": "cpu", "engine": engine or "test"}, self.listener.notice)
        self.compiler = RegionCompiler(mode, self.listener, files)
        self._region = self.compiler.region(small)

    def __call__(self, block, hidden_states, mask=None):
        with torch.inference_mode(), self.compiler.scope():
            return self._region(block, hidden_states.clone(), None if mask is None else mask.clone())


def close(output: Tensor, expected: Tensor) -> bool:
    return torch.allclose(output, expected, rtol=1e-4, atol=5e-5)  # fp32, summed in another order


def file_of(folder: Path) -> Path:
    (path,) = folder.glob(f"*{SUFFIX}")
    return path


# What is kept.


@stores_traces
def test_a_restart_compiles_nothing_whatever_size_batch_or_rank(tmp_path):
    block = make_block()
    first = Region(tmp_path)
    first(block, make_input(1, 5))
    assert first.listener.finished == [("small", 1, "the first time with this kind of model and these settings")]

    restarted = Region(tmp_path)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rank in (0, 1, 7):
            if rank:
                bind_lora(block, rank)
            for shape in ((1, 5), (2, 5), (3, 32), (1, 2)):
                assert close(restarted(block, make_input(*shape)), small(block, make_input(*shape), None))
    assert restarted.compiler.count == 0
    assert (restarted.listener.started, restarted.listener.finished, restarted.listener.warnings) == ([], [], [])


@stores_traces
@pytest.mark.parametrize("mode", ["fp8", "fp8_weight_only", "int8", "int8_weight_only"])
def test_a_restart_of_a_quantized_model_compiles_nothing(tmp_path, mode):
    """torchao's classes lack what storing takes; what is missing is added."""

    def quantized():
        block = make_block()
        weight, bias = (value.to(torch.bfloat16) for value in (block.linear.base.weight, block.linear.base.bias))
        block.linear.base = find_mode(mode).convert(weight, bias, False)
        return block.to(torch.bfloat16)

    block, x = quantized(), make_input(1, 20).to(torch.bfloat16)
    first, restarted = Region(tmp_path), Region(tmp_path)
    expected = first(block, x)
    assert (first.compiler.count, first.listener.warnings) == (1, [])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(restarted(quantized(), x), expected)
    assert (restarted.compiler.count, restarted.listener.warnings) == (0, [])


@stores_traces
def test_what_cannot_be_stored_is_said_once_and_keeps_its_kernels(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    block, x = make_block(), make_input(1, 5)
    monkeypatch.setattr(torch._dynamo.aot_compile.AOTCompiledFunction, "serialize", failing(TypeError("no")))
    region = Region(tmp_path)
    assert close(region(block, x), small(block, x, None))
    (warning,) = region.listener.warnings
    assert "small blocks cannot be stored with this PyTorch (TypeError: no): every start compiles them again" in warning
    assert region.compiler.failure is None
    with safe_open(file_of(tmp_path), framework="pt") as handle:
        assert any(name.startswith(KERNELS) for name in handle.keys())  # noqa: SIM118 - a handle is no mapping
    region(block, make_input(2, 7))
    assert len(region.listener.warnings) == 1


@stores_traces
def test_other_kinds_of_inputs_compile_one_more_variant_which_is_kept_too(tmp_path):
    block, x, mask = make_block(), make_input(1, 5), make_input(1, 5)
    first = Region(tmp_path)
    first(block, x)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        first(block, x, mask)
    assert close(first(block, x, mask), small(block, x, mask))
    _, count, why = first.listener.finished[1]
    assert count == 2
    assert "mask" in why
    assert "\n" not in why
    assert first.compiler.recompiles == 1

    restarted = Region(tmp_path)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert close(restarted(block, x, mask), small(block, x, mask))
        assert close(restarted(block, x), small(block, x, None))
    assert restarted.compiler.count == 0
    # what no stored variant fits is compiled, not computed by the wrong one
    double = block.double()
    assert close(restarted(double, x.double()), small(double, x.double(), None))
    assert (restarted.compiler.count, restarted.compiler.recompiles) == (1, 1)


@stores_traces
def test_a_damaged_file_is_dropped_with_one_notice_and_made_again(tmp_path):
    block, x = make_block(), make_input(1, 5)
    Region(tmp_path)(block, x)
    path = file_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])

    region = Region(tmp_path)
    assert close(region(block, x), small(block, x, None))
    assert region.compiler.count == 1
    assert region.compiler.failure is None
    (warning,) = region.listener.warnings
    assert warning == "stored compiled code is not used (it is cut off); it is compiled again, once."
    again = Region(tmp_path)
    assert close(again(block, x), small(block, x, None))
    assert (again.compiler.count, again.listener.warnings) == (0, [])


@stores_traces
def test_a_stored_region_that_does_not_load_is_compiled_again(tmp_path):
    """Whole and unchanged, but of libraries in another state."""
    block, x = make_block(), make_input(1, 5)
    cache = CompileCache(str(tmp_path))
    cache.files({"device": "cpu", "engine": "test"}, Listener().notice).store("small", b"no pickle")
    region = Region(tmp_path)
    assert close(region(block, x), small(block, x, None))
    assert (region.compiler.count, len(region.listener.warnings)) == (1, 1)
    again = Region(tmp_path)
    again(block, x)
    assert (again.compiler.count, again.listener.warnings) == (0, [])


@stores_traces
def test_two_processes_that_compile_at_once_both_keep_theirs(tmp_path):
    block, x, mask = make_block(), make_input(1, 5), make_input(1, 5)
    one, other = Region(tmp_path), Region(tmp_path)
    one(block, x)
    assert other.compiler.count == 0
    threads = [threading.Thread(target=other, args=(block, x, mask))]
    for thread in threads:
        thread.start()
        thread.join()
    restarted = Region(tmp_path)
    restarted(block, x)
    restarted(block, x, mask)
    assert restarted.compiler.count == 0
    assert not list(tmp_path.glob(".*.tmp"))


def test_files_of_other_engines_are_others(tmp_path):
    def key(**engine):
        return CompileCache(str(tmp_path)).files({"device": "cpu", **engine}, Listener().notice)._key

    assert key(dtype="bf16") == key(dtype="bf16") != key(dtype="fp16")


def test_a_folder_that_cannot_be_written_costs_the_next_start_only(tmp_path):
    block, x = make_block(), make_input(1, 5)
    blocker = tmp_path / "file"
    blocker.write_bytes(b"")
    region = Region(blocker / "folder")
    assert close(region(block, x), small(block, x, None))
    assert close(region(block, x, x), small(block, x, x))
    assert region.compiler.failure is None
    (warning,) = region.listener.warnings
    assert "could not be stored" in warning


RESTART = """
import json, os, sys
from tests.test_compile import Region, make_block, make_input
from torch._inductor.codecache import CppCodeCache
compiles = []
import torch._inductor.cpp_builder as builder
real = builder.run_compile_cmd
builder.run_compile_cmd = lambda *a, **k: (compiles.append(a), real(*a, **k))[1]
before = dict(os.environ)
region = Region(sys.argv[1])
output = region(make_block(), make_input(1, 5))
print(json.dumps({"count": region.compiler.count, "warnings": region.listener.warnings,
    "cpp": [str(command) for command in compiles], "output": output.flatten()[:8].tolist(),
    "changed": sorted(key for key in {*before, *os.environ} if before.get(key) != os.environ.get(key))}))
"""


@stores_traces
def test_a_new_process_with_an_empty_temporary_folder_needs_no_compiler(tmp_path):
    """Kernels are kept as well as traces, nothing is in the system's temporary folder afterwards, and no environment
    variable is left changed."""
    results = []
    for number in range(2):
        temporary = tmp_path / f"temp{number}"
        temporary.mkdir()
        environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
        environment |= {"TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
        environment |= {"PYTHONPATH": str(REPO), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", RESTART, str(tmp_path / "cache")],
            cwd=REPO, env=environment, capture_output=True, text=True, check=False,
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
        assert [name for name in os.listdir(temporary) if name.startswith("flux-hotswap")] == []
    cold, warm = results
    assert len(cold["cpp"]) >= 1  # or the next line says nothing
    assert (warm["count"], warm["cpp"], warm["warnings"]) == (0, [], [])
    assert warm["output"] == cold["output"]
    # an address for inductor's own libraries, not a setting
    assert set(warm["changed"]) <= {"_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}


def test_a_folder_chosen_by_the_user_is_left_to_him(tmp_path, monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert not chosen_by_user(None)
    assert not chosen_by_user(default_cache_dir())
    chosen = tmp_path / "chosen"
    assert chosen_by_user(str(chosen))
    files = CompileCache(str(tmp_path / "ours")).files({}, Listener().notice)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(chosen))
    with files.inductor_folder():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(chosen)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    with files.inductor_folder():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(tempfile.gettempdir())
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert os.environ["TRITON_CACHE_DIR"] == "kept"


# What cannot be compiled.


def failing(error):
    def compile_fx(*args, **kwargs):
        raise error

    return compile_fx


FAILURES = {
    "a compile worker was killed": (BrokenProcessPool("a child process terminated abruptly"), "memory is short"),
    "the disk is full": (OSError(errno.ENOSPC, "No space left", "there"), "Free space on the disk of 'there'"),
    "an error inside of inductor": (AssertionError("a broken lowering"), "Update torch"),
    "no Triton": (torch._inductor.exc.TritonMissing(None), "triton-windows"),
}


@pytest.mark.parametrize(("error", "advice"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_a_failure_costs_speed_and_is_told_once(tmp_path, monkeypatch, error, advice, kept):
    block, x = make_block(), make_input(1, 5)
    region = Region(tmp_path if kept else None)
    with monkeypatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", failing(error))
        assert torch.equal(region(block, x), small(block, x, None))
    assert torch.equal(region(block, make_input(2, 7)), small(block, make_input(2, 7), None))
    (warning,) = region.listener.warnings
    for words in ("could not compile the small blocks", "goes on without compiling", advice, "'compile' to 'off'"):
        assert words in warning
    assert (region.compiler.count, region.listener.finished) == (0, [])
    assert region.compiler.failure


def test_a_broken_compiler_costs_speed(tmp_path, monkeypatch):
    """A real one: a program that fails, by the environment variable that users set."""
    block, x = make_block(), make_input(1, 5)
    compiler = tmp_path / "broken-cxx"
    compiler.write_text("#!/bin/sh\necho 'internal compiler error' >&2\nexit 1\n", encoding="ascii")
    compiler.chmod(0o755)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    region = Region(tmp_path / "cache")
    with torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}):
        assert torch.equal(region(block, x), small(block, x, None))
    (warning,) = region.listener.warnings
    assert "C++ compiler" in warning
    assert not list((tmp_path / "cache").glob("*"))


def test_what_was_stored_is_set_aside_before_the_compiler_is_blamed(tmp_path, monkeypatch):
    """A failure that says nothing of its cause gets one more attempt, in an empty folder, with nothing stored."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    block, x = make_block(), make_input(1, 5)
    Region(tmp_path)(block, x)
    from torch._inductor import compile_fx as module

    real, calls = module.compile_fx, []

    def once(*args, **kwargs):
        calls.append(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
        if len(calls) == 1:
            raise AssertionError("a cached file is broken")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "compile_fx", once)
    region = Region(tmp_path)
    assert close(region(block, x, x), small(block, x, x))
    before, after = calls
    assert before != after
    assert Path(after).is_dir()
    assert not Path(before).exists()
    assert (region.compiler.failure, region.listener.warnings) == (None, [])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no memory"), SystemExit()])
def test_an_interrupt_or_a_full_memory_is_no_failure_of_the_compiler(tmp_path, monkeypatch, error):
    block, x = make_block(), make_input(1, 5)
    region = Region(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", failing(error))
        with pytest.raises(type(error)):
            region(block, x)
    assert (region.compiler.failure, region.listener.warnings) == (None, [])
    assert close(region(block, x), small(block, x, None))
    assert region.compiler.count == 1


def test_an_error_of_the_computation_itself_is_raised_as_it_is(tmp_path):
    block = make_block()
    region = Region(tmp_path)
    with pytest.raises(RuntimeError, match="shape"):
        region(block, torch.randn(1, 5, WIDTH + 1))
    assert (region.compiler.failure, region.listener.warnings) == (None, [])


# Modes.


def test_each_mode_has_its_options_for_its_own_compiles_only(monkeypatch):
    assert {*INDUCTOR_OPTIONS, "off"} == set(COMPILE_MODES)
    from torch._inductor import compile_fx as module

    real, seen = module.compile_fx, []

    def watching(*args, config_patches=None, **kwargs):
        seen.append(dict(config_patches or {}))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "compile_fx", watching)
    block, x = make_block(), make_input(1, 5)
    for mode in COMPILE_MODES:
        assert close(Region(mode=mode)(block, x), small(block, x, None))
    assert seen == [{}, INDUCTOR_OPTIONS["regional max-autotune"], {}]
    assert INDUCTOR_OPTIONS["regional max-autotune"]["triton.cudagraphs"] is False
    assert not torch._inductor.config.max_autotune
    for options in INDUCTOR_OPTIONS.values():
        with torch._inductor.config.patch(options):  # every name exists in this torch
            pass
