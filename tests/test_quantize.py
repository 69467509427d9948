"""Quantized weights without ComfyUI: what is converted, how exact it is, LoRAs over it, and the cache of the result."""

import dataclasses
import errno
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import accel.load
import accel.quantize.library
import accel.quantize.modes
from accel.build import conversion_of, load_model, model_bytes
from accel.checkpoint import inspect_checkpoint
from accel.compile.tracing import batch_can_be_unbacked
from accel.engine import Engine
from accel.errors import CheckpointError, SettingsError
from accel.hardware import hardware_of
from accel.linear.layers import LoraLinear
from accel.linear.slot import NOTHING, Bound, make_slot
from accel.lora.stack import LoraStack
from accel.observer import Silent
from accel.prove import Proof, Verdict
from accel.quantize import choose, dequantize, find_mode, parameter_bytes
from accel.quantize.bitsandbytes_modes import Nf4Linear
from accel.quantize.cache import SUFFIX
from accel.quantize.codec import CodecError, decode, encode
from accel.quantize.modes import MODES, PREFERENCES
from accel.registry import EngineKey
from accel.settings import QUANTIZATION_MODES, EngineSettings, Quantization, QuantizedCache
from accel.store.entry import EntryWriter
from harness import comfyui
from harness.graphs import Picture
from harness.lora_files import in_blocks, kind_state_dict, lora_state_dict, write_lora
from harness.paths import REPO
from harness.tensor_files import write_tensors
from harness.tiny_models import TinyFluxConfig, tiny_flux_state_dict
from tests.test_engine import distance, make_inputs

CPU = torch.device("cpu")
ON_CPU = ("fp8", "fp8_weight_only", "int8", "int8_weight_only", "nf4")
CHECKPOINT = "diffusion_models/tiny-flux-dev-fp32.safetensors"
LIMIT = 10**12


def sqnr_db(approximation, exact):
    error = (approximation.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / error))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def like_trained(rows, columns):
    """Weights as training leaves them: heavier tails than a normal's, and a few input channels that are much larger."""
    tails = torch.distributions.StudentT(4.0)
    torch.manual_seed(1)
    weight = tails.sample((rows, columns)) * 0.02
    weight[:, torch.arange(0, columns, 61)] *= 6
    return weight


class Notices(Silent):
    """An observer that keeps what it is told."""

    def __init__(self):
        self.said, self.warnings = [], []

    def notice(self, text, warning):
        (self.warnings if warning else self.said).append(text)


@pytest.fixture(scope="module")
def spec(models):
    return inspect_checkpoint(str(models / CHECKPOINT))


@pytest.fixture(scope="module")
def exact(spec):
    engine = Engine(spec, EngineSettings(compile="off"))
    engine.load()
    return engine


def quantized(spec, mode, cache=None, observer=None, compile="off", load=True):
    settings = EngineSettings(compile=compile, quantization=Quantization(mode, cache))
    engine = Engine(spec, settings, observer or Silent())
    if load:
        engine.load()
    return engine


@pytest.fixture(scope="module")
def engines(spec):
    return {mode: quantized(spec, mode) for mode in ON_CPU}


# One linear

# In dB, of normal weights and of weights as trained, then of the output of a linear, whichever weights it has; measured
# on 2026-11-22: fp8 31.6, 32.6, 33.0; fp8_weight_only 31.6, 32.6, 36.5; int8 42.3, 32.5, 36.0; int8_weight_only 42.3,
# 32.5, 36.3; nf4 20.7, 17.4, 21.4.
WEIGHT_FLOORS = {
    "fp8": (31.0, 32.0),
    "fp8_weight_only": (31.0, 32.0),
    "int8": (41.5, 31.5),
    "int8_weight_only": (41.5, 31.5),
    "nf4": (20.0, 16.5),
}
OUTPUT_FLOORS = {"fp8": 32.0, "fp8_weight_only": 35.5, "int8": 35.0, "int8_weight_only": 35.5, "nf4": 20.5}


def as_in_a_block(linear, x):
    """Run it as the engine does, which multiplies float8 by itself."""
    layer = LoraLinear(linear)
    layer.lora = make_slot(CPU)
    layer.lora.bound_lora = NOTHING
    return layer(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ON_CPU)
def test_signal_to_noise_of_a_linear(mode, dtype):
    x, bias = normal(96, 512, seed=2).to(dtype), normal(384, seed=3).to(dtype)
    for weight, floor in zip((normal(384, 512) * 0.02, like_trained(384, 512)), WEIGHT_FLOORS[mode], strict=True):
        linear = find_mode(mode).convert(weight.to(dtype), bias, False)
        assert (linear.in_features, linear.out_features) == (512, 384)
        assert not any(parameter.requires_grad for parameter in linear.parameters())
        restored = dequantize(linear)
        assert (restored.shape, restored.dtype) == ((384, 512), torch.float32)
        assert sqnr_db(restored, weight) >= floor
        output = as_in_a_block(linear, x)
        assert output.dtype == dtype
        assert sqnr_db(output, F.linear(x.float(), weight, bias.float())) >= OUTPUT_FLOORS[mode]
        # What dequantize gives is what it computes with.
        if mode in ("fp8_weight_only", "int8_weight_only", "nf4"):
            assert distance(output.float(), F.linear(x.float(), restored, bias.float())) < 0.01
        unbiased = find_mode(mode).convert(weight.to(dtype), None, False)
        assert unbiased.bias is None
        # The sum is rounded once more.
        assert distance(as_in_a_block(unbiased, x).float() + bias.float(), output.float()) < torch.finfo(dtype).eps


def spare(mode, rows):
    """What is planned for rows, but not taken: torchao 0.17 keeps the scales of int8 rows in the weight's dtype."""
    return 2 * rows if mode.name.startswith("int8") and version("torchao") < "0.18" else 0


@pytest.mark.parametrize("shape", [(384, 512), (64, 256), (3, 7), (1040, 2048)], ids=str)
@pytest.mark.parametrize("mode", ON_CPU)
def test_bytes_are_known_before_converting(mode, shape):
    mode = find_mode(mode)
    if not mode.fits(*shape):
        assert shape == (3, 7)
        return
    weight, bias = normal(*shape).bfloat16(), torch.zeros(shape[0], dtype=torch.bfloat16)
    planned = mode.weight_bytes(*shape)
    for added, its_bytes in ((bias, 2 * shape[0]), (None, 0)):
        taken = parameter_bytes(mode.convert(weight, added, False)) - its_bytes
        assert planned - spare(mode, shape[0]) <= taken <= planned


@pytest.mark.parametrize("mode", ON_CPU)
def test_runs_of_rows_give_what_the_whole_gives(mode, monkeypatch):
    """A weight is converted in runs that fit a processor's cache; the result must not show where they end."""
    import accel.quantize.nf4
    import accel.quantize.torchao_modes

    weight, bias = like_trained(500, 512).bfloat16(), torch.zeros(500, dtype=torch.bfloat16)
    whole = dequantize(find_mode(mode).convert(weight, bias, False))
    for module in (accel.quantize.torchao_modes, accel.quantize.nf4):
        monkeypatch.setattr(module, "RUN_ELEMENTS", 512 * 48)
    assert torch.equal(dequantize(find_mode(mode).convert(weight, bias, False)), whole)


def test_dequantize_of_a_plain_linear():
    linear = torch.nn.Linear(8, 4, dtype=torch.bfloat16)
    assert torch.equal(dequantize(linear), linear.weight.float())


# A model


# Relative distance of the engine's output from the unquantized one's, tiny model with random weights, float32; measured
# 0.089, 0.062, 0.030, 0.020, 0.27 (2026-11-22).
MODEL_DISTANCES = {"fp8": 0.12, "fp8_weight_only": 0.08, "int8": 0.04, "int8_weight_only": 0.03, "nf4": 0.33}


@pytest.mark.parametrize("mode", ON_CPU)
def test_output_is_near_the_unquantized(exact, engines, mode):
    exact.swap(LoraStack())
    engines[mode].swap(LoraStack())
    found = distance(engines[mode](make_inputs()), exact(make_inputs()))
    assert MODEL_DISTANCES[mode] / 4 < found < MODEL_DISTANCES[mode]


@pytest.mark.parametrize("mode", ON_CPU)
def test_exactly_the_linears_of_the_blocks_are_converted(spec, mode):
    model = load_model(spec, torch.bfloat16, CPU, lambda done, total: None, find_mode(mode))
    kinds = {
        name: type(module) if isinstance(module, Nf4Linear) else type(module.weight.data)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Nf4Linear))
    }
    inside = {name: kind for name, kind in kinds.items() if "transformer_blocks." in name}
    outside = {name: kind for name, kind in kinds.items() if name not in inside}
    # 2 double blocks of 2 modulations, 6 projections in, 2 out, 4 of the MLPs; 2 single ones of 1, 3, 1, 1.
    assert (len(inside), len(outside)) == (2 * 14 + 2 * 6, 10)
    assert torch.Tensor not in inside.values()
    assert len(set(inside.values())) == 1
    assert set(outside.values()) == {torch.Tensor}
    assert all(parameter.dtype == torch.bfloat16 for name, parameter in model.named_parameters() if "norm_" in name)
    assert str(conversion_of(spec, find_mode(mode))) == "40 of 50 linears quantized"


def test_modulations_are_weight_only_in_int8(spec):
    model = load_model(spec, torch.bfloat16, CPU, lambda done, total: None, find_mode("int8"))
    dynamic = {
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "act_quant_kwargs", None) is not None
    }
    left = {name for name, _ in model.named_modules() if "blocks." in name and name.endswith(".linear")} - dynamic
    assert len(dynamic) == 40 - 6
    assert len(left) == 6


@pytest.mark.parametrize("mode", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_of_an_engine_are_true(spec, mode, dtype):
    model = load_model(spec, dtype, CPU, lambda done, total: None, find_mode(mode))
    rows = sum(linear.out_features for linear in spec.layout.by_module.values())
    planned = model_bytes(spec, dtype, find_mode(mode))
    assert planned - spare(find_mode(mode), rows) <= parameter_bytes(model) <= planned
    plain = load_model(spec, dtype, CPU, lambda done, total: None)
    assert model_bytes(spec, dtype, None) == parameter_bytes(plain) > 1.4 * parameter_bytes(model)


def test_linears_that_a_mode_cannot_take_are_counted_and_named(spec):
    strict = dataclasses.replace(find_mode("fp8"), multiple_of=(512, 16))
    conversion = conversion_of(spec, strict)
    model = load_model(spec, torch.bfloat16, CPU, lambda done, total: None, strict)
    left = [
        name
        for name, module in model.named_modules()
        if "transformer_blocks." in name and type(getattr(module, "weight", None)) is torch.nn.Parameter
        and module.weight.ndim == 2 and not hasattr(module.weight, "qdata")
    ]
    assert sorted(conversion.unfit) == sorted(left)
    assert len(left) > 10
    assert f"{len(left)} left because of their sizes" in str(conversion)
    assert model_bytes(spec, torch.bfloat16, strict) == parameter_bytes(model)


def test_nothing_process_wide_changes(spec):
    from torch._inductor import config

    before = config.get_config_copy(), torch.get_float32_matmul_precision(), torch.get_default_dtype()
    for mode in ON_CPU:
        quantized(spec, mode)(make_inputs())
    assert (config.get_config_copy(), torch.get_float32_matmul_precision(), torch.get_default_dtype()) == before


def test_what_torchao_would_change_is_seen():
    """The control of the test above: torchao's own default does change inductor's configuration."""
    from torch._inductor import config
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    with config.patch({}):
        before, precision = config.get_config_copy(), torch.get_float32_matmul_precision()
        quantize_(torch.nn.Sequential(torch.nn.Linear(16, 16)), Int8WeightOnlyConfig())
        changed = config.get_config_copy() != before or torch.get_float32_matmul_precision() != precision
        torch.set_float32_matmul_precision(precision)
        for name, value in before.items():
            if getattr(config, name) != value:
                setattr(config, name, value)
    assert changed


@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_dynamic_modes_without_compile_warn(spec, mode):
    observer = Notices()
    quantized(spec, mode, observer=observer)
    assert [text for text in observer.warnings if "slower than no quantization" in text] == observer.warnings != []
    observer = Notices()
    quantized(spec, f"{mode}_weight_only", observer=observer)
    assert observer.warnings == []


# LoRAs

RANKS = (7, 13, 1, 128, 16)
KRONECKER = "LoKr full"


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    ranks = {rank: str(write_lora(folder / f"{rank}.safetensors", "kohya", rank=rank, seed=rank)) for rank in RANKS}
    return {**ranks, KRONECKER: str(write_tensors(folder / "lokr.safetensors", kind_state_dict(KRONECKER)))}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ON_CPU)
def test_compiled_swaps_equal_eager_and_do_not_recompile(spec, engines, loras, mode):
    eager, compiled = engines[mode], quantized(spec, mode, compile="regional")
    eager.swap(LoraStack())
    compiled(make_inputs())
    assert (compiled.compiler.count, compiled.compiler.recompiles) == (2, 0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        base = compiled(make_inputs())
        for rank, batch in zip((*RANKS, KRONECKER), (1, 2, 1, 3, 2, 2), strict=True):
            inputs = make_inputs(batch if batch_can_be_unbacked() else 1, 17, 23, 154)
            for engine in (eager, compiled):
                engine.swap(LoraStack().with_lora(engine.read_lora(loras[rank]), 0.8))
            output, reference = compiled(inputs), eager(inputs)
            # Fused arithmetic differs in the last bit, which moves some activations to the next of 256 steps.
            assert distance(output, reference) < MODEL_DISTANCES[mode] / 2
            compiled.swap(LoraStack())
            assert distance(output, compiled(inputs)) > 0.2
        assert torch.equal(compiled(make_inputs()), base)
    assert (compiled.compiler.count, compiled.compiler.recompiles) == (2, 0)


@pytest.mark.parametrize("mode", ON_CPU)
def test_lora_matrices_keep_their_dtype(engines, loras, mode):
    from accel.linear.slot import bound_to

    engine = engines[mode]
    engine.swap(LoraStack().with_lora(engine.read_lora(loras[7]), 1.0))
    slots = (slot for name, slot in engine.assembled.model.named_parameters() if name.endswith(".lora"))
    bound = {
        (number, half): matrix
        for number, lora in enumerate(map(bound_to, slots))
        for half, matrix in (("lora_A", lora.lora_A), ("lora_B", lora.lora_B))
        if matrix is not None
    }
    assert len(bound) == 100
    assert {type(parameter.data) for parameter in bound.values()} == {torch.Tensor}
    assert {parameter.dtype for parameter in bound.values()} == {torch.float32}
    engine.swap(LoraStack())


def lora_effect(engine, path):
    engine.swap(LoraStack())
    without = engine(make_inputs())
    engine.swap(LoraStack().with_lora(engine.read_lora(path), 1.0))
    with_lora = engine(make_inputs())
    engine.swap(LoraStack())
    return with_lora - without


def comfy_float():
    """ComfyUI's own rounding to float8, from its source."""
    path = comfyui.source_path() / "comfy" / "float.py"
    module_spec = importlib.util.spec_from_file_location("comfy_float", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=[0.3, 0.05], ids=["strong", "weak"])
def effects(request, exact, tmp_path_factory):
    """A LoRA, what it does to the exact model, and how much of that stock's merge into fp8 weights loses."""
    folder = tmp_path_factory.mktemp("effect")
    options = {"rank": 8, "scale": request.param, "seed": 3, "targets": in_blocks}
    path = str(write_lora(folder / "lora.safetensors", "native", **options))
    lora, rounding = lora_state_dict("native", **options), comfy_float()
    base = tiny_flux_state_dict(TinyFluxConfig(), 0)
    before = {
        key: value.to(torch.float8_e4m3fn) if value.ndim == 2 and "blocks." in key else value
        for key, value in base.items()
    }
    after, taken = dict(before), 0
    for key, down in lora.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("diffusion_model.").removesuffix("lora_A.weight") + "weight"
            merged = before[name].float() + lora[key.replace("lora_A", "lora_B")].float() @ down.float()
            after[name] = rounding.stochastic_rounding(merged, torch.float8_e4m3fn, seed=taken)
            taken += 1
    assert taken == 26  # all linears of the blocks, as the original layout fuses them
    outputs = []
    for name, tensors in (("before", before), ("after", after)):
        write_tensors(folder / f"{name}.safetensors", tensors)
        engine = Engine(
            inspect_checkpoint(str(folder / f"{name}.safetensors")), EngineSettings(dtype="fp32", compile="off")
        )
        engine.load()
        outputs.append(engine(make_inputs()))
    wanted = lora_effect(exact, path)
    return request.param, path, wanted, distance(outputs[1] - outputs[0], wanted)


# Relative error of (with LoRA − without) on the quantized base against the same on the exact one, for LoRAs that change
# the output by 77 % and by 13 %; measured 0.142, 0.080, 0.045, 0.026, 0.36 and 0.59, 0.13, 0.21, 0.046, 0.48. Stock's
# merge into fp8 weights loses 0.13 to 0.24 and 0.5 to 0.75. In fp8 and int8 most of it is no loss of the LoRA, but the
# rounding of activations, which falls differently in the two pictures that are compared.
EFFECT_ERRORS = {
    0.3: {"fp8": 0.17, "fp8_weight_only": 0.10, "int8": 0.06, "int8_weight_only": 0.035, "nf4": 0.42},
    0.05: {"fp8": 0.75, "fp8_weight_only": 0.17, "int8": 0.28, "int8_weight_only": 0.06, "nf4": 0.58},
}


@pytest.mark.parametrize("mode", ON_CPU)
def test_the_effect_of_a_lora_is_preserved(engines, effects, mode):
    scale, path, wanted, lost_by_merging = effects
    found = distance(lora_effect(engines[mode], path), wanted)
    assert found < EFFECT_ERRORS[scale][mode]
    if scale == 0.05 and mode == "fp8_weight_only":  # the same weights as fp8, without the rounding of activations
        assert found <= lost_by_merging / 2


@pytest.mark.parametrize("scale", [0.3, 0.03])
def test_fp8_loses_at_most_half_of_what_merging_loses(scale):
    """Linear by linear, where the rounding of activations is the same with and without the LoRA."""
    rounding, worst = comfy_float(), 0.0
    base = tiny_flux_state_dict(TinyFluxConfig(), 0)
    lora = lora_state_dict("native", rank=8, scale=scale, seed=3, targets=in_blocks)
    for number, (key, down) in enumerate(item for item in lora.items() if item[0].endswith("lora_A.weight")):
        up = lora[key.replace("lora_A", "lora_B")].bfloat16()
        down = down.bfloat16()
        weight = base[key.removeprefix("diffusion_model.").removesuffix("lora_A.weight") + "weight"].bfloat16()
        x = normal(64, weight.shape[1], seed=number).bfloat16()
        layer = LoraLinear(find_mode("fp8").convert(weight, torch.zeros(len(weight), dtype=torch.bfloat16), False))
        layer.lora = make_slot(CPU)
        outputs = []
        for a, b in ((down[:0], up[:, :0]), (down.contiguous(), up.contiguous())):
            layer.lora.bound_lora = Bound(a, b) if len(a) else NOTHING
            outputs.append(layer(x).float())
        wanted = F.linear(x.float(), up.float() @ down.float())
        eight = weight.to(torch.float8_e4m3fn).float()
        merged = rounding.stochastic_rounding(eight + up.float() @ down.float(), torch.float8_e4m3fn, seed=number)
        lost = distance(F.linear(x.float(), merged.float() - eight), wanted)
        ratio = distance(outputs[1] - outputs[0], wanted) / lost
        worst = max(worst, ratio)
    assert worst <= 0.5


# What runs where


def test_the_names_are_those_of_the_settings():
    assert ("none", *MODES) == QUANTIZATION_MODES
    assert {name for name, mode in MODES.items() if mode.lacks(hardware_of(CPU)) is None} == set(ON_CPU)
    assert all(set(mode.instead) <= set(MODES) - {mode.name} for mode in MODES.values())
    with pytest.raises(SettingsError, match="quantization is 'q8', expected one of: none, fp8"):
        Quantization("q8")
    with pytest.raises(SettingsError, match="'auto', expected one of"):
        Quantization("auto")
    with pytest.raises(SettingsError, match="quantization is 'q8', expected one of: auto, none"):
        choose("q8", CPU)
    assert find_mode("none") is None
    with pytest.raises(SettingsError, match="quantization is 'q8', expected one of: none, fp8"):
        find_mode("q8")


@pytest.mark.parametrize("mode", ON_CPU)
def test_modes_that_run_on_a_cpu(mode):
    assert choose(mode, CPU).mode == mode


@pytest.mark.parametrize(
    ("mode", "reason", "nearest"),
    [
        ("int4", "tinygemm.*compute capability 8.0.*the device cpu", "nf4"),
        ("nvfp4", "fp4 products.*10.0", "nf4"),
        ("mxfp8", "mxfp8 products.*10.0", "fp8"),
    ],
)
def test_modes_that_do_not(spec, mode, reason, nearest):
    with pytest.raises(SettingsError, match=f"'{mode}' needs .*{reason}.* nearest mode that runs here is '{nearest}'"):
        choose(mode, CPU)
    with pytest.raises(SettingsError, match=reason):
        quantized(spec, mode, load=False)


class Card:
    """Stands for a CUDA device: what the modes ask about it. That they compute on it is taken for granted."""

    def __init__(self, monkeypatch, name, capability):
        proven = Proof("", "", Verdict(None), 0.0)
        monkeypatch.setattr(accel.quantize.modes, "prove", lambda mode, device, dtype: proven)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


@pytest.mark.parametrize(
    ("name", "capability", "best", "refused"),
    [
        ("RTX 5090", (12, 0), "fp8", ()),
        ("H100", (9, 0), "fp8", ("nvfp4", "mxfp8")),
        ("RTX 4090", (8, 9), "fp8", ("nvfp4", "mxfp8")),
        ("RTX 3090", (8, 6), "int8", ("fp8", "nvfp4", "mxfp8")),
        ("RTX 2080", (7, 5), "int8", ("fp8", "int4", "nvfp4", "mxfp8")),
        ("V100", (7, 0), "int8_weight_only", ("fp8", "int8", "int4", "nvfp4", "mxfp8")),
    ],
)
def test_auto_and_refusals_by_card(monkeypatch, name, capability, best, refused):
    Card(monkeypatch, name, capability)
    cuda = torch.device("cuda:0")
    choice = choose("auto", cuda)
    assert choice.mode == best
    assert "half the memory" in choice.reason
    for mode in MODES:
        if mode in refused:
            with pytest.raises(SettingsError, match=rf"{name} has {capability[0]}\.{capability[1]}.*nearest mode"):
                choose(mode, cuda)
        else:
            assert choose(mode, cuda).mode == mode


def test_auto_elsewhere():
    assert choose("auto", CPU).mode == PREFERENCES["cpu"][0][0] == "int8"
    assert choose("auto", torch.device("meta")).mode == "none"
    assert choose("none", CPU).mode == "none"


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({}, "needs torchao, which is not installed: pip install 'torchao>=0.17' in ComfyUI's Python"),
        ({"torchao": "0.15.0"}, "needs torchao 0.17 or newer, installed is 0.15.0: pip install --upgrade 'torchao"),
        (
            {"torchao": "0.18.0", "torch": "2.10.0+cu128"},
            r"needs torchao older than 0.18 beside torch 2.10.0\+cu128, installed is 0.18.0: pip install "
            "'torchao>=0.17,<0.18', or update torch to 2.11 or newer",
        ),
    ],
)
def test_a_library_that_does_not_serve(monkeypatch, versions, words):
    def version(name):
        if name != "torch" and name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name, "2.14.1")

    monkeypatch.setattr(accel.quantize.library, "version", version)
    with pytest.raises(SettingsError, match=f"{words}.*nearest mode that runs here is 'none'"):
        choose("int8", CPU)
    choice = choose("auto", CPU)
    assert choice.mode == "none"
    assert re.match(f"int8 {words}", choice.reason)


def test_the_newest_library_serves_beside_a_new_torch_and_an_older_one_beside_an_old_torch(monkeypatch):
    for found, torch_version in (("0.18.0", "2.11.0"), ("0.30.1", "2.15.0"), ("0.17.0", "2.9.1"), ("0.17.0", "2.14.1")):
        versions = {"torchao": found, "torch": torch_version}
        monkeypatch.setattr(accel.quantize.library, "version", versions.get)
        assert find_mode("int8").library.missing() is None


def test_compute_dtype_on_a_gpu():
    mode, cuda = find_mode("fp8"), torch.device("cuda")
    assert mode.compute_dtype(torch.float16, cuda, explicit=False) == torch.bfloat16
    assert mode.compute_dtype(torch.float16, CPU, explicit=True) == torch.float16
    with pytest.raises(SettingsError, match="'fp8' computes in bfloat16 on a GPU, but dtype is float16"):
        mode.compute_dtype(torch.float16, cuda, explicit=True)
    assert find_mode("int8").compute_dtype(torch.float16, cuda, explicit=True) == torch.float16


def test_engine_key(spec):
    identity = spec.file.identity
    plain, fp8, nf4 = (
        EngineKey.of(identity, EngineSettings(quantization=Quantization(mode))) for mode in ("none", "fp8", "nf4")
    )
    assert len({plain, fp8, nf4}) == 3
    assert not any("torchao" in library for library in (*plain.libraries, *nf4.libraries))
    assert any(library.startswith("torchao ") for library in fp8.libraries)
    assert any(library.startswith("bitsandbytes ") for library in nf4.libraries)
    cached = EngineSettings(quantization=Quantization("fp8", QuantizedCache("folder", 1)))
    assert EngineKey.of(identity, cached) == fp8


# The cache


@pytest.fixture
def cache(tmp_path):
    return QuantizedCache(str(tmp_path / "cache"), LIMIT)


def files_of(cache):
    return sorted(Path(cache.folder).iterdir())


def forbid_reading(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the checkpoint was read")

    monkeypatch.setattr(accel.load, "load_model", fail)


@pytest.mark.parametrize("mode", ON_CPU)
def test_the_second_load_maps_the_file_and_computes_the_same(spec, engines, cache, monkeypatch, mode, loras):
    engines[mode].swap(LoraStack())
    expected = engines[mode](make_inputs())
    first, observer = quantized(spec, mode, cache), Notices()
    assert torch.equal(first(make_inputs()), expected)
    (file,) = files_of(cache)
    assert file.name.startswith(f"tiny-flux-dev-fp32-{mode}-")
    assert file.name.endswith(SUFFIX)
    forbid_reading(monkeypatch)
    second = quantized(spec, mode, cache, observer)
    assert torch.equal(second(make_inputs()), expected)
    assert observer.said[-1].endswith(file.name)
    assert parameter_bytes(second.assembled.model) == parameter_bytes(first.assembled.model)
    # Tensors are where compiled kernels expect them.
    for _, parameter in second.assembled.model.named_parameters():
        for name in parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else ():
            assert getattr(parameter, name).data_ptr() % 64 == 0
    stack = LoraStack().with_lora(second.read_lora(loras[7]), 0.8)
    for engine in (first, second):
        engine.swap(stack)
    assert torch.equal(first(make_inputs()), second(make_inputs()))


def test_the_file_is_safetensors_that_others_can_read(spec, cache):
    from safetensors import safe_open

    quantized(spec, "int8", cache)
    with safe_open(files_of(cache)[0], framework="pt") as handle:
        names = set(handle.keys())
        assert handle.get_tensor("transformer_blocks.0.attn.to_q.weight.qdata").dtype == torch.int8
        assert handle.get_tensor("transformer_blocks.0.attn.to_q.weight.scale").shape == (256, 1)
    assert "x_embedder.weight" in names
    assert "transformer_blocks.0.attn.to_q.bias" in names


def test_the_key(spec, cache, models):
    for mode, dtype in (("int8", "fp32"), ("int8", "bf16"), ("fp8", "fp32")):
        settings = EngineSettings(dtype=dtype, compile="off", quantization=Quantization(mode, cache))
        Engine(spec, settings).load()
    other = inspect_checkpoint(str(models / "diffusion_models/tiny-flux-dev-bf16.safetensors"))
    quantized(other, "int8", cache)
    assert len(files_of(cache)) == 4


def test_a_changed_checkpoint_is_converted_anew(tmp_path, cache):
    path = tmp_path / "model.safetensors"
    outputs = []
    for seed in (1, 2):
        write_tensors(path, tiny_flux_state_dict(TinyFluxConfig(depth=1, depth_single=1), seed))
        os.utime(path, (seed, seed))
        outputs.append(quantized(inspect_checkpoint(str(path)), "int8", cache)(make_inputs()))
    assert distance(*outputs) > 0.1
    assert len(files_of(cache)) == 2


def test_a_damaged_file_is_made_again_with_a_warning(spec, cache, engines):
    engines["int8"].swap(LoraStack())
    quantized(spec, "int8", cache)
    (file,) = files_of(cache)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    observer = Notices()
    engine = quantized(spec, "int8", cache, observer)
    assert f"the quantized weights are made again: '{file.name}' is damaged (it is cut off)" in observer.warnings
    assert torch.equal(engine(make_inputs()), engines["int8"](make_inputs()))
    assert files_of(cache) == [file]
    assert file.read_bytes() == whole


def test_an_interrupted_load_leaves_nothing(spec, cache):
    class Interrupting(Silent):
        def loading(self, done, total):
            if done == 40:
                raise KeyboardInterrupt

    engine = quantized(spec, "fp8", cache, Interrupting(), load=False)
    with pytest.raises(KeyboardInterrupt):
        engine.load()
    assert not engine.loaded
    assert files_of(cache) == []


def test_a_bad_weight_leaves_nothing(tmp_path, cache):
    tensors = tiny_flux_state_dict(TinyFluxConfig(), 0)
    tensors["single_blocks.1.linear2.weight"][3, 4] = float("nan")
    path = tmp_path / "nan.safetensors"
    write_tensors(path, tensors)
    with pytest.raises(CheckpointError, match=r"single_blocks\.1\.linear2\.weight' holds NaN"):
        quantized(inspect_checkpoint(str(path)), "int8", cache)
    assert files_of(cache) == []


def test_a_disk_that_fills_up_ends_the_writing_not_the_load(spec, cache, engines, monkeypatch):
    write, written = EntryWriter._write, []

    def fill(writer, name, tensor):
        written.append(name)
        if len(written) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, name, tensor)

    monkeypatch.setattr(EntryWriter, "_write", fill)
    observer = Notices()
    engine = quantized(spec, "int8", cache, observer)
    (warning,) = (text for text in observer.warnings if "could not be stored" in text)
    assert f"in '{cache.folder}' (No space left on device); the model works" in warning
    assert len(written) == 21
    assert files_of(cache) == []
    engines["int8"].swap(LoraStack())
    assert torch.equal(engine(make_inputs()), engines["int8"](make_inputs()))


def test_a_folder_that_cannot_be_written_is_told_once(spec, tmp_path):
    folder = tmp_path / "file"
    folder.write_text("")
    observer = Notices()
    engine = quantized(spec, "int8", QuantizedCache(str(folder), LIMIT), observer)
    (warning,) = (text for text in observer.warnings if "could not be stored" in text)
    assert f"'{folder}'" in warning
    assert engine(make_inputs()).isfinite().all()


def test_a_model_larger_than_the_limit_is_not_stored(spec, cache):
    quantized(spec, "nf4", cache)
    observer = Notices()
    quantized(spec, "fp8", QuantizedCache(cache.folder, 7_000_000), observer)
    assert any("the limit of the cache is 0.0 GB" in text for text in observer.warnings)
    assert len(files_of(cache)) == 1  # and nothing was deleted for it


def test_only_torchao_is_made_from_a_file():
    for name in ("os:system", "torchao.quantization:nothing", "subprocess:Popen", "torchao.utils:os.system"):
        for kind in ("enum", "dataclass", "namedtuple"):
            with pytest.raises(CodecError):
                decode({kind: name, "member": "x", "fields": {}, "items": []})
    with pytest.raises(CodecError, match="cannot be written"):
        encode(object())
    with pytest.raises(CodecError, match="is not torchao's"):
        encode(Picture())
    value = {"a": [1, 2.5, None, True], "b": (torch.bfloat16, "x")}
    assert decode(encode(value)) == value


# Memory

# A process for each mode, or what one left in the allocator would be the next one's; forked, as most of the time is the
# libraries' import.
PEAK_SCRIPT = """
import os, sys
import diffusers.models.transformers.transformer_flux, torch
from benchmarks.load_stage import anonymous_bytes, PeakMemory, import_libraries
from accel.build import load_model
from accel.checkpoint import inspect_checkpoint
from accel.compile.tracing import batch_can_be_unbacked
from accel.quantize import find_mode, parameter_bytes
for mode in sys.argv[2:]:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    spec = inspect_checkpoint(sys.argv[1])
    import_libraries(spec, mode)
    before, memory = anonymous_bytes(), PeakMemory()
    with memory.sampling():
        model = load_model(spec, torch.bfloat16, torch.device("cpu"), lambda done, total: None, find_mode(mode))
    print(mode, memory.bytes - before, parameter_bytes(model), flush=True)
    os._exit(0)
"""
PEAK_MODES = ("fp8", "int8", "nf4")


@pytest.mark.slow
def test_loading_holds_one_tensor_beyond_the_model(tmp_path):
    """Full width, two blocks: 1 GB of weights become 0.5 GB, with half a gigabyte beside them at most."""
    from accel.families.flux1 import Flux1
    from benchmarks.load import scaled
    from benchmarks.random_checkpoint import write_checkpoint

    path = tmp_path / "wide.safetensors"
    write_checkpoint(path, scaled(Flux1.published["flux1-dev"], 0.01))
    assert path.stat().st_size > 0.9e9
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK_SCRIPT, str(path), *PEAK_MODES],
        cwd=REPO, capture_output=True, text=True, check=True,
    )
    found = [line.split() for line in done.stdout.splitlines()]
    assert [mode for mode, _, _ in found] == [*PEAK_MODES]
    for mode, peak, size in found:
        assert int(size) < 0.62 * path.stat().st_size, mode
        assert int(peak) - int(size) < 0.45e9, mode


def test_loads_in_threads_do_not_disturb_each_other(spec, cache, engines):
    found = {}

    def load(mode):
        found[mode] = quantized(spec, mode, cache)(make_inputs())

    threads = [threading.Thread(target=load, args=(mode,)) for mode in ("int8", "nf4")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mode, output in found.items():
        engines[mode].swap(LoraStack())
        assert torch.equal(output, engines[mode](make_inputs()))
    assert len(found) == 2
