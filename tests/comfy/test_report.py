"""Flux Accel Report on a running server."""

from __future__ import annotations

import re
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from harness.graphs import Picture, graph, node

BASE = Picture(steps=3)


def reported(nodes, prefix="p0_", passthrough="sample"):
    """Add a report on a sampler's model."""
    link = {"passthrough": [prefix + passthrough, 0]} if passthrough else {}
    nodes[prefix + "report"] = node("FluxAccelReport", model=nodes[prefix + "sample"]["inputs"]["model"], **link)
    return nodes


def read(comfy, nodes):
    """The report's text, and its picture."""
    outputs = comfy.run(nodes).outputs["p0_report"]
    (image,) = outputs["images"]
    return outputs["text"][0], Image.open(BytesIO(comfy.client.view(**image)))


@pytest.fixture(scope="module")
def lora(comfy):
    return comfy.lora("report.safetensors", "kohya", rank=8, alpha=4.0, seed=181)


def test_it_waits_for_the_sampler_and_tells_of_it(comfy, lora):
    picture = replace(BASE, loras=[(lora, 0.55)], seed=21, width=96)
    nodes = graph(picture)
    nodes["p0_cache"] = node("FluxStepCache", model=["p0_lora0", 0], threshold=1.0)
    nodes["p0_sample"]["inputs"]["model"] = ["p0_cache", 0]
    text, image = read(comfy, reported(nodes))
    last = text.split("Last samplings")[1].split("Memory")[0]
    assert "96 × 64, 3 steps in" in last
    assert re.search(r"step cache \d of 3 skipped\n +LoRAs report.safetensors × 0.55", last)
    assert re.search(r"stack +report.safetensors × 0.55\n +bound now  yes", text)
    assert re.search(r"threshold +1\n", text)
    assert f"ComfyUI       {comfy.server.version}" in text
    assert str(comfy.server.base_directory) not in text
    assert image.size[0] == 1280
    assert not image.info  # nor the workflow with its prompts


def test_it_runs_again_in_every_prompt_and_remembers(comfy):
    nodes = reported(graph(replace(BASE, seed=22)))
    first, _ = read(comfy, nodes)
    comfy.sample(replace(BASE, seed=23, width=136))
    second, _ = read(comfy, nodes)  # everything but the report is known to ComfyUI
    assert "136 × 64" not in first
    assert "136 × 64" in second
    again = comfy.run(nodes)
    assert "p0_report" in again.executed
    assert "p0_sample" not in again.executed


def test_text_and_picture_are_outputs_too(comfy):
    nodes = reported(graph(replace(BASE, seed=24)), passthrough="sample")
    nodes["text"] = node("PreviewAny", source=["p0_report", 0])
    nodes["saved"] = node("SaveImage", images=["p0_report", 1], filename_prefix="report")
    result = comfy.run(nodes)
    assert result.outputs["text"]["text"][0].startswith("```\nFlux Hotswap report")
    assert len(result.outputs["saved"]["images"]) == 1


def test_without_a_passthrough_it_is_still_a_report(comfy):
    text, _ = read(comfy, reported(graph(replace(BASE, seed=25)), passthrough=None))
    assert "tiny-flux-dev-fp32.safetensors" in text


def test_another_model_is_refused_at_the_node(comfy):
    result = comfy.client.run(reported(graph(replace(BASE, stock=True))))
    assert result.error.node_id == "p0_report"
    assert "expected one from Accelerated Flux Loader" in result.error.exception_message
