"""LoRA loader nodes that are not ours: ComfyUI's own, and packs that call its API, hotswap on the accelerated model."""

from dataclasses import replace

import pytest
import torch

from harness import broken_files
from harness.graphs import Graph, Picture, graph, latents, node, relative_distance
from harness.lora_files import clip_l_lora_state_dict, kind_state_dict, lora_state_dict, norm_state_dict

FP32 = 1e-4


def native(picture: Picture, class_type: str = "LoraLoaderModelOnly") -> Graph:
    """Picture 0 by the pack's loader and another pack's LoRA nodes, picture 1 by stock ComfyUI alone."""
    nodes = graph(picture, replace(picture, stock=True))
    for number, (name, strength) in enumerate(picture.loras):
        inputs = nodes[f"p0_lora{number}"]["inputs"]
        nodes[f"p0_lora{number}"] = node(
            class_type, model=inputs["model"], lora_name=name, strength_model=strength
        )
    return nodes


def both(comfy, nodes: Graph) -> tuple[torch.Tensor, torch.Tensor]:
    result = comfy.run(nodes)
    return latents(comfy.client, result, 0), latents(comfy.client, result, 1)


LORAS = {
    "kohya with alpha": [("native-a.safetensors", 0.8)],
    "diffusers, split q k v": [("native-b.safetensors", -0.5)],
    "ComfyUI names": [("native-c.safetensors", 1.6)],
    "a stack of three": [("native-a.safetensors", 0.4), ("native-b.safetensors", 0.7), ("native-c.safetensors", -0.3)],
}


@pytest.fixture(scope="module", autouse=True)
def files(comfy):
    comfy.lora("native-a.safetensors", "kohya", rank=8, alpha=4.0)
    comfy.lora("native-b.safetensors", "diffusers", rank=5, seed=1)
    comfy.lora("native-c.safetensors", "native", rank=16, seed=2)


@pytest.mark.parametrize("class_type", ["LoraLoaderModelOnly", "ProbePowerLoraLoader"])
@pytest.mark.parametrize("loras", LORAS.values(), ids=LORAS)
def test_native_loaders_equal_stock(comfy, loras, class_type):
    picture = Picture(loras=loras)
    ours, stock = both(comfy, native(picture, class_type))
    assert relative_distance(ours, stock) < FP32
    assert relative_distance(ours, comfy.sample(replace(picture, loras=()))) > 0.05


def test_native_and_our_nodes_in_one_chain(comfy):
    picture = Picture(loras=LORAS["a stack of three"])
    nodes = native(picture)
    nodes["p0_lora1"] = graph(picture)["p0_lora1"]
    ours, stock = both(comfy, nodes)
    assert relative_distance(ours, stock) < FP32


def test_switching_by_a_native_loader_touches_no_weights(comfy):
    """The same engine goes on, and without the LoRA it is bit-identical to before."""
    plain = Picture()
    before, engine = comfy.sample(plain), comfy.engine()
    both(comfy, native(Picture(loras=LORAS["kohya with alpha"])))
    assert torch.equal(comfy.sample(plain), before)
    assert [comfy.engine()[name] for name in ("serial", "load_count")] == [engine["serial"], engine["load_count"]]


def test_text_encoder_keys_go_to_the_clip(comfy):
    tensors = {**lora_state_dict("kohya", rank=4), **clip_l_lora_state_dict("kohya", rank=4)}
    comfy.tensors("loras", "native-both.safetensors", tensors)
    picture = Picture()
    nodes = graph(picture, replace(picture, stock=True))
    for prefix in ("p0_", "p1_"):
        nodes[prefix + "both"] = node(
            "LoraLoader",
            model=[prefix + "model", 0],
            clip=["clip", 0],
            lora_name="native-both.safetensors",
            strength_model=0.7,
            strength_clip=0.6,
        )
        nodes[prefix + "sample"]["inputs"]["model"] = [prefix + "both", 0]
        nodes[prefix + "positive"]["inputs"]["clip"] = [prefix + "both", 1]
    ours, stock = both(comfy, nodes)
    assert relative_distance(ours, stock) < FP32


# Kinds of change that ComfyUI's loader hands over as adapters of their own.
KINDS = {
    "LoCon": {}, "LoHa": {}, "LoKr": {}, "LoKr products": {}, "LoKr full": {}, "LoKr full DoRA": {"rms": 0.01},
    "DoRA": {"rms": 0.01}, "GLoRA": {}, "difference": {}, "OFT": {}, "bias": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_our_node_reads(comfy, kind):
    name = f"native-{kind.replace(' ', '-')}.safetensors"
    comfy.tensors("loras", name, kind_state_dict(kind, alpha=2.0, **KINDS[kind]))
    picture = Picture(loras=[(name, 0.7)])
    ours, stock = both(comfy, native(picture))
    assert relative_distance(ours, stock) < FP32
    assert relative_distance(ours, comfy.sample(replace(picture, loras=()))) > 0.02


@pytest.mark.parametrize("format", ["native", "diffusers"])
def test_norms(comfy, format):
    comfy.tensors("loras", "native-norms.safetensors", norm_state_dict(format=format, std=0.6))
    picture = Picture(loras=[("native-norms.safetensors", 1.0)])
    ours, stock = both(comfy, native(picture))
    assert relative_distance(ours, stock) < FP32
    assert relative_distance(ours, comfy.sample(replace(picture, loras=()))) > 0.02


LAYER = "diffusion_model.double_blocks.0.img_attn.proj"
REFUSED = {
    "bypass": ("LoraLoaderBypassModelOnly", "native-a.safetensors", ["Bypass", "Use one of them"]),
    "for another model": ("LoraLoaderModelOnly", "sdxl_lora.safetensors", ["found no key", "Hotswap LoRA"]),
    "another width": ("LoraLoaderModelOnly", "lora_wrong_width.safetensors", ["another size", "expected (256, rank)"]),
    "not a number": ("LoraLoaderModelOnly", "lora_nan.safetensors", ["NaN", "choose another file"]),
    "BOFT": ("LoraLoaderModelOnly", "boft.safetensors", ["BOFTAdapter", "Load Diffusion Model"]),
    "DoRA over GLoRA": ("LoraLoaderModelOnly", "glora.safetensors", ["does not belong with the GLoRA"]),
    "DoRA over columns": ("LoraLoaderModelOnly", "columns.safetensors", ["input's columns", "Load Diffusion Model"]),
    "OFT with a DoRA scale": ("LoraLoaderModelOnly", "oft_dora.safetensors", ["does not belong with the OFT"]),
    "a difference of another size": ("LoraLoaderModelOnly", "whole.safetensors", ["expected (256, 256)"]),
    "set": ("LoraLoaderModelOnly", "set.safetensors", ["'set' patch", "Load Diffusion Model"]),
    "reshape": ("LoraLoaderModelOnly", "reshape.safetensors", ["reshaped weight", "Load Diffusion Model"]),
}
FILES = {
    "boft": {f"{LAYER}.oft_blocks": torch.zeros(2, 16, 16, 16)},
    "glora": {
        **{f"{LAYER}.{part}.weight": torch.zeros(256, 256) for part in ("a1", "a2", "b1", "b2")},
        f"{LAYER}.dora_scale": torch.ones(256, 1),
    },
    "columns": {**lora_state_dict("native", rank=4), f"{LAYER}.dora_scale": torch.ones(1, 256)},
    "oft_dora": {f"{LAYER}.oft_blocks": torch.zeros(16, 16, 16), f"{LAYER}.dora_scale": torch.ones(256, 1)},
    "whole": {f"{LAYER}.diff": torch.zeros(256, 512)},
    "set": {f"{LAYER}.set_weight": torch.zeros(256, 256)},
    "reshape": {
        **lora_state_dict("native", rank=4), f"{LAYER}.reshape_weight": torch.tensor([256, 512]),
    },
}


@pytest.mark.parametrize(("class_type", "name", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_carried_is_refused_at_the_node(comfy, class_type, name, words):
    for broken in (broken_files.sdxl_lora, broken_files.lora_wrong_width, broken_files.lora_nan):
        broken(comfy.model_file("loras", f"{broken.__name__}.safetensors"))
    for file, tensors in FILES.items():
        comfy.tensors("loras", f"{file}.safetensors", tensors)
    before = comfy.sample(Picture())
    result = comfy.client.run(native(Picture(loras=[(name, 1.0)]), class_type))
    assert result.error.node_id == "p0_lora0"
    if class_type == "LoraLoaderModelOnly":
        assert f"LoRA '{name}': " in result.error.exception_message
    for word in words:
        assert word in result.error.exception_message
    assert torch.equal(comfy.sample(Picture()), before)
