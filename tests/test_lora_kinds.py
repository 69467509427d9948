"""What a file of any trainer, format and kind makes of each weight: the same as stock ComfyUI makes of it."""

import json
import math
import os
import re
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import accel.lora.kinds
import accel.lora.read.file
import accel.lora.read.stream
import accel.memory.buffers
from accel.checkpoint import inspect_checkpoint
from accel.errors import FileError, LoraError
from accel.families.layout import LinearPart, LoraTarget
from accel.linear.kronecker import multiplications
from accel.lora.hold.slots import LoraSlots
from accel.lora.kinds import KINDS as KINDS_OF_THE_PACKAGE
from accel.lora.kinds import lowrank
from accel.lora.kinds.base import Converted, Kind
from accel.lora.kinds.composed import mix
from accel.lora.kinds.layers import KroneckerLayer, Layer, LayerCost, split_rows
from accel.lora.kinds.lowrank import Tolerance
from accel.lora.kinds.table import KindTable
from accel.lora.pack.flat import FlatLora, flatten
from accel.lora.pack.truncate import truncate
from accel.lora.read.file import read_lora
from accel.lora.read.patches import LinearPatch, from_patches, tensor_digest
from accel.lora.read.stream import max_magnitude
from accel.lora.stack import LoraStack
from accel.memory.buffers import HostBuffers
from accel.quantize import find_mode
from accel.tensors import own_vector
from harness import lora_files, lora_kinds
from harness.lora_files import kind_state_dict, lora_state_dict, norm_state_dict
from harness.lora_formats import (
    ALL_FORMATS,
    FLUX2_FORMATS,
    FLUX2_STOCK_FORMATS,
    STOCK_FORMATS,
    format_named,
    linears_of,
)
from harness.stock_weights import StockWeights
from harness.tensor_files import write_tensors
from harness.tiny_flux2 import TinyFlux2Config, tiny_flux2_state_dict
from harness.tiny_models import TinyFluxConfig, flux_linears, tiny_flux_state_dict

EXACT = 2e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
TINY = TinyFluxConfig()


# What a test without the mark `of_both` runs with is FLUX.1.
MODELS = {"FLUX.1": TINY, "FLUX.2": TinyFlux2Config(guidance=True)}
of_both = pytest.mark.parametrize("tiny", MODELS, indirect=True)


@pytest.fixture(scope="module")
def tiny(request):
    return MODELS[getattr(request, "param", "FLUX.1")]


@pytest.fixture(scope="module")
def checkpoint(models, tiny, tmp_path_factory):
    if tiny is TINY:
        return models / "diffusion_models/tiny-flux-dev-fp32.safetensors"
    return write_tensors(tmp_path_factory.mktemp("flux2") / "tiny-flux2.safetensors", tiny_flux2_state_dict(tiny))


@pytest.fixture(scope="module")
def spec(checkpoint):
    return inspect_checkpoint(str(checkpoint))


@pytest.fixture(scope="module")
def tensors(checkpoint):
    return load_file(checkpoint)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    with StockWeights(tmp_path_factory.mktemp("stock")) as process:
        yield process


class Base:
    """The checkpoint's own weights, as `flatten` asks for them."""

    def __init__(self, spec, tensors):
        layout = spec.layout
        self.values = {}
        for linear in layout.linears:
            for end in ("weight", "bias") if linear.bias else ("weight",):
                value = tensors[f"{linear.name}.{end}"].float()
                if linear.swap_halves:
                    value = torch.cat(value.chunk(2)[::-1])
                for part in linear.parts:
                    self.values[f"{part.module}.{end}"] = value[part.start : part.start + part.rows]
        for vector in layout.vectors:
            self.values[vector.parameter] = tensors[vector.name].float()

    def weight(self, module):
        return self.values[f"{module}.weight"]

    def parameter(self, name):
        return self.values[name]


@pytest.fixture(scope="module")
def base(spec, tensors):
    return Base(spec, tensors)


def effective(flat, base, spec) -> dict[str, torch.Tensor]:
    """Weights, biases and norms under a stack, by the checkpoint's names; only those that it changes."""
    values = {}
    for name, before in base.values.items():
        module = name.removesuffix(".weight")
        value = before.double()
        if module in flat.mixing:
            value = mix(flat.mixing[module].double(), value)
        if module in flat.placed:
            place = flat.placed[module]
            lora_A = flat.buffer.as_strided(place.a_shape, (place.a_shape[1], 1), place.a_start)
            lora_B = flat.buffer.as_strided(place.b_shape, (place.b_shape[1], 1), place.b_start)
            value = value + lora_B.double() @ lora_A.double()
        for term in flat.kroneckers.get(module, ()):
            product = torch.kron(*(side.double() for side in term.matrices(flat.buffer)))
            product = product.roll(-term.first, 0)[: len(value)]
            if term.width:
                product = mix(term.blocks(flat.buffer, len(value)).view(-1, term.width, term.width).double(), product)
            value = value + product
        values[name] = flat.vectors[name].double() if name in flat.vectors else value
    touched = {f"{module}.weight" for module in (*flat.placed, *flat.mixing, *flat.kroneckers)} | set(flat.vectors)
    layout = spec.layout
    result = {vector.name: values[vector.parameter] for vector in layout.vectors if vector.parameter in touched}
    for linear in layout.linears:
        for end in ("weight", "bias"):
            names = [f"{part.module}.{end}" for part in linear.parts]
            if touched & set(names):
                value = torch.cat([values[name] for name in names])
                result[f"{linear.name}.{end}"] = torch.cat(value.chunk(2)[::-1]) if linear.swap_halves else value
    return result


def ours(loras, spec, base, **arguments):
    stack = LoraStack()
    for path, strength in loras:
        stack = stack.with_lora(read_lora(str(path), spec, **arguments), strength)
    return effective(flatten(stack.active, torch.float32, pin=False, base=base), base, spec)


def assert_same(actual, expected, before, tolerance=EXACT):
    """Equal keys; and each change, not only each weight, within the tolerance (relative Frobenius norm)."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        change = value.double() - before[name].double()
        assert change.norm() > 0.001 * before[name].norm(), f"{name} hardly changes: equality would say nothing"
        error = float((actual[name] - value.double()).norm() / change.norm())
        assert error < tolerance, f"{name}: {error}"


def write(folder, name, tensors, metadata=None):
    path = folder / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return path


def formats(flux1, flux2):
    """Every format of each family."""
    pairs = [(name, format) for name, known in (("FLUX.1", flux1), ("FLUX.2", flux2)) for format in known]
    ids = [f"{name}-{format}" for name, format in pairs]
    return pytest.mark.parametrize(("tiny", "format"), pairs, ids=ids, indirect=["tiny"])


@pytest.mark.parametrize("alpha", [None, 3.0])
@formats(STOCK_FORMATS, FLUX2_STOCK_FORMATS)
def test_every_format_equals_stock(tmp_path, spec, tensors, base, stock, checkpoint, tiny, format, alpha):
    path = write(tmp_path, "a", lora_state_dict(format, tiny, rank=5, alpha=alpha))
    expected = stock.merge(checkpoint, [(path, 0.7)])
    assert_same(ours([(path, 0.7)], spec, base), expected, tensors)
    assert set(expected) == {f"{module}.weight" for module in linears_of(tiny)}


@formats([name for name in ALL_FORMATS if name not in STOCK_FORMATS],
         [name for name in FLUX2_FORMATS if name not in FLUX2_STOCK_FORMATS])  # fmt: skip
def test_names_that_stock_does_not_know_mean_the_same_layers(
    tmp_path, spec, tensors, base, stock, checkpoint, tiny, format
):
    """Against stock on the same matrices in its own names."""
    other, own, spelling = {}, {}, format_named(format)
    for module, (out_features, in_features) in linears_of(tiny).items():
        downs, ups = [], []
        for part in spelling.parts(module, tiny):
            down, up = torch.randn(3, in_features), 0.02 * torch.randn(part.out_features, 3)
            other |= {f"{part.prefix}.{spelling.down}": down, f"{part.prefix}.{spelling.up}": up}
            whole, row = torch.zeros(out_features, 3), 0
            for start, stop in part.rows:
                whole[start:stop] = up[row : row + stop - start]
                row += stop - start
            downs.append(down)
            ups.append(whole)
        if downs:
            own[f"diffusion_model.{module}.lora_A.weight"] = torch.cat(downs)
            own[f"diffusion_model.{module}.lora_B.weight"] = torch.cat(ups, dim=1)
    expected = stock.merge(checkpoint, [(write(tmp_path, "own", own), 1.0)])
    assert_same(ours([(write(tmp_path, "other", other), 1.0)], spec, base), expected, tensors)


# ComfyUI 0.30 logs an error at a LoKr's middle matrix (a view of what is not contiguous) and leaves it out.
STOCK_KINDS = [kind for kind in lora_kinds.KINDS if not kind.startswith("PEFT") and kind != "LoKr Tucker"]


# FLUX.2 has the same kinds of layers at one strength: what else there is to a kind does not depend on the model.
KINDS_EQUAL_STOCK = [("FLUX.1", kind, strength) for kind in STOCK_KINDS for strength in (1.0, 0.6, -0.8)]
KINDS_EQUAL_STOCK += [("FLUX.2", kind, 0.6) for kind in STOCK_KINDS if kind != "bias"]


@pytest.mark.parametrize(("tiny", "kind", "strength"), KINDS_EQUAL_STOCK, indirect=["tiny"])
def test_every_kind_equals_stock(tmp_path, spec, tensors, base, stock, checkpoint, tiny, kind, strength):
    path = write(tmp_path, "kind", kind_state_dict(kind, config=tiny, alpha=1.5))
    expected = stock.merge(checkpoint, [(path, strength)])
    assert_same(ours([(path, strength)], spec, base), expected, tensors)


SPLIT_KINDS = ["LoKr", "LoHa", "DoRA", "OFT", "LoKr products", "LoKr full", "LoKr full DoRA", "GLoRA", "GLoRA old",
               "difference"]  # fmt: skip


@pytest.mark.parametrize("kind", SPLIT_KINDS)
@of_both
def test_kinds_in_split_names_equal_stock(tmp_path, spec, tensors, base, stock, checkpoint, tiny, kind):
    """ComfyUI adds a DoRA's or OFT's change to norm_out with its halves exchanged, but not what multiplies them.

    Nor has it diffusers' names of FLUX.2's modulations and embedders.
    """

    def known(module):
        return "_blocks." in module if tiny is not TINY else not module.startswith("final_layer.adaLN")

    path = write(tmp_path, "kind", kind_state_dict(kind, "lycoris", tiny, targets=known))
    assert_same(ours([(path, 0.9)], spec, base), stock.merge(checkpoint, [(path, 0.9)]), tensors)


@pytest.mark.parametrize("format", ["native", "diffusers"])
@of_both
def test_norms_equal_stock(tmp_path, spec, tensors, base, stock, checkpoint, tiny, format):
    path = write(tmp_path, "norms", norm_state_dict(tiny, format))
    expected = stock.merge(checkpoint, [(path, 0.7)])
    if format == "native":
        assert len(expected) == 2 * (2 * tiny.depth + tiny.depth_single)
    assert_same(ours([(path, 0.7)], spec, base), expected, tensors)


# Parts of a single block's first linear, which diffusers' FLUX.2 and checkpoints keep whole.
PARTS = {
    "linear1_qkv": ("diffusion_model.single_blocks.0.linear1_qkv", 0, 3),
    "to_qkv": ("transformer.single_transformer_blocks.0.attn.to_qkv", 0, 3),
    "to_q": ("transformer.single_transformer_blocks.0.attn.to_q", 0, 1),
    "to_v": ("lycoris_single_transformer_blocks_0_attn_to_v", 2, 1),
    "proj_mlp": ("transformer.single_transformer_blocks.0.proj_mlp", 3, 6),
    "linear1.3": ("transformer.single_blocks.0.linear1.3", 3, 6),
    "to_added_qkv": ("transformer.transformer_blocks.0.attn.to_added_qkv", 0, 3),
    "linear_in": ("transformer.transformer_blocks.1.ff.linear_in", 0, 6),
}


@pytest.mark.parametrize("kind", ["LoRA", "LoKr full", "LoHa", "difference", "OFT", "DoRA"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("tiny", ["FLUX.2"], indirect=True)
def test_a_part_of_a_fused_linear_is_changed_as_if_it_were_a_linear(tmp_path, spec, base, tensors, part, kind):
    """Each kind's own formula on the rows of a part; the other rows stay bit for bit."""
    name, first, count = PARTS[part]
    rows = slice(256 * first, 256 * (first + count))
    values = lora_kinds.kind_tensors(kind, (256 * count, 256), rms=0.02)
    path = write(tmp_path, "part", {f"{name}.{end}": value for end, value in values.items()})
    ((linear, weight),) = ours([(path, 0.8)], spec, base).items()
    before = tensors[linear].double()
    expected = before.clone()
    expected[rows] = changed(kind, before[rows], {end: value.double() for end, value in values.items()}, 0.8)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert (expected[rows] - before[rows]).norm() > 0.001 * before[rows].norm()
    untouched = torch.ones(len(before), dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(weight[untouched], before[untouched])


def changed(kind, weight, values, strength):
    """A weight (rows, columns) under one change without alpha, in float64."""
    if kind == "LoKr full":
        return weight + strength * torch.kron(values["lokr_w1"], values["lokr_w2"])
    if kind == "LoHa":
        halves = (values[f"hada_w{number}_a"] @ values[f"hada_w{number}_b"] for number in (1, 2))
        return weight + strength * next(halves) * next(halves)
    if kind == "difference":
        return weight + strength * values["diff"]
    if kind == "OFT":
        skew = values["oft_blocks"] - values["oft_blocks"].transpose(1, 2)
        identity = torch.eye(16, dtype=torch.float64)
        rotation = (identity + skew) @ torch.linalg.inv(identity - skew) - identity
        turned = torch.einsum("k n m, k n c -> k m c", rotation, weight.view(-1, 16, 256))
        return weight + strength**2 * turned.reshape_as(weight)
    change = values["lora_up.weight"] @ values["lora_down.weight"]
    if kind == "LoRA":
        return weight + strength * change
    longer = values["dora_scale"] / weight.norm(dim=1, keepdim=True)
    return weight + strength * (longer * (weight + change) - weight)


@pytest.mark.parametrize("kind", ["bias", "PEFT bias"])
@pytest.mark.parametrize("tiny", ["FLUX.2"], indirect=True)
def test_a_change_of_a_bias_that_is_not_there_is_refused(tmp_path, spec, tiny, kind):
    file = kind_state_dict(kind, "diffusers", tiny, targets=lambda module: module == "single_blocks.1.linear2")
    with pytest.raises(LoraError, match=r"changes a bias of 'transformer\.single_tr.*attn\.to_out', which has none in"):
        read_lora(str(write(tmp_path, "bias", file)), spec)


@of_both
def test_a_stack_of_everything_equals_stock(tmp_path, spec, tensors, base, stock, checkpoint, tiny):
    """DoRA, OFT and GLoRA twice each, among others, in both orders: composition depends on the order."""
    names = ["DoRA", "GLoRA", "LoKr full", "OFT", "LoRA", "LoKr full DoRA", "OFT", "bias", "LoKr DoRA", "LoHa", "DoRA"]
    names.append("GLoRA old")
    if tiny is not TINY:
        names[names.index("bias")] = "LoRA"
    files = [
        write(tmp_path, f"{number}", kind_state_dict(kind, config=tiny, seed=number, alpha=2.0))
        for number, kind in enumerate(names)
    ]
    loras = list(zip(files, (0.8, 0.9, -0.6, 0.5, -0.7, 0.9, 1.0, 0.9, 0.3, 0.4, 0.6, -0.5), strict=True))
    for order in (loras, loras[::-1], [loras[0], loras[0], loras[2]]):
        assert_same(ours(order, spec, base), stock.merge(checkpoint, order), tensors, 1e-4)


def test_a_lokr_with_a_middle_matrix_is_the_product_that_lycoris_defines(tmp_path, spec, tensors, base):
    file = kind_state_dict("LoKr Tucker", alpha=3.0, targets=lambda module: module.startswith("double_blocks.0"))
    actual = ours([(write(tmp_path, "lokr", file), 0.7)], spec, base)
    for name, value in actual.items():
        prefix = f"diffusion_model.{name.removesuffix('.weight')}"
        w1, a, b, middle = (file[f"{prefix}.lokr_{end}"].double() for end in ("w1", "w2_a", "w2_b", "t2"))
        w2 = torch.einsum("ij,ip,jr->pr", middle[:, :, 0, 0], a, b)
        expected = tensors[name].double() + 0.7 * 3.0 / 4 * torch.kron(w1, w2)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_peft_dora_equals_peft(tmp_path, spec, tensors, base):
    """m / ‖W + s BA‖ (W + s BA), by PEFT's own layer."""
    from peft.tuners.lora.dora import DoraLinearLayer

    file = kind_state_dict("PEFT DoRA", "diffusers", rank=4, targets=lambda module: "img_attn.qkv" in module)
    path = write(tmp_path, "dora", file)
    for strength in (1.0, 0.5, -0.7):
        actual = ours([(path, strength)], spec, base)
        for index in range(TINY.depth):
            parts = []
            for name in ("to_q", "to_k", "to_v"):
                module = f"transformer_blocks.{index}.attn.{name}"
                values = {key.removeprefix(f"transformer.{module}."): value for key, value in file.items()}
                linear = torch.nn.Linear(256, 256, bias=False)
                linear.weight.data = base.weight(module).clone()
                lora_A, lora_B = torch.nn.Linear(256, 4, bias=False), torch.nn.Linear(4, 256, bias=False)
                lora_A.weight.data, lora_B.weight.data = values["lora_A.weight"], values["lora_B.weight"]
                layer = DoraLinearLayer(False)
                layer.weight = torch.nn.Parameter(values["lora_magnitude_vector"])
                x = torch.eye(256)
                with torch.no_grad():
                    added = layer(x, lora_A=lora_A, lora_B=lora_B, scaling=strength, base_layer=linear)
                    parts.append((linear(x) + added).T)
            torch.testing.assert_close(
                actual[f"double_blocks.{index}.img_attn.qkv.weight"].float(), torch.cat(parts), rtol=1e-4, atol=1e-5
            )


def test_peft_bias_is_added_with_the_scale(tmp_path, spec, base):
    file = kind_state_dict("PEFT bias", "diffusers", rank=4, alpha=2.0)
    weights = read_lora(str(write(tmp_path, "bias", file)), spec)
    flat = flatten(LoraStack().with_lora(weights, 0.6).active, torch.float32, pin=False, base=base)
    assert len(flat.vectors) == len(flat.placed)
    for parameter, value in flat.vectors.items():
        added = file[f"transformer.{parameter.removesuffix('.bias')}.lora_B.bias"]
        torch.testing.assert_close(value, base.parameter(parameter) + 0.6 * 0.5 * added)


def saved_by_diffusers(folder, tiny=TINY, **config):
    """A file by diffusers' own `save_lora_weights`, from a model with PEFT's layers in it."""
    import diffusers
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    sizes = {
        "patch_size": 1, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 2,
        "joint_attention_dim": 768, "guidance_embeds": True,
    }  # fmt: skip
    if tiny is TINY:
        pipeline = diffusers.FluxPipeline
        model = diffusers.FluxTransformer2DModel(in_channels=64, pooled_projection_dim=768, **sizes)
    else:
        pipeline = diffusers.Flux2Pipeline
        model = diffusers.Flux2Transformer2DModel(in_channels=128, mlp_ratio=3.0, **sizes)
    model.add_adapter(LoraConfig(init_lora_weights=False, **config))
    pipeline.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(model),
        **_collate_lora_metadata({"transformer": model}),
    )
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            layers[name] = module.get_delta_weight("default").detach()
    return folder / "pytorch_lora_weights.safetensors", layers


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha over rank", "rslora"])
def test_what_diffusers_saves_is_scaled_as_peft_does(tmp_path, spec, rslora):
    path, expected = saved_by_diffusers(
        tmp_path, r=4, lora_alpha=6, use_rslora=rslora,
        rank_pattern={"attn.to_q": 8, "transformer_blocks.1.ff.net.2": 3}, alpha_pattern={"attn.to_k": 2},
        target_modules=["to_q", "to_k", "to_v", "ff.net.2", "proj_out", "norm_out.linear", "x_embedder"],
    )
    weights = read_lora(str(path), spec)
    assert {layer.module for layer in weights.layers} == set(expected)
    assert {layer.rank for layer in weights.layers} == {3, 4, 8}
    for layer in weights.layers:
        torch.testing.assert_close(layer.scale * layer.lora_B @ layer.lora_A, expected[layer.module])


@pytest.mark.parametrize("tiny", ["FLUX.2"], indirect=True)
def test_what_diffusers_saves_of_flux2_is_scaled_as_peft_does(tmp_path, spec, tiny):
    """The fused linear of single blocks too, which is four here."""
    path, expected = saved_by_diffusers(
        tmp_path, tiny, r=4, lora_alpha=6, use_rslora=True, rank_pattern={"attn.to_qkv_mlp_proj": 8},
        target_modules=["to_q", "to_qkv_mlp_proj", "to_out.0", "ff.linear_in", "ff_context.linear_out",
                        "norm_out.linear", "double_stream_modulation_img.linear",
                        "time_guidance_embed.timestep_embedder.linear_1"],
    )
    changes = {layer.module: layer.scale * layer.lora_B @ layer.lora_A for layer in read_lora(str(path), spec).layers}
    for name, change in expected.items():
        block, fused, _ = name.partition("to_qkv_mlp_proj")
        names = [block + part for part in (("to_q", "to_k", "to_v", "to_mlp") if fused else ("",))]
        torch.testing.assert_close(torch.cat([changes.pop(each) for each in names]), change)
    assert not changes
    assert len(expected) == 2 * 4 + 2 * 1 + 3


def test_metadata_that_contradicts_the_matrices_is_refused(tmp_path, spec):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 8, "transformer.lora_alpha": 8})}
    path = write(tmp_path, "other-rank", lora_state_dict("diffusers", rank=4), metadata)
    with pytest.raises(LoraError, match=r"'other-rank\.safetensors'.*rank 4.*says 8"):
        read_lora(str(path), spec)
    bad = ["{r: 4}", "[" * 100_000]
    for changes in (
        {"lora_alpha": math.nan},
        {"r": math.inf},
        {"lora_alpha": 10**400},
        {"rank_pattern": {"blocks.(": 4}},
        {"alpha_pattern": {"*.to_q": 4}},
        {"alpha_pattern": {"to_q": math.nan}},
    ):
        values = {"r": 4, "lora_alpha": 4, **changes}
        bad.append(json.dumps({f"transformer.{key}": value for key, value in values.items()}))
    for metadata in bad:
        path = write(tmp_path, "broken", lora_state_dict("diffusers", rank=4), {"lora_adapter_metadata": metadata})
        with pytest.raises(LoraError, match=r"'broken\.safetensors'.*not a configuration of PEFT"):
            read_lora(str(path), spec)


@pytest.mark.parametrize("channels", [128, 384], ids=["control", "fill"])
def test_a_lora_for_the_plain_model_reads_the_latents_of_a_wide_one(tmp_path, channels):
    """As FLUX.1-Turbo-Alpha on Fill: diffusers widens lora_A by zeros, stock leaves the layer out."""
    checkpoint = write(tmp_path, "wide", tiny_flux_state_dict(TinyFluxConfig(in_channels=channels)))
    spec = inspect_checkpoint(str(checkpoint))
    for format in ("diffusers", "kohya", "native"):
        for dtype in (torch.float32, torch.float8_e4m3fn):
            file = lora_state_dict(format, rank=3, alpha=2.0, dtype=dtype)
            (layer,) = (
                layer
                for layer in read_lora(str(write(tmp_path, format, file)), spec).layers
                if layer.module == "x_embedder"
            )
            name = {"diffusers": "transformer.x_embedder", "kohya": "lora_unet_img_in"}.get(
                format, "diffusion_model.img_in"
            )
            narrow = next(value for key, value in file.items() if key.startswith(name) and value.shape[:1] == (3,))
            assert layer.lora_A.shape == (3, channels)
            assert torch.equal(layer.lora_A[:, :64].float(), narrow.float())
            assert not layer.lora_A[:, 64:].float().any()
    wrong = {f"diffusion_model.img_in.lora_{role}.weight": torch.zeros(256, 4) for role in "AB"}
    wrong["diffusion_model.img_in.lora_A.weight"] = torch.zeros(4, 32)
    with pytest.raises(LoraError, match=rf"is \(4, 32\), expected \(rank, {channels}\)"):
        read_lora(str(write(tmp_path, "wrong", wrong)), spec)


def test_what_a_model_lacks_and_what_no_loader_reads_is_counted(tmp_path, models, spec):
    schnell = inspect_checkpoint(str(models / "diffusion_models/tiny-flux-schnell-fp32.safetensors"))
    embeddings = {"bundle_emb.woman.clip_l": torch.zeros(2, 768), "bundle_emb.woman.t5": torch.zeros(2, 4096)}
    for format in ("kohya", "diffusers", "onetrainer"):
        path = str(write(tmp_path, format, {**lora_state_dict(format, rank=3, alpha=1.0), **embeddings}))
        dev, other = read_lora(path, spec), read_lora(path, schnell)
        missing = {layer.module for layer in dev.layers} - {layer.module for layer in other.layers}
        assert missing == {f"time_text_embed.guidance_embedder.linear_{number}" for number in (1, 2)}
        assert sum(dev.report.unused.values()) == 2
        assert "2 not used: of trained embeddings" in str(dev.report)
        assert sorted(other.report.unused.values()) == [2, 6]
        assert "6 not used: of the guidance embedder, which FLUX.1-schnell does not have" in str(other.report)
    with pytest.raises(LoraError, match=r"'only\.safetensors' holds nothing for the FLUX\.1.*2 keys of trained"):
        read_lora(str(write(tmp_path, "only", embeddings)), spec)


def test_requests_for_attention_are_counted(tmp_path, spec):
    """ComfyUI lets LoRAs carry them from about 0.40 on."""
    request = torch.tensor(list(b'{"attention": "comfy_kitchen_int8"}'), dtype=torch.uint8)
    blocks = ("double_blocks.0", "single_blocks.1")
    requests = {f"diffusion_model.{block}.comfy_attention.config": request.clone() for block in blocks}
    file = lora_state_dict("native", rank=3)
    plain, asking = (read_lora(str(write(tmp_path, name, tensors)), spec)
                     for name, tensors in (("plain", file), ("asking", {**file, **requests})))
    assert [layer.module for layer in asking.layers] == [layer.module for layer in plain.layers]
    assert "2 not used: which ask for an attention kernel" in str(asking.report)
    with pytest.raises(LoraError, match=r"holds nothing for the FLUX\.1.*2 keys which ask for an attention kernel"):
        read_lora(str(write(tmp_path, "only", requests)), spec)


@pytest.mark.parametrize(
    ("one", "other"), [("kohya", "diffusers_fused"), ("onetrainer", "diffusers"), ("native", "bfl")]
)
def test_two_loras_in_one_file_are_refused(tmp_path, spec, one, other):
    file = {**lora_state_dict(one, rank=3, seed=1), **lora_state_dict(other, rank=3, seed=2)}
    with pytest.raises(LoraError, match=r"'two\.safetensors' holds two LoRAs: '.*' and '.*' are the same layer"):
        read_lora(str(write(tmp_path, "two", file)), spec)


def test_a_file_in_float64(tmp_path, spec):
    one, two = (
        read_lora(str(write(tmp_path, str(dtype), lora_state_dict("kohya", rank=3, alpha=2.0, dtype=dtype))), spec)
        for dtype in (torch.float32, torch.float64)
    )
    for first, second in zip(one.layers, two.layers, strict=True):
        assert second.lora_A.dtype == torch.float32
        assert first.scale == second.scale
        assert torch.equal(first.lora_B, second.lora_B)


def test_metadata_that_says_nothing(tmp_path, spec):
    path = write(tmp_path, "null", lora_state_dict("diffusers", rank=4), {"lora_adapter_metadata": "null"})
    assert {layer.scale for layer in read_lora(str(path), spec).layers} == {1.0}


def image_embedder(channels):
    """A LoRA of a model whose tokens have so many channels."""
    return {"diffusion_model.img_in.lora_A.weight": torch.zeros(4, channels),
            "diffusion_model.img_in.lora_B.weight": torch.zeros(256, 4)}  # fmt: skip


LAYER = "diffusion_model.double_blocks.0.img_attn.proj"
REFUSED = {
    "OneTrainer's scaled OFT": ({f"{LAYER}.oft_R.scaled_oft": torch.zeros(4)}, "ComfyUI does not read it either"),
    "IA3": ({f"{LAYER}.weight": torch.zeros(1, 256), f"{LAYER}.on_input": torch.tensor(False)}, "is IA3"),
    "a whole layer": ({f"{LAYER}.weight": torch.zeros(256, 256)}, "whole weight"),
    "a control LoRA with keys of its own": (
        {"transformer.x_embedder.lora_A.weight": torch.zeros(4, 128),
         "transformer.x_embedder.lora_B.weight": torch.zeros(256, 4), "transformer.x": torch.zeros(4)},
        "is for FLUX.1 Canny or Depth"),
    "a checkpoint": (tiny_flux_state_dict(TINY), "is a whole FLUX.1 checkpoint, with"),
    "Qwen-Image": (
        {f"transformer_blocks.0.{name}.lora_{role}.weight": torch.zeros(4, 4)
         for name in ("img_mod.1", "txt_mod.1", "img_mlp.net.2", "attn.to_q") for role in "AB"},
        "it is for another model, whose layers are named alike"),
    "Chroma": ({"diffusion_model.distilled_guidance_layer.layers.0.in_layer.lora_A.weight": torch.zeros(4)}, "Chroma"),
    "FLUX.2": ({"diffusion_model.double_stream_modulation_img.lin.lora_A.weight": torch.zeros(4)}, "FLUX.2"),
    "Nunchaku": ({"transformer_blocks.0.mlp_fc1.lora_down": torch.zeros(4)}, "converted for Nunchaku"),
    "BOFT": ({f"{LAYER}.oft_blocks": torch.zeros(2, 16, 16, 16)}, "BOFT"),
    "a quarter of a GLoRA": ({f"{LAYER}.a1.weight": torch.zeros(4, 256)}, "no a2 matrix"),
    "GLoRA of another size": (
        {f"{LAYER}.{part}.weight": torch.zeros(4, 256) for part in ("a1", "a2", "b1", "b2")}, "expected (256, 4)"),
    "DoRA over GLoRA": (
        {**kind_state_dict("GLoRA", targets=lambda m: m == "double_blocks.0.img_attn.proj"),
         f"{LAYER}.dora_scale": torch.ones(256, 1)}, "does not belong with the GLoRA"),
    "difference of another size": ({f"{LAYER}.diff": torch.zeros(256, 512)}, "expected (256, 256)"),
    "whole weight": ({f"{LAYER}.set_weight": torch.zeros(256, 256)}, "whole weight"),
    "PEFT's OFT": ({f"{LAYER}.oft_R.weight": torch.zeros(4, 120)}, "rotates the layer's input"),
    "OFT across q, k and v": (
        {"diffusion_model.double_blocks.0.img_attn.qkv.oft_blocks": 0.01 * torch.randn(8, 96, 96)}, "lie across"),
    "OFT with rescale": (
        {f"{LAYER}.oft_blocks": torch.zeros(16, 16, 16), f"{LAYER}.rescale": torch.full((256, 1), 2.0)}, "rescales"),
    "DoRA over columns": (
        {**kind_state_dict("LoRA", targets=lambda m: m == "double_blocks.0.img_attn.proj"),
         f"{LAYER}.dora_scale": torch.ones(1, 256)}, "over the input's columns"),
    "DoRA without LoRA": ({f"{LAYER}.dora_scale": torch.ones(256, 1)}, "not there"),
    "two kinds": (
        {**kind_state_dict("LoRA", targets=lambda m: m == "double_blocks.0.img_attn.proj"),
         **kind_state_dict("LoHa", targets=lambda m: m == "double_blocks.0.img_attn.proj")}, "two ways"),
    "half a LoKr": ({f"{LAYER}.lokr_w1": torch.zeros(4, 4)}, "no lokr_w2"),
    "LoKr of another size": (
        {f"{LAYER}.lokr_w1": torch.zeros(4, 4), f"{LAYER}.lokr_w2": torch.zeros(32, 64)}, "factor of (256, 256)"),
    "3x3 convolution": (
        {f"{LAYER}.lora_down.weight": torch.zeros(4, 256, 3, 3), f"{LAYER}.lora_up.weight": torch.zeros(256, 4, 1, 1)},
        "expected a matrix"),
    "control LoRA": (
        {"img_in.lora_A.weight": torch.zeros(4, 128), "img_in.lora_B.weight": torch.zeros(256, 4),
         "single_blocks.0.norm.key_norm.scale": torch.ones(128)}, "Choose that model in Accelerated Flux Loader"),
    "a LoRA of Fill": (image_embedder(384), "is for FLUX.1 Fill, trained on that model"),
    "a LoRA of ACE++": (image_embedder(448), "is for ACE++ FFT"),
    "reshaped": (
        {**kind_state_dict("LoRA", targets=lambda m: m == "img_in"),
         "diffusion_model.img_in.reshape_weight": torch.tensor([256, 128])}, "reshaped"),
    "a norm of another size": (
        {"diffusion_model.single_blocks.0.norm.key_norm.diff": torch.zeros(64)}, "expected (128,)"),
    "NaN in a bias": ({f"{LAYER}.diff_b": torch.full((256,), math.nan)}, "NaN"),
}


@pytest.mark.parametrize(("file", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(tmp_path, spec, file, words):
    path = write(tmp_path, "refused", file)
    with pytest.raises(LoraError) as caught:
        read_lora(str(path), spec)
    message = str(caught.value)
    assert message.startswith("LoRA 'refused.safetensors'")
    assert words in message
    assert any(key.rsplit(".", 1)[0] in message or key in message for key in file)


# The model's own weights, for what depends on them.


@pytest.mark.parametrize("kind", ["plain", "torchao", "nf4"])
def test_slots_give_the_weights_that_the_model_computes_with(kind):
    linear = torch.nn.Linear(64, 96)
    expected, tolerance = linear.weight.detach().clone(), 1e-6
    model = torch.nn.Sequential(linear)
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
        tolerance = 0.01
    elif kind == "nf4":
        packed = find_mode("nf4").convert(linear.weight.detach(), linear.bias.detach(), False)
        model, tolerance = torch.nn.Sequential(packed), 0.02
    slots = LoraSlots(model.requires_grad_(False), ["0"], torch.device("cpu"))
    slots.bind(slots.empty)
    weight = slots.weight("0")
    assert (weight.dtype, tuple(weight.shape)) == (torch.float32, (96, 64))
    torch.testing.assert_close(weight, expected, rtol=0.0, atol=tolerance)
    own = slots.parameter("0.bias").clone()
    flat = FlatLora(torch.zeros(64), {}, {}, {"0.bias": torch.full((96,), 7.0)})
    slots.bind(slots.bindings(flat))
    assert bool((model[0].base.bias == 7.0).all())
    assert torch.equal(slots.parameter("0.bias"), own)


# Approximations.


def test_a_loha_of_high_rank_is_compressed(tmp_path, spec, tensors, base, stock, checkpoint):
    path = write(tmp_path, "loha", kind_state_dict("LoHa", rank=12, targets=lambda m: m.startswith("double")))
    weights = read_lora(str(path), spec)
    assert weights.report.ranks[1] <= 144
    assert 0.0 < weights.report.overall_error <= weights.report.max_error <= 0.01
    assert "approximated" in str(weights.report)
    expected = stock.merge(checkpoint, [(path, 1.0)])
    actual = ours([(path, 1.0)], spec, base)
    assert_same(actual, expected, tensors, 0.0101)
    largest, lost, total = 0.0, 0.0, 0.0
    for name, value in expected.items():
        error, change = (actual[name] - value).norm(), (value - tensors[name]).double().norm()
        largest, lost, total = max(largest, error / change), lost + error**2, total + change**2
    assert largest == pytest.approx(weights.report.max_error, rel=0.01)
    assert math.sqrt(lost / total) == pytest.approx(weights.report.overall_error, rel=0.01)


def test_a_loha_that_no_rank_fits_is_refused(tmp_path, spec):
    file = kind_state_dict("LoHa", rank=16, targets=lambda m: m == "double_blocks.0.img_attn.proj")
    path = write(tmp_path, "loha", file)
    with pytest.raises(LoraError, match=r"'loha\.safetensors'.*rank 256; the 8 that.*expected at most 10%"):
        read_lora(str(path), spec, tolerance=Tolerance(max_rank=8))


def difference(rank, noise, module="double_blocks.0.img_mlp.0", shape=(1024, 256)):
    generator = torch.Generator().manual_seed(rank)
    low_rank = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    change = 0.02 / rank**0.5 * (low_rank + noise * rank**0.5 * torch.randn(shape, generator=generator))
    return {f"diffusion_model.{module}.diff": change}


def test_a_difference_of_a_whole_weight_is_cut_to_its_rank(tmp_path, spec, tensors, base, stock, checkpoint):
    """The error that is stated is the one that is there; no noise of a sampler is touched."""
    file = {**difference(100, 0.003), **difference(5, 0.0, "double_blocks.0.img_attn.proj", (256, 256))}
    path = write(tmp_path, "difference", file)
    state = torch.get_rng_state()
    weights = read_lora(str(path), spec)
    assert torch.equal(torch.get_rng_state(), state)
    ranks = {layer.module: layer.rank for layer in weights.layers}
    assert ranks == {"transformer_blocks.0.ff.net.0.proj": 100, "transformer_blocks.0.attn.to_out.0": 5}
    expected, actual = stock.merge(checkpoint, [(path, 1.0)]), ours([(path, 1.0)], spec, base)
    name = "double_blocks.0.img_mlp.0.weight"
    error = float((actual[name] - expected[name]).norm() / (expected[name] - tensors[name]).norm())
    assert 0.001 < error < 0.01
    assert error == pytest.approx(weights.report.max_error, rel=0.02)


def test_a_difference_of_an_embedder_is_exact(tmp_path, spec, tensors, base, stock, checkpoint):
    """Its rank is at most 64, the width of the picture's side."""
    shapes = {"img_in": (256, 64), "final_layer.linear": (64, 256)}
    file = {}
    for module, shape in shapes.items():
        file |= difference(64, 1.0, module, shape)
    path = write(tmp_path, "embedders", file)
    report = read_lora(str(path), spec, cache_dir=tmp_path / "cache").report
    assert (report.keys_applied, report.keys_approximated) == (2, 0)
    assert not (tmp_path / "cache").exists()
    assert_same(ours([(path, 0.7)], spec, base), stock.merge(checkpoint, [(path, 0.7)]), tensors)


def test_a_difference_that_no_low_rank_comes_near_is_refused(tmp_path, spec):
    path = write(tmp_path, "flat", difference(1, 100.0))
    with pytest.raises(LoraError, match=r"'flat\.safetensors'.*rank 256; the 100 that.*expected at most 10%"):
        read_lora(str(path), spec, tolerance=Tolerance(max_rank=100))


def test_a_sketch_is_as_good_as_the_best():
    values = torch.logspace(0, -3, 200, dtype=torch.float64).float()
    u, v = (torch.linalg.qr(torch.randn(size, 200)).Q for size in (700, 500))
    matrix = (u * values) @ v.T
    for error, max_rank in ((0.1, 150), (0.01, 150), (0.001, 20), (0.0, 500)):
        found = lowrank.sketch(matrix, error, max_rank)
        best = lowrank.compress(lowrank.whole(matrix), error, max_rank)
        assert found.rank <= best.rank + 1
        left = float((matrix - found.lora_B @ found.lora_A).norm() / matrix.norm())
        assert left == pytest.approx(found.error, abs=2e-3 if error == 0.0 else 2e-4)
        assert found.error <= max(error, 1.02 * best.error + 1e-3)
        assert found.norm == pytest.approx(best.norm, rel=1e-5)
    nothing = lowrank.sketch(torch.zeros(300, 200), 0.01, 100)
    assert (nothing.rank, nothing.error, nothing.norm) == (1, 0.0, 0.0)
    assert not (nothing.lora_B @ nothing.lora_A).any()


def loha(number=0, targets="double_blocks.0"):
    return kind_state_dict("LoHa", rank=12, seed=number, targets=lambda module: module.startswith(targets))


def test_approximations_are_cached_and_rebuilt(tmp_path, spec, monkeypatch):
    path = write(tmp_path, "loha", loha())
    first = read_lora(str(path), spec, cache_dir=tmp_path / "cache")
    (cached,) = (tmp_path / "cache").iterdir()
    import accel.lora.read.factor_cache as module

    computed = []
    real = module.product_factors
    monkeypatch.setattr(module, "product_factors", lambda *arguments: computed.append(1) or real(*arguments))
    second = read_lora(str(path), spec, cache_dir=tmp_path / "cache")
    assert not computed
    assert second.report == first.report
    for one, two in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one.lora_A, two.lora_A)
        assert torch.equal(one.lora_B, two.lora_B)
    good = cached.read_bytes()
    cached.write_bytes(good[: len(good) // 2])
    again = read_lora(str(path), spec, cache_dir=tmp_path / "cache")
    assert len(computed) == 10
    assert torch.equal(again.layers[0].lora_B, first.layers[0].lora_B)
    assert cached.read_bytes() == good
    read_lora(str(path), spec, cache_dir=tmp_path / "cache", tolerance=Tolerance(error=0.005))
    save_file(loha(1), path)
    read_lora(str(path), spec, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, spec):
    (tmp_path / "file").write_text("not a folder")
    path = write(tmp_path, "loha", loha(targets="double_blocks.0.img_attn.proj"))
    assert read_lora(str(path), spec, cache_dir=tmp_path / "file").report.keys_approximated == 4


# Kronecker products.


def lokr(shape, factor, seed=0, module="double_blocks.0.img_attn.qkv", product=False):
    """A LoKr whose spectrum is flat: both matrices are parts of orthogonal ones, so that nothing of it can be cut."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for size in (factor, (shape[0] // factor[0], shape[1] // factor[1])):
        matrix = torch.randn(size, generator=generator)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        sides.append(u @ v)
    prefix = f"diffusion_model.{module}"
    if product:
        w2 = {"lokr_w2_a": sides[1], "lokr_w2_b": torch.eye(sides[1].shape[1]), "alpha": torch.tensor(64.0)}
    else:
        w2 = {"lokr_w2": 0.3 * sides[1]}
    return {f"{prefix}.{end}": value for end, value in {"lokr_w1": sides[0], **w2}.items()}


# Fused linear -> sizes of w1: its parts then begin and end inside blocks of w2's rows, or w1 is the larger matrix.
FACTORS = {
    "double_blocks.0.img_attn.qkv": [(16, 16), (2, 8), (1, 1), (768, 256), (96, 16)],
    "single_blocks.1.linear1": [(16, 16), (7, 4), (256, 64)],
    "single_blocks.0.linear2": [(16, 16), (4, 5)],
    "final_layer.adaLN_modulation.1": [(1, 16), (16, 16), (512, 1)],
}
FACTORS_OF_FLUX2 = {
    "single_blocks.1.linear1": [(16, 16), (2, 8), (9, 4), (256, 64)],
    "single_stream_modulation.lin": [(2, 1)],
}
FLAT = [("FLUX.1", *each) for each in FACTORS.items()] + [("FLUX.2", *each) for each in FACTORS_OF_FLUX2.items()]
FLAT_IDS = [f"{name}-{module}" for name, module, _ in FLAT]


@pytest.mark.parametrize("product", [False, True], ids=["whole", "product"])
@pytest.mark.parametrize(("tiny", "module", "factors"), FLAT, indirect=["tiny"], ids=FLAT_IDS)
def test_a_lokr_of_a_flat_spectrum_is_exact_wherever_its_blocks_lie(
    tmp_path, spec, tensors, base, stock, checkpoint, module, factors, product
):
    shape = tuple(tensors[f"{module}.weight"].shape)
    for number, factor in enumerate(factors):
        path = write(tmp_path, f"lokr{number}", lokr(shape, factor, number, module, product))
        loras = [(path, 0.7), (path, -0.2)]
        assert_same(ours(loras, spec, base), stock.merge(checkpoint, loras), tensors)


def test_alpha_beside_whole_matrices_means_nothing(tmp_path, spec, tensors, base, stock, checkpoint):
    """ai-toolkit writes 9999999999 there, in float16 as infinity."""
    file = {key: value.half() for key, value in lokr((768, 256), (16, 16)).items()}
    file["diffusion_model.double_blocks.0.img_attn.qkv.alpha"] = torch.tensor(math.inf, dtype=torch.float16)
    path = write(tmp_path, "lokr", file)
    assert_same(ours([(path, 0.7)], spec, base), stock.merge(checkpoint, [(path, 0.7)]), tensors)


def test_a_lokr_is_neither_cut_nor_kept_on_disk(tmp_path, spec):
    path = write(tmp_path, "lokr", kind_state_dict("LoKr full"))
    weights = read_lora(str(path), spec, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert weights.report.keys_applied == len(load_file(path))
    assert weights.report.keys_approximated == 0
    kroneckers = {layer.module: layer for layer in weights.layers if isinstance(layer, KroneckerLayer)}
    assert len(kroneckers) == len(weights.layers) == weights.report.targets == 50
    # q, k and v of a fused linear: one right matrix, and of the left one no more rows than they need.
    q, k, v = (kroneckers[f"transformer_blocks.0.attn.{name}"] for name in ("to_q", "to_k", "to_v"))
    assert q.right is k.right is v.right
    assert [(len(layer.left), layer.first) for layer in (q, k, v)] == [(3, 0), (4, 64), (3, 32)]
    # As large as the file, but for the rows that two parts need.
    assert weights.bytes == pytest.approx(path.stat().st_size, rel=0.02)


def test_a_lokr_of_low_rank_becomes_a_lora_where_that_is_less_work(tmp_path, spec):
    file = kind_state_dict("LoKr", rank=2, targets=lambda module: module == "double_blocks.0.img_attn.proj")
    file |= kind_state_dict("LoKr", rank=4, targets=lambda module: module == "double_blocks.1.img_attn.proj")
    path = str(write(tmp_path, "lokr", file))
    # 16 · (256 + 256) is less than 8 · 32 · 32 + 8 · 8 · 32, and 32 · (256 + 256) is more.
    assert multiplications((8, 8), (32, 32)) == 8 * 32 * 32 + 8 * 8 * 32
    low, high = read_lora(path, spec).layers
    assert low.rank == 16
    assert isinstance(high, KroneckerLayer)
    both = read_lora(path, spec, tolerance=Tolerance(exact_rank=8)).layers
    assert all(isinstance(layer, KroneckerLayer) for layer in both)


# What a stack costs, and what it costs less.


def test_a_stack_is_cut_to_a_rank_at_the_error_that_is_stated(tmp_path, spec, base, tensors):
    loras = [(write(tmp_path, f"{rank}", lora_state_dict("kohya", rank=rank, seed=rank)), 1.0) for rank in (12, 20)]
    stack = LoraStack()
    for path, strength in loras:
        stack = stack.with_lora(read_lora(str(path), spec), strength)
    flat = flatten(stack.active, torch.float32, pin=False, base=base)
    full = effective(flat, base, spec)
    last = 1.0
    for rank in (4, 16, 28):
        result = truncate(flat, rank)
        ranks = {place.a_shape[0] for place in result.flat.placed.values()}
        assert ranks == {-(-rank // 16) * 16}
        cut = effective(result.flat, base, spec)
        lost = math.sqrt(sum(float((cut[name] - full[name]).norm()) ** 2 for name in full))
        total = math.sqrt(sum(float((full[name] - tensors[name]).norm()) ** 2 for name in full))
        assert lost / total == pytest.approx(result.overall_error, rel=1e-3)
        assert 0.0 < result.overall_error <= result.max_error < last
        last = result.max_error
    same = truncate(flat, 32)
    assert same.max_error == 0.0
    assert torch.equal(same.flat.buffer, flat.buffer)
    attention = [same.flat.placed[f"transformer_blocks.0.attn.{name}"].a_start for name in ("to_q", "to_k", "to_v")]
    assert len(set(attention)) == 1
    with pytest.raises(ValueError, match="max_rank is 0"):
        truncate(flat, 0)


def test_a_stack_says_what_it_costs(tmp_path, spec, base):
    kohya = read_lora(str(write(tmp_path, "a", lora_state_dict("kohya", rank=16))), spec)
    split = read_lora(str(write(tmp_path, "b", lora_state_dict("diffusers", rank=32))), spec)
    stack = LoraStack().with_lora(kohya, 1.0).with_lora(split, -0.5).with_lora(split, 0.0)
    assert (stack.cost.linears, stack.cost.max_rank) == (50, 48)
    assert stack.cost.summed_rank == 50 * 48
    alone = LoraStack().with_lora(kohya, 1.0)
    flat = flatten(alone.active, torch.bfloat16, pin=False)
    assert alone.cost.megabytes(torch.bfloat16) == pytest.approx(flat.bytes / 1e6, rel=1e-3)
    assert LoraStack().with_lora(kohya, 0.0).cost.megabytes(torch.bfloat16) == 0.0
    assert str(stack.cost) == "rank 48 at most on 50 linears"
    assert alone.cost.multiplications == alone.cost.elements


def test_a_stack_with_kronecker_products_says_what_they_cost(tmp_path, spec):
    kronecker = read_lora(str(write(tmp_path, "lokr", kind_state_dict("LoKr full"))), spec)
    kohya = read_lora(str(write(tmp_path, "kohya", lora_state_dict("kohya", rank=16))), spec)
    stack = LoraStack().with_lora(kronecker, 0.5)
    flat = flatten(stack.active, torch.bfloat16, pin=False)
    assert stack.cost.megabytes(torch.bfloat16) == pytest.approx(flat.bytes / 1e6, rel=1e-2)
    assert str(stack.cost) == "Kronecker products on 50 linears"
    assert stack.cost.max_rank == 0
    layers = kronecker.layers
    assert stack.cost.multiplications == sum(multiplications(each.left.shape, each.right.shape) for each in layers)
    both = stack.with_lora(kohya, 1.0)
    assert str(both.cost) == "rank 16 at most on 50 linears, Kronecker products on 50 linears"
    alone = LoraStack().with_lora(kohya, 1.0).cost
    assert both.cost.multiplications == stack.cost.multiplications + alone.multiplications
    assert both.cost.elements == stack.cost.elements + alone.elements


def test_the_report_accounts_for_every_key(tmp_path, spec):
    file = {
        **kind_state_dict("LoRA", alpha=2.0, targets=lambda module: module == "img_in"),
        **kind_state_dict("DoRA", rank=7, targets=lambda module: module == "double_blocks.0.img_attn.qkv"),
        **kind_state_dict("OFT", targets=lambda module: module == "txt_in"),
        **kind_state_dict("bias", targets=lambda module: module == "img_in"),
        **norm_state_dict(),
        **lora_files.clip_l_lora_state_dict("native", layers=range(1)),
    }
    report = read_lora(str(write(tmp_path, "all", file)), spec).report
    assert report.keys_applied + report.text_encoder_keys == len(file)
    assert report.kinds == {"LoRA": 1, "DoRA (LoRA)": 1, "OFT": 1, "bias": 1, "norm": 12}
    assert (report.ranks, report.targets, report.format) == ((4, 7), 5, "ComfyUI")
    assert str(report).startswith("ComfyUI: DoRA (LoRA) on 1, LoRA on 1, OFT on 1, bias on 1, norm on 12, ranks 4 to 7")


@pytest.mark.parametrize("format", list(ALL_FORMATS))
def test_formats_have_names(tmp_path, spec, format):
    names = {
        "kohya": "Kohya sd-scripts", "diffusers": "diffusers / PEFT", "native": "ComfyUI", "bfl": "Black Forest Labs",
        "diffusers_old": "diffusers / PEFT", "onetrainer": "OneTrainer", "lycoris": "LyCORIS", "fal": "PEFT",
        "diffsynth": "DiffSynth", "xlabs": "XLabs", "omi": "OneTrainer", "diffusers_fused": "diffusers / PEFT",
        "simpletuner": "diffusers' names behind ComfyUI's prefix",
    }
    path = write(tmp_path, "a", lora_state_dict(format, rank=2))
    assert read_lora(str(path), spec).report.format == names[format]


def test_what_needs_the_base_says_so_and_nothing_else_does(tmp_path, spec):
    plain = [(kind, False) for kind in ("LoRA", "OFT", "LoKr", "LoKr full")]
    for kind, needs in (*plain, ("DoRA", True), ("LoKr full DoRA", True), ("bias", True)):
        weights = read_lora(str(write(tmp_path, kind, kind_state_dict(kind))), spec)
        if needs:
            with pytest.raises(ValueError, match="needs the base weights"):
                flatten(LoraStack().with_lora(weights, 1.0).active, torch.float32, pin=False)
        else:
            flatten(LoraStack().with_lora(weights, 1.0).active, torch.float32, pin=False)


def test_a_strength_that_overflows_is_refused(tmp_path, spec):
    weights = read_lora(str(write(tmp_path, "big", lora_state_dict("kohya", dtype=torch.float16))), spec)
    assert math.isfinite(weights.peak)
    flatten(LoraStack().with_lora(weights, 1000.0).active, torch.float16, pin=False)
    with pytest.raises(LoraError, match=r"'big\.safetensors' × 1e\+07 overflows"):
        flatten(LoraStack().with_lora(weights, 1e7).active, torch.float16, pin=False)


def test_buffers_are_used_again_when_no_tensor_is_left(tmp_path, spec, monkeypatch):
    buffers = HostBuffers(2**30)
    path = write(tmp_path, "a", lora_state_dict("kohya", rank=128))
    plain = read_lora(str(path), spec)
    weights = read_lora(str(path), spec, buffers=buffers)
    passed_through = buffers.free_bytes  # what the file was read into before its tensors were in their places
    layer = weights.layers[3]
    del weights
    assert buffers.free_bytes == passed_through
    assert torch.equal(layer.lora_B, plain.layers[3].lora_B)
    del layer
    assert buffers.free_bytes >= passed_through + path.stat().st_size * 0.99
    with monkeypatch.context() as patch:
        patch.setattr(accel.memory.buffers, "new_block", None)
        again = read_lora(str(path), spec, buffers=buffers)
    assert torch.equal(again.layers[3].lora_B, plain.layers[3].lora_B)
    flat = flatten(LoraStack().with_lora(again, 0.5).active, torch.float32, pin=False, buffers=buffers)
    expected = flatten(LoraStack().with_lora(plain, 0.5).active, torch.float32, pin=False)
    assert torch.equal(flat.buffer, expected.buffer)
    del again, flat
    buffers.clear()
    assert buffers.free_bytes == 0
    HostBuffers(0).take(2**23)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_magnitude_is_found_among_the_bits(dtype):
    for values in ([0.0, -3.0, 2.0], [-0.0], [1.5, -1.0], [-448.0, 0.25]):
        tensor = torch.tensor(values).to(dtype)
        found = max_magnitude(tensor.view(torch.uint8).numpy(), dtype)
        assert found == float(tensor.float().abs().max())
    bad = [math.nan, -math.nan] if dtype == torch.float8_e4m3fn else [math.nan, -math.nan, math.inf, -math.inf]
    for value in bad:
        tensor = torch.tensor([1.0, value, -2.0]).to(dtype)
        found = max_magnitude(tensor.view(torch.uint8).numpy(), dtype)
        assert not math.isfinite(found)


@pytest.mark.parametrize("chunk_bytes", [64, 2**12, 2**23])
def test_a_value_that_is_not_finite_is_named_wherever_it_is(tmp_path, spec, monkeypatch, chunk_bytes):
    """A file is checked piece by piece while it comes, and converted meanwhile."""
    monkeypatch.setattr(accel.lora.read.stream, "CHUNK_BYTES", chunk_bytes)
    one = {
        kind: kind_state_dict(kind, targets=lambda name, module=module: name == module, alpha=2.0)
        for kind, module in (
            ("LoRA", "double_blocks.0.img_attn.qkv"),
            ("DoRA", "double_blocks.1.txt_attn.proj"),
            ("OFT", "double_blocks.1.img_attn.proj"),
            ("LoHa", "single_blocks.0.linear2"),
            ("LoKr full", "single_blocks.1.linear2"),
        )
    }
    file = {key: value for kind in one.values() for key, value in kind.items()}
    file |= {"diffusion_model.single_blocks.0.norm.key_norm.diff": torch.zeros(128)}
    read_lora(write(tmp_path, "whole", file), spec)
    for key, tensor in file.items():
        if key == "diffusion_model.single_blocks.1.linear2.alpha":
            continue  # has no meaning beside whole matrices
        bad = {**file, key: tensor.clone()}
        bad[key].view(-1)[-1] = math.inf
        with pytest.raises(LoraError, match=f"'{re.escape(key)}' holds NaN or infinity"):
            read_lora(write(tmp_path, "bad", bad), spec)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, spec, monkeypatch):
    path = write(tmp_path, "shrinking", lora_state_dict("kohya", rank=3))
    looked_at = accel.lora.read.file.account

    def cut(file, spec):
        keys = looked_at(file, spec)
        os.truncate(path, path.stat().st_size // 2)
        return keys

    monkeypatch.setattr(accel.lora.read.stream, "CHUNK_BYTES", 2**10)  # so that most of it is read after that
    monkeypatch.setattr(accel.lora.read.file, "account", cut)
    with pytest.raises(FileError, match=r"'shrinking\.safetensors' became shorter or unreadable.*Get it again"):
        read_lora(str(path), spec)


def test_another_file_in_the_same_place_is_refused(tmp_path, spec, monkeypatch):
    path = write(tmp_path, "replaced", lora_state_dict("kohya", rank=3))
    other = write(tmp_path, "other", lora_state_dict("kohya", rank=4))
    header = accel.lora.read.file.read_header

    def replaced(name):
        os.replace(other, path)
        return header(name)

    monkeypatch.setattr(accel.lora.read.file, "read_header", replaced)
    with pytest.raises(FileError, match=r"'replaced\.safetensors' was changed while it was read"):
        read_lora(str(path), spec)


def test_a_file_that_is_overwritten_in_place_is_refused(tmp_path, spec, monkeypatch):
    """Half old and half new values would be no LoRA."""
    path = write(tmp_path, "overwritten", lora_state_dict("kohya", rank=3))
    convert, changed = accel.lora.kinds.convert, []

    def overwrite(*arguments):
        if not changed:
            changed.append(path.write_bytes(path.read_bytes()))
            os.utime(path, ns=(1, 1))
        return convert(*arguments)

    monkeypatch.setattr(accel.lora.kinds, "convert", overwrite)
    with pytest.raises(FileError, match=r"'overwritten\.safetensors' was changed while it was read"):
        read_lora(str(path), spec)


def test_a_float64_value_that_float32_cannot_hold_is_named(tmp_path, spec):
    file = {key: tensor.double() for key, tensor in lora_state_dict("kohya", rank=3).items()}
    key = next(key for key in file if key.endswith("lora_up.weight"))
    file[key][0, 0] = -1e300
    with pytest.raises(LoraError, match=f"'{re.escape(key)}' holds NaN or infinity"):
        read_lora(str(write(tmp_path, "large", file)), spec)


def test_an_empty_tensor_is_refused_by_name(tmp_path, spec):
    oft = kind_state_dict("OFT")
    key = next(key for key in oft if key.endswith(".oft_blocks")).replace(".oft_blocks", ".rescale")
    with pytest.raises(LoraError, match=re.escape(f"'{key}' is (0,), expected")):
        read_lora(str(write(tmp_path, "empty", {**oft, key: torch.zeros(0)})), spec)


def test_a_nan_that_is_not_used_does_not_hide_an_overflow(tmp_path, spec):
    file = lora_state_dict("kohya", rank=1, alpha=1.0, scale=1000.0)
    file["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.full((4, 768), math.nan)
    stack = LoraStack().with_lora(read_lora(str(write(tmp_path, "strong", file)), spec), 100.0)
    with pytest.raises(LoraError, match="overflows"):
        flatten(stack.active, torch.float16, pin=False)


def test_a_bias_alone_does_not_keep_its_file_in_memory(tmp_path, spec):
    path = write(tmp_path, "bias", kind_state_dict("bias") | {"lora_te1_x.lora_down.weight": torch.zeros(2000, 2000)})
    weights = read_lora(str(path), spec)
    assert weights.bytes == sum(vector.value.nbytes for vector in weights.vectors) < path.stat().st_size / 10
    tensors = lora_state_dict("kohya", rank=3)
    whole = read_lora(str(write(tmp_path, "whole", tensors)), spec)
    assert whole.bytes >= sum(tensor.nbytes for tensor in tensors.values())


def test_two_changes_of_one_norm_are_refused(tmp_path, spec):
    file = {**norm_state_dict(format="native"), **norm_state_dict(format="diffusers")}
    with pytest.raises(LoraError, match=r"'norms\.safetensors' holds two LoRAs"):
        read_lora(str(write(tmp_path, "norms", file)), spec)


def test_patches_in_float64_and_with_a_bad_alpha(spec):
    target = LoraTarget.whole(spec.layout.linears[0])
    A, B = torch.randn(3, target.in_features), torch.randn(target.out_features, 3)

    def read(dtype, alpha):
        patch = LinearPatch("img_in", target, {"A": A.to(dtype), "B": B.to(dtype), "alpha": alpha})
        return from_patches([patch], tensor_digest).layers[0]

    assert torch.equal(read(torch.float64, 2.0).lora_B, B)
    for alpha in (math.nan, math.inf):
        with pytest.raises(LoraError, match=f"has alpha {alpha}, expected a finite number"):
            read(torch.float32, alpha)


def test_bytes_behind_a_lora_change_nothing(tmp_path, spec):
    path = write(tmp_path, "longer", lora_state_dict("kohya", rank=3, alpha=2.0))
    expected = read_lora(str(path), spec)
    path.write_bytes(path.read_bytes() + b"appended by a download")
    actual = read_lora(str(path), spec)
    for one, two in zip(expected.layers, actual.layers, strict=True):
        assert (one.module, one.scale) == (two.module, two.scale)
        assert torch.equal(one.lora_A, two.lora_A)
        assert torch.equal(one.lora_B, two.lora_B)


@pytest.mark.parametrize("header_bytes", [1, 2, 7])
def test_tensors_at_odd_places(tmp_path, spec, header_bytes):
    """safetensors aligns them; a file by another program may not."""
    path = write(tmp_path, "odd", lora_state_dict("kohya", rank=3, dtype=torch.float16))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head, rest = data[8 : 8 + size], data[8 + size :]
    path.write_bytes((size + header_bytes).to_bytes(8, "little") + head + b" " * header_bytes + rest)
    if header_bytes % 2:
        with pytest.raises(FileError, match="does not begin at a multiple of its dtype's size"):
            read_lora(str(path), spec)
    else:
        assert read_lora(str(path), spec).report.targets == 50


# A kind that this package does not have, in one class and one line of the table.


@dataclass(frozen=True)
class GainLayer(Layer):
    """weight scaled row by row: (1 + s · gain) · weight at strength s."""

    gain: torch.Tensor

    @property
    def rows(self):
        return len(self.gain)

    @property
    def tensors(self):
        return (self.gain,)

    @property
    def cost(self):
        return LayerCost(self.rows, self.rows)

    def apply(self, state, strength):
        return state.mix((1.0 + strength * self.gain)[:, None, None])


class Gain(Kind):
    name: ClassVar[str] = "gain"
    endings: ClassVar[dict[str, str]] = {".row_gain": "row_gain"}

    def check(self, shapes):
        shapes.vector("row_gain", shapes.target.out_features)
        return 0

    def convert(self, change, values):
        return Converted(
            tuple(GainLayer(*each) for each in split_rows(change.target, own_vector(values.tensors["row_gain"])))
        )


@pytest.fixture
def with_gain(monkeypatch):
    kinds = [kind for kind in KINDS_OF_THE_PACKAGE if kind is not KINDS_OF_THE_PACKAGE.bias]
    monkeypatch.setattr(accel.lora.kinds, "KINDS", KindTable(*kinds, Gain(), bias=KINDS_OF_THE_PACKAGE.bias))


def gains(modules=("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1")):
    sizes = flux_linears(TINY)
    return {f"diffusion_model.{module}.row_gain": 0.1 * torch.randn(sizes[module][0]) for module in modules}


def test_a_new_kind_is_one_class_from_the_file_to_the_slots(tmp_path, spec, tensors, base, with_gain):
    file = gains()
    gain = read_lora(str(write(tmp_path, "gain", file)), spec)
    lora = read_lora(str(write(tmp_path, "lora", lora_state_dict("native", rank=3))), spec)
    assert (gain.report.kinds, gain.report.keys_applied, gain.report.ranks) == ({"gain": 3}, 3, (0, 0))
    assert gain.report.targets == 3 + 4 + 1
    assert not gain.only_adds
    assert gain.bytes == sum(tensor.nbytes for tensor in file.values())
    stack = LoraStack().with_lora(lora, 0.7).with_lora(gain, -0.5)
    alone = LoraStack().with_lora(lora, 0.7)
    assert stack.cost.elements == alone.cost.elements + sum(tensor.numel() for tensor in file.values())
    flat = flatten(stack.active, torch.float32, pin=False, base=base)
    before = effective(flatten(alone.active, torch.float32, pin=False, base=base), base, spec)
    after = effective(flat, base, spec)
    for key, values in file.items():
        name = key.removeprefix("diffusion_model.").replace("row_gain", "weight")
        factor = (1.0 - 0.5 * values.double())[:, None]
        # Weights of one module each are what a slot computes with.
        torch.testing.assert_close(after[name], factor * before[name], rtol=1e-5, atol=1e-6)
    module = "transformer_blocks.0.attn.to_q"
    linear = torch.nn.Linear(256, 256)
    linear.weight.data = base.weight(module).clone()
    model = torch.nn.Sequential(linear).requires_grad_(False)
    slots = LoraSlots(model, ["0"], torch.device("cpu"))
    slots.bind(slots.bindings(replace(flat, placed={"0": flat.placed[module]}, mixing={"0": flat.mixing[module]})))
    expected = after["double_blocks.0.img_attn.qkv.weight"][:256].float()
    torch.testing.assert_close(model(torch.eye(256)) - linear.bias, expected.T, rtol=1e-4, atol=1e-5)


def test_a_new_kind_is_checked_and_told_from_others(tmp_path, spec, with_gain):
    (key, values), *_ = gains().items()
    with pytest.raises(LoraError, match=r"row_gain' is \(5,\), expected \(768,\)"):
        read_lora(str(write(tmp_path, "size", {key: torch.zeros(5)})), spec)
    layer = key.removesuffix(".row_gain")
    both = {key: values, f"{layer}.diff": torch.zeros(768, 256)}
    with pytest.raises(LoraError, match=r"changed in two ways at once, difference and gain"):
        read_lora(str(write(tmp_path, "both", both)), spec)
    scaled = {key: values, f"{layer}.alpha": torch.tensor(1.0)}
    with pytest.raises(LoraError, match=r"alpha' does not belong with the gain"):
        read_lora(str(write(tmp_path, "scaled", scaled)), spec)


def test_without_its_line_a_new_kind_is_unknown(tmp_path, spec):
    with pytest.raises(LoraError, match=r"'gain\.safetensors' does not fit"):
        read_lora(str(write(tmp_path, "gain", gains())), spec)


def test_two_kinds_cannot_claim_one_ending():
    with pytest.raises(ValueError, match="claim one ending"):
        KindTable(Gain(), Gain(), bias=KINDS_OF_THE_PACKAGE.bias)


def test_rows_of_one_layer_as_patches_of_one_name_stay_apart(spec, tmp_path):
    """ComfyUI brings q, k and v of diffusers' names so; each keeps its own matrices, also those kept on the disk."""
    linear = next(each for each in spec.layout.linears if each.name == "double_blocks.0.img_attn.qkv")
    patches = []
    for seed, part in enumerate(linear.parts):
        values = lora_kinds.kind_tensors("LoHa", (part.rows, linear.in_features), rank=12, seed=seed)
        target = LoraTarget((LinearPart(part.module, 0, part.rows),), linear.in_features, part.rows, False, True)
        patches.append(LinearPatch("diffusion_model.double_blocks.0.img_attn.qkv.weight", target, values))
    for _ in range(2):  # computed, and from the disk
        read = from_patches(patches, tensor_digest, cache_dir=tmp_path)
        assert read.report.keys_approximated >= 8
        for patch, layer in zip(patches, read.layers, strict=True):
            w1_a, w1_b, w2_a, w2_b = (patch.values[f"hada_{end}"] for end in ("w1_a", "w1_b", "w2_a", "w2_b"))
            change = (w1_a @ w1_b) * (w2_a @ w2_b)
            assert (layer.lora_B @ layer.lora_A - change).norm() < 0.02 * change.norm()


# What ComfyUI's own loaders put on the pack's model.


def natively(stock, checkpoint, loras, base, spec):
    """As `ours`, by ComfyUI's own loader."""
    return effective(flatten(stock.native(checkpoint, loras).active, torch.float32, pin=False, base=base), base, spec)


@pytest.mark.parametrize("format", ["native", "kohya", "diffusers", "onetrainer", "lycoris", "diffsynth"])
@of_both
def test_comfyuis_own_loader_brings_what_it_merges(tmp_path, spec, tensors, base, stock, checkpoint, tiny, format):
    """In blocks: of FLUX.2's modulations and embedders ComfyUI leaves out diffusers' names, here as when it merges."""
    file = lora_state_dict(format, tiny, rank=3, alpha=2.0, targets=lambda module: "_blocks." in module)
    loras = [(write(tmp_path, "a", file), 0.7), (write(tmp_path, "b", file), -0.3)]
    actual = natively(stock, checkpoint, loras, base, spec)
    assert_same(actual, stock.merge(checkpoint, loras), tensors)
    assert_same(actual, ours(loras, spec, base), tensors)


@pytest.mark.parametrize("kind", ["LoKr full", "LoHa", "DoRA", "OFT", "GLoRA", "difference"])
@pytest.mark.parametrize("tiny", ["FLUX.2"], indirect=True)
def test_comfyuis_own_loader_brings_kinds(tmp_path, spec, tensors, base, stock, checkpoint, tiny, kind):
    loras = [(write(tmp_path, "kind", kind_state_dict(kind, config=tiny, alpha=1.5)), 0.8)]
    assert_same(natively(stock, checkpoint, loras, base, spec), stock.merge(checkpoint, loras), tensors)


@pytest.mark.parametrize("tiny", ["FLUX.2"], indirect=True)
def test_comfyuis_own_loader_brings_norms_and_rows(tmp_path, spec, tensors, base, stock, checkpoint, tiny):
    file = norm_state_dict(tiny)
    for name, rows in (
        ("diffusion_model.single_blocks.0.linear1_qkv", 768),
        ("transformer.single_transformer_blocks.1.attn.to_k", 256),
    ):
        values = lora_kinds.kind_tensors("LoRA", (rows, 256), name=name)
        file |= {f"{name}.{end}": value for end, value in values.items()}
    loras = [(write(tmp_path, "rows", file), 0.8)]
    assert_same(natively(stock, checkpoint, loras, base, spec), stock.merge(checkpoint, loras), tensors)


@pytest.mark.parametrize("tiny", ["FLUX.2"], indirect=True)
def test_what_comfyui_places_wrongly_is_refused_and_read_from_the_file(tmp_path, spec, base, stock, checkpoint):
    """Its map gives `proj_mlp` four times the width, which is FLUX.1's; stock logs an error, and leaves it out."""
    name = "transformer.single_transformer_blocks.0.proj_mlp"
    values = lora_kinds.kind_tensors("LoRA", (1536, 256))
    path = write(tmp_path, "mlp", {f"{name}.{end}": value for end, value in values.items()})
    with pytest.raises(RuntimeError, match="ERROR"):
        stock.merge(checkpoint, [(path, 1.0)])
    with pytest.raises(RuntimeError, match=r"rows 768 to 1792 of 'single_blocks\.0\.linear1' are not .*Hotswap LoRA"):
        stock.native(checkpoint, [(path, 1.0)])
    assert list(ours([(path, 1.0)], spec, base)) == ["single_blocks.0.linear1.weight"]


@of_both
def test_comfyuis_own_loader_on_a_model_of_another_width(tmp_path, stock, checkpoint, tiny):
    """FLUX.2 klein 9B's, by ComfyUI's own loader, on what is as small as the tests' models."""
    shapes = {"double_blocks.0.img_attn.qkv": (12288, 4096), "double_blocks.1.txt_attn.proj": (4096, 4096),
              "single_blocks.0.linear1": (36864, 4096)}  # fmt: skip
    file = {}
    for module, (rows, columns) in shapes.items():
        file[f"diffusion_model.{module}.lora_A.weight"] = torch.zeros(1, columns)
        file[f"diffusion_model.{module}.lora_B.weight"] = torch.zeros(rows, 1)
    with pytest.raises(RuntimeError, match=r"LoRA: it is for FLUX\.2 klein 9B, not for FLUX.*are 256 wide"):
        stock.native(checkpoint, [(write(tmp_path, "klein", file), 1.0)])


# Properties.

MODULES = sorted(flux_linears(TINY))
KINDS = ["LoRA", "DoRA", "LoHa", "LoKr", "LoKr products", "LoKr full", "LoKr full DoRA", "GLoRA", "OFT", "bias"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_any_subset_rank_alpha_and_dtype_equals_stock(tmp_path, spec, tensors, base, stock, checkpoint, data):
    loras = []
    for number in range(data.draw(st.integers(1, 3))):
        chosen = data.draw(st.sets(st.sampled_from(MODULES), min_size=1, max_size=5))
        kind = data.draw(st.sampled_from([*KINDS, "LoRA", "LoRA"]))
        file = {}
        for module in sorted(chosen):
            file |= kind_state_dict(
                kind,
                targets=lambda name, module=module: name == module,
                rank=data.draw(st.integers(1, 8)),
                alpha=data.draw(st.sampled_from([None, 1.0, 2.0, 16.0])),
                seed=number,
                rms=0.1,
                dtype=data.draw(st.sampled_from(DTYPES)),
            )
        strength = data.draw(st.sampled_from([1.0, 0.5, -1.0, 2.0]))
        loras.append((write(tmp_path, f"lora{number}", file), strength))
    expected = stock.merge(checkpoint, loras)
    actual = ours(loras, spec, base)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        error = float((actual[name] - value).norm() / value.norm())
        assert error < 1e-5, f"{name}: {error}"
