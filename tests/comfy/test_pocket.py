"""The pocket models in a real ComfyUI: found without being copied, the same through stock's nodes, what they draw."""

import contextlib
import dataclasses
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
from pocket.flux2 import FLUX2

FP32 = 1e-4
MODELS = REPO / "pocket" / "models"
PROMPT = "two red stars on a gray background"
KINDS = pytest.mark.parametrize("kind", [FLUX1, FLUX2], ids=lambda kind: kind.title)


def name_of(kind, what):
    """The name of a model's file in ComfyUI's lists."""
    return kind.files[what].rpartition("/")[2]


def sampled(prefix, prompt, stock, lora=None, steps=4, kind=FLUX1):
    """Nodes that draw one picture and save its latent; `lora` is (file, strength)."""
    if stock:
        loader = node("UNETLoader", unet_name=name_of(kind, "model"), weight_dtype="default")
        lora_node = {"class_type": "LoraLoaderModelOnly", "strength": "strength_model"}
    else:
        settings = {"dtype": "fp32", "attention": "auto", "compile": "off"}
        loader = node("FluxAccelLoader", model_name=name_of(kind, "model"), **settings)
        lora_node = {"class_type": "FluxHotswapLora", "strength": "strength"}
    nodes = {prefix + "model": loader}
    linked = [prefix + "model", 0]
    if lora:
        arguments = {"lora_name": lora[0], lora_node["strength"]: lora[1]}
        nodes[prefix + "lora"] = node(lora_node["class_type"], model=linked, **arguments)
        linked = [prefix + "lora", 0]
    return {
        **nodes,
        "clip": node("FluxTextEncoderLoader", t5_name=name_of(kind, "text"), clip_l_name="none", quantization="none"),
        prefix + "text": node("CLIPTextEncode", clip=["clip", 0], text=prompt),
        "empty": node(
            "EmptySD3LatentImage" if kind is FLUX1 else "EmptyFlux2LatentImage", width=96, height=96, batch_size=1
        ),
        prefix + "sample": node(
            "KSampler", model=linked, seed=5, steps=steps, cfg=1.0, sampler_name="euler", scheduler="simple",
            positive=[prefix + "text", 0], negative=[prefix + "text", 0], latent_image=["empty", 0], denoise=1.0,
        ),
        prefix + "latent": node("SaveLatent", samples=[prefix + "sample", 0], filename_prefix="latents/pocket"),
    }


@pytest.fixture(scope="module")
def base(comfy):
    """The same picture by stock's nodes and by ours, for each model: two latents."""
    drawn = {}
    for kind in (FLUX1, FLUX2):
        stock, ours = (sampled(f"p{index}_", PROMPT, stock=not index, kind=kind) for index in (0, 1))
        result = comfy.run({**stock, **ours})
        drawn[kind.title] = latents(comfy.client, result, 0), latents(comfy.client, result, 1)
    return drawn


@KINDS
def test_the_lists_have_it_without_a_copy(comfy, kind):
    inputs = [
        ("UNETLoader", "unet_name", name_of(kind, "model")),
        ("FluxAccelLoader", "model_name", name_of(kind, "model")),
        ("VAELoader" if kind is FLUX1 else "FluxTaesdLoader", "vae_name", name_of(kind, "vae")),
        ("FluxTextEncoderLoader", "t5_name", name_of(kind, "text")),
        *(("FluxHotswapLora", "lora_name", recipe.file) for recipe in kind.recipes),
    ]
    for node_type, name, file in inputs:
        schema = json.loads(http_request(f"{comfy.server.url}/object_info/{node_type}"))[node_type]
        entry = schema["input"]["required"][name]
        assert file in (entry[1]["options"] if entry[0] == "COMBO" else entry[0])
    assert not list(comfy.server.models.rglob("pocket-*"))


@KINDS
def test_stock_loads_the_model_and_draws_the_same(base, kind):
    stock, ours = base[kind.title]
    assert relative_distance(ours, stock) < FP32


def test_training_computed_what_the_sampler_computes(base):
    transformer, encoder = files.load_trained(FLUX1, MODELS)
    tokens = files.tokenizer_of_comfyui(FLUX1)([PROMPT], FLUX1.text.length)
    drawn = FLUX1.sample(transformer, FLUX1.noise(5), encoder(tokens), 4)
    assert relative_distance(drawn / SCALE + SHIFT, base[FLUX1.title][0]) < FP32


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [pytest.param(kind, recipe, id=recipe.file) for kind in (FLUX1, FLUX2) for recipe in kind.recipes],
)
def test_stock_loads_each_lora_and_draws_the_same(comfy, base, kind, recipe):
    lora = (recipe.file, 0.8)
    stock, ours = (sampled(f"p{index}_", PROMPT, not index, lora, kind=kind) for index in (0, 1))
    result = comfy.run({**stock, **ours})
    stock, ours = latents(comfy.client, result, 0), latents(comfy.client, result, 1)
    assert relative_distance(ours, stock) < FP32
    assert relative_distance(stock, base[kind.title][0]) > 0.05, "the LoRA does something"


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


def drawn_by_the_workflow(comfy, name):
    """Name of each of the demo's prompts -> its pictures."""
    workflow = json.loads((demo.WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for entry in workflow.values():
        if entry["class_type"] == "FluxAccelLoader":
            entry["inputs"]["compile"] = "off"
    saved = [key for key, entry in workflow.items() if entry["class_type"] == "SaveImage"]
    results = {p.name: comfy.run(demo.adapt(workflow, p.loras)) for p in demo.PROMPTS if p.workflow == name}
    return {name: [opened(comfy, result, key) for key in saved] for name, result in results.items()}


def test_the_bundled_workflow_draws_its_prompt_and_switches(comfy):
    pictures = {name: only for name, (only,) in drawn_by_the_workflow(comfy, "flux_hotswap_pocket").items()}

    plain = pictures["none"]
    asked = draw.Scene("heart", "green")
    assert all(measure.follows(measure.see(plain), asked).values())
    assert np.array_equal(pictures["none again"], plain)
    for name, style in (("A: neon", "neon"), ("B: stripes", "stripes"), ("C: outline", "outline")):
        assert quality.EFFECTS[style](pictures[name], plain) > quality.EFFECTS[style](plain, plain) + 0.25, name


def test_the_workflow_of_flux2_draws_its_prompt_and_edits_what_it_drew(comfy):
    pictures = drawn_by_the_workflow(comfy, "flux_hotswap_pocket_flux2")
    plain, edited = pictures["FLUX.2, none"]
    asked = draw.Scene("heart", "red", size="large")
    assert all(measure.follows(measure.see(plain), asked).values())
    assert all(measure.follows(measure.see(edited), dataclasses.replace(asked, colour="blue")).values())
    for name, style in (("FLUX.2, D: neon", "neon"), ("FLUX.2, E: outline", "outline")):
        for picture, before in zip(pictures[name], (plain, edited), strict=True):
            assert quality.EFFECTS[style](picture, before) > quality.EFFECTS[style](before, before) + 0.25, name


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
