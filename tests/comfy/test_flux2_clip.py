"""The CLIP of Flux Text Encoder Loader for FLUX.2 within ComfyUI's own code, in this process.

ComfyUI's own `klein_te` and `flux2_te` load small language models when they are told the sizes: they are the reference.
"""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from harness import language_model_files as files
from harness.graphs import relative_distance
from harness.language_model_files import TINY_MISTRAL, TINY_QWEN3
from harness.tensor_files import write_tensors
from harness.tiny_models import seeded_normal

CPU = torch.device("cpu")
PROMPT = "a red fox jumps over the blue moon"
# |ours − fp32| / |fp32| of the hidden states, measured 0.027, 0.113, 0.382: 27 random layers change everything.
DISTANCE = {"int8": 0.036, "fp8": 0.155, "nf4": 0.52}


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True, scope="module")
def one_tokenizer(core):
    """Half a second each time that transformers makes one."""
    with pytest.MonkeyPatch.context() as patch:
        made = functools.cache(transformers.Qwen2Tokenizer.from_pretrained)
        patch.setattr(transformers.Qwen2Tokenizer, "from_pretrained", made)
        yield


@pytest.fixture(scope="module")
def qwen3() -> dict[str, torch.Tensor]:
    return files.language_model_state_dict(TINY_QWEN3)


@pytest.fixture(scope="module")
def mistral() -> dict[str, torch.Tensor]:
    return files.language_model_state_dict(TINY_MISTRAL)


@pytest.fixture(scope="module")
def paths(qwen3, mistral, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("language-models")
    written = files.write_formats(folder, qwen3)
    written["mistral"] = write_tensors(folder / "mistral.safetensors", files.with_tekken(mistral))
    pruned = {name: tensor for name, tensor in mistral.items() if ".30." not in name and name != "model.norm.weight"}
    written["pruned"] = write_tensors(folder / "pruned.safetensors", files.with_tekken(pruned))
    for architecture in ("llama", "mistral3"):
        path = folder / f"{architecture}.gguf"
        written[architecture] = files.write_gguf(path, mistral, TINY_MISTRAL, "F32", architecture, "tekken")
    return written


@pytest.fixture
def make(core, paths):
    """`make("bf16", "nf4")`: a CLIP from one of the files."""
    module, recognise, checkpoint = core("nodes.families.flux2.clip"), core("accel.text_encoder.recognise"), core(
        "accel.checkpoint")  # fmt: skip

    def build(name="bf16", mode="none", embeddings=None):
        spec = recognise.encoder_spec(checkpoint.read_file(str(paths.get(name, name))))
        return module.Flux2Clip(spec, mode, CPU, CPU, embeddings)

    return build


def sizes(config: files.TinyLanguageModel) -> dict[str, int]:
    """As ComfyUI's classes call them."""
    return {"num_hidden_layers": config.layers, "hidden_size": config.hidden, "intermediate_size": config.inner,
            "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "vocab_size": config.vocab,
            "lm_head": config.lm_head}  # fmt: skip


@pytest.fixture
def stock(core, paths, monkeypatch, tmp_path):
    """ComfyUI's own CLIP for FLUX.2, as `load_text_encoder_state_dicts` makes it, in the sizes of the small models."""
    import comfy.sd
    import comfy.text_encoders.flux as flux
    import comfy.utils

    def build(name="bf16", model="qwen3_4b", config=TINY_QWEN3):
        tensors, metadata = comfy.utils.load_torch_file(str(paths.get(name, name)), return_metadata=True)
        tensors, _ = comfy.utils.convert_old_quants(tensors, model_prefix="", metadata=metadata)

        stored = comfy.sd.llama_detect([tensors])
        target = {
            "qwen3_4b": lambda: (flux.klein_te(**stored, model_type="qwen3_4b"), flux.KleinTokenizer),
            "qwen3_8b": lambda: (flux.klein_te(**stored, model_type="qwen3_8b"), flux.KleinTokenizer8B),
            "mistral3_24b": lambda: (flux.flux2_te(**stored), flux.Flux2Tokenizer),
        }
        made, tokenizer = target[model]()
        return comfy.sd.CLIP(
            SimpleNamespace(params={}, clip=made, tokenizer=tokenizer),
            tokenizer_data={"tekken_model": tensors.get("tekken_model")},
            state_dict=[tensors], model_options={f"{model}_model_config": sizes(config)}, disable_dynamic=True,
        )  # fmt: skip

    # ComfyUI 0.30 calls a converter of transformers 4; this is the one of transformers 5, which wants a file.
    vocabulary = tmp_path / "tekken.json"
    vocabulary.write_text(json.dumps(files.tekken()))

    def converted(data):
        from transformers.integrations.mistral import MistralConverter

        assert json.loads(data.numpy().tobytes()) == files.tekken()
        return {"tokenizer_object": MistralConverter(str(vocabulary)).converted()}

    monkeypatch.setattr(flux, "load_mistral_tokenizer", converted)
    monkeypatch.setattr(
        flux.MistralTokenizerClass, "from_pretrained",
        staticmethod(lambda path, **made: transformers.PreTrainedTokenizerFast(**made)),
    )  # fmt: skip
    return build


def encode(clip, text=PROMPT, **options) -> tuple[torch.Tensor, dict]:
    """As CLIPTextEncode does, with less padding to save time: the hidden states, and what else the conditioning has."""
    tokens = clip.tokenize(text, **{"min_length": 24, **options})
    [[cond, extra]] = clip.encode_from_tokens_scheduled(tokens, add_dict={"guidance": 3.5})
    return cond, extra


def check_same(ours, theirs) -> None:
    """Bit for bit, with all that the conditioning has."""
    assert ours[1].keys() == theirs[1].keys() == {"pooled_output", "guidance", "attention_mask"}
    assert ours[1]["pooled_output"] is theirs[1]["pooled_output"] is None
    assert torch.equal(ours[1]["attention_mask"], theirs[1]["attention_mask"])
    assert torch.equal(ours[0], theirs[0])


# What it encodes.


@pytest.mark.parametrize("text", [PROMPT, "", "(weights:1.3) do not count " * 100], ids=["plain", "empty", "long"])
def test_bit_equal_to_stock(make, stock, text):
    ours, theirs = make(), stock()
    tokens = ours.tokenize(text)
    assert tokens == theirs.tokenize(text)
    length = len(tokens["qwen3_4b"][0])
    assert length == 512 if text == PROMPT else length >= 512
    encoded = encode(ours, text, min_length=512)
    check_same(encoded, encode(theirs, text, min_length=512))
    assert encoded[0].shape == (1, length, 3 * TINY_QWEN3.hidden)


def test_mistral_is_bit_equal_to_stock(make, stock):
    ours, theirs = make("mistral"), stock("mistral", "mistral3_24b", TINY_MISTRAL)
    assert ours.tokenize(PROMPT) == theirs.tokenize(PROMPT)
    # ComfyUI pads on the left, with tokens that it attends to.
    assert ours.tokenize(PROMPT, min_length=600)["mistral3_24b"][0][0] == (11, 1.0)
    expected = encode(theirs)
    check_same(encode(ours), expected)
    # The file without what comes after the thirtieth layer, and llama.cpp's, say the same.
    for name in ("pruned", "llama", "mistral3"):
        clip = make(name)
        assert clip.tokenize(PROMPT) == theirs.tokenize(PROMPT), name
        check_same(encode(clip), expected)


def test_later_layers_are_not_loaded(make):
    for name, layers in (("bf16", 27), ("mistral", 30)):
        encoders = make(name).cond_stage_model
        assert len(encoders.get_submodule(encoders.name).transformer.model.layers) == layers


@pytest.mark.parametrize("name", ["scaled-old", "scaled-new", "scaled-rows"])
def test_scaled_fp8_equals_stock(make, stock, name):
    ours, theirs = encode(make(name)), encode(stock(name))
    # ComfyUI keeps the scale in its own order of operations; without scales the distance is over 1.
    assert relative_distance(ours[0], theirs[0]) < 1e-5
    assert torch.equal(ours[1]["attention_mask"], theirs[1]["attention_mask"])


def test_quantized_is_near(make):
    """Also from blocks, which are unpacked first; and what is less exact is farther."""
    expected = encode(make("fp32"))[0]
    distances = {mode: relative_distance(encode(make("fp32", mode))[0], expected) for mode in DISTANCE}
    assert distances["int8"] < distances["fp8"] < distances["nf4"]
    for mode, limit in DISTANCE.items():
        assert limit / 4 < distances[mode] < limit, distances
    blocks = [relative_distance(encode(make("gguf-Q8_0", mode))[0], expected) for mode in ("none", "int8")]
    assert 0.005 < blocks[0] < blocks[1] < 2 * DISTANCE["int8"]


def test_any_sizes(make, stock, tmp_path, monkeypatch):
    """Heads are as wide as their norms say; ComfyUI's class has that width as a constant."""
    import comfy.text_encoders.llama as llama

    config = files.TinyLanguageModel(layers=29, hidden=32, inner=64, heads=3, kv_heads=3, head_dim=16)
    path = write_tensors(tmp_path / "other.safetensors", files.language_model_state_dict(config))
    ours = encode(make(path, "none"))
    monkeypatch.setattr(llama.Qwen3_4BConfig, "head_dim", 16)
    check_same(ours, encode(stock(path, config=config)))


def test_the_larger_qwen3_has_its_own_names(core, make, stock, monkeypatch):
    """By which LoRAs and embeddings find it: here the small one counts as Qwen3-8B."""
    monkeypatch.setattr(core("nodes.families.flux2.clip"), "WIDTH_8B", TINY_QWEN3.hidden)
    ours, theirs = make(), stock(model="qwen3_8b")
    assert ours.tokenize(PROMPT) == theirs.tokenize(PROMPT)
    assert list(ours.tokenize(PROMPT)) == ["qwen3_8b"]
    check_same(encode(ours), encode(theirs))
    assert ours.cond_stage_model.state_dict().keys() < theirs.cond_stage_model.state_dict().keys()


def test_embedding_files(make, stock, tmp_path):
    path = tmp_path / "style.safetensors"
    write_tensors(path, {"qwen3_4b": seeded_normal(0, "style", (3, TINY_QWEN3.hidden))})
    ours, theirs = make(embeddings=[str(tmp_path)]), stock()
    theirs.tokenizer.qwen3_4b.embedding_directory = [str(tmp_path)]
    text = "a fox, embedding:style in the moon"
    first = encode(ours, text)
    check_same(first, encode(theirs, text))
    assert relative_distance(first[0], encode(ours, "a fox, in the moon")[0]) > 0.01


def test_a_template_of_ones_own(make, stock):
    ours, theirs = (encode(clip, llama_template="{}", min_length=1) for clip in (make(), stock()))
    assert ours[0].shape[1] < 20
    check_same(ours, theirs)


# What it remembers.


def test_remembered_prompts_need_no_weights(make):
    clip = make("bf16", "nf4")
    assert not clip.cond_stage_model.loaded
    first = encode(clip)
    clip.patcher.detach()
    weights = clip.cond_stage_model.named_parameters()
    assert all(parameter.is_meta for name, parameter in weights if "logit" not in name)
    again = encode(clip.clone())
    check_same(again, first)
    assert clip.cond_stage_model.encode_counts == {"qwen3_4b": 1}
    assert not clip.cond_stage_model.loaded
    again[1]["attention_mask"].zero_()
    again[0].zero_()
    check_same(encode(clip), first)


# LoRAs.

LAYERS = ("layers.3.self_attn.q_proj", "layers.20.mlp.down_proj")
SHAPES = {"layers.3.self_attn.q_proj": (256, 64), "layers.20.mlp.down_proj": (64, 96)}


def lora(prefix: str, separator: str = ".") -> dict[str, torch.Tensor]:
    """A LoRA on a layer of each kind."""
    tensors = {}
    for layer in LAYERS:
        rows, columns = SHAPES[layer]
        name = prefix + layer.replace(".", separator)
        tensors[f"{name}.lora_down.weight"] = seeded_normal(5, f"{layer}.down", (4, columns), 0.2)
        tensors[f"{name}.lora_up.weight"] = seeded_normal(5, f"{layer}.up", (rows, 4), 0.2)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def with_lora(clip, tensors):
    """As ComfyUI's Load LoRA does."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(None, clip, tensors, 0.0, 0.8)[1]


@pytest.mark.parametrize("tensors", [
    lora("text_encoders.qwen3_4b.transformer.model."), lora("text_encoders.transformer.model."), lora("lora_te_", "_"),
], ids=["ComfyUI", "without a name", "kohya"])  # fmt: skip
def test_loras_equal_stock(core, make, stock, tmp_path, tensors):
    ours, theirs = make(), stock()
    plain, expected = encode(ours), encode(with_lora(theirs, tensors))
    assert relative_distance(expected[0], plain[0]) > 0.02
    check_same(encode(with_lora(ours, tensors)), expected)
    # Hotswap LoRA's part for text encoders makes the same of it.
    path = write_tensors(tmp_path / "lora.safetensors", tensors)
    patched, found = core("nodes.clip_lora").patch_clip(ours, str(path), list(tensors), 0.8)
    assert (found.applied, found.left) == (6, {})
    check_same(encode(patched), expected)
    check_same(encode(ours), plain)
    assert ours.cond_stage_model.encode_counts == {"qwen3_4b": 3}


def test_a_lora_on_quantized_layers(make):
    clip = make("bf16", "int8")
    plain, tensors = encode(clip), lora("text_encoders.qwen3_4b.transformer.model.")
    changed, exact = encode(with_lora(clip, tensors)), make()
    effect = encode(with_lora(exact, tensors))[0] - encode(exact)[0]
    assert relative_distance(changed[0] - plain[0], effect) < 0.3
    check_same(encode(clip), plain)


# What it refuses, and what it saves.


def test_what_it_does_not_do(make):
    clip = make("bf16", "int8")
    with pytest.raises(Exception, match=r"Qwen3.*writes no text"):
        clip.generate(clip.tokenize(PROMPT))
    with pytest.raises(Exception, match=r"The Qwen3 'qwen-bf16.safetensors' is quantized \(int8\), and cannot be"):
        clip.get_sd()


def test_a_saved_one_is_read_again(make, stock, tmp_path):
    """By the name of the file's tensors, and with Mistral's vocabulary; by ComfyUI, too."""
    clip = make("pruned")
    clip.load_model()
    prefix = "mistral3_24b.transformer."
    saved = {name.removeprefix(prefix): tensor for name, tensor in clip.get_sd().items() if "logit" not in name}
    path = write_tensors(tmp_path / "saved.safetensors", saved)
    check_same(encode(make(path)), encode(clip))
    check_same(encode(stock(path, "mistral3_24b", TINY_MISTRAL)), encode(clip))


def test_a_vocabulary_that_does_not_fit(make, qwen3, mistral, tmp_path):
    short = {**qwen3, "model.embed_tokens.weight": torch.zeros(1000, 64)}
    with pytest.raises(Exception, match=r"short.safetensors.*has 1,000 tokens, expected at least 151,669"):
        make(write_tensors(tmp_path / "short.safetensors", short))
    damaged = {**mistral, "tekken_model": torch.zeros(10, dtype=torch.uint8)}
    with pytest.raises(Exception, match=r"damaged.safetensors.*no vocabulary in Mistral's form"):
        make(write_tensors(tmp_path / "damaged.safetensors", damaged))


@pytest.fixture
def node(core, paths, tmp_path, monkeypatch):
    """The node, in a folder with the files under their own names."""
    import folder_paths

    module = core("nodes.families.text_encoder_node")
    by_name = {path.name: str(path) for path in paths.values()}
    monkeypatch.setattr(folder_paths, "get_full_path", lambda folder, name: by_name.get(name, str(tmp_path / name)))
    yield module.FluxTextEncoderLoader
    core("accel.registry").TEXT_ENCODERS.clear()


def test_the_node(core, node, paths, monkeypatch):
    said = []
    monkeypatch.setattr(core("nodes.families.text_encoder_node"), "say", said.append)
    name = paths["bf16"].name
    clips = [node.execute(name, "none", "auto").args[0] for _ in range(2)]
    assert clips[0].cond_stage_model is clips[1].cond_stage_model
    assert said[0].startswith("Qwen3 quantization auto: none (0.0 GB of ")
    assert said[1] == "Text encoder: Qwen3 of width 64, unlike FLUX.2 klein 4B 2560, FLUX.2 klein 9B 4096"
    assert len(said) == 2
    node.execute(paths["mistral"].name, "none", "none")
    assert said[2] == "Text encoder: Mistral Small of width 64, unlike FLUX.2 dev 5120"


def test_a_second_file_is_refused(node, paths):
    name = paths["bf16"].name
    with pytest.raises(Exception, match=rf"clip_l_name is '{paths['fp16'].name}', expected 'none'.*'{name}' is Qwen3"):
        node.execute(name, paths["fp16"].name, "none")


def test_a_comfyui_that_cannot(core, node, paths, monkeypatch):
    monkeypatch.setattr(core("nodes.contract"), "holds", lambda part: "FLUX.2" not in part.without)
    with pytest.raises(Exception, match=r"'qwen-bf16.safetensors' is a text encoder of FLUX.2.*Update ComfyUI"):
        node.execute(paths["bf16"].name, "none", "none")
