"""Recognising, reading and quantizing text encoder files, without ComfyUI."""

import builtins
import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import accel.quantize.library
from accel.checkpoint import read_file
from accel.errors import AccelError, CheckpointError, FileError, SettingsError
from accel.text_encoder.linear import Nf4, RowScaled, WeightOnlyLinear
from accel.text_encoder.load import EncoderWeights
from accel.text_encoder.modes import FORMATS, check_mode, choose_mode, resident_bytes
from accel.text_encoder.recognise import check_not_swapped, clip_spec, encoder_spec
from harness import broken_files
from harness import text_encoder_files as files
from harness.tensor_files import write_tensors
from harness.tiny_others import TinyT5Config, tiny_clip_l_state_dict, tiny_t5_state_dict

CPU = torch.device("cpu")
# Signal to noise of one linear's weight, 10 log10(|W|² / |W − Ŵ|²): measured 39.9, 31.6, 20.7 dB.
SQNR_DB = {"int8": 38.0, "fp8": 30.0, "nf4": 20.0}
LINEARS = [f"encoder.block.{i}.layer.0.SelfAttention.{n}" for i in range(2) for n in "qkvo"] + [
    f"encoder.block.{i}.layer.1.DenseReluDense.{n}" for i in range(2) for n in ("wi_0", "wi_1", "wo")
]


@pytest.fixture(scope="module")
def t5() -> dict[str, torch.Tensor]:
    return tiny_t5_state_dict()


@pytest.fixture(scope="module")
def paths(t5, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("t5")
    written = files.write_formats(folder, t5)
    written["clip"] = write_tensors(folder / "clip.safetensors", tiny_clip_l_state_dict(hidden=128, layers=2))
    return written


def skeleton(spec) -> nn.Module:
    """Modules of T5's names and sizes on the meta device, as ComfyUI's class would be."""
    root = nn.Module()
    for name, stored in spec.weights.items():
        owner, parent = name.removesuffix(".weight"), root
        for part in owner.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        if len(stored.shape) == 2:
            layer = nn.Linear(stored.shape[1], stored.shape[0], bias=False, device="meta")
        else:
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.empty(stored.shape, device="meta"))
        parent.add_module(owner.split(".")[-1], layer)
    return root


def load(path, mode="none"):
    spec = encoder_spec(read_file(str(path)))
    weights = EncoderWeights(skeleton(spec), spec, mode)
    announced = weights.bytes
    report = weights.fill(CPU, CPU, lambda done, total: None)
    assert report.bytes == announced == resident_bytes(spec, mode)
    return weights


def values(weights: EncoderWeights) -> dict[str, torch.Tensor]:
    """Every weight as it is computed with, float32, by Hugging Face's names."""
    result = {}
    for name in weights.spec.weights:
        layer = weights.quantized.get(name.removesuffix(".weight"))
        value = layer.dequantize(torch.float32, CPU) if layer else weights.module.get_parameter(name).float()
        result[name] = value
    return result


def sqnr_db(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (ours - reference).square().sum()))


def test_sizes_come_from_the_header(paths, tmp_path):
    spec = encoder_spec(read_file(str(paths["bf16"])))
    config = spec.config
    sizes = (config.num_layers, config.d_model, config.d_ff, config.d_kv, config.num_heads, config.vocab_size)
    assert sizes == (2, 128, 256, 32, 4, 32128)
    assert spec.stored_dtype == torch.bfloat16
    other = write_tensors(tmp_path / "other.safetensors", tiny_t5_state_dict(TinyT5Config(3, 64, 96, 2, 16)))
    config = encoder_spec(read_file(str(other))).config
    assert (config.num_layers, config.d_model, config.d_ff, config.d_kv, config.num_heads) == (3, 64, 96, 16, 2)
    clip = clip_spec(read_file(str(paths["clip"]))).config
    sizes = (clip.num_hidden_layers, clip.hidden_size, clip.intermediate_size, clip.max_position_embeddings)
    assert (sizes, clip.num_attention_heads) == ((2, 128, 512, 77), 2)


# Floor of the SQNR in dB over all tensors; inf: every value exact.
FORMATS_READ = {
    "fp32": float("inf"), "prefixed": float("inf"), "tied": float("inf"), "fp16": 60.0, "bf16": 50.0, "fp8": 25.0,
    "scaled-old": 30.0, "scaled-new": 30.0, "scaled-rows": 30.0, "scaled-metadata": 30.0, "gguf-Q8_0": 40.0,
    "gguf-Q4_0": 17.0, "gguf-BF16": 50.0,
}


@pytest.mark.parametrize("name", FORMATS_READ)
def test_every_format_gives_the_same_weights(paths, t5, name):
    loaded = values(load(paths[name]))
    assert loaded.keys() == t5.keys()
    for key, reference in t5.items():
        if FORMATS_READ[name] == float("inf"):
            assert torch.equal(loaded[key], reference), key
        else:
            assert sqnr_db(loaded[key], reference) >= FORMATS_READ[name], key


def test_scaled_fp8_stays_as_stored(paths):
    """Neither `none` nor `fp8` rounds a file's own fp8 again."""
    stored = load_file(paths["scaled-old"])
    for mode in ("none", "fp8"):
        layers = load(paths["scaled-old"], mode).quantized
        assert sorted(layers) == sorted(LINEARS)
        for name, layer in layers.items():
            assert torch.equal(layer.weight.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
            assert layer.scale.item() == stored[f"{name}.scale_weight"].item()


def scaled_int8(t5):
    """ComfyUI's `int8_tensorwise`: one scale for all of a linear's weight, or (of every o) one per row."""
    tensors = dict(t5)
    for name in LINEARS:
        largest = t5[f"{name}.weight"].abs()
        scale = (largest.amax(dim=1, keepdim=True) if name.endswith(".o") else largest.amax()) / 127
        tensors[f"{name}.weight"] = (t5[f"{name}.weight"] / scale).round().to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale
        description = json.dumps({"format": "int8_tensorwise"}).encode()
        tensors[f"{name}.comfy_quant"] = torch.tensor(list(description), dtype=torch.uint8)
    return tensors


@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
def test_scaled_int8_is_read_and_kept(t5, tmp_path, mode):
    """`int8` keeps a file's own int8, too; `nf4` quantizes what it stands for."""
    stored = scaled_int8(t5)
    weights = load(write_tensors(tmp_path / "int8.safetensors", stored), mode)
    assert sorted(weights.quantized) == sorted(LINEARS)
    for name, layer in weights.quantized.items():
        expected = stored[f"{name}.weight"] * stored[f"{name}.weight_scale"]
        if mode == "nf4":
            assert sqnr_db(layer.dequantize(torch.float32, CPU), expected) >= SQNR_DB["nf4"]
        else:
            assert torch.equal(layer.weight, stored[f"{name}.weight"])
            assert torch.equal(layer.dequantize(torch.float32, CPU), expected)


@pytest.mark.parametrize("form", ["scaled-old", "scaled-new", "int8"])
def test_scales_in_an_all_in_one_file(paths, t5, tmp_path, form):
    """Scales, markers and descriptions are those of the encoder alone, whatever other parts are stored as."""
    plain = scaled_int8(t5) if form == "int8" else load_file(paths[form])
    tensors = files.prefixed(plain)
    tensors["model.diffusion_model.x.weight"] = torch.zeros(2, 2)
    description = json.dumps({"format": "nvfp4"}).encode()
    tensors["model.diffusion_model.x.comfy_quant"] = torch.tensor(list(description), dtype=torch.uint8)
    spec = encoder_spec(read_file(write_tensors(tmp_path / "all.safetensors", tensors)))
    assert {tensor.key for tensor in spec.weights.values()} == {files.PREFIX + name for name in t5}
    scaled = {name: tensor.scale for name, tensor in spec.weights.items() if tensor.scale is not None}
    suffix = "scale_weight" if form == "scaled-old" else "weight_scale"
    assert scaled == {f"{name}.weight": f"{files.PREFIX}{name}.{suffix}" for name in LINEARS}


@pytest.mark.parametrize("mode", FORMATS)
@pytest.mark.parametrize("name", ["bf16", "fp8", "scaled-new", "gguf-Q8_0"])
def test_exactly_the_linears_are_quantized(paths, name, mode):
    loaded = load(paths[name], mode)
    as_stored = name == "fp8" and mode == "fp8"
    assert sorted(loaded.quantized) == ([] if as_stored else sorted(LINEARS))
    reference, ours = values(load(paths[name])), values(loaded)
    for key in reference:
        if key.removesuffix(".weight") not in loaded.quantized or (name, mode) == ("scaled-new", "fp8"):
            assert torch.equal(ours[key], reference[key]), key
        else:
            assert sqnr_db(ours[key], reference[key]) >= SQNR_DB[mode], key


def test_sizes_per_mode(paths):
    spec = encoder_spec(read_file(str(paths["bf16"])))
    count = sum(torch.Size(shape).numel() for shape in spec.config.linears.values())
    rest = resident_bytes(spec, "none") - 2 * count
    rows = sum(shape[0] for shape in spec.config.linears.values())
    assert resident_bytes(spec, "nf4") - rest == count // 2 + count // 64 * 4
    assert resident_bytes(spec, "int8") - rest == resident_bytes(spec, "fp8") - rest == count + 4 * rows


def test_nf4_is_bitsandbytes(t5):
    """The packed bytes and scales are those of bitsandbytes' own Linear4bit."""
    import bitsandbytes as bnb

    from accel.text_encoder import linear

    weight = t5["encoder.block.0.layer.1.DenseReluDense.wo.weight"]
    theirs = bnb.nn.Params4bit(weight.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4",
                               blocksize=64)
    theirs = theirs._quantize(CPU)
    whole = linear.Nf4().quantize(weight)
    assert torch.equal(whole["weight"], theirs.data)
    assert torch.equal(whole["absmax"], theirs.quant_state.absmax)


@pytest.mark.parametrize("mode", FORMATS)
def test_pieces_give_the_same_as_the_whole(t5, mode, monkeypatch):
    from accel.quantize import nf4
    from accel.text_encoder import linear

    weight = t5["encoder.block.0.layer.1.DenseReluDense.wo.weight"]
    whole = FORMATS[mode].quantize(weight)
    monkeypatch.setattr(linear, "CHUNK", 4096)
    monkeypatch.setattr(nf4, "RUN_ELEMENTS", 4096)
    pieces = FORMATS[mode].quantize(weight)
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


@pytest.mark.parametrize("weight_format", [Nf4(), RowScaled(torch.int8), RowScaled(torch.float8_e4m3fn)], ids=str)
def test_a_layer_computes_where_its_input_is(weight_format):
    """The weight stays in host memory, as when ComfyUI loads in part; the input is on a (pretended) GPU."""
    with FakeTensorMode():
        layer = WeightOnlyLinear(128, 64, weight_format)
        parts = weight_format.quantize(torch.randn(64, 128))
        layer.store(parts, CPU)
        assert layer.weight.device == CPU
        out = layer(torch.randn(2, 5, 128, device="cuda"))
        assert (out.device.type, out.shape, out.dtype) == ("cuda", (2, 5, 64), torch.float32)
        layer.store(parts, torch.device("cuda"))
        assert {p.device.type for p in layer.parameters()} == {"cuda"}
        assert layer.weight.dtype == weight_format.shapes((64, 128))["weight"][1]
        assert layer(torch.randn(2, 5, 128, device="cuda")).device.type == "cuda"


def test_functions_change_the_weight_and_not_what_is_stored():
    layer = WeightOnlyLinear(128, 64, FORMATS["int8"])
    layer.store(FORMATS["int8"].quantize(torch.randn(64, 128)), CPU)
    x, before = torch.randn(3, 128), layer.weight.clone()
    plain = layer(x)
    layer.weight_function = [lambda weight: weight.mul_(2.0), lambda weight: weight + 1.0]
    assert torch.allclose(layer(x), 2 * plain + x.sum(dim=1, keepdim=True), atol=1e-4)
    assert torch.equal(layer.weight, before)
    layer.weight_function = []
    assert torch.equal(layer(x), plain)


def test_clear_gives_back_and_fill_brings_back(paths):
    loaded = load(paths["fp16"], "int8")
    before, size = values(loaded), loaded.bytes
    loaded.clear()
    assert not loaded.loaded
    assert all(parameter.is_meta for parameter in loaded.module.parameters())
    assert loaded.bytes == size
    loaded.fill(CPU, CPU, lambda done, total: None)
    after = values(loaded)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_cancelled_load_leaves_nothing(paths):
    spec = encoder_spec(read_file(str(paths["fp16"])))
    weights = EncoderWeights(skeleton(spec), spec, "int8")

    def cancel(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.fill(CPU, CPU, cancel)
    assert not weights.loaded
    assert all(parameter.is_meta for parameter in weights.module.parameters())


def test_auto_is_the_most_exact_that_fits(paths):
    spec = encoder_spec(read_file(str(paths["fp32"])))
    sizes = {mode: resident_bytes(spec, mode) for mode in ("none", "int8", "nf4")}
    for mode, size in sizes.items():
        assert choose_mode(spec, 2 * size, "free RAM", bitsandbytes=True)[0] == mode
    mode, reason = choose_mode(spec, 2 * sizes["nf4"] - 2, "free RAM", bitsandbytes=True)
    assert (mode, "the smallest" in reason) == ("nf4", True)
    mode, reason = choose_mode(spec, 2 * sizes["int8"] - 2, "free RAM", bitsandbytes=False)
    assert (mode, "bitsandbytes" in reason) == ("int8", True)


def test_modes_that_cannot_run(monkeypatch):
    with pytest.raises(SettingsError, match="expected one of: auto, none, nf4, int8, fp8"):
        check_mode("int2", CPU)
    with pytest.raises(SettingsError, match=r"mps.*Choose 'int8'"):
        check_mode("fp8", torch.device("mps"))
    check_mode("nf4", CPU)
    for installed, words in ((None, "pip install 'bitsandbytes>=.*'int8'"), ("0.1", "installed is 0.1.*'int8'")):

        def version(name, found=installed):
            if name == "bitsandbytes" and found is None:
                raise PackageNotFoundError(name)
            return found if name == "bitsandbytes" else torch.__version__

        monkeypatch.setattr(accel.quantize.library, "version", version)
        with pytest.raises(SettingsError, match=words):
            check_mode("nf4", CPU)


def test_missing_gguf_package(paths, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FileError, match="pip install gguf"):
        read_file(str(paths["gguf-Q8_0"]))


def changed(t5, **edits):
    """The tiny T5 with tensors replaced (or, by None, left out)."""
    tensors = {**t5, **{name.replace("__", "."): value for name, value in edits.items()}}
    return {name: value for name, value in tensors.items() if value is not None}


def umt5(t5):
    return {**t5, "shared.weight": torch.zeros(256384, 128, dtype=torch.float16)}


def non_gated(t5):
    return {name.replace("wi_0", "wi"): value for name, value in t5.items() if "wi_1" not in name}


def decoder_only(t5):
    return {name.replace("encoder.", "decoder."): value for name, value in t5.items() if "shared" not in name}


WRONG = {
    "umt5": (umt5, "UMT5.*Wan"),
    "T5 v1.0": (non_gated, "T5 v1.0.*expected T5 v1.1"),
    "decoder": (decoder_only, "the decoder half of a T5"),
    "clip": (lambda t5: tiny_clip_l_state_dict(hidden=64, layers=1), "a CLIP text encoder, expected a T5"),
    "missing": (lambda t5: {k: v for k, v in t5.items() if not k.endswith("1.layer.1.DenseReluDense.wo.weight")},
                "1 of 21 tensors are missing, such as 'encoder.block.1.layer.1.DenseReluDense.wo.weight'"),
    "no embedding": (lambda t5: changed(t5, shared__weight=None), "token embedding, is missing"),
    "short vocabulary": (lambda t5: changed(t5, shared__weight=torch.zeros(100, 128)), "100 tokens"),
    "another shape": (
        lambda t5: {**t5, "encoder.final_layer_norm.weight": torch.ones(64)}, r"\(64,\), expected \(128,\)"),
    "unknown": (lambda t5: {**t5, "encoder.block.0.layer.2.x.weight": torch.ones(4)}, "no place in the encoder"),
    "scale without weight": (lambda t5: {**t5, "encoder.block.0.scale_weight": torch.ones(())}, "which is missing"),
    "scale of another weight": (
        lambda t5: {**t5, "encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(())}, "expected fp8"),
}


@pytest.mark.parametrize(("build", "words"), WRONG.values(), ids=WRONG)
def test_wrong_t5_files(t5, tmp_path, build, words):
    path = write_tensors(tmp_path / "wrong.safetensors", build(t5))
    with pytest.raises(CheckpointError, match=words) as error:
        encoder_spec(read_file(str(path)))
    assert "wrong.safetensors" in str(error.value)


def test_another_quantization_format_is_named(t5, tmp_path):
    path = files.write_scaled_fp8_metadata(tmp_path / "nvfp4.safetensors", t5, form="nvfp4")
    with pytest.raises(CheckpointError, match="quantized as 'nvfp4'"):
        encoder_spec(read_file(str(path)))


def test_wrong_clip_files(paths, tmp_path):
    with pytest.raises(CheckpointError, match="a T5 text encoder, expected a CLIP-L"):
        clip_spec(read_file(str(paths["fp16"])))
    tensors = tiny_clip_l_state_dict(hidden=64, layers=2)
    del tensors["text_model.encoder.layers.1.mlp.fc2.bias"]
    path = write_tensors(tmp_path / "clip.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.fc2\.bias"):
        clip_spec(read_file(str(path)))


OTHER_FILES = {
    "decoder.conv_in.weight": "a VAE",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "double_blocks.0.img_attn.qkv.weight": "a FLUX.1 transformer",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "a LoRA",
    "transformer.resblocks.0.ln_1.weight": "a CLIP in OpenCLIP's layout",
    "joint_blocks.0.context_block.attn.qkv.weight": "an SD3 checkpoint",
    "emb_params": "not a text encoder that this pack knows",
}


@pytest.mark.parametrize("key", OTHER_FILES)
def test_other_files_are_named(tmp_path, key):
    file = read_file(write_tensors(tmp_path / "other.safetensors", {key: torch.zeros(4, 4)}))
    for spec, expected in ((encoder_spec, "a T5"), (clip_spec, "a CLIP-L")):
        with pytest.raises(CheckpointError, match=f"'other.safetensors' is {OTHER_FILES[key]}.*expected {expected}"):
            spec(file)


def test_swapped_files(paths):
    t5, clip = read_file(str(paths["fp16"])), read_file(str(paths["clip"]))
    with pytest.raises(CheckpointError, match="swapped"):
        check_not_swapped(clip, t5)
    check_not_swapped(t5, clip)
    check_not_swapped(t5, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number(t5, tmp_path, value):
    tensors = {name: tensor.clone() for name, tensor in t5.items()}
    tensors["encoder.block.1.layer.0.SelfAttention.v.weight"][3, 3] = value
    path = write_tensors(tmp_path / "nan.safetensors", tensors)
    for mode in ("none", "int8"):
        with pytest.raises(CheckpointError, match=r"SelfAttention\.v\.weight' holds NaN or infinity"):
            load(path, mode)


def test_blocks_that_float16_cannot_hold(t5, tmp_path):
    """Packed embeddings are kept in float16; linears, once quantized, need not be."""
    tensors = {**t5, "shared.weight": t5["shared.weight"] * 1e6}
    with pytest.raises(CheckpointError, match=r"'token_embd.weight' has values that float16 cannot hold"):
        load(files.write_gguf(tmp_path / "large.gguf", tensors))
    linear = f"{LINEARS[0]}.weight"
    large = load(files.write_gguf(tmp_path / "large.gguf", {**t5, linear: t5[linear] * 1e6}), "int8")
    assert sqnr_db(values(large)[linear], t5[linear] * 1e6) >= SQNR_DB["int8"]


def test_damaged_gguf(paths, tmp_path):
    content = paths["gguf-Q8_0"].read_bytes()
    path = tmp_path / "half.gguf"
    for length in (4, 40, 400, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:length])
        with pytest.raises(FileError, match=r"half.gguf.*get it again"):
            read_file(str(path))


@pytest.mark.parametrize("write", broken_files.UNREADABLE, ids=lambda write: write.__name__)
def test_unreadable_files(write, tmp_path):
    with pytest.raises(AccelError):
        read_file(str(write(tmp_path / "broken.safetensors")))


def test_a_file_that_changed(paths, t5, tmp_path):
    for name, write in {
        "a.safetensors": lambda path, seed: write_tensors(path, tiny_t5_state_dict(seed=seed)),
        "a.gguf": lambda path, seed: files.write_gguf(path, tiny_t5_state_dict(TinyT5Config(2 + seed))),
    }.items():
        path = tmp_path / name
        write(path, 0)
        spec = encoder_spec(read_file(str(path)))
        write(path, 1)
        with pytest.raises(FileError, match="was changed"):
            EncoderWeights(skeleton(spec), spec, "none").fill(CPU, CPU, lambda done, total: None)
