"""Every kind of checkpoint file gives the weights that its writer meant, and wrong ones are explained."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel.build import load_model
from accel.checkpoint import identify, inspect_checkpoint, read_weights
from accel.checkpoint.other_models import first_match
from accel.checkpoint.read import LinearWeights
from accel.errors import AccelError, CheckpointError, FileError
from accel.families import registry
from accel.families.flux2.layout import diffusers_layout
from accel.files import TensorInfo
from harness import checkpoint_kinds as kinds
from harness.tensor_files import json_tensor, write_tensors
from harness.tiny_flux2 import TinyFlux2Config, tiny_flux2_state_dict
from harness.tiny_models import TinyFluxConfig, tiny_flux_state_dict

CPU = torch.device("cpu")
CONFIG = TinyFluxConfig(hidden=256, depth=1, depth_single=2, context=256, pooled=256)
FLUX2 = TinyFlux2Config(hidden=256, depth=1, depth_single=2, context=256, guidance=True)
# What a test without the mark `of_both` runs with is FLUX.1.
CONFIGS = {"FLUX.1": CONFIG, "FLUX.2": FLUX2}
of_both = pytest.mark.parametrize("config", CONFIGS, indirect=True)


@pytest.fixture(scope="module")
def config(request):
    return CONFIGS[getattr(request, "param", "FLUX.1")]


@pytest.fixture(scope="module")
def tensors(config):
    made = tiny_flux2_state_dict(config) if config is FLUX2 else tiny_flux_state_dict(config)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def parameters(path, dtype=torch.float32):
    spec = inspect_checkpoint(path)
    return dict(load_model(spec, dtype, CPU, lambda done, total: None).named_parameters())


def assert_holds(path, tensors, dtype=torch.float32):
    """The loaded model is diffusers' own conversion of these tensors, bit for bit after one rounding to `dtype`."""
    config = config_of(tensors)
    expected = dict(apart(kinds.diffusers_model(tensors, config, torch.float32), config))
    loaded = parameters(path, dtype)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded[name], value.to(dtype)), name


def apart(model, config):
    """Names and values of diffusers' model, with the linear that this package takes apart in four."""
    for name, value in model.named_parameters():
        block, found, end = name.partition("to_qkv_mlp_proj")
        parts = value.split([config.hidden] * 3 + [2 * config.mlp]) if found else [value]
        names = ("to_q", "to_k", "to_v", "to_mlp") if found else ("",)
        yield from ((f"{block}{part}{end}", rows) for part, rows in zip(names, parts, strict=True))


def config_of(tensors):
    return FLUX2 if "double_stream_modulation_img.lin.weight" in tensors else CONFIG


KINDS = {
    "bf16": lambda path, tensors: kinds.plain(path, tensors, torch.bfloat16),
    "fp16": lambda path, tensors: kinds.plain(path, tensors, torch.float16),
    "fp32": lambda path, tensors: kinds.plain(path, tensors, torch.float32),
    "e4m3": lambda path, tensors: kinds.plain(path, tensors, torch.float8_e4m3fn),
    "e5m2": lambda path, tensors: kinds.plain(path, tensors, torch.float8_e5m2),
    "prefixed": lambda path, tensors: kinds.plain(path, tensors, torch.float32, "model.diffusion_model."),
    "scaled, marker": lambda path, tensors: kinds.scaled_fp8(path, tensors, "marker"),
    "scaled, e5m2": lambda path, tensors: kinds.scaled_fp8(path, tensors, "marker", torch.float8_e5m2),
    "scaled, tensors": lambda path, tensors: kinds.scaled_fp8(path, tensors, "tensors"),
    "scaled, metadata": lambda path, tensors: kinds.scaled_fp8(path, tensors, "metadata"),
    "scaled, rows": lambda path, tensors: kinds.scaled_fp8(path, tensors, "tensors", per_row=True),
    "scaled, prefixed": lambda path, tensors: kinds.scaled_fp8(
        path, tensors, "metadata", prefix="model.diffusion_model."),
    "all in one": kinds.all_in_one,
    "sft": lambda path, tensors: kinds.plain(path.with_suffix(".sft"), tensors, torch.bfloat16),
    "folder": lambda path, tensors: kinds.diffusers_folder(path.with_suffix(""), tensors, config_of(tensors)),
    "shards": lambda path, tensors: kinds.diffusers_folder(
        path.with_suffix(""), tensors, config_of(tensors), shard_bytes=400_000),
    "pipeline": lambda path, tensors: kinds.diffusers_folder(
        path.with_suffix(""), tensors, config_of(tensors), pipeline=True),
    "diffusers in one file": lambda path, tensors: diffusers_file(path, tensors),
    "diffusers, prefixed": lambda path, tensors: diffusers_file(path, tensors, "transformer."),
    "as trainers save it": lambda path, tensors: kinds.plain(path, tensors, torch.bfloat16, "diffusion_model."),
    "gguf without architecture": lambda path, tensors: kinds.gguf(
        path.with_suffix(".gguf"), tensors, architecture=None),
    "gguf of a nameless architecture": lambda path, tensors: kinds.gguf(
        path.with_suffix(".gguf"), tensors, architecture="pig"),
    "gguf reshaped": lambda path, tensors: kinds.gguf(
        path.with_suffix(".gguf"), tensors, reshaped="single_blocks.0.linear2.weight"),
}  # fmt: skip
GGUF_KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
for gguf_kind in GGUF_KINDS:
    KINDS[f"gguf {gguf_kind}"] = lambda path, tensors, kind=gguf_kind: kinds.gguf(
        path.with_suffix(".gguf"), tensors, kind)


def diffusers_file(path, tensors, prefix=""):
    model = kinds.diffusers_model(tensors, config_of(tensors), torch.bfloat16)
    save_file({prefix + name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return kinds.Written(path, {name: tensor.bfloat16().float() for name, tensor in tensors.items()})


def renamed(path, tensors):
    """The scales of norms as some programs call them."""
    stored = {name.replace("_norm.scale", "_norm.weight"): tensor.bfloat16() for name, tensor in tensors.items()}
    write_tensors(path, stored)
    return kinds.Written(path, {name: tensor.bfloat16().float() for name, tensor in tensors.items()})


KINDS["norms called weight"] = renamed
# How one GGML type or another is unpacked does not depend on the model.
PAIRS = [("FLUX.1", kind) for kind in KINDS]
PAIRS += [("FLUX.2", kind) for kind in KINDS if kind.removeprefix("gguf ") not in GGUF_KINDS or kind in (
    "gguf BF16", "gguf Q8_0", "gguf Q4_K")]  # fmt: skip


@pytest.mark.parametrize(("config", "kind"), PAIRS, indirect=["config"])
def test_every_kind_gives_the_weights_that_it_was_made_from(tmp_path, tensors, kind):
    written = KINDS[kind](tmp_path / "model.safetensors", tensors)
    assert_holds(written.path, written.tensors)
    # rounded once to bfloat16, whatever the file computes with
    assert_holds(written.path, written.tensors, torch.bfloat16)


@pytest.mark.parametrize("kind", ["bf16", "scaled, marker", "scaled, rows", "all in one", "shards", "gguf Q4_K"])
@of_both
def test_parameters_are_counted_without_scales_and_other_parts(tmp_path, tensors, kind):
    spec = inspect_checkpoint(KINDS[kind](tmp_path / "model.safetensors", tensors).path)
    assert spec.parameter_count == sum(tensor.numel() for tensor in tensors.values())


STORED = {
    "bf16": torch.bfloat16, "e5m2": torch.float8_e5m2, "scaled, marker": torch.float8_e4m3fn,
    "gguf Q8_0": torch.bfloat16, "gguf F16": torch.float16, "gguf F32": torch.float32, "shards": torch.bfloat16,
}  # fmt: skip


@pytest.mark.parametrize("kind", STORED)
def test_stored_dtype(tmp_path, tensors, kind):
    assert inspect_checkpoint(KINDS[kind](tmp_path / "m.safetensors", tensors).path).stored_dtype == STORED[kind]


def test_scaled_weights_are_what_they_were_quantized_from(tmp_path, tensors):
    """The scales matter: without them the weights would be off by hundreds."""
    written = kinds.scaled_fp8(tmp_path / "scaled.safetensors", tensors, "marker")
    weight = parameters(written.path)["transformer_blocks.0.attn.to_q.weight"]
    source = tensors["double_blocks.0.img_attn.qkv.weight"][:256]
    assert (weight - source).norm() < 0.04 * source.norm()
    raw = load_file(written.path)["double_blocks.0.img_attn.qkv.weight"][:256].float()
    assert raw.norm() > 100 * source.norm()


@of_both
def test_int8_with_scales(tmp_path, tensors):
    scale = tensors["img_in.weight"].abs().amax(dim=1, keepdim=True) / 127
    stored = {**tensors, "img_in.weight": (tensors["img_in.weight"] / scale).round().to(torch.int8),
              "img_in.weight_scale": scale}
    described = {"layers": {"img_in": {"format": "int8_tensorwise"}}}
    save_file(stored, tmp_path / "int8.safetensors", metadata={"_quantization_metadata": json.dumps(described)})
    assert_holds(tmp_path / "int8.safetensors", {**tensors, "img_in.weight": stored["img_in.weight"] * scale})


def test_int8_that_was_rotated_is_refused(tmp_path, tensors):
    """ComfyUI's ConvRot: without the rotation of what it multiplies, the weights mean nothing."""
    stored = {**tensors, "img_in.weight": torch.zeros(256, 64, dtype=torch.int8),
              "img_in.weight_scale": torch.ones(256, 1)}  # fmt: skip
    described = {"layers": {"img_in": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}}}
    save_file(stored, tmp_path / "int8.safetensors", metadata={"_quantization_metadata": json.dumps(described)})
    assert "'img_in' is quantized as 'int8_tensorwise' with a rotation" in error_of(tmp_path / "int8.safetensors")


@of_both
def test_nothing_of_the_file_is_kept(tmp_path, tensors):
    """Every yielded tensor owns exactly its own memory: no view of the file or of a fused linear."""
    for kind in ("fp32", "scaled, marker", "gguf Q8_0", "gguf F32"):
        spec = inspect_checkpoint(KINDS[kind](tmp_path / "model.safetensors", tensors).path)
        for weights in read_weights(spec, torch.float32, CPU):
            values = [weights.weight, weights.bias] if isinstance(weights, LinearWeights) else [weights.value]
            for value in values:
                assert value is None or value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("kind", ["bf16", "scaled, rows", "shards"])
def test_bytes_behind_the_last_tensor_change_nothing(tmp_path, tensors, kind):
    written = KINDS[kind](tmp_path / "model.safetensors", tensors)
    for file in written.path.glob("*.safetensors") if written.path.is_dir() else [written.path]:
        file.write_bytes(file.read_bytes() + b"appended by a download")
    assert_holds(written.path, written.tensors)


def test_every_file_of_a_folder_counts(tmp_path, tensors):
    path = KINDS["shards"](tmp_path / "model.safetensors", tensors).path
    spec = inspect_checkpoint(path)
    names = sorted(file.name for file in path.iterdir())
    assert len(names) > 4, names
    assert spec.file.identity == identify(path)
    for name in names:
        before = identify(path)
        stat = (path / name).stat()
        os.utime(path / name, ns=(stat.st_atime_ns, stat.st_mtime_ns - 1_000_000_000))
        assert identify(path) != before, name
    with pytest.raises(FileError, match="was changed after it was read"):
        next(read_weights(spec, torch.float32, CPU))


def test_the_index_itself_can_be_chosen(tmp_path, tensors):
    written = KINDS["shards"](tmp_path / "model.safetensors", tensors)
    index = written.path / "diffusion_pytorch_model.safetensors.index.json"
    assert_holds(index, written.tensors)


# What is refused.


def error_of(path) -> str:
    """What inspecting, or else reading, says."""
    with pytest.raises(AccelError) as caught:
        list(read_weights(inspect_checkpoint(path), torch.bfloat16, CPU))
    assert isinstance(caught.value, (CheckpointError, FileError))
    return str(caught.value)


def edit(path, change, metadata=None) -> Path:
    stored = load_file(path)
    change(stored)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path, metadata=metadata)
    return path


QKV = "double_blocks.0.img_attn.qkv"
BAD_SCALES = {
    "zero": (torch.tensor(0.0), ["holds zero, NaN", "positive"]),
    "nan": (torch.tensor(float("nan")), ["holds zero, NaN", "get it again"]),
    "infinite": (torch.tensor(float("inf")), ["holds zero, NaN"]),
    "negative": (torch.tensor(-1.0), ["negative number"]),
    "blocks": (torch.ones(768, 8), ["shape (768, 8)", "one for each of its 768 rows", "nvfp4 and mxfp8"]),
    "integer": (torch.tensor(1), ["torch.int64", "one floating-point scale"]),
}


@pytest.mark.parametrize("kind", BAD_SCALES)
def test_bad_scales(tmp_path, tensors, kind):
    path = kinds.scaled_fp8(tmp_path / "scaled.safetensors", tensors, "marker").path
    scale, words = BAD_SCALES[kind]
    message = error_of(edit(path, lambda stored: stored.update({f"{QKV}.scale_weight": scale})))
    for word in ["'scaled.safetensors'", f"'{QKV}.scale_weight'", *words]:
        assert word in message


def test_a_vector_has_no_scale_per_row(tmp_path, tensors):
    folder = kinds.diffusers_folder(tmp_path / "model", tensors, CONFIG).path
    name = "transformer_blocks.0.attn.norm_q"
    edit(folder / "diffusion_pytorch_model.safetensors",
         lambda stored: stored.update({f"{name}.weight_scale": torch.ones(128)}))
    assert f"'{name}.weight_scale' is torch.float32 of shape (128,)" in error_of(folder)


def test_a_scale_without_its_weight(tmp_path, tensors):
    path = kinds.scaled_fp8(tmp_path / "scaled.safetensors", tensors, "marker").path
    message = error_of(edit(path, lambda stored: stored.update({"nowhere.scale_weight": torch.ones(())})))
    assert "'nowhere.scale_weight' is a scale without a weight" in message


def test_a_described_weight_without_its_scale(tmp_path, tensors):
    path = kinds.scaled_fp8(tmp_path / "scaled.safetensors", tensors, "tensors").path
    message = error_of(edit(path, lambda stored: stored.pop(f"{QKV}.weight_scale")))
    assert f"has no '{QKV}.weight_scale'" in message


def test_a_weight_with_two_scales(tmp_path, tensors):
    path = kinds.scaled_fp8(tmp_path / "scaled.safetensors", tensors, "marker").path
    message = error_of(edit(path, lambda stored: stored.update({f"{QKV}.weight_scale": torch.ones(())})))
    assert "has two scales" in message


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "convrot_w4a4", "something_new"])
def test_other_formats_of_comfyui_are_named(tmp_path, tensors, kind):
    described = json.dumps({"layers": {QKV: {"format": kind}}})
    path = tmp_path / "quantized.safetensors"
    save_file(tensors, path, metadata={"_quantization_metadata": described})
    message = error_of(path)
    for word in ["'quantized.safetensors'", f"'{QKV}' is quantized as '{kind}'", "GGUF"]:
        assert word in message


def packed(weight, columns_per_byte=2, dtype=torch.uint8):
    return torch.zeros(weight.shape[0], weight.shape[1] // columns_per_byte, dtype=dtype)


PACKED = {
    "nvfp4": lambda w: ({"weight": packed(w), "weight_scale": torch.ones(len(w), 4).to(torch.float8_e4m3fn),
                         "weight_scale_2": torch.tensor(1.0)}, "nvfp4"),
    "mxfp8": lambda w: ({"weight": w.to(torch.float8_e4m3fn),
                         "weight_scale": torch.full((len(w), 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)},
                        "mxfp8"),
    "convrot_w4a4": lambda w: ({"weight": packed(w, dtype=torch.int8), "weight_scale": torch.ones(len(w))}, None),
    "asym_w4a8_int8": lambda w: ({"weight": packed(w, dtype=torch.int8), "weight_s_channel": torch.ones(len(w)),
                                  "weight_s_rel": torch.ones(len(w), 4)}, "w4a8 or w6a8"),
    "something_new": lambda w: ({"weight": packed(w, 8)}, "packed uint8 values, of a format that the file does not"),
}  # fmt: skip


@pytest.mark.parametrize("layers", [("img_in",), ("txt_in", "img_in", QKV)], ids=["img_in", "several"])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_sizes_are_not_taken_for_the_models(tmp_path, tensors, kind, layers):
    """Described in the file or not, the format is named, not a width that follows from it."""
    file = dict(tensors)
    for layer in layers:
        stored, name = PACKED[kind](file.pop(f"{layer}.weight"))
        file |= {f"{layer}.{end}": tensor for end, tensor in stored.items()}
    description = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    described = file | {f"{layer}.comfy_quant": description.clone() for layer in layers}
    message = error_of(write_tensors(tmp_path / "described.safetensors", described))
    assert f"' is quantized as '{kind}', which this loader does not read" in message
    if name is not None:
        message = error_of(write_tensors(tmp_path / "bare.safetensors", file))
        assert name in message
        assert "choose such a file, the bf16 one, or a GGUF file" in message


@pytest.mark.parametrize(
    ("channels", "words"),
    [(448, "ACE++ FFT (one more picture"), (196, "Flex.2-preview (a mask"), (72, "no published FLUX.1 does")],
)
def test_inputs_of_other_models_are_named(tmp_path, tensors, channels, words):
    file = {**tensors, "img_in.weight": torch.zeros(256, channels)}
    message = error_of(write_tensors(tmp_path / "wide.safetensors", file))
    for word in (f"img_in reads {channels} channels", words, "384 (FLUX.1 Fill)", "the nodes that its author names"):
        assert word in message


@pytest.mark.parametrize("metadata", ["{not json", "[]", '{"layers": []}'])
def test_damaged_descriptions(tmp_path, tensors, metadata):
    path = tmp_path / "quantized.safetensors"
    save_file(tensors, path, metadata={"_quantization_metadata": metadata})
    assert "_quantization_metadata" in error_of(path)


def test_a_description_that_is_wrong(tmp_path, tensors):
    path = tmp_path / "quantized.safetensors"
    described = json.dumps({"layers": {QKV: {"format": "float8_e4m3fn"}}})
    save_file(tensors, path, metadata={"_quantization_metadata": described})
    assert "is stored as torch.float32, and the file describes it as 'float8_e4m3fn'" in error_of(path)


REQUESTS = {
    "one": (json_tensor({"attention": "comfy_kitchen_int8"}), "comfy_kitchen_int8"),
    "several": (json_tensor([{"attention": "sol", "tau": 1.0}, {"attention": "int8"}, {"tau": 1}]), "sol, int8"),
    "another form": (json_tensor({"kernel": 3}), "of an unknown kind"),
    "no object": (json_tensor([3, None]), "of an unknown kind"),
    "no JSON": (torch.tensor([0xFF, 0x7B], dtype=torch.uint8), "of an unknown kind"),
    "no bytes": (torch.ones(2), "of an unknown kind"),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", REQUESTS)
def test_requests_for_attention_change_no_weight(tmp_path, tensors, kind, prefix):
    """ComfyUI saves them beside the weights of a block, from about 0.38 on."""
    content, kernels = REQUESTS[kind]
    asked = {f"{block}.comfy_attention.config": content.clone() for block in ("double_blocks.0", "single_blocks.1")}
    path = tmp_path / "asks.safetensors"
    write_tensors(path, {prefix + name: tensor for name, tensor in {**tensors, **asked}.items()})
    spec = inspect_checkpoint(path)
    assert spec.asks_for_attention == kernels
    assert spec.stored.keys() == inspect_checkpoint(write_tensors(tmp_path / "a.safetensors", tensors)).stored.keys()


def test_other_entries_of_that_kind_have_no_place(tmp_path, tensors):
    path = write_tensors(tmp_path / "other.safetensors", {**tensors, "double_blocks.0.config": torch.zeros(2)})
    assert "1 tensors have no place in the model, such as 'double_blocks.0.config'" in error_of(path)


FOREIGN = {
    "double_blocks.0.img_mod.lin.weight.quant_state.bitsandbytes__nf4": "bitsandbytes NF4",
    "single_blocks.0.linear1.qweight": "SVDQuant (Nunchaku)",
    "double_blocks.0.img_mod.lin.weight._data": "optimum-quanto",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_quantizations_of_other_libraries_are_named(tmp_path, tensors, key):
    path = write_tensors(tmp_path / "foreign.safetensors", {**tensors, key: torch.zeros(4, dtype=torch.uint8)})
    message = error_of(path)
    assert FOREIGN[key] in message
    assert "Choose the bf16, fp8 or GGUF file" in message


OTHER_MODELS = {
    "distilled_guidance_layer.norms.0.scale": "a Chroma checkpoint",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "a HunyuanVideo checkpoint",
    "joint_blocks.0.context_block.attn.qkv.weight": "an SD3 checkpoint",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "an SD3 checkpoint",
    "transformer_blocks.0.img_mod.1.weight": "a Qwen-Image checkpoint",
    "noise_refiner.0.attention.k_norm.weight": "a Z-Image or Lumina 2 checkpoint",
    "head.modulation": "a Wan checkpoint",
    "model.diffusion_model.input_blocks.0.0.weight": "a Stable Diffusion or SDXL checkpoint",
    "down_blocks.0.resnets.0.conv1.weight": "a Stable Diffusion or SDXL UNet",
    "adaln_single.emb.timestep_embedder.linear_1.bias": "an LTX-Video or PixArt checkpoint",
    "controlnet_blocks.0.weight": "a ControlNet",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 text encoder",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a CLIP text encoder",
    "first_stage_model.decoder.conv_in.weight": "a VAE",
    "decoder.conv_in.weight": "a VAE",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "is a LoRA",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "is a LoRA",
    "double_blocks.0.processor.qkv_lora1.down.weight": "is a LoRA",
    "emb_params": "not a model that this pack knows",
}


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_other_models_are_named(tmp_path, key):
    path = write_tensors(tmp_path / "other.safetensors", {key: torch.zeros(4, 4)})
    message = error_of(path)
    assert OTHER_MODELS[key] in message
    assert "FLUX.1" in message
    assert "FLUX.2" in message
    assert "'other.safetensors'" in message


def test_unknown_parts_of_an_all_in_one_file(tmp_path, tensors):
    path = kinds.all_in_one(tmp_path / "aio.safetensors", tensors, others={"ip_adapter.x.weight": torch.ones(2)}).path
    assert "'ip_adapter.x.weight'" in error_of(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"img_in.weight": torch.zeros(2, 2)}, path)
    message = error_of(path)
    for word in [f"'model{suffix}'", "pickle", "run code", "safetensors"]:
        assert word in message


# Shards and folders.


@pytest.fixture
def shards(tmp_path, tensors):
    folder = KINDS["shards"](tmp_path / "model.safetensors", tensors).path
    return folder, folder / "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "C:\\model.safetensors",
                                  "sub/model.safetensors", "..\\model.safetensors", "..", "", 7])
def test_an_index_that_leaves_its_folder(shards, name):
    folder, index = shards
    save_file({"x": torch.zeros(1)}, folder.parent / "outside.safetensors")
    content = json.loads(index.read_text())
    content["weight_map"]["x_embedder.weight"] = name
    index.write_text(json.dumps(content))
    message = error_of(folder)
    assert f"names {name!r}" in message
    assert "refused" in message


def first_shard(folder):
    return min(folder.glob("*-00001-of-*.safetensors"))


def test_a_missing_shard(shards):
    folder, _ = shards
    first_shard(folder).unlink()
    message = error_of(folder)
    assert "shards are missing" in message
    assert "-00001-of-" in message


def test_a_truncated_shard(shards):
    folder, _ = shards
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])
    message = error_of(folder)
    assert f"'{shard.name}' is truncated" in message


def test_a_shard_of_another_model(shards):
    folder, index = shards
    shard = first_shard(folder)
    stored = load_file(shard)
    key = next(iter(stored))
    edit(shard, lambda stored: stored.update(extra=torch.zeros(1)))
    assert "'extra', which the index does not place there" in error_of(folder)
    edit(shard, lambda stored: (stored.pop("extra"), stored.pop(key)))
    message = error_of(folder)
    assert f"'{index.name}': '{key}' should be in '{shard.name}'" in message


def test_one_shard_alone(shards):
    folder, index = shards
    assert f"is one shard of a model, not all of it: choose '{index.name}'" in error_of(first_shard(folder))
    index.unlink()
    assert "get the complete model" in error_of(first_shard(folder))
    assert "holds shards such as" in error_of(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_an_index_that_is_none(shards, content):
    folder, index = shards
    index.write_text(content)
    assert f"'{index.name}'" in error_of(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_layers", 19, "config.json says num_layers = 19, but the tensors say 1"),
        ("guidance_embeds", False, "config.json says guidance_embeds = False, but the tensors say True"),
        ("joint_attention_dim", 4096, "says joint_attention_dim = 4096"),
        ("_class_name", "QwenImageTransformer2DModel", "config.json is of a QwenImageTransformer2DModel"),
        ("_class_name", "Flux2Transformer2DModel", "config.json is of a Flux2Transformer2DModel, but the tensors are"),
    ],
)
def test_a_config_in_conflict(shards, key, value, words):
    folder, _ = shards
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    assert words in error_of(folder)


def test_folders_without_a_model(tmp_path, tensors):
    (tmp_path / "empty").mkdir()
    assert "'empty' holds no *.safetensors" in error_of(tmp_path / "empty")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert "a diffusers pipeline without a 'transformer' folder" in error_of(tmp_path / "pipeline")
    several = tmp_path / "several"
    for name in ("a", "b"):
        kinds.plain(several / f"{name}.safetensors", tensors, torch.bfloat16)
    assert "holds several models ('a.safetensors', 'b.safetensors')" in error_of(several)


# Missing, wrong and broken tensors, in the layouts that test_checkpoint.py does not cover.


def test_a_missing_tensor_in_the_diffusers_layout(tmp_path, tensors):
    folder = kinds.diffusers_folder(tmp_path / "model", tensors, CONFIG).path
    file = folder / "diffusion_pytorch_model.safetensors"
    edit(file, lambda stored: stored.pop("single_transformer_blocks.1.attn.to_k.bias"))
    message = error_of(folder)
    assert "1 of " in message
    assert "'single_transformer_blocks.1.attn.to_k.bias'" in message


def test_nan_in_a_scaled_file(tmp_path, tensors):
    path = kinds.scaled_fp8(tmp_path / "scaled.safetensors", tensors, "marker").path

    def damage(stored):
        stored[f"{QKV}.weight"].view(torch.uint8)[700, 3] = 0x7F

    message = error_of(edit(path, damage))
    assert f"'{QKV}.weight' holds NaN or infinity" in message


def test_a_missing_block_in_an_all_in_one_file(tmp_path, tensors):
    path = kinds.all_in_one(tmp_path / "aio.safetensors", tensors).path

    def remove(stored):
        for name in [name for name in stored if ".single_blocks.0." in name]:
            del stored[name]

    assert "single_blocks.0 is missing, though single_blocks.1 is there" in error_of(edit(path, remove))


# FLUX.2's own.


def without(end):
    return lambda file: {name: tensor for name, tensor in file.items() if not name.startswith(end)}


DAMAGED = {
    "a block": (without("single_blocks.0."), "single_blocks.0 is missing, though single_blocks.1 is there"),
    "a linear": (without("double_blocks.0.img_mlp.0"), "are missing, such as 'double_blocks.0.img_mlp.0.weight'"),
    "a shared modulation": (
        without("double_stream_modulation_img"), "are missing, such as 'double_stream_modulation_img.lin.weight'"),
    "an embedder": (without("txt_in"), "looks like FLUX.2, but 'txt_in.weight' is missing"),
    "half of the guidance": (without("guidance_in.out"), "are missing, such as 'guidance_in.out_layer.weight'"),
    "channels that go in": (
        lambda file: {**file, "img_in.weight": torch.zeros(256, 256)}, "img_in has 256 channels, expected 128"),
    "channels that come out": (
        lambda file: {**file, "final_layer.linear.weight": torch.zeros(64, 256)},
        "final_layer.linear has 64 channels, expected 128"),
    "a width": (
        lambda file: {**file, "img_in.weight": torch.zeros(200, 128)}, "expected a multiple of 128 (FLUX.2 heads"),
    "an MLP that is not gated": (
        lambda file: {**file, "double_blocks.0.img_mlp.0.weight": torch.zeros(768, 256)},
        "has shape (768, 256), expected"),
    "a bias": (
        lambda file: {**file, "img_in.bias": torch.zeros(256)}, "no place in the model, such as 'img_in.bias'"),
    "a block of FLUX.1": (
        lambda file: {**file, "double_blocks.0.img_mod.lin.weight": torch.zeros(1536, 256)},
        "no place in the model, such as 'double_blocks.0.img_mod.lin.weight'"),
    "NaN": (
        lambda file: {**file, "single_stream_modulation.lin.weight": torch.full((768, 256), float("nan"))},
        "'single_stream_modulation.lin.weight' holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("config", ["FLUX.2"], indirect=True)
def test_damaged_files_of_flux2(tmp_path, tensors, damage, words):
    message = error_of(write_tensors(tmp_path / "damaged.safetensors", damage(tensors)))
    assert "'damaged.safetensors'" in message
    assert words in message


@pytest.mark.parametrize("key", ["double_stream_modulation_img.lin.weight", "single_stream_modulation.linear.weight"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_both_families_is_none(tmp_path, tensors, key, prefix):
    file = {prefix + name: tensor for name, tensor in {**tensors, key: torch.zeros(4, 4)}.items()}
    message = error_of(write_tensors(tmp_path / "mixed.safetensors", file))
    assert f"'mixed.safetensors' has '{key}', as FLUX.2 has, and 'vector_in.in_layer.weight', as FLUX.1 has." in message


@pytest.mark.parametrize("name", registry.FAMILIES[1].published)
def test_published_models_are_recognised_by_their_headers(name):
    """In both layouts, by sizes alone."""
    flux1, flux2 = registry.FAMILIES
    expected = flux2.published[name]
    for layout in (flux2.layout(expected), diffusers_layout(expected)):
        tensors = {key: TensorInfo(shape, torch.bfloat16) for key, shape in layout.expected_shapes().items()}
        config, found = flux2.recognise(tensors, "file")
        assert (config, found.expected_shapes()) == (expected, layout.expected_shapes())
        assert first_match(flux1.relatives, tensors).what == "a FLUX.2 checkpoint"
    variant = {"flux2-dev": "dev", "flux2-klein-9b": "klein 9B", "flux2-klein-4b": "klein 4B"}[name]
    assert expected.variant == variant


# GGUF.


@pytest.fixture
def gguf_path(tmp_path, tensors):
    return kinds.gguf(tmp_path / "model.gguf", tensors).path


@pytest.mark.parametrize("architecture", ["wan", "sd3", "t5", "qwen_image"])
def test_gguf_of_another_architecture(tmp_path, tensors, architecture):
    path = kinds.gguf(tmp_path / "model.gguf", tensors, architecture=architecture).path
    assert f"of the architecture '{architecture}', expected 'flux'" in error_of(path)


@pytest.mark.parametrize("left", [20, 300, 0.5, 0.999])
def test_truncated_gguf(gguf_path, left):
    content = gguf_path.read_bytes()
    gguf_path.write_bytes(content[: left if isinstance(left, int) else int(len(content) * left)])
    message = error_of(gguf_path)
    assert "'model.gguf' is truncated or damaged" in message
    assert "get it again" in message


def test_big_endian_gguf(gguf_path):
    content = bytearray(gguf_path.read_bytes())
    content[4:8] = content[4:8][::-1]
    gguf_path.write_bytes(content)
    assert "'model.gguf' is a big-endian GGUF file" in error_of(gguf_path)


def test_a_gguf_file_that_is_none(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"<html></html>")
    assert "'model.gguf' is not a GGUF file" in error_of(tmp_path / "model.gguf")


def test_a_gguf_file_under_another_name(gguf_path, tensors):
    before = parameters(gguf_path)
    after = parameters(gguf_path.rename(gguf_path.with_suffix(".safetensors")))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_gguf_file_without_tensors(tmp_path):
    path = kinds.gguf(tmp_path / "model.gguf", {}).path
    assert "'model.gguf' holds no tensors" in error_of(path)


def test_a_gguf_type_that_the_package_cannot_read(tmp_path, tensors):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "flux")
    writer.add_tensor("img_in.weight", tensors["img_in.weight"].numpy().astype("int32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = error_of(tmp_path / "model.gguf")
    assert "'img_in.weight' is stored as I32" in message
    assert "Q8_0" in message


def test_gguf_without_its_package(gguf_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = error_of(gguf_path)
    assert "'model.gguf'" in message
    assert "pip install gguf" in message


def test_a_damaged_gguf_block(gguf_path):
    """An infinite scale, in the first block of a matrix."""
    import gguf

    tensor = next(t for t in gguf.GGUFReader(str(gguf_path)).tensors if t.name == f"{QKV}.weight")
    offset = tensor.data_offset
    content = bytearray(gguf_path.read_bytes())
    content[offset : offset + 2] = b"\x00\x7c"
    gguf_path.write_bytes(content)
    assert f"'{QKV}.weight' holds NaN or infinity" in error_of(gguf_path)
