"""Quantize Transformer in a real ComfyUI: pictures, and refusals at the node. The cache is in test_compiled.py."""

from dataclasses import replace

import pytest
import torch

from harness.graphs import Picture, graph, latents, node, relative_distance

DEV = Picture(model="tiny-flux-dev-fp32.safetensors", dtype="fp32")
# Of the final latents from those of the unquantized model, which have a LoRA too.
DISTANCES = {"fp8_weight_only": 0.25, "int8": 0.15, "nf4": 0.6}
CACHE = "flux_hotswap_cache"


def quantized_graph(picture, mode, **inputs):
    nodes = graph(picture)
    nodes["quantize"] = node("FluxQuantizeTransformer", mode=mode, **{"cache": True, "cache_limit_gb": 50, **inputs})
    nodes["p0_model"]["inputs"]["quantization"] = ["quantize", 0]
    return nodes


def files(comfy):
    """Of quantized weights; folders beside them hold what else is kept."""
    return sorted(path for path in (comfy.server.models / CACHE).glob("*") if path.is_file())


@pytest.mark.parametrize("mode", DISTANCES)
def test_pictures_are_near_the_unquantized(comfy, mode):
    lora = comfy.lora("quantized.safetensors", seed=81, scale=0.3)
    picture = replace(DEV, loras=[(lora, 0.8)])
    exact, plain = comfy.samples(picture, DEV)
    result = comfy.run(quantized_graph(picture, mode))
    drawn = latents(comfy.client, result)
    assert 1e-3 < relative_distance(drawn, exact) < DISTANCES[mode]
    # nearer to the picture with the LoRA than to the one without
    assert relative_distance(drawn, exact) < relative_distance(drawn, plain)
    assert comfy.engine()["bytes"] < 0.6 * 4 * 8_000_000
    assert any(at == "quantize" and text.startswith(f"{mode}: ") for at, text in result.progress_texts)


def test_auto_says_what_and_why(comfy):
    mark = comfy.server.mark()
    result = comfy.run(quantized_graph(DEV, "auto"))
    told = [text for at, text in result.progress_texts if at == "quantize"]
    (text,) = told
    assert text.startswith("int8: weights and activations in 8-bit integers")
    assert text.endswith("half the memory, and the fastest on a CPU")
    assert f"quantization auto is {told[0]}" in comfy.server.log_since(mark)
    assert "40 of 50 linears quantized" in comfy.server.log_since(mark)


def test_none_is_no_quantization(comfy):
    plain = comfy.sample(DEV)
    assert torch.equal(latents(comfy.client, comfy.run(quantized_graph(DEV, "none"))), plain)


@pytest.mark.parametrize(("mode", "nearest"), [("nvfp4", "nf4"), ("mxfp8", "fp8"), ("int4", "nf4")])
def test_a_mode_that_cannot_run_is_refused_at_its_node(comfy, mode, nearest):
    plain = comfy.sample(DEV)
    result = comfy.client.run(quantized_graph(DEV, mode))
    assert result.status == "error"
    assert result.error.node_id == "quantize"
    assert f"'{mode}' needs" in result.error.exception_message
    assert f"nearest mode that runs here is '{nearest}'" in result.error.exception_message
    assert torch.equal(comfy.sample(DEV), plain)


def test_an_eager_dynamic_mode_warns(comfy):
    mark = comfy.server.mark()
    comfy.run(quantized_graph(replace(DEV, seed=82), "fp8", cache=False))
    assert "fp8 without compiling is slower than no quantization" in comfy.server.log_since(mark)


def test_without_cache_nothing_is_written(comfy):
    before = files(comfy)
    comfy.run(quantized_graph(replace(DEV, seed=83), "fp8_weight_only", cache=False))
    assert files(comfy) == before
