"""The pack against its oracle: stock ComfyUI with the same files, seed and LoRAs, in one server and one prompt."""

from dataclasses import replace

import pytest
import torch

from harness.controlnet_files import instantx_controlnet, xlabs_controlnet
from harness.graphs import Picture, graph, latents, node, relative_distance
from harness.lora_files import clip_l_lora_state_dict, in_attention, in_blocks, lora_state_dict
from harness.lora_formats import FORMATS
from harness.tiny_models import TinyFluxConfig

TOLERANCE = {"fp32": 1e-4, "bf16": 0.03}
VISIBLE = 0.05

DEV = Picture(model="tiny-flux-dev-fp32.safetensors", dtype="fp32")
BY_PRECISION = {
    "fp32": DEV,
    "bf16": replace(DEV, model="tiny-flux-dev-bf16.safetensors", dtype="auto"),
}
SCHNELL_CONFIG = TinyFluxConfig(guidance=False)
FILL_CONFIG = TinyFluxConfig(in_channels=384)
CONTROL_CONFIG = TinyFluxConfig(in_channels=128)


@pytest.fixture(params=TOLERANCE)
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def loras(comfy):
    """The files of the stack tests."""
    return (
        comfy.lora("a.safetensors", "kohya", rank=8, alpha=4.0, seed=1),
        comfy.lora("b.safetensors", "diffusers", rank=16, seed=2, targets=in_attention),
        comfy.lora("c.safetensors", "native", rank=4, seed=3, targets=in_blocks),
    )


def assert_equal(comparison, precision="fp32", visible=VISIBLE):
    assert torch.isfinite(comparison.ours).all()
    assert comparison.distance <= TOLERANCE[precision]
    if comparison.plain is not None:
        assert comparison.effect >= visible


def test_no_lora(comfy, precision):
    drawn = comfy.compare(BY_PRECISION[precision])
    assert drawn.distance <= TOLERANCE[precision]
    assert float(drawn.stock.std()) > 0.1


RANKS = {
    "rank 4": {"rank": 4},
    "rank 8, alpha 4": {"rank": 8, "alpha": 4.0},
    "rank 64": {"rank": 64},
    "mixed ranks": {"rank": lambda module: 3 + len(module) % 17, "alpha": 6.0},
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("format", FORMATS)
def test_format_and_rank(comfy, format, ranks):
    name = comfy.lora(f"{format}-{ranks}.safetensors", format, seed=4, scale=0.4, **RANKS[ranks])
    assert_equal(comfy.compare(replace(DEV, loras=[(name, 1.0)]), plain=DEV))


@pytest.mark.parametrize("ranks", RANKS)
def test_rank_in_bf16(comfy, ranks):
    """Of one format: what is read from a file does not depend on what the model computes in."""
    name = comfy.lora(f"bf16-{ranks}.safetensors", "kohya", seed=4, scale=0.4, **RANKS[ranks])
    base = BY_PRECISION["bf16"]
    assert_equal(comfy.compare(replace(base, loras=[(name, 1.0)]), plain=base), "bf16")


@pytest.mark.parametrize("strength", [0.35, -0.8, 1.6])
def test_strength(comfy, precision, loras, strength):
    base = BY_PRECISION[precision]
    assert_equal(comfy.compare(replace(base, loras=[(loras[0], strength)]), plain=base), precision)


def test_strength_zero_is_no_lora(comfy, precision, loras):
    base = BY_PRECISION[precision]
    without, zero, full = comfy.samples(
        base, replace(base, loras=[(loras[0], 0.0)]), replace(base, loras=[(loras[0], 1.0)]))
    assert torch.equal(zero, without)
    assert relative_distance(full, without) >= VISIBLE


@pytest.mark.parametrize(
    "stack",
    [
        pytest.param([(0, 0.7), (1, -0.5)], id="two"),
        pytest.param([(0, 0.7), (1, 1.2), (2, -0.6)], id="three"),
        pytest.param([(0, 0.7), (0, 0.4)], id="the same file twice"),
        pytest.param([(0, 0.7), (1, 0.0), (2, 0.5)], id="one of three at zero"),
    ],
)
def test_stack(comfy, precision, loras, stack):
    base = BY_PRECISION[precision]
    picture = replace(base, loras=[(loras[number], strength) for number, strength in stack])
    last_left_out = replace(picture, loras=picture.loras[:-1])
    assert_equal(comfy.compare(picture, plain=last_left_out), precision)


def test_a_stack_that_cancels_out_is_no_lora(comfy, loras):
    cancelled = replace(DEV, loras=[(loras[0], 0.8), (loras[0], -0.8)])
    once = replace(DEV, loras=[(loras[0], 0.8)])
    assert relative_distance(comfy.sample(cancelled), comfy.sample(DEV)) <= TOLERANCE["fp32"]
    assert relative_distance(comfy.sample(once), comfy.sample(DEV)) >= VISIBLE


def test_back_to_none_is_bit_identical(comfy, precision, loras):
    base = BY_PRECISION[precision]
    before = comfy.sample(base)
    for names in ([loras[0]], [loras[1], loras[2]]):
        changed = comfy.sample(replace(base, loras=[(name, 1.3) for name in names]))
        assert relative_distance(changed, before) >= VISIBLE
    # another seed between, so that the picture is drawn again and not taken from ComfyUI's cache
    comfy.sample(replace(base, seed=99))
    again = comfy.run(graph(base))
    assert "p0_sample" in again.executed
    assert torch.equal(latents(comfy.client, again), before)


LAYERS = [
    "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer.linear", "final_layer.adaLN_modulation",
    "img_mod.lin", "txt_mod.lin", "img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj", "img_mlp",
    "txt_mlp", "single_blocks.0.modulation", "linear1", "linear2",
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_kind(comfy, layer):
    """All three formats at once: each is one picture of the same prompt, with the same LoRA in its own spelling."""
    pictures = [DEV]
    for format in FORMATS:
        name = comfy.lora(
            f"{layer}-{format}.safetensors", format, rank=5, alpha=3.0, scale=2.0, seed=6,
            targets=lambda module: layer in module)
        picture = replace(DEV, loras=[(name, 1.0)])
        pictures += [picture, replace(picture, stock=True)]
    without, *drawn = comfy.samples(*pictures)
    for ours, stock in zip(drawn[::2], drawn[1::2], strict=True):
        assert relative_distance(ours, stock) <= TOLERANCE["fp32"]
        assert relative_distance(stock, without) >= VISIBLE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_lora_stored_in(comfy, dtype):
    name = comfy.lora(f"stored-{dtype}.safetensors", "kohya", rank=8, alpha=8.0, dtype=dtype, seed=7)
    assert_equal(comfy.compare(replace(DEV, loras=[(name, 1.0)]), plain=DEV))


# What the model and the sampler are given.


@pytest.mark.parametrize("guidance", [None, 1.0, 3.3, 7.1], ids=lambda value: f"guidance {value}")
def test_guidance(comfy, precision, loras, guidance):
    """3.3 is no bf16 number: a guidance that is rounded on its way turns its embedding by radians."""
    picture = replace(BY_PRECISION[precision], guidance=guidance, loras=[(loras[0], 0.8)])
    plain = replace(picture, guidance=3.5 if guidance else 8.0)
    assert_equal(comfy.compare(picture, plain=plain), precision, visible=0.01)


def test_guidance_switched_off(comfy, precision, loras):
    def disable(nodes, prefix):
        nodes[prefix + "disabled"] = node("FluxDisableGuidance", conditioning=[prefix + "guidance", 0])
        nodes[prefix + "sample"]["inputs"]["positive"] = [prefix + "disabled", 0]

    picture = replace(BY_PRECISION[precision], loras=[(loras[0], 0.8)])
    assert_equal(comfy.compare(picture, plain=picture, edit=disable), precision)


@pytest.mark.parametrize("model", ["tiny-flux-schnell-fp32.safetensors", "tiny-flux-schnell-bf16.safetensors"])
@pytest.mark.parametrize("guidance", [None, 3.5], ids=lambda value: f"guidance {value}")
def test_schnell(comfy, model, guidance):
    precision = model[-16:-12]
    name = comfy.lora("schnell.safetensors", "kohya", config=SCHNELL_CONFIG, seed=8)
    base = Picture(model=model, guidance=guidance)
    assert_equal(comfy.compare(replace(base, loras=[(name, 1.0)]), plain=base), precision)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_batch_and_cfg(comfy, precision, loras, batch, cfg):
    """In bf16, cfg 3 is near the limit: it multiplies rounding, of which stock ComfyUI, in float32 here, has none."""
    base = replace(BY_PRECISION[precision], batch=batch, cfg=cfg, negative="blurry, ugly")
    drawn = comfy.compare(replace(base, loras=[(loras[2], 0.8)]), plain=base)
    assert drawn.ours.shape[0] == batch
    assert_equal(drawn, precision)


def test_cfg_with_prompts_of_two_lengths(comfy, loras):
    """ComfyUI then runs the two conditions one after another."""
    base = replace(DEV, cfg=3.0, negative="ugly " * 90)
    assert_equal(comfy.compare(replace(base, loras=[(loras[0], 0.8)]), plain=base))


@pytest.mark.parametrize("size", [(72, 104), (136, 56), (256, 64), (16, 16)], ids=lambda size: "{}x{}".format(*size))
def test_size(comfy, precision, loras, size):
    base = replace(BY_PRECISION[precision], width=size[0], height=size[1])
    drawn = comfy.compare(replace(base, loras=[(loras[0], 0.8)]), plain=base)
    assert drawn.ours.shape[2:] == (size[1] // 8, size[0] // 8)
    assert_equal(drawn, precision)


@pytest.mark.parametrize(("words", "tokens"), [(1, 77), (90, 154), (170, 231)], ids=lambda value: str(value))
def test_prompt_length(comfy, precision, loras, words, tokens):
    base = replace(BY_PRECISION[precision], prompt=" ".join(["circle"] * words))

    def show(nodes, prefix):
        nodes[prefix + "shape"] = node("ProbeConditioning", conditioning=[prefix + "positive", 0])

    drawn = comfy.compare(replace(base, loras=[(loras[0], 0.8)]), plain=base, edit=show)
    assert drawn.result.outputs["p0_shape"]["shape"][0][1] == tokens
    assert_equal(drawn, precision)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_another_dtype_than_the_file(comfy, loras, dtype):
    """Stock ComfyUI computes in float32 here, so only rounding may differ."""
    base = replace(DEV, dtype=dtype)
    assert_equal(comfy.compare(replace(base, loras=[(loras[0], 0.8)]), plain=base), "bf16")


def test_bf16_checkpoint_computed_in_fp32(comfy, loras):
    """What stock ComfyUI does on a CPU: nothing is rounded then."""
    base = replace(BY_PRECISION["bf16"], dtype="fp32")
    without, without_stock, ours, stock = comfy.samples(
        *(replace(base, loras=stack, stock=stock) for stack in ([], [(loras[0], 0.8)]) for stock in (False, True)))
    assert relative_distance(without, without_stock) <= TOLERANCE["fp32"]
    assert relative_distance(ours, stock) <= TOLERANCE["fp32"]


# Text encoder.


@pytest.mark.parametrize(
    ("format", "strength_clip"), [*((format, 1.0) for format in FORMATS), ("kohya", -0.5), ("diffusers", 0.0)]
)
def test_text_encoder_keys(comfy, format, strength_clip):
    tensors = lora_state_dict(format, seed=9) | clip_l_lora_state_dict(format, seed=9, scale=0.5)
    name = comfy.tensors("loras", f"with-clip-{format}.safetensors", tensors)

    def connect(nodes, prefix):
        if prefix == "p0_":
            inputs = {"model": [prefix + "model", 0], "strength": 0.8}
            nodes[prefix + "lora"] = node(
                "FluxHotswapLora", **inputs, lora_name=name, clip=["clip", 0], strength_clip=strength_clip)
        else:
            nodes[prefix + "lora"] = node(
                "LoraLoader", model=[prefix + "model", 0], clip=["clip", 0], lora_name=name, strength_model=0.8,
                strength_clip=strength_clip)
        nodes[prefix + "sample"]["inputs"]["model"] = [prefix + "lora", 0]
        for text in ("positive", "negative"):
            nodes[prefix + text]["inputs"]["clip"] = [prefix + "lora", 1]

    drawn = comfy.compare(DEV, plain=replace(DEV, loras=[(name, 0.8)]), edit=connect)
    assert drawn.distance <= TOLERANCE["fp32"]
    assert drawn.effect >= VISIBLE if strength_clip else drawn.effect == 0.0


def test_text_encoder_keys_without_clip_are_announced(comfy):
    tensors = lora_state_dict("kohya", seed=9) | clip_l_lora_state_dict("kohya", seed=9)
    name = comfy.tensors("loras", "with-clip-unconnected.safetensors", tensors)
    mark = comfy.server.mark()
    assert_equal(comfy.compare(replace(DEV, loras=[(name, 0.8)]), plain=DEV))
    assert f"'{name}' has 144 text encoder keys; connect clip" in comfy.server.log_since(mark)


# ComfyUI's other features on our MODEL.


def change_model(class_type, **inputs):
    """An edit that puts a node between the model and the sampler."""

    def edit(nodes, prefix):
        sampler = nodes[prefix + "sample"]["inputs"]
        name = f"{prefix}{class_type}{len(nodes)}"
        nodes[name] = node(class_type, model=sampler["model"], **inputs)
        sampler["model"] = [name, 0]

    return edit


def change_conditioning(*steps):
    """An edit that puts nodes (class type, inputs) between the conditioning and the sampler."""

    def edit(nodes, prefix):
        sampler = nodes[prefix + "sample"]["inputs"]
        for kind in ("positive", "negative"):
            for class_type, inputs in steps:
                name = f"{prefix}{kind}{class_type}{len(nodes)}"
                nodes[name] = node(class_type, conditioning=sampler[kind], **inputs)
                sampler[kind] = [name, 0]

    return edit


def several(*edits):
    def edit(nodes, prefix):
        for each in edits:
            each(nodes, prefix)

    return edit


def add_image(nodes, name="image", width=64, height=64, color=0x3366CC):
    """A picture with structure: a coloured one, noise drawn over its latent."""
    nodes[name] = node("EmptyImage", width=width, height=height, batch_size=1, color=color)
    return [name, 0]


def add_reference(nodes, name, width, height, color):
    image = add_image(nodes, f"{name}_image", width, height, color)
    nodes[name] = node("VAEEncode", pixels=image, vae=["vae", 0])
    return [name, 0]


def test_model_sampling_flux(comfy, loras):
    edit = change_model("ModelSamplingFlux", max_shift=1.6, base_shift=0.3, width=512, height=512)
    picture = replace(DEV, loras=[(loras[0], 0.8)])
    assert_equal(comfy.compare(picture, plain=picture, edit=edit))


def test_model_sampling_of_another_kind(comfy, loras):
    """Unlike ModelSamplingFlux, this changes what the model itself does with its sampling object."""
    edit = change_model("ModelSamplingContinuousEDM", sampling="edm", sigma_max=2.0, sigma_min=0.05)
    picture = replace(DEV, loras=[(loras[0], 0.8)])
    assert_equal(comfy.compare(picture, plain=picture, edit=edit))


def test_model_sampling_does_not_leak_to_the_next_prompt(comfy):
    before = comfy.sample(DEV)
    edit = change_model("ModelSamplingContinuousEDM", sampling="edm", sigma_max=2.0, sigma_min=0.05)
    assert relative_distance(comfy.sample(DEV, edit=edit), before) >= VISIBLE
    assert torch.equal(comfy.sample(replace(DEV, loras=[])), before)
    assert torch.equal(comfy.sample(replace(DEV, batch=1, negative="again")), before)


@pytest.mark.parametrize(
    ("change", "index"),
    [("scale_tokens", 1), ("scale_conditioning", 0), ("read_options", 1), ("skip", 0), ("skip", 1)],
)
@pytest.mark.parametrize("kind", ["double_block", "single_block"])
def test_patch_around_a_block(comfy, loras, kind, change, index):
    edit = change_model("ProbeBlockPatch", kind=kind, index=index, change=change)
    picture = replace(DEV, loras=[(loras[0], 0.8)], batch=2)
    assert_equal(comfy.compare(picture, plain=picture, edit=edit))


def test_patches_inside_attention(comfy, loras):
    picture = replace(DEV, loras=[(loras[0], 0.8)], batch=2)
    assert_equal(comfy.compare(picture, plain=picture, edit=change_model("ProbeAttentionPatch")))


@pytest.mark.parametrize("extra_tokens", [False, True], ids=["same tokens", "more text tokens"])
def test_patch_after_the_embedders(comfy, loras, extra_tokens):
    edit = change_model("ProbePostInputPatch", extra_tokens=extra_tokens)
    picture = replace(DEV, loras=[(loras[0], 0.8)], batch=2)
    assert_equal(comfy.compare(picture, plain=picture, edit=edit))


def test_wrapper_of_the_transformer(comfy, loras):
    picture = replace(DEV, loras=[(loras[0], 0.8)])
    assert_equal(comfy.compare(picture, plain=picture, edit=change_model("ProbeWrapper")))


def test_scaled_positions(comfy, loras):
    edit = change_model(
        "ScaleROPE", scale_x=1.7, shift_x=3.0, scale_y=0.6, shift_y=-2.0, scale_t=1.0, shift_t=2.0)
    picture = replace(DEV, loras=[(loras[0], 0.8)], width=96)
    assert_equal(comfy.compare(picture, plain=picture, edit=edit))


def test_attention_mask(comfy, precision, loras):
    picture = replace(BY_PRECISION[precision], loras=[(loras[0], 0.8)], width=96, batch=2)
    edit = change_conditioning(("ProbeAttentionMask", {"tokens": 40}))
    assert_equal(comfy.compare(picture, plain=picture, edit=edit), precision)


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("method", [None, "offset", "index", "uxo/uno"])
def test_kontext_references(comfy, loras, method, references):
    def edit(nodes, prefix):
        first = add_reference(nodes, "ref0", 72, 40, 0x2244EE)
        steps = [("ReferenceLatent", {"latent": first})]
        if references == 2:
            steps.append(("ReferenceLatent", {"latent": add_reference(nodes, "ref1", 48, 104, 0xDD8811)}))
        if method:
            steps.append(("FluxKontextMultiReferenceLatentMethod", {"reference_latents_method": method}))
        change_conditioning(*steps)(nodes, prefix)

    picture = replace(DEV, loras=[(loras[0], 0.8)], cfg=2.0, width=88)
    assert_equal(comfy.compare(picture, plain=picture, edit=edit))


@pytest.mark.parametrize("kind", ["xlabs", "instantx"])
def test_controlnet(comfy, precision, loras, kind):
    make = {"xlabs": xlabs_controlnet, "instantx": instantx_controlnet}[kind]
    name = comfy.tensors("controlnet", f"{kind}.safetensors", make())

    def edit(nodes, prefix):
        nodes["controlnet"] = node("ControlNetLoader", control_net_name=name)
        sampler = nodes[prefix + "sample"]["inputs"]
        inputs = {kind: sampler[kind] for kind in ("positive", "negative")}
        nodes[prefix + "control"] = node(
            "ControlNetApplyAdvanced", **inputs, control_net=["controlnet", 0], image=add_image(nodes), strength=0.9,
            start_percent=0.0, end_percent=0.9, vae=["vae", 0])
        sampler["positive"], sampler["negative"] = [prefix + "control", 0], [prefix + "control", 1]

    picture = replace(BY_PRECISION[precision], loras=[(loras[0], 0.8)], cfg=2.0, width=80)
    assert_equal(comfy.compare(picture, plain=picture, edit=edit), precision)


def test_custom_sampler_and_guider(comfy, precision, loras):
    def edit(nodes, prefix):
        sampler = nodes.pop(prefix + "sample")["inputs"]
        nodes |= {
            prefix + "noise": node("RandomNoise", noise_seed=5),
            prefix + "guider": node("BasicGuider", model=sampler["model"], conditioning=sampler["positive"]),
            prefix + "select": node("KSamplerSelect", sampler_name="dpmpp_2m"),
            prefix + "sigmas": node(
                "BasicScheduler", model=sampler["model"], scheduler="beta", steps=4, denoise=0.9),
            prefix + "sample": node(
                "SamplerCustomAdvanced", noise=[prefix + "noise", 0], guider=[prefix + "guider", 0],
                sampler=[prefix + "select", 0], sigmas=[prefix + "sigmas", 0],
                latent_image=sampler["latent_image"]),
        }

    base = BY_PRECISION[precision]
    drawn = comfy.compare(replace(base, loras=[(loras[0], 0.8)]), plain=base, edit=edit, edit_plain=edit)
    assert_equal(drawn, precision)


@pytest.mark.parametrize("with_mask", [True, False], ids=["InpaintModelConditioning", "no picture given"])
def test_fill_model(comfy, with_mask):
    model = comfy.checkpoint("tiny-fill.safetensors", seed=3, in_channels=384)
    name = comfy.lora("fill.safetensors", "kohya", config=FILL_CONFIG, seed=3)

    def edit(nodes, prefix):
        sampler = nodes[prefix + "sample"]["inputs"]
        nodes["mask"] = node("SolidMask", value=1.0, width=32, height=64)
        nodes["no_mask"] = node("SolidMask", value=0.0, width=96, height=64)
        nodes["half"] = node("MaskComposite", destination=["no_mask", 0], source=["mask", 0], x=8, y=0, operation="add")
        conditioning = {kind: sampler[kind] for kind in ("positive", "negative")}
        nodes[prefix + "fill"] = node(
            "InpaintModelConditioning", **conditioning, vae=["vae", 0], pixels=add_image(nodes, width=96),
            mask=["half", 0], noise_mask=True)
        sampler |= {"positive": [prefix + "fill", 0], "negative": [prefix + "fill", 1],
                    "latent_image": [prefix + "fill", 2]}

    base = replace(DEV, model=model, width=96)
    edit = edit if with_mask else None
    drawn = comfy.compare(replace(base, loras=[(name, 0.8)]), plain=base, edit=edit, edit_plain=edit)
    assert_equal(drawn)


def test_control_model(comfy):
    model = comfy.checkpoint("tiny-control.safetensors", seed=4, in_channels=128)
    name = comfy.lora("control.safetensors", "kohya", config=CONTROL_CONFIG, seed=4)

    def edit(nodes, prefix):
        sampler = nodes[prefix + "sample"]["inputs"]
        conditioning = {kind: sampler[kind] for kind in ("positive", "negative")}
        nodes[prefix + "control"] = node(
            "InstructPixToPixConditioning", **conditioning, vae=["vae", 0], pixels=add_image(nodes, width=96))
        sampler |= {"positive": [prefix + "control", 0], "negative": [prefix + "control", 1],
                    "latent_image": [prefix + "control", 2]}

    base = replace(DEV, model=model, width=96)
    drawn = comfy.compare(replace(base, loras=[(name, 0.8)]), plain=base, edit=edit, edit_plain=edit)
    assert_equal(drawn)
