"""Attention backends: chosen per engine, checked before they draw, traced in one graph.

No library of another project is installed here, and there is no GPU: `harness.attention_packages` writes stand-ins with
the declarations of the real ones and SDPA inside. They show that the pack calls the libraries as declared, and refuses
what is missing, broken or wrong. That the real kernels are right is for the tests marked gpu.
"""

import dataclasses
import gc
import importlib
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from accel.attention import (
    BACKENDS,
    Target,
    check_attention,
    choose,
    choose_attention,
    correctness,
    flash,
    library,
    native,
    onednn,
)
from accel.attention.backend import EXACT
from accel.attention.correctness import judge, verify
from accel.checkpoint import inspect_checkpoint
from accel.engine import Engine
from accel.errors import SettingsError
from accel.families.flux1 import Flux1Inputs
from accel.observer import Silent
from accel.prove import proofs
from accel.settings import ATTENTION_BACKENDS, EngineSettings
from harness.attention_packages import PACKAGES, write_package
from harness.paths import REPO

NAMES = ("sdpa", "cudnn", "flash_2", "flash_3", "flash_4", "sage", "xformers", "flex", "onednn")
CHECKPOINT = "diffusion_models/tiny-flux-dev-fp32.safetensors"
CPU = Target(torch.device("cpu"), torch.bfloat16, 2, 128, compiled=True)
CUDA = dataclasses.replace(CPU, device=torch.device("cuda:0"), heads=24)
# Stand-in -> the backend that it serves.
SERVES = {
    "flash_2": "flash_2", "flash_2_old": "flash_2", "flash_3": "flash_3", "flash_3_old": "flash_3",
    "flash_4": "flash_4", "sage": "sage", "xformers": "xformers", "kernels": "flash_3",
}  # fmt: skip
MODULES = ("flash_attn", "flash_attn_interface", "sageattention", "xformers", "kernels")
OPERATORS = ("flash_attn::_flash_attn_forward", "flash_attn_3::_flash_attn_forward")


REMEMBERED = (library.find, proofs, flash._hub_function)


def clear_caches() -> None:
    for cached in REMEMBERED:
        cached.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write stand-ins where Python finds them, and give the module that records calls; nothing of them is left."""

    def put(package: str, version: str | None = None, changes: dict[str, str] | None = None):
        write_package(tmp_path, package, version, changes)
        importlib.invalidate_caches()
        holder = "flash_attn_interface_of_the_hub.py" if package == "kernels" else list(PACKAGES[package][2])[-1]
        return holder.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    monkeypatch.syspath_prepend(str(tmp_path))
    clear_caches()
    yield put
    clear_caches()
    for name in [name for name in sys.modules if name.startswith(MODULES)]:
        del sys.modules[name]
    for name in OPERATORS:
        definition = torch._library.custom_ops.OPDEFS.pop(name, None)
        if definition is not None:
            definition._lib._destroy()
            namespace, _, operator_name = name.partition("::")
            vars(getattr(torch.ops, namespace)).pop(operator_name, None)
    # A library takes its operators out of torch.ops by name when it is collected, be they another one's by then.
    gc.collect()


@pytest.fixture
def card(monkeypatch):
    """Pretend that cuda:0 is a card of some compute capability."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some Card")
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)

    return pretend


@pytest.fixture
def on_cpu(monkeypatch):
    """Let backends pass for ones that run on any device: their stand-ins do."""
    for name in NAMES:
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], hardware=lambda target: None))


def make_inputs(target: Target, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode():  # as in an engine: compiled code is bound to it
        return correctness.make_inputs(target, batch, tokens)


def graphs_of(function, *inputs, dynamic=True):
    """The graphs that torch.compile traces of a function."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.inference_mode():
        return compiled, graphs, compiled(*inputs)


def calls_in(graph) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


# What can be chosen.


def test_the_names_are_those_of_the_loader():
    assert ("auto", *BACKENDS) == ATTENTION_BACKENDS
    assert tuple(BACKENDS) == NAMES
    for name in ("auto", *NAMES):
        assert EngineSettings(attention=name).attention == name
    with pytest.raises(SettingsError, match="attention is 'flash', expected one of: auto, sdpa, cudnn"):
        EngineSettings(attention="flash")


@pytest.mark.parametrize(
    ("capability", "run"),
    [
        ((7, 5), {"xformers", "flex", "sdpa"}),
        ((8, 6), {"xformers", "flex", "sdpa", "cudnn", "flash_2", "sage"}),
        ((8, 9), {"xformers", "flex", "sdpa", "cudnn", "flash_2", "sage"}),
        ((9, 0), {"xformers", "flex", "sdpa", "cudnn", "flash_2", "sage", "flash_3", "flash_4"}),
        ((10, 0), {"xformers", "flex", "sdpa", "cudnn", "flash_2", "flash_4"}),
        ((12, 0), {"xformers", "flex", "sdpa", "cudnn", "flash_2", "sage", "flash_4"}),
    ],
)
def test_hardware(card, capability, run):
    card(*capability)
    reasons = {name: BACKENDS[name].hardware(CUDA) for name in NAMES}
    assert {name for name, reason in reasons.items() if reason is None} == run
    assert "runs on CPUs; this is the device cuda:0" in reasons["onednn"]
    for name in set(NAMES) - run - {"onednn"}:
        assert f"Some Card has {capability[0]}.{capability[1]}" in reasons[name]


@pytest.mark.parametrize("bf16_units", [True, False])
def test_what_runs_on_a_cpu(monkeypatch, bf16_units):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16_units)
    found = {name for name in NAMES if BACKENDS[name].missing(CPU) is None}
    assert found == {"sdpa", "flex"} | ({"onednn"} if bf16_units else set())
    if not bf16_units:
        with pytest.raises(SettingsError, match=r"'onednn' needs a CPU that multiplies bfloat16 .* 'sdpa'"):
            check_attention("onednn", CPU)
    with pytest.raises(SettingsError, match=r"'flash_3' needs an NVIDIA card .* 9.x; this is the device cpu. .*'sdpa'"):
        check_attention("flash_3", CPU)
    with pytest.raises(SettingsError, match=r"'flex' runs compiled only: set 'compile' to 'regional'. .* 'sdpa'"):
        check_attention("flex", dataclasses.replace(CPU, compiled=False))
    with pytest.raises(SettingsError, match="'flex' has no kernels for the device mps"):
        check_attention("flex", dataclasses.replace(CPU, device=torch.device("mps")))


def test_what_an_amd_card_runs(card, monkeypatch):
    card(9, 4)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert {name for name in NAMES if BACKENDS[name].hardware(CUDA) is None} == {"sdpa", "flash_2", "xformers", "flex"}
    assert "this is an AMD card" in BACKENDS["flash_3"].hardware(CUDA)


def test_float16_on_a_cpu_is_not_for_onednn(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    half = dataclasses.replace(CPU, dtype=torch.float16)
    assert BACKENDS["onednn"].missing(half) == "computes in bfloat16, but dtype is float16"


# What onednn computes; on a CPU without bfloat16 units too, only slowly.


@pytest.mark.parametrize("max_scores", [2**22, 8 * 203**2, 203 * 50])
@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_onednn_computes_attention_in_parts_of_any_size(monkeypatch, max_scores, sharpness):
    monkeypatch.setattr(onednn, "MAX_SCORES", max_scores)
    monkeypatch.setattr(correctness, "SHARPNESS", sharpness)
    target = dataclasses.replace(CPU, heads=5)
    query, key, value = make_inputs(target, 2, 203)
    attention = BACKENDS["onednn"].make()
    output = attention(query, key, value, None)
    assert output.transpose(1, 2).is_contiguous()
    reference = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert judge(BACKENDS["onednn"], target, output, reference).refusal is None
    mask = torch.rand(2, 1, 203, 203) < 0.5
    assert torch.equal(attention(query, key, value, mask), native.sdpa(query, key, value, mask))


def test_control_scores_that_are_rounded_once_are_too_coarse(monkeypatch):
    product = torch.baddbmm

    def rounded(largest, queries, keys, *, alpha, out):
        return out.copy_(product(torch.zeros_like(largest), queries, keys, alpha=alpha) + largest)

    monkeypatch.setattr(torch, "baddbmm", rounded)
    query, key, value = make_inputs(CPU, 1, 203)
    output = BACKENDS["onednn"].make()(query, key, value, None)
    reference = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert "computes wrong numbers" in judge(BACKENDS["onednn"], CPU, output, reference).refusal


@pytest.mark.parametrize("name", ["cudnn", "flash_2", "flash_3", "flash_4", "sage"])
def test_a_dtype_without_kernels_is_refused(card, name):
    card(9, 0)
    with pytest.raises(SettingsError, match=f"'{name}' computes in bfloat16, float16, but dtype is float32. .* 'sdpa'"):
        check_attention(name, dataclasses.replace(CUDA, dtype=torch.float32))


def test_heads_without_kernels_are_refused(card):
    card(9, 0)
    wide = dataclasses.replace(CUDA, head_dim=192)
    assert "of up to 128 channels, in eights; this model's have 192" in BACKENDS["sage"].hardware(wide)
    assert BACKENDS["flash_2"].hardware(wide) is None
    assert BACKENDS["flash_2"].hardware(dataclasses.replace(CUDA, head_dim=100)) is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flash_2", "needs the package flash-attn, which is not installed: pip install flash-attn"),
        ("flash_3", "needs the package flash_attn_3, which is not installed: pip install 'kernels>=0.12'"),
        ("flash_4", "needs the package flash-attn-4, which is not installed: pip install --pre flash-attn-4"),
        ("sage", "needs the package sageattention, which is not installed: build it from"),
        ("xformers", "needs the package xformers, which is not installed: pip install xformers"),
    ],
)
def test_a_missing_library_is_named_with_where_to_get_it(card, install, name, expected):
    card(9, 0)
    with pytest.raises(SettingsError) as raised:
        check_attention(name, CUDA)
    assert expected in str(raised.value)
    assert str(raised.value).endswith("The nearest that runs here is 'cudnn'.")


def test_the_nearest_is_one_that_is_installed(card, install):
    card(8, 9)
    install("flash_2")
    with pytest.raises(SettingsError, match=r"'flash_2'\.$"):
        check_attention("sage", CUDA)


@pytest.mark.parametrize(
    ("package", "version", "needed"),
    [("flash_2", "2.5.9", "2.6.3"), ("sage", "1.0.6", "2.1.1"), ("xformers", "0.0.28", "0.0.29")],
)
def test_an_old_library_is_refused(card, install, package, version, needed):
    card(9, 0)
    install(package, version)
    with pytest.raises(SettingsError, match=f"{needed} or newer, installed is {version}: "):
        check_attention(SERVES[package], CUDA)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "(ImportError: undefined symbol: _ZN3c10). Often it"),
        ("raise OSError('libcudart.so.11: cannot open')", "(OSError: libcudart.so.11: cannot open)"),
        ("import not_there", "needs sageattention, which does not load: the package not_there is missing"),
        ("undefined_name", "(NameError: "),
    ],
)
def test_a_broken_library_is_named(card, install, change, expected):
    card(9, 0)
    install("sage", changes={"CALLS = []": f"CALLS = []\n{change}"})
    with pytest.raises(SettingsError) as raised:
        check_attention("sage", CUDA)
    assert expected in str(raised.value)


def test_a_library_is_imported_once(card, install):
    card(9, 0)
    module = install("sage")
    for _ in range(3):
        check_attention("sage", CUDA)
    first = sys.modules.pop(module)
    check_attention("sage", CUDA)
    assert module not in sys.modules
    assert BACKENDS["sage"].library() is None
    assert first.CALLS == []


# How the libraries are called.


@pytest.mark.parametrize("package", SERVES)
def test_a_library_gets_what_it_declares_without_a_copy(install, package):
    module = install(package)
    attention = BACKENDS[SERVES[package]].make()
    assert attention.__closure__ is None  # what is compiled of it can be stored
    query, key, value = make_inputs(CPU, 2, 77)
    with torch.inference_mode():
        output = attention(query, key, value, None)
        assert torch.equal(output, F.scaled_dot_product_attention(query, key, value))
    calls = importlib.import_module(module).CALLS
    assert calls == [(query.data_ptr(), (2, 77, 2, 128), torch.bfloat16)]
    # Heads beside each other, as the next linear reads them.
    joined = output.transpose(1, 2).flatten(2)
    assert joined.data_ptr() == output.data_ptr()
    assert joined.is_contiguous()


@pytest.mark.parametrize("package", SERVES)
def test_each_is_traced_in_one_graph_whatever_the_sizes(install, package):
    install(package)
    attention = BACKENDS[SERVES[package]].make()
    expected = {  # the library's own operator, where it has one
        "flash_2": "flash_attn._flash_attn_forward", "flash_3": "flash_attn_3._flash_attn_forward",
    }.get(package, f"flux_hotswap.attention_{SERVES[package]}")  # fmt: skip
    compiled, graphs, _ = graphs_of(attention, *make_inputs(CPU, 3, 77), None)
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 160), (5, 200)):
            inputs = make_inputs(CPU, batch, tokens)
            assert torch.equal(compiled(*inputs, None), F.scaled_dot_product_attention(*inputs))
    assert len(graphs) == 1
    assert [call for call in calls_in(graphs[0]) if "attention" in call or "flash" in call] == [expected]


def test_an_operator_that_is_declared_otherwise_is_not_used(install):
    install("flash_2", changes={
        "dropout_p: float, softmax_scale: float,": "softmax_scale: float, dropout_p: float,",
        "_flash_attn_forward(q, k, v, dropout_p, q.shape[-1] ** -0.5,":
        "_flash_attn_forward(q, k, v, q.shape[-1] ** -0.5, dropout_p,",
    })  # fmt: skip
    inputs = make_inputs(CPU, 1, 77)
    _, graphs, output = graphs_of(BACKENDS["flash_2"].make(), *inputs, None)
    assert "flux_hotswap.attention_flash_2" in calls_in(graphs[0])
    assert torch.equal(output, F.scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize("package", ["flash_2", "flash_4", "sage", "xformers"])
def test_a_mask_goes_to_sdpa_and_adds_no_recompile(install, package):
    module = install(package)
    attention = BACKENDS[SERVES[package]].make()
    query, key, value = make_inputs(CPU, 2, 77)
    with torch.inference_mode():
        mask = torch.rand(2, 1, 77, 77) > 0.3
    compiled, graphs, _ = graphs_of(attention, query, key, value, None)
    with torch.inference_mode():
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert torch.equal(attention(query, key, value, mask), expected)
        assert torch.equal(compiled(query, key, value, mask), expected)
        count = len(importlib.import_module(module).CALLS)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for chosen in (None, mask, None, mask):
                compiled(query, key, value, chosen)
    assert len(graphs) == 2
    assert len(importlib.import_module(module).CALLS) == count + 2


def test_the_operator_says_what_it_does(install):
    install("flash_4")
    query, key, value = (heads.transpose(1, 2) for heads in make_inputs(CPU, 2, 77))
    BACKENDS["flash_4"].make()
    own = torch.ops.flux_hotswap.attention_flash_4.default
    torch.library.opcheck(own, (query, key, value), test_utils=("test_schema", "test_faketensor"))
    assert not own._schema.is_mutable


def test_cudnn_is_called_as_pytorch_declares_it():
    schema = torch.ops.aten._scaled_dot_product_cudnn_attention.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:5] == ["query", "key", "value", "attn_bias", "compute_log_sumexp"]
    assert all(argument.has_default_value() for argument in schema.arguments[5:])
    assert schema.returns[0].name == "output"


def test_the_kernel_of_the_hub_is_fetched_when_it_is_needed(card, install):
    card(9, 0)
    install("kernels")
    check_attention("flash_3", CUDA)
    hub = importlib.import_module("kernels")
    assert hub.ASKED == []
    assert BACKENDS["flash_3"].downloads()
    BACKENDS["flash_3"].make()
    BACKENDS["flash_3"].make()
    assert hub.ASKED == [("kernels-community/flash-attn3", 1)]


def test_a_hub_out_of_reach_is_an_error_that_can_be_tried_again(install, on_cpu):
    install("kernels", changes={"    ASKED.append": "    if not ASKED:\n        ASKED.append(0)\n        raise OSError("
                                "'We cannot connect to huggingface.co')\n    ASKED.append"})  # fmt: skip
    with pytest.raises(SettingsError, match=r"needs kernels-community/flash-attn3 .*\(OSError: We cannot connect"):
        choose_attention("flash_3", CPU)
    assert choose_attention("flash_3", CPU).name == "flash_3"


def test_an_installed_build_comes_before_the_hub(install):
    install("kernels")
    install("flash_3")
    assert not BACKENDS["flash_3"].downloads()
    BACKENDS["flash_3"].make()
    assert "kernels" not in sys.modules


# A kernel that computes wrong numbers.

BROKEN = {
    "the last key lost": ("attend(q, k, v)", "attend(q, k[:, :-1].contiguous(), v[:, :-1].contiguous())"),
    "zero keys in the last tile": (
        "attend(q, k, v)", "attend(q, *(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 107)) for x in (k, v)))"),
    "heads and tokens mixed up": ("attend(q, k, v)", "attend(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))"),
    "a scale 2 % off": ("attend(q, k, v)", "attend(1.02 * q, k, v)"),
    "not a number": ("attend(q, k, v)", "attend(q, k, v) * float('nan')"),
    "another dtype": ("attend(q, k, v)", "attend(q, k, v).half()"),
    "no such parameter": ("q, k, v, qv=None, gather_kv", "q, k, qv=None, gather_kv"),
    "an error": ("attend(q, k, v)", "attend(q[0], k, v)"),
}  # fmt: skip


@pytest.mark.parametrize("flaw", BROKEN)
def test_a_wrong_kernel_is_refused(install, on_cpu, flaw):
    old, new = BROKEN[flaw]
    if flaw == "no such parameter":
        old, new = "q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qv=None", "q: torch.Tensor, k: torch.Tensor"
        install("flash_4", changes={old: new})
    else:
        install("flash_4", changes={f"return {old}, None": f"return {new}, None"})
    with pytest.raises(SettingsError, match=r"'flash_4' (computes wrong|does not run|returns) .*nearest .* 'cudnn'.$"):
        choose_attention("flash_4", CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("package", SERVES)
def test_a_right_kernel_is_taken(install, on_cpu, package, dtype):
    install(package)
    choice = choose_attention(SERVES[package], dataclasses.replace(CPU, dtype=dtype))
    assert choice.name == SERVES[package]
    assert choice.sentence.startswith(f"attention: {choice.name} (0.00")
    assert ("an approximation" in choice.sentence) == (package == "sage")


def quantized_as_sage_does(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SageAttention's arithmetic: int8 queries and smoothed keys by blocks, float8 weights and values."""

    def int8(x: Tensor, block: int) -> Tensor:
        tokens = x.shape[2]
        blocks = F.pad(x, (0, 0, 0, -tokens % block)).unflatten(2, (-1, block))
        scale = blocks.abs().amax((-1, -2), keepdim=True) / 127
        return ((blocks / scale).round() * scale).flatten(2, 3)[:, :, :tokens]

    def float8(x: Tensor, scale: Tensor | float) -> Tensor:
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    query, key, value = query.float(), key.float(), value.float()
    key = key - key.mean(2, keepdim=True)
    scores = int8(query, 64) @ int8(key, 128).transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return float8(weights, 1 / 448) @ float8(value, value.abs().amax(2, keepdim=True) / 448) / weights.sum(
        -1, keepdim=True
    )


def test_tolerances_part_rounding_from_errors():
    target = dataclasses.replace(CPU, dtype=torch.float16)
    inputs = make_inputs(target, 1, 1_173)
    reference = F.scaled_dot_product_attention(*(x.float() for x in inputs))
    sage = quantized_as_sage_does(*inputs).half()
    assert judge(BACKENDS["sage"], target, sage, reference).refusal is None
    assert judge(BACKENDS["sage"], target, sage, reference).deviation > 0.02
    assert "wrong numbers" in judge(BACKENDS["flash_2"], target, sage, reference).refusal
    query, key, value = inputs
    cut = F.scaled_dot_product_attention(query, key[:, :, :-1], value[:, :, :-1])
    assert "wrong numbers" in judge(BACKENDS["sage"], target, cut, reference).refusal
    assert all(backend.max_deviation.items() <= EXACT.items() for backend in BACKENDS.values() if backend.exact)


def test_a_kernel_is_checked_once_for_each_dtype(install, on_cpu):
    module = install("flash_4")
    for _ in range(2):
        choose_attention("flash_4", CPU)
    calls = importlib.import_module(module).CALLS
    assert [shape for _, shape, _ in calls] == [(2, 1_173, 2, 128)]
    choose_attention("flash_4", dataclasses.replace(CPU, dtype=torch.float16))
    choose_attention("flash_4", dataclasses.replace(CPU, heads=3))
    assert [(shape[2], dtype) for _, shape, dtype in calls[1:]] == [(2, torch.float16), (3, torch.bfloat16)]


def test_no_memory_is_no_verdict(install, on_cpu):
    module = install("flash_4", changes={
        "    return attend(q, k, v), None":
        "    if not CALLS:\n        CALLS.append(0)\n        raise torch.OutOfMemoryError('none left')\n"
        "    return attend(q, k, v), None"})  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError):
        choose_attention("flash_4", CPU)
    assert choose_attention("flash_4", CPU).name == "flash_4"
    assert len(importlib.import_module(module).CALLS) == 2


# "auto".


def test_auto_on_a_cpu_leaves_out_what_is_for_gpus(install):
    install("xformers")
    choice = choose_attention("auto", dataclasses.replace(CPU, dtype=torch.float32))
    assert (choice.name, choice.sentence, choice.warnings) == ("sdpa", "attention: sdpa", ())


def test_auto_on_a_cpu_measures_what_is_for_cpus(monkeypatch):
    monkeypatch.setitem(BACKENDS, "onednn", dataclasses.replace(BACKENDS["onednn"], hardware=lambda target: None))
    monkeypatch.setattr(choose, "_seconds_on_cpu", lambda run: 2e-3 if run.func is native.sdpa else 1e-3)
    choice = choose_attention("auto", CPU)
    assert choice.name == "onednn"
    assert choice.sentence == "attention: onednn, 1.00 ms a call at 1024 tokens (sdpa 2.00)"
    without = dataclasses.replace(BACKENDS["onednn"], hardware=lambda target: "is not here")
    monkeypatch.setitem(BACKENDS, "onednn", without)
    assert choose_attention("auto", CPU).sentence == "attention: sdpa"


def test_the_fastest_and_the_first_of_equals():
    assert choose.fastest({"sdpa": 1.0, "cudnn": 0.9, "flash_3": 0.5}) == "flash_3"
    assert choose.fastest({"sdpa": 1.0, "flash_2": 0.96}) == "sdpa"
    assert choose.fastest({"flash_2": 0.50, "flash_3": 0.51, "sdpa": 0.7}) == "flash_3"
    assert "sage" not in choose.AUTO
    assert all(BACKENDS[name].exact for name in choose.AUTO)


@pytest.fixture
def timed(on_cpu, monkeypatch):
    """Seconds by backend, in place of a GPU's clock: what runs, in what order, is real."""
    seconds = {"sdpa": 0.9e-3, "flash_2": 0.8e-3, "flash_4": 0.4e-3, "xformers": 0.85e-3}
    measured = []

    def measure(names, target):
        measured.append(names)
        return {name: seconds[name] for name in names}

    monkeypatch.setattr(choose, "measure", measure)
    for name in ("cudnn", "onednn"):
        absent = dataclasses.replace(BACKENDS[name], hardware=lambda target: "is not here")
        monkeypatch.setitem(BACKENDS, name, absent)
    return measured


def test_auto_measures_what_is_installed_and_names_what_is_not(install, timed):
    for package in ("flash_2", "flash_4", "sage", "kernels"):
        install(package)
    choice = choose_attention("auto", CPU)
    assert timed == [("sdpa", "flash_4", "flash_2")]
    assert choice.name == "flash_4"
    assert choice.sentence == (
        "attention: flash_4, 0.40 ms a call at 1024 tokens (sdpa 0.90, flash_2 0.80); would run here with "
        "their libraries: flash_3, xformers"
    )
    assert importlib.import_module("kernels").ASKED == []  # it downloads nothing


def test_auto_leaves_out_what_is_broken(install, timed):
    install("flash_2")
    install("flash_4", changes={"return attend(q, k, v), None": "return attend(q, k, v) * 1.1, None"})
    choice = choose_attention("auto", CPU)
    assert choice.name == "flash_2"
    assert len(choice.warnings) == 1
    assert "attention 'flash_4' computes wrong numbers here: 0.1 " in choice.warnings[0]


def test_measuring_runs_every_backend_on_a_picture_of_1024_pixels(install, on_cpu, monkeypatch):
    module = install("flash_2_old")
    monkeypatch.setattr(choose, "MEASURED_TOKENS", {"cpu": 96})
    monkeypatch.setattr(choose, "_seconds_on_cpu", choose._seconds_on_gpu)
    clock = iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    names = ("sdpa", "flash_2")
    assert choose.measure(names, CPU) == {"sdpa": 1e-3, "flash_2": 1e-3}
    calls = importlib.import_module(module).CALLS
    assert len(calls) == 2 + choose.REPEATS
    assert {call[1] for call in calls} == {(1, 96, 2, 128)}


# In an engine.


class Listener(Silent):
    def __init__(self):
        self.notices = []

    def notice(self, text, warning):
        self.notices.append((text, warning))


@pytest.fixture(scope="module")
def spec(models):
    return inspect_checkpoint(str(models / CHECKPOINT))


def forward_inputs(batch: int = 1, size: int = 16, text: int = 77, dtype=torch.float32, masked=False) -> Flux1Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens = text + (size // 2) ** 2
    mask = torch.rand(1, 1, tokens, tokens, generator=generator) > 0.5
    return Flux1Inputs(
        latent=normal(batch, 16, size, size),
        timestep=torch.full((batch,), 0.7367),
        encoder_hidden_states=normal(batch, text, 768),
        pooled_projections=normal(batch, 768),
        guidance=torch.full((batch,), 3.5),
        attention_mask=mask if masked else None,
    )


def distance(output: Tensor, reference: Tensor) -> float:
    return float((output.float() - reference.float()).norm() / reference.float().norm())


def test_an_engine_says_what_it_took(spec):
    listener = Listener()
    engine = Engine(spec, EngineSettings(compile="off"), listener)
    assert engine.attention == "auto"
    assert listener.notices == []
    engine.load()
    assert engine.attention == "sdpa"
    engine.offload()
    engine.load()
    assert listener.notices == [("attention: sdpa", False)]


def test_an_impossible_choice_fails_before_anything_is_read(spec):
    for name in ("cudnn", "flash_2", "flash_3", "flash_4", "sage", "xformers"):
        with pytest.raises(SettingsError, match=f"attention '{name}' "):
            Engine(spec, EngineSettings(attention=name, dtype="bf16"))
    with pytest.raises(SettingsError, match="'flex' runs compiled only"):
        Engine(spec, EngineSettings(attention="flex", compile="off"))


def test_a_wrong_kernel_is_refused_before_anything_is_read(spec, install, on_cpu):
    install("flash_4", changes={"return attend(q, k, v), None": "return attend(q, k, v) * 1.1, None"})
    with pytest.raises(SettingsError, match="'flash_4' computes wrong numbers here"):
        Engine(spec, EngineSettings(attention="flash_4", dtype="bf16", compile="off"))


def test_without_room_to_compare_it_is_compared_when_the_weights_load(spec, install, on_cpu, monkeypatch):
    install("flash_4", changes={"return attend(q, k, v), None": "return attend(q, k, v) * 1.1, None"})
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(correctness, "make_inputs", no_room)
        engine = Engine(spec, EngineSettings(attention="flash_4", dtype="bf16", compile="off"))
    with pytest.raises(SettingsError, match="'flash_4' computes wrong numbers here"):
        engine.load()
    assert not engine.loaded
    assert engine.load_count == 0


def no_room(*_):
    raise torch.OutOfMemoryError("tried to allocate 0.3 GB")


def test_two_engines_have_each_their_own(spec, install, on_cpu):
    flags = [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()]
    module = install("flash_2")
    settings = [EngineSettings(attention=name, dtype="bf16", compile="off") for name in ("flash_2", "sdpa")]
    engines = [Engine(spec, each) for each in settings]
    inputs = forward_inputs(dtype=torch.bfloat16)
    outputs = []
    for engine in engines:
        engine.load()
        outputs.append(engine(inputs))
    assert torch.equal(*outputs)
    calls = importlib.import_module(module).CALLS
    blocks = spec.config.depth + spec.config.depth_single
    assert len(calls) == 1 + blocks  # the check, and the first engine's blocks
    engines[0](forward_inputs(dtype=torch.bfloat16, masked=True))
    engines[1](inputs)
    assert len(calls) == 1 + blocks
    assert [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()] == flags


@pytest.fixture(scope="module")
def eager(spec):
    engine = Engine(spec, EngineSettings(attention="sdpa", compile="off"))
    engine.load()
    return engine


SIZES = [(1, 16, 77), (2, 32, 154), (3, 4, 256), (1, 4, 2)]

# torch 2.11 cannot compile it on a CPU for a batch of any size ("Cannot convert symbols to int").
FLEX_COMPILES = Version(torch.__version__).release[:2] != (2, 11)


@pytest.mark.slow
@pytest.mark.skipif(FLEX_COMPILES, reason="about a torch that cannot compile flex on a CPU, such as 2.11")
def test_flex_is_refused_where_it_does_not_compile(spec):
    with pytest.raises(SettingsError, match=r"'flex' does not run here \(.*symbols to int.*'sdpa'"):
        Engine(spec, EngineSettings(attention="flex")).load()


@pytest.mark.slow
@pytest.mark.skipif(not FLEX_COMPILES, reason="this torch cannot compile flex on a CPU, see the test above")
def test_flex_on_a_cpu_equals_sdpa_and_does_not_recompile(spec, eager):
    listener = Listener()
    engine = Engine(spec, EngineSettings(attention="flex"), listener)
    engine.load()
    assert engine.attention == "flex"
    assert listener.notices[0][0].startswith("attention: flex (")
    engine(forward_inputs())
    assert engine.compiler.count == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in SIZES:
            assert distance(engine(forward_inputs(*size)), eager(forward_inputs(*size))) < 2e-5
    assert (engine.compiler.count, engine.compiler.recompiles) == (2, 0)


@pytest.mark.slow
def test_a_library_in_a_compiled_engine(spec, install, on_cpu):
    module = install("flash_4")
    engine = Engine(spec, EngineSettings(attention="flash_4", dtype="bf16"))
    plain = Engine(spec, EngineSettings(attention="sdpa", dtype="bf16", compile="off"))
    engine.load()
    plain.load()
    engine(forward_inputs(dtype=torch.bfloat16))
    calls = importlib.import_module(module).CALLS
    blocks = spec.config.depth + spec.config.depth_single
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in SIZES:
            calls.clear()
            inputs = forward_inputs(*size, dtype=torch.bfloat16)
            assert distance(engine(inputs), plain(inputs)) < 2e-2
            assert len(calls) == blocks
    assert (engine.compiler.count, engine.compiler.recompiles) == (2, 0)


# On CUDA, without a GPU: a child process traces, and reads the code that would run there.


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    for package in ("flash_2", "flash_4"):
        write_package(folder, package)
    command = [sys.executable, "-m", "harness.attention_trace", str(folder)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("cudnn", "aten._scaled_dot_product_cudnn_attention"),
        ("flash_2", "flash_attn._flash_attn_forward"),
        ("flash_4", "flux_hotswap.attention_flash_4"),
        ("flex", "triton_tem_fused"),
    ],
)
def test_the_code_for_a_gpu_calls_the_kernel_and_copies_nothing_around_it(traced, name, kernel):
    found = traced[name]
    assert found["kernels"] == [kernel]
    assert found["symbols"], "the tokens became a constant"
    # Before it modulation and rotation, behind it nothing: the values and the result are views. flex has two kernels
    # more: its block mask, one number in each.
    assert found["triton_before"] == (4 if name == "flex" else 2)
    assert found["triton_after"] == 0
    assert found["crossings"] == 0


def test_sdpa_is_one_call_in_one_graph_for_a_gpu(traced):
    # Which kernel that is, PyTorch asks the driver: without a GPU it cannot be followed further.
    assert traced["sdpa"]["dynamo"] == ["scaled_dot_product_attention"]


# With a GPU: what runs there is compared, whatever it is.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_a_backend_computes_attention(name, dtype):
    target = dataclasses.replace(CUDA, dtype=dtype)
    reason = BACKENDS[name].missing(target)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    assert verify(name, target).refusal is None
    attention = BACKENDS[name].make()
    function = torch.compile(attention, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for batch, tokens in ((1, 4_608), (2, 1_173), (1, 333)):
            inputs = make_inputs(target, batch, tokens)
            reference = F.scaled_dot_product_attention(*(x.float() for x in inputs))
            verdict = judge(BACKENDS[name], target, function(*inputs, None), reference)
            assert verdict.refusal is None, (batch, tokens)
        mask = torch.rand(1, 1, tokens, tokens, device=target.device) > 0.3
        expected = F.scaled_dot_product_attention(*(x.float() for x in inputs), attn_mask=mask)
        assert judge(BACKENDS["sdpa"], target, function(*inputs, mask), expected).refusal is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_auto_takes_something_that_is_right():
    choice = choose_attention("auto", CUDA)
    print(choice.sentence, *choice.warnings, sep="\n")
    assert choice.name in choose.AUTO
    inputs = make_inputs(CUDA, 1, 2_000)
    with torch.inference_mode():
        reference = F.scaled_dot_product_attention(*(x.float() for x in inputs))
        assert judge(BACKENDS[choice.name], CUDA, choice.attention(*inputs, None), reference).refusal is None
