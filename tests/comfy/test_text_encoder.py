"""Flux Text Encoder Loader on a real server: pictures, LoRAs, memory, and wrong files."""

import json

import pytest

from harness import text_encoder_files as files
from harness.client import http_request
from harness.graphs import Graph, latents, node, relative_distance
from harness.lora_files import clip_l_lora_state_dict, lora_state_dict
from harness.tiny_models import TinyFluxConfig
from harness.tiny_others import TinyT5Config, tiny_clip_l_state_dict, tiny_t5_state_dict

PROMPT = "a red circle on a blue square"
MODEL = "text-width-128.safetensors"
FP32 = 1e-4


@pytest.fixture(scope="module", autouse=True)
def assets(comfy):
    """What the tests' graphs name."""
    write_assets(comfy)


def write_assets(comfy):
    """A FLUX model for a T5 of width 128, T5 files for it, and a LoRA for the model and CLIP-L."""
    comfy.checkpoint(MODEL, context=128)
    tensors = tiny_t5_state_dict()
    files.write_formats(comfy.server.models / "text_encoders", tensors)
    width = TinyFluxConfig(context=128)
    both = {**lora_state_dict("kohya", width, rank=4), **clip_l_lora_state_dict("kohya", rank=4)}
    comfy.tensors("loras", "model-and-text.safetensors", both)


def text_graph(t5="t5-fp16.safetensors", clip="tiny-clip-l.safetensors", quantization="none", text=PROMPT, prefix="p0_",
               stock=False, lora=None, encode="CLIPTextEncodeFlux") -> Graph:
    """A picture from text through the loader; `lora` is the class of a node that gets model and CLIP."""

    def link(name, output=0):
        return [prefix + name, output]

    nodes = {
        prefix + "text": node("FluxTextEncoderLoader", t5_name=t5, clip_l_name=clip, quantization=quantization),
        prefix + "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        prefix + "latent": node("SaveLatent", samples=link("sample"), filename_prefix="latents/text"),
    }
    if stock:
        nodes[prefix + "model"] = node("UNETLoader", unet_name=MODEL, weight_dtype="default")
    else:
        settings = {"dtype": "auto", "attention": "auto", "compile": "off"}
        nodes[prefix + "model"] = node("FluxAccelLoader", model_name=MODEL, **settings)
    model, text_encoder = link("model"), link("text")
    if lora is not None:
        strength = "strength" if lora == "FluxHotswapLora" else "strength_model"
        inputs = {strength: 0.7, "strength_clip": 0.6, "lora_name": "model-and-text.safetensors"}
        nodes[prefix + "lora"] = node(lora, model=model, clip=text_encoder, **inputs)
        model, text_encoder = link("lora"), link("lora", 1)
    if encode == "CLIPTextEncodeFlux":
        nodes[prefix + "positive"] = node(encode, clip=text_encoder, clip_l=text, t5xxl=text, guidance=3.5)
    else:
        nodes[prefix + "encoded"] = node(encode, clip=text_encoder, text=text)
        nodes[prefix + "positive"] = node("FluxGuidance", conditioning=link("encoded"), guidance=3.5)
    nodes[prefix + "negative"] = node("ConditioningZeroOut", conditioning=link("positive"))
    nodes[prefix + "sample"] = node(
        "KSampler", model=model, seed=1, steps=4, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        positive=link("positive"), negative=link("negative"), latent_image=link("empty"),
    )
    return nodes


def draw(comfy, *graphs: Graph):
    result = comfy.run({key: value for nodes in graphs for key, value in nodes.items()})
    return [latents(comfy.client, result, index) for index in range(len(graphs))]


def encoders(comfy) -> dict:
    held = json.loads(http_request(f"{comfy.server.url}/probe/text_encoders"))
    assert len(held) == 1
    return held[0]


@pytest.mark.parametrize(("quantization", "quantized"), [("none", 0), ("int8", 14), ("fp8", 14), ("nf4", 14)])
def test_pictures_from_text(comfy, quantization, quantized):
    """The accelerated model and ComfyUI's own draw the same from this CLIP; the prompt matters."""
    ours, stock, other = draw(
        comfy,
        text_graph(quantization=quantization),
        text_graph(quantization=quantization, stock=True, prefix="p1_"),
        text_graph(quantization=quantization, text="nothing but (grey:1.4) fog", prefix="p2_"),
    )
    assert relative_distance(ours, stock) < FP32
    assert relative_distance(other, ours) > 0.05
    state = encoders(comfy)
    assert (state["mode"], state["quantized"]) == (quantization, quantized)


def test_both_encode_nodes_and_gguf(comfy):
    flux, plain, gguf = draw(
        comfy,
        text_graph(),
        text_graph(encode="CLIPTextEncode", prefix="p1_"),
        text_graph(t5="t5-BF16.gguf", prefix="p2_"),
    )
    assert relative_distance(plain, flux) < 1e-6
    assert 0 < relative_distance(gguf, flux) < 0.05


def test_auto_says_what_it_chose(comfy):
    mark = comfy.server.mark()
    draw(comfy, text_graph(quantization="auto"))
    assert "T5 quantization auto: none (0.0 GB of" in comfy.server.log_since(mark)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loras_with_a_text_encoder_part(comfy, quantization):
    """Our node, ComfyUI's node on our model, and ComfyUI's node on its own model draw the same."""
    ours, native, stock, plain = draw(
        comfy,
        text_graph(quantization=quantization, lora="FluxHotswapLora"),
        text_graph(quantization=quantization, lora="LoraLoader", prefix="p1_"),
        text_graph(quantization=quantization, lora="LoraLoader", prefix="p2_", stock=True),
        text_graph(quantization=quantization, prefix="p3_"),
    )
    assert relative_distance(ours, stock) < FP32
    assert relative_distance(native, stock) < FP32
    assert relative_distance(plain, stock) > 0.02


def test_repeated_prompts_need_no_text_encoder(comfy):
    """Also when ComfyUI has forgotten everything in between."""
    nodes = text_graph(quantization="int8", text="a prompt of this test alone")
    first = draw(comfy, nodes)[0]
    before = encoders(comfy)
    assert before["loaded"]
    comfy.free(unload_models=True, free_memory=True)
    again = draw(comfy, nodes)[0]
    after = encoders(comfy)
    assert not after["loaded"]
    assert after["encode_counts"] == before["encode_counts"]
    assert relative_distance(again, first) == 0.0


def error_of(comfy, nodes, at):
    result = comfy.client.run(nodes)
    assert result.status == "error"
    assert result.error.node_id == at, result.error
    assert "Traceback" not in result.error.exception_message
    return result.error.exception_message


def test_wrong_files(comfy):
    before = draw(comfy, text_graph())[0]
    broken = {name: t for name, t in tiny_t5_state_dict().items() if "block.1.layer.1" not in name}
    comfy.tensors("text_encoders", "t5-incomplete.safetensors", broken)
    nan = tiny_t5_state_dict(TinyT5Config(layers=1))
    nan["encoder.block.0.layer.0.SelfAttention.q.weight"][0, 0] = float("nan")
    comfy.tensors("text_encoders", "t5-nan.safetensors", nan)
    comfy.tensors("text_encoders", "clip-small.safetensors", tiny_clip_l_state_dict(hidden=64, layers=1))
    clip, t5 = "tiny-clip-l.safetensors", "t5-fp16.safetensors"
    for wrong, at, words in (
        ({"t5": clip, "clip": t5}, "p0_text", "swapped"),
        ({"t5": clip}, "p0_text", "expected a T5"),
        ({"clip": t5}, "p0_text", "expected a CLIP-L"),
        ({"t5": "t5-incomplete.safetensors"}, "p0_text", "tensors are missing"),
        ({"t5": "t5-nan.safetensors"}, "p0_positive", "holds NaN or infinity"),
    ):
        assert words in error_of(comfy, text_graph(**wrong), at)
    assert relative_distance(draw(comfy, text_graph())[0], before) == 0.0


def test_a_quantized_clip_is_not_saved(comfy):
    nodes = text_graph(quantization="nf4")
    nodes["save"] = node("CLIPSave", clip=["p0_text", 0], filename_prefix="clip/never")
    assert "cannot be saved" in error_of(comfy, nodes, "save")
    assert not list(comfy.server.base_directory.rglob("never*"))
