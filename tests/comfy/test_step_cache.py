"""Flux Step Cache in a real sampling: what it skips, what it leaves alone, and where it may stand in a graph."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from harness.graphs import Picture, graph, latents, node, relative_distance

BASE = Picture(steps=10)
# The end of a sampling, in steps so small that every one but the first can be skipped, and its middle.
CLOSE, LATE = Picture(steps=20), {"denoise": 0.002}
MIDDLE = 0.99895
# The tiny model's random blocks change a lot from step to step.
OFTEN = {"threshold": 0.6}


@pytest.fixture(scope="module")
def lora(comfy):
    return comfy.lora("step-cache.safetensors", "kohya", rank=8, alpha=4.0, seed=171)


def cached(nodes, prefix="p0_", **inputs):
    """Put a Flux Step Cache in front of a sampler."""
    sampler = nodes[prefix + "sample"]["inputs"]
    nodes[prefix + "cache"] = node("FluxStepCache", model=sampler["model"], **inputs)
    sampler["model"] = [prefix + "cache", 0]
    return nodes


def drawn(comfy, nodes):
    """The latent of picture 0, and (skipped, calls) of each sampling, as the log says; None without a cache."""
    mark = comfy.server.mark()
    result = comfy.run(nodes)
    lines = [line for line in comfy.server.log_since(mark).splitlines() if "Flux Hotswap: LoRAs" in line]
    found = [re.search(r"\| step cache (\d+) of (\d+) skipped$", line) for line in lines]
    return latents(comfy.client, result), [match and tuple(map(int, match.groups())) for match in found]


def skipped_late(comfy, picture, **inputs):
    """How many steps of a late sampling are skipped at the highest threshold."""
    nodes = cached(graph(picture), threshold=1.0, **inputs)
    nodes["p0_sample"]["inputs"] |= LATE
    _, ((skipped, calls),) = drawn(comfy, nodes)
    assert calls == picture.steps
    return skipped


def test_it_skips_and_says_so_and_the_picture_stays_near(comfy):
    plain, counts = drawn(comfy, graph(BASE))
    assert counts == [None]
    picture, ((skipped, calls),) = drawn(comfy, cached(graph(BASE), **OFTEN))
    assert calls == BASE.steps
    assert 2 <= skipped <= calls - 2
    assert 0 < relative_distance(picture, plain) < 0.5


def test_threshold_0_changes_nothing(comfy):
    picture, counts = drawn(comfy, cached(graph(replace(BASE, seed=2)), threshold=0.0))
    assert counts == [None]
    assert torch.equal(picture, comfy.sample(replace(BASE, seed=2)))


def test_a_threshold_that_no_step_reaches_changes_nothing(comfy):
    picture, counts = drawn(comfy, cached(graph(replace(BASE, seed=3)), threshold=0.005))
    assert counts == [(0, BASE.steps)]
    assert torch.equal(picture, comfy.sample(replace(BASE, seed=3)))


def test_before_and_after_a_lora_is_the_same(comfy, lora):
    picture = replace(BASE, loras=[(lora, 0.8)], seed=4)
    after, counts = drawn(comfy, cached(graph(picture), **OFTEN))
    nodes = graph(picture)
    nodes["cache"] = node("FluxStepCache", model=["p0_model", 0], **OFTEN)
    nodes["p0_lora0"]["inputs"]["model"] = ["cache", 0]
    before, counts_before = drawn(comfy, nodes)
    assert counts == counts_before
    assert counts[0][0] > 0
    assert torch.equal(before, after)


def test_each_sampling_begins_anew(comfy, lora):
    """Two samplers on one engine in one prompt, one of them with the cache, draw what each draws alone."""
    first, second = replace(BASE, seed=5), replace(BASE, seed=5, loras=[(lora, 0.8)])
    alone = [drawn(comfy, cached(graph(picture), **OFTEN)) for picture in (first, second)]
    plain = comfy.sample(replace(BASE, seed=6))
    nodes = cached(cached(graph(first, second, replace(BASE, seed=6)), "p0_", **OFTEN), "p1_", **OFTEN)
    comfy.sample(replace(BASE, seed=7))
    mark = comfy.server.mark()
    result = comfy.run(nodes)
    together = [latents(comfy.client, result, index) for index in range(3)]
    expected = [alone[0][0], alone[1][0], plain]
    assert [torch.equal(one, other) for one, other in zip(together, expected, strict=True)] == [True] * 3
    said = re.findall(r"step cache (\d+) of (\d+) skipped", comfy.server.log_since(mark))
    assert sorted(tuple(map(int, pair)) for pair in said) == sorted([*alone[0][1], *alone[1][1]])


def regional(nodes):
    """A second prompt for the left half: ComfyUI calls the model for it separately."""
    sampler = nodes["p0_sample"]["inputs"]
    nodes["left"] = node("CLIPTextEncode", clip=["clip", 0], text="a green tree")
    nodes["area"] = node("ConditioningSetArea", conditioning=["left", 0], width=64, height=64, x=0, y=0, strength=1.0)
    nodes["both"] = node("ConditioningCombine", conditioning_1=sampler["positive"], conditioning_2=["area", 0])
    sampler["positive"] = ["both", 0]
    return nodes


@pytest.mark.parametrize(("change", "calls_per_step"), [(dict, 1), (regional, 2)], ids=["one batch", "two calls"])
def test_conditions_are_remembered_apart_and_decided_together(comfy, change, calls_per_step):
    picture = replace(BASE, cfg=2.0, negative="blue", width=128, seed=8)
    plain, _ = drawn(comfy, change(graph(picture)))
    near, ((skipped, calls),) = drawn(comfy, cached(change(graph(picture)), **OFTEN))
    assert calls == BASE.steps * calls_per_step
    assert 0 < skipped < calls
    assert relative_distance(near, plain) < 0.6


def test_a_lora_that_sets_in_is_computed(comfy):
    """The first block does not show it: this LoRA changes the last ones."""
    name = comfy.lora("step-cache-single.safetensors", "kohya", rank=8, seed=172,
                      targets=lambda module: module.startswith("single_blocks"))
    picture = replace(CLOSE, loras=[(name, 0.8)], seed=10)
    whole = skipped_late(comfy, picture)
    parted = skipped_late(comfy, replace(picture, extra={"start_percent": MIDDLE}))
    assert whole == CLOSE.steps - 1  # all but the first
    assert parted == CLOSE.steps - 2  # and the one in which the LoRA begins


def test_ranges_and_rows_of_skips(comfy):
    def skipped(**inputs):
        return skipped_late(comfy, replace(CLOSE, seed=11), **inputs)

    assert skipped() == 19
    assert skipped(max_skips=1) == 10
    before, after = skipped(end_percent=MIDDLE), skipped(start_percent=MIDDLE)
    assert before > 3
    assert after > 3
    assert before + after == 19
    assert skipped(end_percent=0.0) == 0


def test_patched_blocks_are_not_skipped(comfy):
    picture = replace(BASE, seed=12)

    def patched(nodes):
        sampler = nodes["p0_sample"]["inputs"]
        nodes["patch"] = node(
            "ProbeBlockPatch", model=sampler["model"], kind="single_block", index=1, change="scale_tokens"
        )
        sampler["model"] = ["patch", 0]
        return nodes

    expected, _ = drawn(comfy, patched(graph(picture)))
    mark = comfy.server.mark()
    found, counts = drawn(comfy, cached(patched(graph(picture)), threshold=1.0))
    assert counts == [(0, BASE.steps)]
    assert torch.equal(found, expected)
    assert "Flux Step Cache skips nothing on this model" in comfy.server.log_since(mark)


def test_the_prefetch_looks_through_it(comfy, lora):
    nodes = graph(replace(BASE, loras=[(lora, 0.8), (lora, 0.3)]))
    nodes["cache"] = node("FluxStepCache", model=["p0_lora0", 0], **OFTEN)
    nodes["p0_lora1"]["inputs"]["model"] = ["cache", 0]
    cached(nodes, **OFTEN)
    found = comfy.stacks_of(nodes, comfy.model_file("diffusion_models", BASE.model))
    assert found == [[[lora, 0.8], [lora, 0.3]]]


def test_another_model_is_refused_at_the_node(comfy):
    result = comfy.client.run(cached(graph(replace(BASE, stock=True)), **OFTEN))
    assert result.error.node_id == "p0_cache"
    assert "expected one from Accelerated Flux Loader" in result.error.exception_message
    assert "EasyCache" in result.error.exception_message


def test_an_end_before_the_start_is_refused_at_the_node(comfy):
    result = comfy.client.run(cached(graph(BASE), start_percent=0.6, end_percent=0.2, **OFTEN))
    assert result.error.node_id == "p0_cache"
    assert "start_percent is 0.6 and end_percent is 0.2" in result.error.exception_message
