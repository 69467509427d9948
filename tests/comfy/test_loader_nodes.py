"""LoRA loaders of other packs, in the ways in which they call ComfyUI's API, mixed with ours in any order."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from harness.graphs import Picture, graph, latents, node, relative_distance

FP32 = 1e-4
FILES = ("loader-a.safetensors", "loader-b.safetensors", "loader-c.safetensors")
LORAS = list(zip(FILES, (0.8, -0.5, 0.4), strict=True))


@pytest.fixture(scope="module", autouse=True)
def files(comfy):
    write_files(comfy)


def write_files(comfy):
    """The LoRAs that the tests' graphs name."""
    for number, (name, format) in enumerate(zip(FILES, ("kohya", "diffusers", "native"), strict=True)):
        comfy.lora(name, format, rank=6 + 5 * number, seed=90 + number)


def both(comfy, picture, kinds, **inputs):
    """Picture 0: the pack's loader and these LoRA nodes, in order; picture 1: stock ComfyUI."""
    nodes = graph(picture, replace(picture, stock=True))
    for number, kind in enumerate(kinds):
        own = nodes[f"p0_lora{number}"]["inputs"]
        if kind != "FluxHotswapLora":
            nodes[f"p0_lora{number}"] = node(
                kind, model=own["model"], lora_name=own["lora_name"], strength_model=own["strength"], **inputs
            )
    result = comfy.run(nodes)
    return latents(comfy.client, result, 0), latents(comfy.client, result, 1)


# rgthree's Power Lora Loader, LoRA Manager with its cached tensors, ComfyUI's own, direct calls of add_patches.
KINDS = ("ProbePowerLoraLoader", "ProbeCachedLoraLoader", "LoraLoaderModelOnly", "ProbeAddPatches", "FluxHotswapLora")


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_one_kind_equals_stock(comfy, kind):
    ours, stock = both(comfy, Picture(loras=LORAS), [kind] * 3)
    assert relative_distance(ours, stock) < FP32
    assert relative_distance(ours, comfy.sample(Picture())) > 0.05


@pytest.mark.parametrize("kinds", permutations(("ProbeCachedLoraLoader", "FluxHotswapLora", "ProbeAddPatches")),
                         ids=" ".join)
def test_mixed_chains_in_any_order_equal_stock(comfy, kinds):
    ours, stock = both(comfy, Picture(loras=LORAS, seed=12), kinds)
    assert relative_distance(ours, stock) < FP32


@pytest.mark.parametrize("kinds", [("ProbeCachedLoraLoader",) * 3, ("FluxHotswapLora", "ProbeAddPatches") * 2],
                         ids=" ".join)
def test_the_same_file_several_times(comfy, kinds):
    loras = [(FILES[0], strength) for strength in (0.3, 0.6, -0.2, 0.5)[: len(kinds)]]
    ours, stock = both(comfy, Picture(loras=loras, seed=13), kinds)
    assert relative_distance(ours, stock) < FP32


def test_cached_tensors_at_another_strength_prepare_nothing_anew(comfy):
    """The loader patches with the same tensors again, so only lora_B is multiplied."""
    for seed, strength in ((14, 0.35), (15, 0.65)):
        mark = comfy.server.mark()
        ours, stock = both(comfy, Picture(loras=[(FILES[2], strength)], seed=seed), ["ProbeCachedLoraLoader"])
        assert relative_distance(ours, stock) < FP32
    assert "ms (strength)" in comfy.server.log_since(mark)


def hooked(nodes):
    nodes["hook"] = node("CreateHookLoraModelOnly", lora_name=FILES[0], strength_model=0.7)
    sampler = nodes["p0_sample"]["inputs"]
    nodes["pair"] = node(
        "PairConditioningSetProperties", positive_NEW=sampler["positive"], negative_NEW=sampler["negative"],
        strength=1.0, set_cond_area="default", hooks=["hook", 0],
    )
    sampler |= {"positive": ["pair", 0], "negative": ["pair", 1]}


def merged(nodes):
    nodes["merge"] = node("ModelMergeSimple", model1=["p0_model", 0], model2=["p0_model", 0], ratio=0.5)
    nodes["p0_sample"]["inputs"]["model"] = ["merge", 0]


def scaled(nodes):
    nodes["scale"] = node("ProbeAddPatches", model=["p0_model", 0], lora_name=FILES[0], strength_model=0.5, keep=0.5)
    nodes["p0_sample"]["inputs"]["model"] = ["scale", 0]


def bypassed(nodes):
    nodes["bypass"] = node("LoraLoaderBypassModelOnly", model=["p0_model", 0], lora_name=FILES[0], strength_model=0.5)
    nodes["p0_sample"]["inputs"]["model"] = ["bypass", 0]


REFUSED = {
    "weight hooks": (hooked, ["hooks", "Hotswap LoRA"]),
    "merging": (merged, ["merged", "Load Diffusion Model"]),
    "scaled weights": (scaled, ["merged", "Load Diffusion Model"]),
    "bypass": (bypassed, ["Bypass", "Use one of them"]),
}


@pytest.mark.parametrize(("edit", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused_with_the_alternative(comfy, edit, words):
    before = comfy.sample(Picture(seed=16))
    nodes = graph(Picture(seed=17))
    edit(nodes)
    result = comfy.client.run(nodes)
    assert result.error is not None
    for word in words:
        assert word in result.error.exception_message
    comfy.sample(Picture(seed=18))
    assert torch.equal(comfy.sample(Picture(seed=16)), before)
