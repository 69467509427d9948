"""What the rules make of devices that are not here: every kind is simulated by what the rules ask of it."""

import re

import pytest
import torch

import accel.quantize.modes
from accel.compile.failures import failure_notice
from accel.errors import SettingsError
from accel.hardware import dtype_on, hardware_of
from accel.memory.gpu import CudaMemory
from accel.prove import Proof, Verdict
from accel.quantize import choose
from accel.quantize.modes import MODES
from harness import device_table

CUDA = torch.device("cuda:0")


@pytest.fixture(params=device_table.KINDS)
def kind(request, monkeypatch):
    """A kind of device on which whatever the rules allow works."""
    hardware = device_table.KINDS[request.param]
    monkeypatch.setattr(accel.quantize.modes, "hardware_of", lambda device: hardware)
    monkeypatch.setattr(accel.quantize.modes, "prove", lambda *_: Proof("", "", Verdict(None), 0.0))
    return hardware


def test_auto_takes_what_the_rules_allow(kind):
    chosen = choose("auto", CUDA).mode
    assert chosen == device_table.candidates(kind)[0]
    assert MODES[chosen].lacks(kind) is None
    assert dtype_on("auto", torch.bfloat16, kind) == (torch.float16 if kind.capability == (7, 5) else torch.bfloat16)
    assert device_table.attention_candidates(kind)[0] == "sdpa"


def test_what_the_rules_do_not_allow_is_refused_with_one_that_they_do(kind):
    for name, mode in MODES.items():
        if mode.lacks(kind) is None:
            assert choose(name, CUDA).mode == name
            continue
        with pytest.raises(SettingsError, match=f"quantization '{name}' needs ") as refused:
            choose(name, CUDA)
        nearest = re.search(r"The nearest mode that runs here is '(\w+)'", str(refused.value))[1]
        assert MODES[nearest].lacks(kind) is None


def test_auto_goes_on_where_a_device_has_less_than_its_rules(kind, monkeypatch):
    """Such as a Blackwell card whose cuBLAS refuses the product."""
    candidates = device_table.candidates(kind)

    def prove(mode, device, dtype):
        return Proof("", "", Verdict("is broken" if mode.name == candidates[0] else None), 0.0)

    monkeypatch.setattr(accel.quantize.modes, "prove", prove)
    choice = choose("auto", CUDA)
    assert choice.mode == (candidates[1] if len(candidates) > 1 else "none")
    assert f"{candidates[0]} is broken" in choice.reason


def test_bf16_on_a_card_without_it_is_refused():
    turing = device_table.KINDS["Turing (RTX 20, T4)"]
    with pytest.raises(SettingsError, match=r"'bf16', which .* 8\.0 on; a Turing card has 7\.5: choose 'fp16'"):
        dtype_on("bf16", torch.bfloat16, turing)


def test_what_a_device_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    found = hardware_of(CUDA)
    assert (found.kind, found.sentence) == ("cuda", "Some Card has 8.9")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found = hardware_of(CUDA)
    assert (found.kind, found.capability, found.sentence) == ("rocm", None, "this is an AMD card")
    assert hardware_of(torch.device("mps")).sentence == "this is the device mps"


@pytest.mark.parametrize(("device", "beside"), [("cuda", True), ("xpu", True), ("mps", False)])
def test_copies_take_turns_where_there_are_no_streams(device, beside):
    assert CudaMemory(torch.device(device), pin=False).beside == beside


def test_a_card_whose_compiled_code_reads_no_float8_is_told_what_does():
    """What Triton says below compute capability 8.9."""
    error = ImportError("type fp8e4nv not supported in this architecture. The supported fp8 dtypes are ('fp8e5',)")
    assert "choose int8_weight_only in Quantize Transformer" in failure_notice("double", error)


def test_the_page_is_what_the_rules_say():
    """After a change of a rule: `python -m harness.device_table`."""
    assert device_table.PAGE.read_text(encoding="utf-8") == device_table.page()
