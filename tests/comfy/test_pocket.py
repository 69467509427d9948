"""Pocket FLUX in a real ComfyUI: found without being copied, the same through stock's nodes, and what it draws."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from harness import demo, demo_report
from harness.client import http_request
from harness.graphs import latents, node, relative_distance
from harness.paths import REPO
from pocket import autoencoder, draw, files, measure, quality
from pocket.flux1 import FLUX1
from pocket.flux1.autoencoder import SCALE, SHIFT

FP32 = 1e-4
MODELS = REPO / "pocket" / "models"
PROMPT = "two red stars on a gray background"
T5 = {"t5_name": "pocket-t5.safetensors", "clip_l_name": "none", "quantization": "none"}


def sampled(prefix, prompt, stock, lora=None, steps=4):
    """Nodes that draw one picture and save its latent; `lora` is (file, strength)."""
    if stock:
        loader = node("UNETLoader", unet_name="pocket-flux.safetensors", weight_dtype="default")
        lora_node = {"class_type": "LoraLoaderModelOnly", "strength": "strength_model"}
    else:
        settings = {"dtype": "fp32", "attention": "auto", "compile": "off"}
        loader = node("FluxAccelLoader", model_name="pocket-flux.safetensors", **settings)
        lora_node = {"class_type": "FluxHotswapLora", "strength": "strength"}
    nodes = {prefix + "model": loader}
    linked = [prefix + "model", 0]
    if lora:
        arguments = {"lora_name": lora[0], lora_node["strength"]: lora[1]}
        nodes[prefix + "lora"] = node(lora_node["class_type"], model=linked, **arguments)
        linked = [prefix + "lora", 0]
    return {
        **nodes,
        "clip": node("FluxTextEncoderLoader", **T5),
        prefix + "text": node("CLIPTextEncode", clip=["clip", 0], text=prompt),
        "empty": node("EmptySD3LatentImage", width=96, height=96, batch_size=1),
        prefix + "sample": node(
            "KSampler", model=linked, seed=5, steps=steps, cfg=1.0, sampler_name="euler", scheduler="simple",
            positive=[prefix + "text", 0], negative=[prefix + "text", 0], latent_image=["empty", 0], denoise=1.0,
        ),
        prefix + "latent": node("SaveLatent", samples=[prefix + "sample", 0], filename_prefix="latents/pocket"),
    }


@pytest.fixture(scope="module")
def base(comfy):
    """The same picture by stock's nodes and by ours: two latents (1, 16, 12, 12)."""
    result = comfy.run({**sampled("p0_", PROMPT, stock=True), **sampled("p1_", PROMPT, stock=False)})
    return latents(comfy.client, result, 0), latents(comfy.client, result, 1)


def test_the_lists_have_it_without_a_copy(comfy):
    inputs = [
        ("UNETLoader", "unet_name", "pocket-flux.safetensors"),
        ("FluxAccelLoader", "model_name", "pocket-flux.safetensors"),
        ("VAELoader", "vae_name", "pocket-vae.safetensors"),
        ("FluxTextEncoderLoader", "t5_name", "pocket-t5.safetensors"),
        *(("FluxHotswapLora", "lora_name", recipe.file) for recipe in FLUX1.recipes),
    ]
    for node_type, name, file in inputs:
        schema = json.loads(http_request(f"{comfy.server.url}/object_info/{node_type}"))[node_type]
        entry = schema["input"]["required"][name]
        assert file in (entry[1]["options"] if entry[0] == "COMBO" else entry[0])
    assert not list(comfy.server.models.rglob("pocket-*"))


def test_stock_loads_the_model_and_draws_the_same(base):
    stock, ours = base
    assert relative_distance(ours, stock) < FP32


def test_training_computed_what_the_sampler_computes(base):
    transformer, encoder = files.load_trained(FLUX1, MODELS)
    tokens = files.tokenizer_of_comfyui(FLUX1)([PROMPT], FLUX1.text.length)
    drawn = FLUX1.sample(transformer, FLUX1.noise(5), encoder(tokens), 4)
    assert relative_distance(drawn / SCALE + SHIFT, base[0]) < FP32


@pytest.mark.parametrize("recipe", FLUX1.recipes, ids=lambda recipe: recipe.style)
def test_stock_loads_each_lora_and_draws_the_same(comfy, base, recipe):
    lora = (recipe.file, 0.8)
    result = comfy.run({**sampled("p0_", PROMPT, True, lora), **sampled("p1_", PROMPT, False, lora)})
    stock, ours = latents(comfy.client, result, 0), latents(comfy.client, result, 1)
    assert relative_distance(ours, stock) < FP32
    assert relative_distance(stock, base[0]) > 0.05, "the LoRA does something"


def test_stock_encodes_as_training_did(comfy):
    picture = draw.draw(draw.Scene("heart", "pink", ground="light blue"))
    pixels = np.round(picture * 255).astype(np.uint8)
    (comfy.server.base_directory / "input").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(comfy.server.base_directory / "input" / "pocket-heart.png")
    result = comfy.run(
        {
            "vae": node("VAELoader", vae_name="pocket-vae.safetensors"),
            "image": node("LoadImage", image="pocket-heart.png"),
            "encoded": node("VAEEncode", pixels=["image", 0], vae=["vae", 0]),
            "p0_latent": node("SaveLatent", samples=["encoded", 0], filename_prefix="latents/pocket"),
            "decoded": node("VAEDecode", samples=["encoded", 0], vae=["vae", 0]),
            "saved": node("SaveImage", images=["decoded", 0], filename_prefix="pocket"),
        }
    )
    encoded = (latents(comfy.client, result) - SHIFT) * SCALE
    quarters = autoencoder.average(torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None], 4)
    axes = torch.einsum("ac,nchw->nahw", autoencoder.AXES, quarters)
    # Each channel is one axis of the averages, moved and scaled: brightness is the first four.
    brightness = torch.stack([encoded[0, :4].flatten(), torch.pixel_unshuffle(axes, 2)[0, :4].flatten()])
    assert float(torch.corrcoef(brightness)[0, 1]) > 0.9999
    again = opened(comfy, result, "saved")
    assert all(measure.follows(measure.see(again), draw.Scene("heart", "pink", ground="light blue")).values())
    assert measure.psnr([again], [picture]) > 22


def opened(comfy, result, name):
    data = comfy.client.view(**result.outputs[name]["images"][0])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255


def test_the_bundled_workflow_draws_its_prompt_and_switches(comfy):
    workflow = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))
    for entry in workflow.values():
        if entry["class_type"] == "FluxAccelLoader":
            entry["inputs"]["compile"] = "off"
    saved = next(key for key, entry in workflow.items() if entry["class_type"] == "SaveImage")
    pictures = {p.name: opened(comfy, comfy.run(demo.adapt(workflow, p.loras)), saved) for p in demo.PROMPTS}

    plain = pictures["none"]
    asked = draw.Scene("heart", "green")
    assert all(measure.follows(measure.see(plain), asked).values())
    assert np.array_equal(pictures["none again"], plain)
    for name, style in (("A: neon", "neon"), ("B: stripes", "stripes"), ("C: outline", "outline")):
        assert quality.EFFECTS[style](pictures[name], plain) > quality.EFFECTS[style](plain, plain) + 0.25, name


def test_a_rejected_prompt_fails_the_demo_with_its_reason(comfy, monkeypatch, capsys, tmp_path):
    """On the server that runs already, in place of one that the demo starts."""
    monkeypatch.setattr(demo, "ComfyServer", lambda *arguments, **options: contextlib.nullcontext(comfy.server))
    prompt = demo_report.DemoPrompt("bad", (("no-such-lora.safetensors", 1.0),), "bad.png")
    monkeypatch.setattr(demo, "PROMPTS", (prompt,))

    assert demo.main(["--output", str(tmp_path)]) == 1

    message = capsys.readouterr().err
    assert message.startswith("error: ComfyUI rejected the graph")
    assert "no-such-lora.safetensors" in message
    assert "comfyui.log" in message
