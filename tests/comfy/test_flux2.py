"""FLUX.2 against its oracle: stock ComfyUI with the same files, seed and LoRAs, in one server and one prompt."""

from dataclasses import replace

import pytest
import torch

from harness.graphs import Picture, graph, node, relative_distance
from harness.tiny_flux2 import TinyFlux2Config
from tests.comfy import test_step_cache

TOLERANCE = {"fp32": 1e-4, "bf16": 0.03}
VISIBLE = 0.05

KLEIN = Picture(
    model="tiny-flux2-klein-fp32.safetensors", dtype="fp32", guidance=None, empty="EmptyFlux2LatentImage", width=128,
    height=96,
)  # fmt: skip
BY_PRECISION = {"fp32": KLEIN, "bf16": replace(KLEIN, model="tiny-flux2-klein-bf16.safetensors", dtype="auto")}
DEV = replace(KLEIN, model="tiny-flux2-dev-fp32.safetensors", guidance=3.3)


@pytest.fixture(params=TOLERANCE)
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def loras(comfy):
    return write_loras(comfy)


def write_loras(comfy):
    """Of all linears, of attention alone, and of dev's."""
    dev = TinyFlux2Config(guidance=True)
    return (
        comfy.lora("flux2-a.safetensors", "native", config=TinyFlux2Config(), seed=1),
        comfy.lora("flux2-b.safetensors", "native", config=TinyFlux2Config(), rank=16, seed=2, targets=in_qkv),
        comfy.lora("flux2-dev.safetensors", "native", config=dev, seed=3),
    )


def in_qkv(module):
    return "qkv" in module


def assert_equal(comparison, precision="fp32", visible=VISIBLE):
    assert torch.isfinite(comparison.ours).all()
    assert comparison.distance <= TOLERANCE[precision]
    if comparison.plain is not None:
        assert comparison.effect >= visible


def change_model(class_type, **inputs):
    """An edit that puts a node between the model and the sampler."""

    def edit(nodes, prefix):
        sampler = nodes[prefix + "sample"]["inputs"]
        nodes[prefix + class_type] = node(class_type, model=sampler["model"], **inputs)
        sampler["model"] = [prefix + class_type, 0]

    return edit


def references(count, method):
    """An edit that gives the positive conditioning reference latents: what stock ComfyUI draws in one step."""

    def edit(nodes, prefix):
        sampler = nodes[prefix + "sample"]["inputs"]
        for number, (width, height) in enumerate(((64, 96), (112, 48))[:count]):
            name = f"reference{number}"
            nodes[f"{name}_model"] = node("UNETLoader", unet_name=KLEIN.model, weight_dtype="default")
            nodes[f"{name}_empty"] = node(KLEIN.empty, width=width, height=height, batch_size=1)
            nodes[name] = node("KSampler", **{
                **sampler, "model": [f"{name}_model", 0], "latent_image": [f"{name}_empty", 0], "steps": 1, "cfg": 1.0,
                "seed": 70 + number, "positive": ["p0_negative", 0], "negative": ["p0_negative", 0]})  # fmt: skip
            nodes[f"{prefix}{name}"] = node("ReferenceLatent", conditioning=sampler["positive"], latent=[name, 0])
            sampler["positive"] = [f"{prefix}{name}", 0]
        if method:
            nodes[f"{prefix}method"] = node(
                "FluxKontextMultiReferenceLatentMethod", conditioning=sampler["positive"],
                reference_latents_method=method)  # fmt: skip
            sampler["positive"] = [f"{prefix}method", 0]

    return edit


def test_klein_without_a_lora(comfy, precision):
    drawn = comfy.compare(BY_PRECISION[precision], plain=replace(BY_PRECISION[precision], prompt="a green heart"))
    assert_equal(drawn, precision, visible=0.01)
    assert float(drawn.stock.std()) > 0.1


@pytest.mark.parametrize("strength", [0.35, -0.8, 1.6])
def test_strength(comfy, precision, loras, strength):
    base = BY_PRECISION[precision]
    assert_equal(comfy.compare(replace(base, loras=[(loras[0], strength)]), plain=base), precision)


def test_stack(comfy, precision, loras):
    base = BY_PRECISION[precision]
    picture = replace(base, loras=[(loras[0], 0.7), (loras[1], -0.9), (loras[0], 0.2)])
    assert_equal(comfy.compare(picture, plain=replace(base, loras=[(loras[0], 0.9)])), precision)


def test_back_to_none_is_bit_identical(comfy, precision, loras):
    base = BY_PRECISION[precision]
    before = comfy.sample(base)
    changed = comfy.sample(replace(base, loras=[(loras[0], 1.3)]))
    assert relative_distance(changed, before) >= VISIBLE
    comfy.sample(replace(base, seed=99))  # so that the picture is drawn again and not taken from ComfyUI's cache
    assert torch.equal(comfy.sample(replace(base, batch=1, negative="again")), before)


@pytest.mark.parametrize("guidance", [None, 1.0, 7.1], ids=lambda value: f"guidance {value}")
def test_dev_and_its_guidance(comfy, loras, guidance):
    picture = replace(DEV, guidance=guidance, loras=[(loras[2], 0.8)])
    assert_equal(comfy.compare(picture, plain=replace(picture, guidance=4.4)), visible=0.01)


@pytest.mark.parametrize("batch", [1, 2])
def test_cfg_with_a_negative_prompt(comfy, precision, loras, batch):
    """As klein's base models are drawn."""
    base = replace(BY_PRECISION[precision], batch=batch, cfg=2.0, negative="blurry, ugly")
    drawn = comfy.compare(replace(base, loras=[(loras[1], 0.8)]), plain=base)
    assert drawn.ours.shape[0] == batch
    assert_equal(drawn, precision, visible=0.02)


@pytest.mark.parametrize("size", [(16, 16), (80, 208), (256, 64)], ids=lambda size: "{}x{}".format(*size))
def test_size(comfy, loras, size):
    base = replace(KLEIN, width=size[0], height=size[1])
    drawn = comfy.compare(replace(base, loras=[(loras[0], 0.8)]), plain=base)
    assert drawn.ours.shape[1:] == (128, size[1] // 16, size[0] // 16)
    assert_equal(drawn)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", [None, "offset", "index", "uxo/uno", "index_timestep_zero"])
def test_references(comfy, loras, method, count):
    picture = replace(KLEIN, loras=[(loras[0], 0.8)], cfg=2.0)
    assert_equal(comfy.compare(picture, plain=picture, edit=references(count, method)), visible=0.01)


@pytest.mark.parametrize("change", ["scale_tokens", "scale_conditioning", "read_options", "skip"])
@pytest.mark.parametrize("kind", ["double_block", "single_block"])
def test_patch_around_a_block(comfy, loras, kind, change):
    """Its vec are the modulations, which all blocks share."""
    edit = change_model("ProbeBlockPatch", kind=kind, index=1, change=change)
    picture = replace(KLEIN, loras=[(loras[0], 0.8)], batch=2)
    assert_equal(comfy.compare(picture, plain=picture, edit=edit), visible=0.01)


def test_patches_inside_attention(comfy, loras):
    picture = replace(KLEIN, loras=[(loras[0], 0.8)], batch=2)
    assert_equal(comfy.compare(picture, plain=picture, edit=change_model("ProbeAttentionPatch")))


@pytest.mark.parametrize("count", [1, 2])
def test_the_kv_cache_of_references(comfy, loras, count):
    """Their keys and values are those of the first step, in which references are modulated as at timestep 0."""

    def edit(nodes, prefix):
        references(count, None)(nodes, prefix)
        change_model("FluxKVCache")(nodes, prefix)

    picture = replace(KLEIN, loras=[(loras[0], 0.8)])
    drawn = comfy.compare(picture, plain=picture, edit=edit, edit_plain=references(count, None))
    assert_equal(drawn, visible=0.01)


@pytest.mark.parametrize("extra_tokens", [False, True], ids=["same tokens", "more text tokens"])
def test_patch_after_the_embedders(comfy, loras, extra_tokens):
    edit = change_model("ProbePostInputPatch", extra_tokens=extra_tokens)
    picture = replace(KLEIN, loras=[(loras[0], 0.8)], batch=2)
    assert_equal(comfy.compare(picture, plain=picture, edit=edit), visible=0.01)


def test_wrapper_and_scaled_positions(comfy, loras):
    def edit(nodes, prefix):
        change_model("ProbeWrapper")(nodes, prefix)
        change_model(
            "ScaleROPE", scale_x=1.7, shift_x=3.0, scale_y=0.6, shift_y=-2.0, scale_t=1.0, shift_t=2.0
        )(nodes, prefix)  # fmt: skip

    picture = replace(KLEIN, loras=[(loras[0], 0.8)])
    assert_equal(comfy.compare(picture, plain=picture, edit=edit))


def test_its_own_scheduler_and_the_custom_sampler(comfy, precision, loras):
    def edit(nodes, prefix):
        sampler = nodes.pop(prefix + "sample")["inputs"]
        nodes |= {
            prefix + "noise": node("RandomNoise", noise_seed=5),
            prefix + "guider": node(
                "CFGGuider", model=sampler["model"], positive=sampler["positive"], negative=sampler["negative"],
                cfg=2.0),
            prefix + "select": node("KSamplerSelect", sampler_name="euler"),
            prefix + "sigmas": node("Flux2Scheduler", steps=4, width=128, height=96),
            prefix + "sample": node(
                "SamplerCustomAdvanced", noise=[prefix + "noise", 0], guider=[prefix + "guider", 0],
                sampler=[prefix + "select", 0], sigmas=[prefix + "sigmas", 0],
                latent_image=sampler["latent_image"]),
        }  # fmt: skip

    base = BY_PRECISION[precision]
    drawn = comfy.compare(replace(base, loras=[(loras[0], 0.8)]), plain=base, edit=edit, edit_plain=edit)
    assert_equal(drawn, precision)


def test_image_to_image_with_a_mask(comfy, loras):
    def edit(nodes, prefix):
        sampler = nodes[prefix + "sample"]["inputs"]
        nodes[prefix + "first"] = node("KSampler", **{**sampler, "seed": 8, "steps": 2})
        nodes["mask"] = node("SolidMask", value=1.0, width=64, height=96)
        nodes["no_mask"] = node("SolidMask", value=0.0, width=128, height=96)
        nodes["half"] = node("MaskComposite", destination=["no_mask", 0], source=["mask", 0], x=0, y=0, operation="add")
        nodes[prefix + "masked"] = node("SetLatentNoiseMask", samples=[prefix + "first", 0], mask=["half", 0])
        sampler |= {"latent_image": [prefix + "masked", 0], "denoise": 0.7}

    picture = replace(KLEIN, loras=[(loras[0], 0.8)])
    assert_equal(comfy.compare(picture, plain=picture, edit=edit))


def test_the_step_cache_skips_and_the_picture_stays_near(comfy):
    """Late steps are small enough for random blocks."""
    late, cached = graph(replace(KLEIN, steps=10)), graph(replace(KLEIN, steps=10))
    for nodes in (late, cached):
        nodes["p0_sample"]["inputs"] |= test_step_cache.LATE
    plain, counts = test_step_cache.drawn(comfy, late)
    assert counts == [None]
    picture, ((skipped, calls),) = test_step_cache.drawn(comfy, test_step_cache.cached(cached, threshold=1.0))
    assert calls == 10
    assert 2 <= skipped < calls
    assert 0 < relative_distance(picture, plain) < 0.5


def test_engines_of_both_families_in_one_prompt(comfy, loras):
    """One lets go of its weights for the other, and draws the same again when it is back."""
    flux1, flux2 = Picture(dtype="fp32"), replace(KLEIN, loras=[(loras[0], 0.8)])
    pictures = (flux1, flux2, replace(flux1, stock=True), replace(flux2, stock=True))
    drawn = comfy.samples(*pictures)
    for ours, stock in zip(drawn[:2], drawn[2:], strict=True):
        assert relative_distance(ours, stock) <= TOLERANCE["fp32"]
    seen = set()
    for picture, before in zip((flux1, flux2) * 2, drawn[:2] * 2, strict=True):
        comfy.sample(replace(picture, seed=50 + len(seen)))
        seen |= {engine["family"] for engine in comfy.engines()["held"] if engine["loaded"]}
        assert torch.equal(comfy.sample(replace(picture, negative=f"again {len(seen)}")), before)
    assert seen == {"FLUX.1", "FLUX.2"}
