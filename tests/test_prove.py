"""Nothing computes before it has proved itself: every product with every fault, what is remembered, what takes over.

The faults are injected: no machine that these tests run on has a broken kernel. int4, nvfp4 and mxfp8 do not run on a
CPU; stand-ins compute what their formats' formulas say.
"""

import contextlib
import dataclasses
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import accel.prove
from accel.attention import BACKENDS
from accel.checkpoint import inspect_checkpoint
from accel.compile.compiler import RegionCompiler
from accel.engine import Engine
from accel.errors import SettingsError
from accel.linear import float8, product
from accel.lora.stack import LoraStack
from accel.memory.cpu import HostMemory
from accel.memory.gpu import CudaMemory
from accel.observer import Silent
from accel.offload.prove import restrict
from accel.prove import Proofs, Verdict, judge, proofs, random
from accel.quantize import choose, dequantize
from accel.quantize.bitsandbytes_modes import Nf4Linear
from accel.quantize.mode import runs_anywhere
from accel.quantize.modes import MODES, PREFERENCES
from accel.quantize.prove import prove
from accel.selftest import prove_compiling
from accel.settings import EngineSettings, Quantization
from harness import selftest
from tests.test_engine import distance, make_inputs

CPU = torch.device("cpu")
BF16 = torch.bfloat16
CHECKPOINT = "diffusion_models/tiny-flux-dev-fp32.safetensors"
WORDS = "Rowwise scaling is not currently supported on your device"


def raises(result):
    raise RuntimeError(f"{WORDS}\nand pages more")


FAULTS = {
    "raises": raises,
    "NaN": lambda result: torch.full_like(result, torch.nan if result.is_floating_point() else -(2**31)),
    "zeros": torch.zeros_like,
    "10 % off": lambda result: (result * 1.1).to(result.dtype) if result.is_floating_point() else result + result // 10,
}
IN_WORDS = {
    "raises": re.escape(f"does not run here (RuntimeError: {WORDS})"),
    "NaN": "computes wrong numbers here: (nan|inf|1e\\+|[0-9.]+e\\+)",
    "zeros": "computes wrong numbers here: .* 0 times as large|computes wrong numbers here",
    "10 % off": "computes wrong numbers here",
}


@pytest.fixture(autouse=True)
def nothing_proven():
    """Each test starts and ends with nothing known."""
    forget()
    yield
    forget()


def forget():
    for cache in (proofs, float8.way_on, product.gelu_fuses):
        cache.cache_clear()


def faulty(function, fault):
    return lambda *args, **options: FAULTS[fault](function(*args, **options))


def written(function, fault):
    """As `faulty`, for a function that may be told where to write."""

    def run(*args, out=None, **options):
        result = FAULTS[fault](function(*args, **options))
        return result if out is None else out.copy_(result)

    return run


# Formulas of what runs on a GPU alone.

NVFP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def as_nvfp4(matrix):
    blocks = matrix.float().view(-1, 16)
    whole = blocks.abs().max() / 6 / 448
    scale = (blocks.abs().amax(1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    nearest = ((blocks / scale).abs()[..., None] - NVFP4_VALUES).abs().argmin(-1)
    return (NVFP4_VALUES[nearest] * blocks.sign() * scale).view_as(matrix)


def as_mxfp8(matrix):
    blocks = matrix.float().view(-1, 32)
    scale = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(1, keepdim=True))) - 8)
    return ((blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).view_as(matrix)


def as_int4(matrix):
    groups = matrix.float().view(-1, 128)
    least, most = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (most - least) / 15
    return (((groups - least) / scale).round() * scale + least).view_as(matrix)


class Formula(nn.Linear):
    """A linear over a format's values, its input rounded likewise if the mode does that."""

    def __init__(self, weight, bias, stored, read):
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(stored(weight), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.read = read

    def forward(self, x):
        return F.linear(self.read(x).float(), self.weight, self.bias).to(x.dtype)


def unrounded(x):
    return x


FORMULAS = {"nvfp4": (as_nvfp4, as_nvfp4), "mxfp8": (as_mxfp8, as_mxfp8), "int4": (as_int4, unrounded)}


def with_fault(monkeypatch, name, fault):
    """The mode of a name whose product has a fault; None for none."""
    mode = MODES[name]
    if name == "fp8":
        monkeypatch.setattr(torch, "_scaled_mm", written(torch._scaled_mm, fault)) if fault else None
    elif name == "int8":
        monkeypatch.setattr(torch, "_int_mm", faulty(torch._int_mm, fault)) if fault else None
    elif name == "nf4":
        monkeypatch.setattr(Nf4Linear, "unpack", faulty(Nf4Linear.unpack, fault)) if fault else None
    elif name in FORMULAS:
        stored, read = FORMULAS[name]

        def convert(weight, bias, per_picture):
            linear = Formula(weight, bias, stored, read)
            return broken(linear, fault)

        return dataclasses.replace(mode, lacks=runs_anywhere, convert=convert)
    elif fault:
        return dataclasses.replace(mode, convert=lambda *weights: broken(mode.convert(*weights), fault))
    return mode


def broken(linear, fault):
    if fault:
        linear.forward = faulty(linear.forward, fault)
    return linear


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_a_mode_proves_itself_with_room_to_spare(monkeypatch, name, dtype):
    mode = with_fault(monkeypatch, name, None)
    verdict = prove(mode, CPU, dtype).verdict
    assert verdict.refusal is None
    assert mode.error / 3 < verdict.deviation < mode.error / 1.3


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", MODES)
def test_a_product_with_a_fault_is_refused(monkeypatch, name, fault):
    mode = with_fault(monkeypatch, name, fault)
    if name == "fp8" and fault != "raises":
        words = "has no float8 product that works: .*scaled afterwards, it computes wrong numbers here"
    else:
        words = IN_WORDS[fault]
    assert re.search(words, prove(mode, CPU, BF16).refusal)


@pytest.mark.parametrize("fault", FAULTS)
def test_auto_takes_the_best_that_proved_itself_and_says_what_failed(monkeypatch, fault):
    monkeypatch.setitem(PREFERENCES, "cpu", PREFERENCES["cuda"])
    assert choose("auto", CPU).mode == "fp8"
    forget()
    with_fault(monkeypatch, "fp8", fault)
    choice = choose("auto", CPU)
    assert choice.mode == "int8"
    assert re.search(rf"; fp8 .*{IN_WORDS[fault]}", choice.reason)
    with_fault(monkeypatch, "int8", fault)
    forget()
    choice = choose("auto", CPU)
    assert choice.mode == "int8_weight_only"
    assert re.search(rf"; fp8 .*; int8 .*{IN_WORDS[fault]}", choice.reason)


@pytest.fixture(scope="module")
def spec(models):
    return inspect_checkpoint(str(models / CHECKPOINT))


def engine_of(spec, mode="none", compile="off", observer=None, **options):
    return Engine(spec, EngineSettings(compile=compile, quantization=Quantization(mode)), observer, **options)


def test_an_explicit_choice_is_refused_in_the_librarys_words(monkeypatch, spec):
    with_fault(monkeypatch, "int8", "raises")
    message = rf"quantization 'int8' {IN_WORDS['raises']}\. The nearest mode that runs here is 'int8_weight_only'\."
    with pytest.raises(SettingsError, match=message):
        choose("int8", CPU)
    with pytest.raises(SettingsError, match=message):
        engine_of(spec, "int8")


def test_out_of_memory_says_nothing_of_a_mode(monkeypatch):
    full = True

    def convert(*weights):
        if full:
            raise torch.OutOfMemoryError("no room")
        return MODES["nf4"].convert(*weights)

    mode = dataclasses.replace(MODES["nf4"], convert=convert)
    with pytest.raises(torch.OutOfMemoryError):
        prove(mode, CPU, BF16)
    full = False
    assert prove(mode, CPU, BF16).refusal is None


# float8 without a kernel that scales by rows.


def only_one_scale(product):
    """`_scaled_mm` as on Windows: it refuses a scale for each row."""

    def run(*args, scale_a, **options):
        if scale_a.numel() > 1:
            raise RuntimeError(WORDS)
        return product(*args, scale_a=scale_a, **options)

    return run


class Notices(Silent):
    def __init__(self):
        self.said = []

    def notice(self, text, warning):
        self.said.append(text)


def test_fp8_without_products_scaled_by_row_draws_the_same(monkeypatch, spec):
    by_row = engine_of(spec, "fp8")
    by_row.load()
    if not float8.way_on(CPU, torch.float32).refusals:  # PyTorch 2.11 has none on a CPU
        assert float8.way_on(CPU, torch.float32).name == "scaled by row"
    expected = by_row(make_inputs())
    monkeypatch.setattr(torch, "_scaled_mm", only_one_scale(torch._scaled_mm))
    forget()
    notices = Notices()
    afterwards = engine_of(spec, "fp8", observer=notices)
    afterwards.load()
    assert any(
        re.fullmatch(rf"fp8: float8 products scaled by row: .*{WORDS}.*; they are scaled afterwards\.", text)
        for text in notices.said
    )
    # Sums that differ in the last bit move some activations to the next of fp8's steps.
    assert distance(afterwards(make_inputs()), expected) < 0.02


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_scaling_afterwards_in_runs_of_rows(monkeypatch, dtype, with_bias):
    rows, weight = (random((size, 64), CPU, size, 4.0).to(torch.float8_e4m3fn) for size in (45, 32))
    scales = [random((size, 1), CPU, size).abs() for size in (45, 32)]
    bias = random((32,), CPU, 0).to(dtype) if with_bias else None
    exact = (rows.float() * scales[0]) @ (weight.float() * scales[1]).t() + (0 if bias is None else bias.float())
    operands = float8.Operands(rows, weight, *scales, bias, dtype)
    whole = float8.scaled_afterwards(operands)
    assert distance(whole.float(), exact) < 4 * torch.finfo(dtype).eps
    monkeypatch.setattr(float8, "RUN_ELEMENTS", 32 * 10)
    out = torch.empty(45, 32, dtype=dtype)
    assert float8.scaled_afterwards(dataclasses.replace(operands, out=out)) is out
    assert torch.equal(out, whole)


def test_the_faster_way_is_taken_and_the_shorter_one_if_they_are_alike():
    assert float8.fastest({"scaled by row": 1.0, "scaled afterwards": 0.9}) == "scaled afterwards"
    assert float8.fastest({"scaled by row": 1.0, "scaled afterwards": 0.97}) == "scaled by row"


# Copies.


class InOrder:
    """What torch.cuda has of streams, for a device that does everything at once."""

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_event(self, event):
            pass

        def synchronize(self):
            pass

    class Event:
        def record(self, stream):
            pass

    def current_stream(self, device):
        return self.Stream()

    def stream(self, stream):
        return contextlib.nullcontext()


class BrokenStreams(InOrder):
    class Stream(InOrder.Stream):
        def __init__(self, device=None):
            raise RuntimeError("no streams here")


class LosesTheLastPiece(CudaMemory):
    """Copies that are not done when they say so."""

    def copy(self, target, pieces, after):
        return super().copy(target, pieces[:-1] if self.beside else pieces, after)


def memory_on_cpu(kind=CudaMemory, streams=None):
    """A GPU's memory whose device is the CPU. Page-locking needs a driver, so it is off."""
    return kind(CPU, pin=False, streams=streams or InOrder())


def test_copies_that_work_stay_as_they_are():
    memory = memory_on_cpu()
    assert restrict(memory) == ()
    assert memory.beside
    assert restrict(HostMemory()) == ()


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (lambda: memory_on_cpu(streams=BrokenStreams()), r"does not run here \(RuntimeError: no streams here\)"),
        (lambda: memory_on_cpu(LosesTheLastPiece), r"gives wrong data here: [\d,]+ of 1,048,576 bytes"),
    ],
    ids=["raises", "wrong"],
)
def test_copies_with_a_fault_take_turns_with_the_computation(memory, words):
    memory = memory()
    (sentence,) = restrict(memory)
    assert re.fullmatch(rf"copying beside the computation {words}: the two take turns\.", sentence)
    source, target = torch.arange(9, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
    memory.wait(memory.copy(target, [(0, source[:4]), (4, source[4:])], after=memory.mark()))
    memory.finish()
    assert torch.equal(target, source)


def test_page_locking_that_fails_is_done_without(monkeypatch, spec):
    memory = memory_on_cpu()
    memory.pin = memory.flat = True  # this torch cannot lock pages without a driver, and says so
    notices = Notices()
    engine = engine_of(spec, observer=notices, memory=memory)
    assert any(text.startswith("page-locked host memory ") and "twice as long" in text for text in notices.said)
    assert not memory.pin
    assert not engine.library._pin


# What else is fused.


@pytest.mark.parametrize("fault", FAULTS)
def test_a_product_with_gelu_that_fails_is_two_operations(monkeypatch, fault):
    monkeypatch.setattr(torch, "_addmm_activation", faulty(torch._addmm_activation, fault))
    assert not product.gelu_fuses(CPU, BF16)


def test_a_product_with_gelu_that_works():
    assert product.gelu_fuses(CPU, BF16)


# Compiled regions.


def region(block, x):
    return torch.tanh(x * 2) + x


@pytest.mark.parametrize("fault", ["NaN", "zeros", "10 % off"])
def test_a_compiled_region_that_is_wrong_is_not_used(monkeypatch, fault):
    import torch._inductor.compile_fx as inductor

    def compile_wrong(graph, example_inputs, config_patches=None):
        return lambda *args: [FAULTS[fault](result) for result in graph.forward(*args)]

    monkeypatch.setattr(inductor, "compile_fx", compile_wrong)
    notices = Notices()
    compiler = RegionCompiler("regional", notices)
    run = compiler.region(region)
    x = random((2, 40, 16), CPU, 0)
    with torch.inference_mode(), compiler.scope():
        first, second = run(nn.Identity(), x), run(nn.Identity(), x)
    assert torch.equal(first, region(None, x))
    assert torch.equal(second, first)
    assert re.match(r"the compiled region blocks are (inf|1|0\.1) from uncompiled ones", compiler.failure)
    assert "right pictures, but slower" in notices.said[-1]


@pytest.mark.slow
def test_the_tolerance_tells_a_wrong_region_from_another_rounding(monkeypatch):
    x = random((2, 40, 16), CPU, 0)
    verdict = prove_compiling(CPU, BF16).verdict
    assert verdict.refusal is None
    import torch._inductor.compile_fx as inductor

    monkeypatch.setattr(inductor, "compile_fx", lambda graph, *_, **__: lambda *args: [r * 1.1 for r in graph(*args)])
    proofs.cache_clear()
    assert "from uncompiled ones" in prove_compiling(CPU, torch.float32).refusal
    assert x.isfinite().all()


# What is remembered.


def counting(verdict):
    calls = []

    def compare():
        calls.append(1)
        return verdict

    return calls, compare


def test_a_proof_runs_once_a_process_and_what_passed_once_a_machine(tmp_path):
    first = Proofs()
    first.remember_in(tmp_path / "made" / "when needed")
    calls, compare = counting(Verdict(None, 0.25))
    for _ in range(3):
        proof = first.of("a thing", CPU, compare)
    assert (len(calls), proof.remembered, proof.deviation) == (1, False, 0.25)
    later = Proofs()
    later.remember_in(tmp_path / "made" / "when needed")
    proof = later.of("a thing", CPU, compare)
    assert (len(calls), proof.remembered, proof.deviation) == (1, True, 0.25)
    assert proof.sentence.endswith("ms in an earlier start")
    later.of("another thing", CPU, compare)
    assert len(calls) == 2
    assert [each.name for each in later.all] == ["a thing", "another thing"]


def test_what_was_measured_is_not_measured_again(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"one way": 2.0, "another": 1.0 * len(calls)}

    for _ in range(2):
        known = Proofs()
        known.remember_in(tmp_path)
        known.of("a thing", CPU, lambda: Verdict(None))
        for _ in range(2):
            assert known.seconds("ways", CPU, measure) == {"one way": 2.0, "another": 1.0}
    assert calls == [1]
    assert [proof.name for proof in known.all] == ["a thing"]


def test_what_failed_is_tried_again_by_the_next_process(tmp_path):
    calls, compare = counting(Verdict("does not work"))
    for expected in (1, 2):
        known = Proofs()
        known.remember_in(tmp_path)
        for _ in range(2):
            assert known.of("a thing", CPU, compare).sentence == "FAILED: does not work"
        assert len(calls) == expected


def test_another_driver_or_library_proves_everything_again(tmp_path, monkeypatch):
    calls, compare = counting(Verdict(None))
    for version, expected in (("1", 1), ("1", 1), ("2", 2)):
        monkeypatch.setattr(accel.prove, "machine", lambda device, version=version: {"driver": version})
        known = Proofs()
        known.remember_in(tmp_path)
        known.of("a thing", CPU, compare)
        assert len(calls) == expected


def test_a_damaged_file_is_no_proof(tmp_path):
    calls, compare = counting(Verdict(None))
    for number in (1, 2):
        known = Proofs()
        known.remember_in(tmp_path)
        known.of("a thing", CPU, compare)
        assert len(calls) == number
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-1])


def test_a_folder_that_cannot_be_written_costs_only_the_next_start(tmp_path):
    (tmp_path / "file").write_text("")
    known = Proofs()
    known.remember_in(tmp_path / "file" / "below")
    calls, compare = counting(Verdict(None))
    assert known.of("a thing", CPU, compare).refusal is None
    assert calls == [1]


def test_threads_that_ask_at_once_run_it_once():
    known, calls = Proofs(), []
    start = threading.Barrier(4)

    def ask():
        start.wait()
        known.of("a thing", CPU, lambda: calls.append(1) or Verdict(None))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y[:-1], r"returns \(39, 48\), expected \(40, 48\)"),
        (lambda y: torch.cat([y[:, :-1], torch.zeros(40, 1)], dim=1), "1 at the worst row or column"),
        (lambda y: torch.cat([y[:-1], torch.zeros(1, 48)]), "1 at the worst row or column"),
        (lambda y: y * 0.95, "0.95 times as large"),
    ],
    ids=["shape", "last column", "last row", "scale"],
)
def test_judging(change, words):
    reference = random((40, 48), CPU, 0)
    assert judge(reference + random((40, 48), CPU, 1, 0.1), reference, 0.2).refusal is None
    assert re.search(words, judge(change(reference), reference, 0.2).refusal)


# For a person.


def test_the_selftest_prints_a_line_for_everything(capsys, monkeypatch):
    def known(*_):
        """Other tests compile regions and compare attention."""
        return proofs().of("known", CPU, lambda: Verdict(None))

    monkeypatch.setattr("accel.selftest.prove_compiling", known)
    monkeypatch.setattr("accel.selftest.verify", known)
    with_fault(monkeypatch, "int8", "raises")
    assert selftest.main(["--device", "cpu"]) == 1
    text = capsys.readouterr().out
    for name in (*(f"quantization {mode}" for mode in MODES), *(f"attention {backend}" for backend in BACKENDS)):
        assert f"  {name} " in text
    assert re.search(r"quantization fp8 +works, 0\.037 from the reference, \d+ ms", text)
    assert re.search(r"quantization int8 +FAILED: does not run here", text)
    assert re.search(r"quantization nvfp4 +not here  needs fp4 products", text)
    assert re.search(r"float8 product scaled afterwards +works", text)
    assert re.search(r"compiled region +works", text)
    by_row = float8.way_on(CPU, BF16).refusals  # PyTorch 2.11 has none on a CPU
    assert text.rstrip().endswith(f"{1 + len(by_row)} failed")


def test_a_proof_is_in_the_report(spec):
    from accel.report import Reported, write_report

    engine = engine_of(spec, "int8")
    engine.load()
    engine.swap(LoraStack())
    text = write_report(Reported(engine))
    assert re.search(r"What proved itself on this device\n(.*\n)*  quantization int8, float32 +works, 0\.01", text)


def test_what_is_proved_is_what_is_computed_with():
    """The reference is the unquantized product; what a linear computes with is `dequantize`."""
    weight, bias = random((384, 512), CPU, 0, 0.05), torch.zeros(384)
    x = random((40, 512), CPU, 1)
    for name in ("fp8_weight_only", "int8_weight_only", "nf4"):
        linear = MODES[name].convert(weight, bias, False)
        assert distance(linear(x), F.linear(x, dequantize(linear))) < 1e-5
