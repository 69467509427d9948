"""While one prompt samples, the LoRAs of the queued ones are prepared, and what is wrong with them reaches nobody."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from harness import broken_files
from harness.graphs import Picture, graph, node

BASE = Picture()


def gated(picture):
    """A picture whose first step waits until the gate is opened."""
    nodes = graph(picture)
    sampler = nodes["p0_sample"]["inputs"]
    nodes["p0_gate"] = node("ProbeSamplingGate", model=sampler["model"])
    sampler["model"] = ["p0_gate", 0]
    return nodes


def wait_for(condition, what):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def while_sampling(comfy, queued, done):
    """Queue prompts behind one that samples, wait until `done(engine)`, let all run; the log from then on."""
    comfy.sample(replace(BASE, seed=400))
    first = comfy.client.queue(gated(replace(BASE, seed=401)))
    # The sampler's thread of control has come to the first step when the engine is bound and the prompt still runs.
    wait_for(lambda: comfy.client.queue_state()["running"], "the first prompt does not run")
    later = [comfy.client.queue(nodes) for nodes in queued]
    try:
        wait_for(lambda: done(comfy.engine()), f"nothing was prepared: {comfy.engine()}")
    finally:
        mark = comfy.server.mark()
        comfy.open_gate()
    results = [comfy.client.wait(prompt, timeout=60) for prompt in (first, *later)]
    return results, [line for line in comfy.server.log_since(mark).splitlines() if "Flux Hotswap: LoRAs" in line]


def test_the_stack_of_a_queued_prompt_is_only_bound_at_its_turn(comfy):
    one = comfy.lora("prefetch-a.safetensors", "kohya", rank=8, alpha=4.0, seed=81)
    two = comfy.lora("prefetch-b.safetensors", "diffusers", rank=5, seed=82)
    picture = replace(BASE, loras=[(one, 0.7), (two, -0.3)])
    comfy.sample(replace(BASE, seed=399))
    before = comfy.engine()["resident_stacks"]
    _, lines = while_sampling(comfy, [graph(picture)], lambda engine: engine["resident_stacks"] > before)
    assert "LoRAs none" in lines[0]
    assert "prefetch-a.safetensors × 0.7 + prefetch-b.safetensors × -0.3 " in lines[1]
    assert "ms (hot)" in lines[1]


def test_a_strength_that_is_linked_still_gets_its_file_read(comfy):
    name = comfy.lora("prefetch-c.safetensors", "kohya", rank=8, seed=83)
    nodes = graph(replace(BASE, loras=[(name, 0.7)]))
    nodes["number"] = node("PrimitiveFloat", value=0.4)
    nodes["p0_lora0"]["inputs"]["strength"] = ["number", 0]
    comfy.sample(replace(BASE, seed=399))
    before = comfy.engine()["lora_files"]
    _, lines = while_sampling(comfy, [nodes], lambda engine: engine["lora_files"] > before)
    assert "prefetch-c.safetensors × 0.4 " in lines[1]
    assert "ms (cold)" in lines[1]


def test_a_broken_file_fails_at_its_own_node_and_nowhere_else(comfy):
    """It stands first in the queue, so the good one behind it shows that the thread went on."""
    broken_files.lora_nan(comfy.model_file("loras", "prefetch-nan.safetensors"))
    good = comfy.lora("prefetch-d.safetensors", "kohya", rank=8, seed=84)
    queued = [graph(replace(BASE, loras=[(name, 0.7)])) for name in ("prefetch-nan.safetensors", good)]
    comfy.sample(replace(BASE, seed=399))
    before = comfy.engine()["resident_stacks"]
    mark = comfy.server.mark()
    results, lines = while_sampling(comfy, queued, lambda engine: engine["resident_stacks"] > before)
    assert [result.error is None for result in results] == [True, False, True]
    assert results[1].error.node_id == "p0_lora0"
    assert "NaN" in results[1].error.exception_message
    assert "ms (hot)" in lines[1]
    assert "Exception in thread" not in comfy.server.log_since(mark)


def test_prefetching_does_not_change_pictures(comfy):
    name = comfy.lora("prefetch-e.safetensors", "kohya", rank=8, seed=85)
    picture = replace(BASE, loras=[(name, 0.7)], seed=402)
    comfy.sample(replace(BASE, seed=399))
    before = comfy.engine()["resident_stacks"]
    while_sampling(comfy, [graph(picture)], lambda engine: engine["resident_stacks"] > before)
    first = comfy.sample(replace(picture, seed=403))
    comfy.free(unload_models=True, free_memory=True)
    assert torch.equal(comfy.sample(replace(picture, seed=403)), first)


# Loaders of several LoRAs: ComfyUI's numbered rows, and rgthree's nested ones. Only their files are known.
STACKS = {
    "rows": {"loras.0.lora_name": "A", "loras.0.strength": 0.5, "loras.1.lora_name": "B", "loras.1.strength": 1.0},
    "nested": {"lora_1": {"on": True, "lora": "A", "strength": 0.5}, "lora_2": {"on": True, "lora": "B"}},
}


@pytest.mark.parametrize("rows", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("below", [True, False], ids=["and ours", "alone"])
def test_loaders_of_several_loras_are_looked_through(comfy, rows, below):
    names = {name: comfy.lora(f"prefetch-{name}.safetensors", "kohya", rank=4) for name in "ABC"}

    def named(value):
        return {key: named(each) for key, each in value.items()} if isinstance(value, dict) else names.get(value, value)

    nodes = {
        "loader": node("FluxAccelLoader", model_name=BASE.model),
        "several": node("SomeStack", model=["loader", 0], **named(rows | {"text": "a fox"})),
        "sampler": node("KSampler", model=["several", 0]),
    }
    expected = [[names["A"], None], [names["B"], None]]
    if below:
        nodes["ours"] = node("FluxHotswapLora", model=["several", 0], lora_name=names["C"], strength=0.5)
        nodes["sampler"]["inputs"]["model"] = ["ours", 0]
        expected.append([names["C"], 0.5])
    assert comfy.stacks_of(nodes, comfy.model_file("diffusion_models", BASE.model)) == [expected]


CHAINS = {
    "one": ({"a": ("A", 0.5, "loader")}, [(("A", 0.5),)]),
    "two": ({"a": ("A", 0.5, "loader"), "b": ("B", -1.0, "a")}, [(("A", 0.5), ("B", -1.0))]),
    "a linked strength": ({"a": ("A", ["x", 0], "loader")}, [(("A", None),)]),
    "a linked file": ({"a": (["x", 0], 0.5, "loader"), "b": ("B", 1.0, "a")}, [(("B", None),)]),
    "no loader of ours": ({"a": ("A", 0.5, "stranger")}, []),
    "a circle": ({"a": ("A", 0.5, "a")}, []),
}


@pytest.mark.parametrize(("chain", "expected"), CHAINS.values(), ids=CHAINS)
def test_stacks_are_found_in_a_graph(comfy, chain, expected):
    """Asked of the running server: reading a graph needs ComfyUI's folders."""
    names = {name: comfy.lora(f"prefetch-{name}.safetensors", "kohya", rank=4) for name in "AB"}
    nodes = {
        "loader": node("FluxAccelLoader", model_name=BASE.model),
        "stranger": node("UNETLoader", unet_name=BASE.model),
    }
    for key, (name, strength, above) in chain.items():
        nodes[key] = node(
            "FluxHotswapLora", model=[above, 0], lora_name=names.get(name, name) if isinstance(name, str) else name,
            strength=strength,
        )
    nodes["sampler"] = node("KSampler", model=[list(chain)[-1], 0])
    found = comfy.stacks_of(nodes, comfy.model_file("diffusion_models", BASE.model))
    assert found == [[[f"prefetch-{name}.safetensors", strength] for name, strength in stack] for stack in expected]
