"""Several samplers on one engine in one prompt: each gets the LoRAs that its own model carries."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from harness.graphs import Picture, graph, latents, node, relative_distance
from harness.lora_files import in_attention

BASE = Picture(model="tiny-flux-dev-fp32.safetensors")
VISIBLE = 0.05


@pytest.fixture(scope="module")
def branches(comfy):
    """Three pictures: LoRA A, LoRA B, no LoRA."""
    first = comfy.lora("branch-a.safetensors", "kohya", rank=8, alpha=4.0, seed=21)
    second = comfy.lora("branch-b.safetensors", "diffusers", rank=24, seed=22, targets=in_attention)
    return {
        "A": replace(BASE, loras=[(first, 0.9)]),
        "B": replace(BASE, loras=[(second, -0.7)]),
        "none": BASE,
    }


def seeded(branches, seed):
    return {name: replace(picture, seed=seed) for name, picture in branches.items()}


def alone(comfy, pictures):
    """Each picture from a prompt of its own."""
    drawn = {name: comfy.sample(picture) for name, picture in pictures.items()}
    for one, other in (("A", "B"), ("A", "none"), ("B", "none")):
        assert relative_distance(drawn[one], drawn[other]) >= VISIBLE
    return drawn


def together(comfy, nodes, order):
    result = comfy.run(nodes)
    samplers = [f"p{index}_sample" for index in range(len(order))]
    assert set(samplers) <= set(result.executed)  # nothing came from ComfyUI's cache
    return {name: latents(comfy.client, result, index) for index, name in enumerate(order)}


def assert_same(drawn, expected):
    assert {name: torch.equal(drawn[name], expected[name]) for name in expected} == dict.fromkeys(expected, True)


@pytest.mark.parametrize("order", list(permutations(["A", "B", "none"])), ids=" ".join)
def test_each_branch_gets_its_own(comfy, branches, order):
    for seed in (31, 32):
        pictures = seeded(branches, seed)
        expected = alone(comfy, pictures)
        # another seed between, or ComfyUI would answer from its cache
        comfy.sample(replace(BASE, seed=1000))
        drawn = together(comfy, graph(*(pictures[name] for name in order)), order)
        assert_same(drawn, expected)


def test_order_of_insertion_does_not_matter(comfy, branches):
    order = ("A", "B", "none")
    pictures = seeded(branches, 41)
    expected = alone(comfy, pictures)
    for flip in (False, True):
        comfy.sample(replace(BASE, seed=1000))
        nodes = graph(*(pictures[name] for name in order))
        drawn = together(comfy, dict(reversed(nodes.items())) if flip else nodes, order)
        assert_same(drawn, expected)


def test_samplers_in_a_row(comfy, branches):
    """One branch begins from the other's latent, so that the LoRAs take turns within a prompt: A, then B, then A."""
    nodes = graph(branches["A"], branches["B"], replace(branches["A"], seed=3), replace(branches["A"], stock=True),
                  replace(branches["B"], stock=True), replace(branches["A"], seed=3, stock=True))
    for index in (1, 2, 4, 5):
        sampler = nodes[f"p{index}_sample"]["inputs"]
        sampler |= {"latent_image": [f"p{index - 1}_sample", 0], "denoise": 0.6}
    result = comfy.run(nodes)
    drawn = [latents(comfy.client, result, index) for index in range(6)]
    for ours, stock in zip(drawn[:3], drawn[3:], strict=True):
        assert relative_distance(ours, stock) <= 1e-4


def test_one_lora_node_feeds_two_samplers(comfy, branches):
    """And a second LoRA on top of it in a third branch leaves the first two alone."""
    nodes = graph(seeded(branches, 51)["A"], seeded(branches, 52)["A"], seeded(branches, 53)["A"])
    nodes["p1_sample"]["inputs"]["model"] = ["p0_lora0", 0]
    nodes["p2_lora0"]["inputs"] |= {"model": ["p0_lora0", 0], "lora_name": branches["B"].loras[0][0], "strength": -0.7}
    result = comfy.run(nodes)
    drawn = [latents(comfy.client, result, index) for index in range(3)]
    stacked = replace(BASE, seed=53, loras=[*branches["A"].loras, *branches["B"].loras])
    expected = [comfy.sample(picture) for picture in (seeded(branches, 51)["A"], seeded(branches, 52)["A"], stacked)]
    assert [torch.equal(ours, alone) for ours, alone in zip(drawn, expected, strict=True)] == [True] * 3


def test_two_checkpoints_in_one_prompt(comfy, branches):
    """The registry holds one engine, but a prompt that needs two still gets both right."""
    pictures = [branches["A"], replace(branches["A"], model="tiny-flux-dev-bf16.safetensors"), branches["B"]]
    comfy.sample(replace(BASE, seed=1000))
    together = comfy.samples(*pictures)
    comfy.sample(replace(BASE, seed=1000))
    expected = [comfy.sample(picture) for picture in pictures]
    assert [torch.equal(ours, alone) for ours, alone in zip(together, expected, strict=True)] == [True] * 3


@pytest.mark.parametrize("order", [("shifted", "plain"), ("plain", "shifted")], ids=" then ".join)
def test_another_sampling_in_one_branch_stays_there(comfy, branches, order):
    """ModelSamplingContinuousEDM replaces an object of the model that both branches share."""
    expected = {}
    for seed, name in ((61, "plain"), (62, "shifted")):
        expected[name] = comfy.sample(replace(branches["A"], seed=seed), edit=shift if name == "shifted" else None)
    unshifted = comfy.sample(replace(branches["A"], seed=62))
    assert relative_distance(expected["shifted"], unshifted) >= VISIBLE
    comfy.sample(replace(BASE, seed=1000))
    nodes = graph(*(replace(branches["A"], seed={"plain": 61, "shifted": 62}[name]) for name in order))
    shift(nodes, f"p{order.index('shifted')}_")
    assert_same(together(comfy, nodes, order), expected)


def shift(nodes, prefix):
    sampler = nodes[prefix + "sample"]["inputs"]
    nodes[prefix + "shift"] = node(
        "ModelSamplingContinuousEDM", model=sampler["model"], sampling="edm", sigma_max=2.0, sigma_min=0.05)
    sampler["model"] = [prefix + "shift", 0]
