"""The oldest ComfyUI that the pack supports, and one between that and the newest."""

from dataclasses import replace

import pytest
import torch

from harness.graphs import Picture, relative_distance

pytestmark = pytest.mark.slow

DEV = Picture(model="tiny-flux-dev-fp32.safetensors")


@pytest.mark.parametrize("version", ["0.18.2", "0.24.0"])
def test_version(start_comfy, version):
    with start_comfy(version=version) as comfy:
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
