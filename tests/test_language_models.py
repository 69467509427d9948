"""Recognising, reading and quantizing language models that transformers take as text encoders, without ComfyUI."""

import base64
import json

import pytest
import torch
from safetensors.torch import load_file

from accel.checkpoint import read_file
from accel.errors import CheckpointError, FileError
from accel.families.text_encoders import MISTRAL, QWEN3
from accel.text_encoder import recognise, tekken
from accel.text_encoder.llm import halves
from accel.text_encoder.modes import FORMATS, resident_bytes
from accel.text_encoder.recognise import check_not_swapped, clip_spec, encoder_spec
from harness import language_model_files as files
from harness.language_model_files import TINY_MISTRAL, TINY_QWEN3
from harness.tensor_files import json_tensor, write_tensors
from harness.text_encoder_files import write_scaled_fp8_metadata
from harness.tiny_others import tiny_clip_l_state_dict, tiny_t5_state_dict
from tests.test_text_encoder import SQNR_DB, load, sqnr_db, values

# Few tokens: the vocabulary would be nearly all of a small file.
SMALL = files.TinyLanguageModel(vocab=512, head_dim=32)
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip
LINEARS = [f"model.layers.{index}.{part}" for index in range(27) for part in PARTS]


@pytest.fixture(scope="module")
def qwen3() -> dict[str, torch.Tensor]:
    return files.language_model_state_dict(SMALL)


@pytest.fixture(scope="module")
def mistral() -> dict[str, torch.Tensor]:
    return files.language_model_state_dict(TINY_MISTRAL)


@pytest.fixture(scope="module")
def paths(qwen3, mistral, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("language-models")
    written = files.write_formats(folder, qwen3)
    written["mistral"] = write_tensors(folder / "mistral.safetensors", files.with_tekken(mistral))
    for kind in ("F32", "Q8_0"):
        path = folder / f"mistral-{kind}.gguf"
        written[f"mistral-{kind}"] = files.write_gguf(path, mistral, TINY_MISTRAL, kind, "llama", "tekken")
    return written


def spec_of(path):
    return encoder_spec(read_file(str(path)))


def needed(tensors):
    """What comes before the last hidden state that is taken."""
    last = 30 if len(tensors) == len(files.language_model_shapes(TINY_MISTRAL)) else 27
    return {name: t for name, t in tensors.items() if name != "model.norm.weight" and f".{last}." not in name}


def test_sizes_come_from_the_header(paths, mistral, tmp_path):
    config = spec_of(paths["bf16"]).config
    sizes = (config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
             config.vocab_size, config.num_layers)  # fmt: skip
    assert (config.model, sizes) == (QWEN3, (64, 96, 2, 1, 32, 512, 27))
    config = spec_of(paths["mistral"]).config
    assert (config.model, config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers) == (
        MISTRAL, 4, 2, 128, 30)  # fmt: skip
    pruned = {name: tensor for name, tensor in needed(mistral).items() if ".30." not in name}
    assert spec_of(write_tensors(tmp_path / "pruned.safetensors", files.with_tekken(pruned))).config == config
    with_head = files.language_model_state_dict(files.TinyLanguageModel(vocab=256, lm_head=True))
    for name in ("lm_head.weight", "model.lm_head.weight"):  # ComfyUI writes the latter
        tensors = {key if key != "lm_head.weight" else name: tensor for key, tensor in with_head.items()}
        assert name not in spec_of(write_tensors(tmp_path / "head.safetensors", tensors)).weights


# Floor of the SQNR in dB over all tensors; inf: every value exact.
FORMATS_READ = {
    "fp32": float("inf"), "fp16": 60.0, "bf16": 50.0, "prefixed": 50.0, "fp8": 25.0, "scaled-old": 30.0,
    "scaled-new": 30.0, "scaled-rows": 30.0, "gguf-Q8_0": 40.0, "gguf-Q4_0": 17.0, "gguf-BF16": 50.0,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS_READ)
def test_every_format_gives_the_same_weights(paths, qwen3, name):
    loaded = values(load(paths[name]))
    assert loaded.keys() == needed(qwen3).keys()
    for key, ours in loaded.items():
        if FORMATS_READ[name] == float("inf"):
            assert torch.equal(ours, qwen3[key]), key
        else:
            assert sqnr_db(ours, qwen3[key]) >= FORMATS_READ[name], key


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
    spec = spec_of(paths["bf16"])
    count = sum(rows * columns for rows, columns in spec.config.linears.values())
    rest = resident_bytes(spec, "none") - 2 * count
    rows = sum(shape[0] for shape in spec.config.linears.values())
    assert resident_bytes(spec, "nf4") - rest == count // 2 + count // 64 * 4
    assert resident_bytes(spec, "int8") - rest == count + 4 * rows


def test_mistral_in_gguf_has_its_rows_back(paths, mistral):
    """llama.cpp's order is undone, exactly and in blocks, before anything is quantized."""
    stored = spec_of(paths["mistral-F32"])
    assert len(stored.interleaved) == 60
    for name, tensor in needed(mistral).items():
        exact = values(load(paths["mistral-F32"]))[name] if "layers.7." in name else tensor
        assert torch.equal(exact, tensor), name
    for mode in ("none", "int8"):
        loaded = values(load(paths["mistral-Q8_0"], mode))
        assert all(sqnr_db(ours, mistral[name]) >= 36.0 for name, ours in loaded.items())
    key = "model.layers.7.self_attn.k_proj.weight"
    permuted = files.permuted(mistral[key], 2)
    assert not torch.equal(permuted, mistral[key])
    assert torch.equal(halves(permuted, 2), mistral[key])
    assert spec_of(paths["gguf-Q8_0"]).interleaved == {}


# The vocabulary of a Mistral.


def test_a_vocabulary_of_each_kind_cuts_text_alike(paths):
    made = {}
    for name in ("mistral", "mistral-F32"):
        made[name] = tekken.TekkenTokenizer(name, tekken.read_vocabulary(read_file(str(paths[name]))))
    text = "[INST]the fox's re-reading: 12 Öfen\n[/INST]"
    ids = made["mistral"](text)["input_ids"]
    assert ids == made["mistral-F32"](text)["input_ids"]
    words = [made["mistral"].decode([token], skip_special_tokens=False) for token in ids]
    assert words[:4] == ["[INST]", "the", " ", "fox"]
    assert words[-1] == "[/INST]"
    assert made["mistral"].decode(ids) == "the fox's re-reading: 12 Öfen\n"
    assert made["mistral"]("")["input_ids"] == []
    assert len(made["mistral"].get_vocab()) == TINY_MISTRAL.vocab == 1 + max(made["mistral"].get_vocab().values())


def test_it_is_the_tokenizer_of_transformers(paths, tmp_path):
    from transformers.integrations.mistral import MistralConverter

    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(files.tekken()))
    theirs = MistralConverter(str(path)).converted()
    ours = tekken.TekkenTokenizer("", json_tensor(files.tekken()))
    for text in ("the red fox, reading the thing", "[SYSTEM_PROMPT]he[/SYSTEM_PROMPT][INST]\n\n12 a [/INST]", "日本"):
        assert ours(text)["input_ids"] == theirs.encode(text, add_special_tokens=False).ids
    assert ours.get_vocab() == theirs.get_vocab()


def test_tokens_beyond_the_stated_size_are_left_out():
    """Published files hold more than the model knows."""
    content = files.tekken()
    content["vocab"].append({"rank": len(content["vocab"]), "token_bytes": base64.b64encode(b"thing").decode()})
    made = tekken.TekkenTokenizer("", json_tensor(content))
    assert len(made.get_vocab()) == TINY_MISTRAL.vocab


def test_a_gguf_file_that_changed(paths, mistral, tmp_path):
    path = files.write_gguf(tmp_path / "a.gguf", mistral, TINY_MISTRAL, "F32", "llama", "tekken")
    file = read_file(str(path))
    files.write_gguf(path, mistral, TINY_MISTRAL, "Q8_0", "llama", "tekken")
    with pytest.raises(FileError, match="was changed"):
        tekken.read_vocabulary(file)


# What is no text encoder of a transformer here.


def only(tensors, *parts, also=()):
    """A few tensors, and others of the same size."""
    kept = {name: tensor for name, tensor in tensors.items() if ".0." in name or "embed" in name}
    return {**kept, **{name: torch.zeros(8, 8) for name in (*parts, *also)}}


FIRST = "model.layers.0."
EXPECTED = (r", expected a T5 v1.1 text encoder \(FLUX.1\), Qwen3 \(FLUX.2 klein 4B, FLUX.2 klein 9B\) or Mistral "
            r"Small \(FLUX.2 dev\)")  # fmt: skip
WRONG = {
    "Qwen2.5-VL": (lambda t: only(t, f"{FIRST}self_attn.k_proj.bias", "visual.blocks.0.attn.qkv.weight"),
                   f"is Qwen2.5-VL{EXPECTED}"),
    "Qwen2.5": (lambda t: only(t, f"{FIRST}self_attn.k_proj.bias"), f"is Qwen2.5{EXPECTED}"),
    "Qwen3-VL": (lambda t: only(t, "model.visual.deepstack_merger_list.0.norm.weight",
                                "model.language_model.layers.0.mlp.up_proj.weight"), f"is Qwen3-VL{EXPECTED}"),
    "Qwen3.5": (lambda t: only({}, "model.language_model.layers.0.linear_attn.A_log"), f"is Qwen3.5{EXPECTED}"),
    "Gemma": (lambda t: only(t, f"{FIRST}post_feedforward_layernorm.weight"), f"is Gemma{EXPECTED}"),
    "Phi": (lambda t: only({}, f"{FIRST}self_attn.qkv_proj.weight"), "is Phi-3"),
    "experts": (lambda t: only({}, f"{FIRST}mlp.experts.gate_up_proj.weight"), "is a mixture of experts"),
    "sees pictures": (lambda t: only({}, "model.language_model.layers.0.mlp.up_proj.weight"), "that sees pictures"),
    "Llama 3": (lambda t: {**without_qk_norm(t), "model.embed_tokens.weight": torch.zeros(128256, 64)},
                f"is Llama 3{EXPECTED}"),
    "another Llama": (lambda t: without_qk_norm(t), r"is a language model like Llama \(512 tokens\), expected"),
    "Mistral alone": (lambda t: {**without_qk_norm(t), "model.embed_tokens.weight": torch.zeros(131072, 64)},
                      r"is Mistral without its vocabulary.*'tekken_model'.*mistral_3_small_flux2_bf16.safetensors"),
    "few layers": (lambda t: {name: tensor for name, tensor in t.items() if ".26." not in name and ".27." not in name},
                   "is a Qwen3 of 26 layers, expected at least 27"),
    "missing": (lambda t: {name: tensor for name, tensor in t.items() if name != f"{FIRST}mlp.up_proj.weight"},
                "1 of 298 tensors are missing, such as 'model.layers.0.mlp.up_proj.weight'"),
    "first layer": (lambda t: {name: tensor for name, tensor in t.items() if "0.self_attn.k_proj" not in name},
                    "a part of the first layer, or the token embedding, is missing"),
    "unknown": (lambda t: {**t, f"{FIRST}mlp.x.weight": torch.zeros(4)}, "have no place in the encoder"),
    "another shape": (lambda t: {**t, "model.layers.5.mlp.up_proj.weight": torch.zeros(95, 64)},
                      r"'model.layers.5.mlp.up_proj.weight' has shape \(95, 64\), expected \(96, 64\)"),
    "odd heads": (lambda t: {**t, f"{FIRST}self_attn.k_proj.weight": torch.zeros(33, 64)},
                  "has 33 rows, expected a multiple of 32"),
}  # fmt: skip


def without_qk_norm(tensors):
    return {name: tensor for name, tensor in tensors.items() if "q_norm" not in name and "k_norm" not in name}


@pytest.mark.parametrize(("build", "words"), WRONG.values(), ids=WRONG)
def test_wrong_files(qwen3, tmp_path, build, words):
    path = write_tensors(tmp_path / "wrong.safetensors", build(qwen3))
    with pytest.raises(CheckpointError, match=words) as error:
        spec_of(path)
    assert str(error.value).startswith("'wrong.safetensors'")


@pytest.mark.parametrize(("architecture", "words"), {
    "qwen2vl": "is Qwen2.5-VL, expected", "qwen3vl": "is Qwen3-VL, expected", "gemma3": "is Gemma 3, expected",
    "mamba": "a language model of the architecture 'mamba'", "llama": "is a language model like Llama",
}.items())  # fmt: skip
def test_wrong_architectures(qwen3, tmp_path, architecture, words):
    tensors = without_qk_norm({name: tensor for name, tensor in qwen3.items() if ".0." in name or "embed" in name})
    with pytest.raises(CheckpointError, match=words):
        spec_of(files.write_gguf(tmp_path / "wrong.gguf", tensors, SMALL, "F16", architecture))


def test_another_quantization_format_is_named(qwen3, tmp_path):
    with pytest.raises(CheckpointError, match="quantized as 'nvfp4'"):
        spec_of(write_scaled_fp8_metadata(tmp_path / "nvfp4.safetensors", qwen3, form="nvfp4"))


def test_in_an_all_in_one_file(qwen3, tmp_path):
    """Beside a transformer whose layers are named alike, and its scales."""
    others = {"model.diffusion_model.layers.0.attention.qkv.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
              "model.diffusion_model.layers.0.attention.qkv.comfy_quant": json_tensor({"format": "nvfp4"}),
              "vae.encoder.conv_in.weight": torch.zeros(4)}  # fmt: skip
    tensors = {f"{files.PREFIX}{name}": tensor for name, tensor in qwen3.items()}
    spec = spec_of(write_tensors(tmp_path / "all.safetensors", {**others, **tensors}))
    assert {tensor.key for tensor in spec.weights.values()} == {files.PREFIX + name for name in needed(qwen3)}


def test_a_shard_is_named(qwen3, tmp_path):
    half = {name: tensor for name, tensor in qwen3.items() if ".2" not in name}
    with pytest.raises(CheckpointError, match=r"'model-00001-of-00002.safetensors' is one shard of a model, not all"):
        spec_of(write_tensors(tmp_path / "model-00001-of-00002.safetensors", half))
    assert spec_of(write_tensors(tmp_path / "model-00001-of-00001.safetensors", qwen3)).config.model is QWEN3


def test_the_place_of_each_file(paths, tmp_path):
    clip = write_tensors(tmp_path / "clip.safetensors", tiny_clip_l_state_dict(hidden=64, layers=1))
    t5 = write_tensors(tmp_path / "t5.safetensors", tiny_t5_state_dict())
    clip, t5, qwen3 = (read_file(str(path)) for path in (clip, t5, paths["bf16"]))
    with pytest.raises(CheckpointError, match=r"swapped: 'clip.safetensors' is a CLIP.*'qwen-bf16.saf.*' is a lang"):
        check_not_swapped(clip, qwen3)
    for main, second in ((qwen3, clip), (qwen3, t5), (t5, qwen3), (qwen3, None)):
        check_not_swapped(main, second)
    with pytest.raises(CheckpointError, match=r"'qwen-bf16.safetensors' is a language model, expected a CLIP-L"):
        clip_spec(qwen3)
    with pytest.raises(CheckpointError, match=f"'clip.safetensors' is a CLIP text encoder{EXPECTED}"):
        encoder_spec(clip)
    assert [architecture.matches(qwen3) for architecture in recognise.MAIN] == [False, True]


def test_scales_of_layers_that_are_left_out_do_not_matter(paths):
    stored = load_file(paths["scaled-new"])
    assert "model.layers.27.mlp.up_proj.weight_scale" in stored
    spec = spec_of(paths["scaled-new"])
    assert {tensor.scale for name, tensor in spec.weights.items() if tensor.scale} == {
        f"{name}.weight_scale" for name in LINEARS
    }


def test_published_sizes_say_whom_they_serve():
    assert (QWEN3.serves[2560], QWEN3.serves[4096], MISTRAL.serves[5120]) == (
        "FLUX.2 klein 4B", "FLUX.2 klein 9B", "FLUX.2 dev")  # fmt: skip
    assert (QWEN3.taken, MISTRAL.taken, TINY_QWEN3.layers) == ((9, 18, 27), (10, 20, 30), 28)
