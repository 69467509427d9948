"""The oldest ComfyUI that the pack supports, and one between that and the newest."""

from dataclasses import replace

import pytest
import torch

from harness.graphs import Picture, relative_distance
from tests.comfy import test_flux2 as test_flux2_equality
from tests.comfy import test_text_encoder

DEV = Picture(model="tiny-flux-dev-fp32.safetensors")


@pytest.fixture(scope="module", params=["0.18.2", "0.24.0"])
def comfy(start_comfy, request):
    """In place of the server that the imported tests otherwise get."""
    with start_comfy(version=request.param) as running:
        yield running


def test_pictures(comfy):
    assert {"FluxAccelLoader", "FluxHotswapLora"} <= set(comfy.client.object_info())
    assert "Flux Hotswap: this ComfyUI" not in comfy.server.log  # the contract holds, see nodes/contract.py
    lora = comfy.lora("any.safetensors", "kohya", alpha=4.0, seed=81)
    drawn = comfy.compare(replace(DEV, loras=[(lora, 0.9)]), plain=DEV)
    assert drawn.distance <= 1e-4
    assert drawn.effect >= 0.05
    without = comfy.sample(DEV)
    assert relative_distance(without, drawn.plain) <= 1e-4
    engine = comfy.engine()

    comfy.free(unload_models=True, free_memory=True)
    assert torch.equal(comfy.sample(replace(DEV, loras=[(lora, 0.9)])), drawn.ours)
    assert torch.equal(comfy.sample(DEV), without)
    assert comfy.engine()["load_count"] == engine["load_count"] + 1


def test_flux2(comfy):
    loras = test_flux2_equality.write_loras(comfy)
    test_flux2_equality.test_strength(comfy, "fp32", loras, -0.8)
    test_flux2_equality.test_references(comfy, loras, "index", 2)
    test_flux2_equality.test_patches_inside_attention(comfy, loras)


def test_text_encoders(comfy):
    test_text_encoder.write_assets(comfy)
    test_text_encoder.test_loras_with_a_text_encoder_part(comfy, "nf4")
    test_text_encoder.test_repeated_prompts_need_no_text_encoder(comfy)
    test_text_encoder.test_a_quantized_clip_is_not_saved(comfy)
