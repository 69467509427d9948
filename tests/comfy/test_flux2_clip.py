"""The CLIP of Flux Text Encoder Loader for FLUX.2 within ComfyUI's own code, in this process.

ComfyUI's own `klein_te` and `flux2_te` load small language models when they are told the sizes: they are the reference.
"""

import json

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
# |ours − fp32| / |fp32| of the hidden states.
DISTANCE = {"int8": 0.1, "fp8": 0.3, "nf4": 0.6}


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs nodes in inference mode."""
    with torch.inference_mode():
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
    """ComfyUI's own CLIP for FLUX.2, as `load_text_encoder_state_dicts` makes it, with the sizes of the small models."""
    import comfy.sd
    import comfy.text_encoders.flux as flux
    import comfy.utils

    def build(name="bf16", model="qwen3_4b", config=TINY_QWEN3):
        tensors, metadata = comfy.utils.load_torch_file(str(paths.get(name, name)), return_metadata=True)
        tensors, _ = comfy.utils.convert_old_quants(tensors, model_prefix="", metadata=metadata)

        class Target:
            params = {}
            clip = (flux.flux2_te if config is TINY_MISTRAL else flux.klein_te)(
                **comfy.sd.llama_detect([tensors]), **({} if config is TINY_MISTRAL else {"model_type": model})
            )
            tokenizer = {"qwen3_4b": flux.KleinTokenizer, "qwen3_8b": flux.KleinTokenizer8B}.get(
                model, flux.Flux2Tokenizer)  # fmt: skip

        return comfy.sd.CLIP(
            Target, tokenizer_data={"tekken_model": tensors.get("tekken_model")}, state_dict=[tensors],
            model_options={f"{model}_model_config": sizes(config)}, disable_dynamic=True,
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


def encode(clip, text=PROMPT) -> tuple[torch.Tensor, dict]:
    """As CLIPTextEncode does: the hidden states, and what else the conditioning has."""
    [[cond, extra]] = clip.encode_from_tokens_scheduled(clip.tokenize(text), add_dict={"guidance": 3.5})
    return cond, extra


def check_same(ours, theirs) -> None:
    """Bit for bit, with all that the conditioning has."""
    assert ours[1].keys() == theirs[1].keys() == {"pooled_output", "guidance", "attention_mask"}
    assert ours[1]["pooled_output"] is theirs[1]["pooled_output"] is None
    assert torch.equal(ours[1]["attention_mask"], theirs[1]["attention_mask"])
    assert torch.equal(ours[0], theirs[0])


# What it encodes.


@pytest.mark.parametrize("text", [PROMPT, "", "weights (do:1.3) not count ((here)) " * 30], ids=["plain", "empty", "long"])
def test_bit_equal_to_stock(make, stock, text):
    ours, theirs = make(), stock()
    assert ours.tokenize(text) == theirs.tokenize(text)
    check_same(encode(ours, text), encode(theirs, text))
    assert encode(ours, text)[0].shape[-1] == 3 * TINY_QWEN3.hidden


def test_mistral_is_bit_equal_to_stock(make, stock):
    ours, theirs = make("mistral"), stock("mistral", "mistral3_24b", TINY_MISTRAL)
    assert ours.tokenize(PROMPT) == theirs.tokenize(PROMPT)
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
