"""What worked in the newest ComfyUI that can be fetched, once more where it behaves as 0.46: see tests/newer_core_pack.

The caches are tested there by test_cache.py.
"""

from dataclasses import replace

import pytest
import torch

from harness import checkpoint_kinds as kinds
from harness.graphs import Picture, graph, relative_distance
from harness.lora_files import lora_state_dict
from harness.tensor_files import json_tensor
from harness.tiny_models import TinyFluxConfig, tiny_flux_state_dict
from tests.comfy import test_branches, test_loader_nodes, test_native_loras, test_text_encoder
from tests.comfy import test_flux2 as test_flux2_equality
from tests.comfy.test_branches import branches  # noqa: F401 - a fixture

FP32 = 1e-4
DEV = Picture()
ATTENTION = json_tensor([{"attention": "comfy_kitchen_int8"}, {"attention": "comfy_kitchen_sol", "tau": 1.0}])
CONFIG = "double_blocks.0.comfy_attention.config"


@pytest.fixture(scope="module")
def comfy(newer_comfy):
    """In place of the server that the imported fixtures and tests otherwise get."""
    return newer_comfy


def test_the_pack_loads(comfy):
    assert {"FluxAccelLoader", "FluxHotswapLora", "FluxTextEncoderLoader"} <= set(comfy.client.object_info())
    # Nothing else is amiss; the queue is said to be only where this pack was loaded after that one.
    said = [line for line in comfy.server.log.splitlines() if "Flux Hotswap: this ComfyUI" in line]
    assert all("prompt_queue" in line for line in said)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "native"])
def test_hotswap_and_native_loaders_equal_stock(comfy, format):
    lora = comfy.lora(f"newer-{format}.safetensors", format, rank=8, alpha=4.0)
    picture = Picture(loras=[(lora, 0.8)])
    hotswapped, plain = comfy.samples(picture, DEV)
    loaded, stock = test_native_loras.both(comfy, test_native_loras.native(picture))
    assert relative_distance(hotswapped, stock) < FP32
    assert relative_distance(loaded, stock) < FP32
    assert relative_distance(plain, stock) > 0.05


def test_flux2(comfy):
    loras = test_flux2_equality.write_loras(comfy)
    test_flux2_equality.test_strength(comfy, "fp32", loras, -0.8)
    test_flux2_equality.test_references(comfy, loras, "index_timestep_zero", 2)
    test_flux2_equality.test_the_kv_cache_of_references(comfy, loras, 1)


def test_loaders_of_other_packs(comfy):
    test_loader_nodes.write_files(comfy)
    test_loader_nodes.test_mixed_chains_in_any_order_equal_stock(
        comfy, ("ProbeCachedLoraLoader", "FluxHotswapLora", "ProbeAddPatches")
    )


def test_branches_and_another_sampling_in_one(comfy, branches):  # noqa: F811
    test_branches.test_each_branch_gets_its_own(comfy, branches, ("B", "none", "A"))
    test_branches.test_another_sampling_in_one_branch_stays_there(comfy, branches, ("shifted", "plain"))


def test_text_encoders(comfy):
    test_text_encoder.write_assets(comfy)
    test_text_encoder.test_loras_with_a_text_encoder_part(comfy, "int8")
    test_text_encoder.test_repeated_prompts_need_no_text_encoder(comfy)


def test_a_lora_that_asks_for_attention(comfy):
    """The entries are left alone, and said so; the rest is applied by either node."""
    lora = comfy.lora("asks-not.safetensors", "native", rank=6, seed=3)
    tensors = lora_state_dict("native", rank=6, seed=3)
    asks = comfy.tensors("loras", "asks.safetensors", {**tensors, f"diffusion_model.{CONFIG}": ATTENTION})
    mark = comfy.server.mark()
    hotswapped, expected = comfy.samples(Picture(loras=[(asks, 0.7)]), Picture(loras=[(lora, 0.7)]))
    assert torch.equal(hotswapped, expected)
    loaded, stock = test_native_loras.both(comfy, test_native_loras.native(Picture(loras=[(asks, 0.7)])))
    assert relative_distance(loaded, stock) < FP32
    assert relative_distance(hotswapped, stock) < FP32
    said = comfy.server.log_since(mark)
    assert "1 not used: which ask for an attention kernel" in said
    assert "1 entries of a LoRA ask for an attention kernel" in said


def test_a_checkpoint_that_asks_for_attention(comfy):
    tensors = tiny_flux_state_dict(TinyFluxConfig(), seed=0)
    name = comfy.tensors("diffusion_models", "asks.safetensors", {**tensors, CONFIG: ATTENTION})
    mark = comfy.server.mark()
    assert torch.equal(comfy.sample(replace(DEV, model=name, dtype="fp32")), comfy.sample(replace(DEV, dtype="fp32")))
    assert "'asks.safetensors' asks for attention comfy_kitchen_int8, comfy_kitchen_sol, not used" in (
        comfy.server.log_since(mark)
    )


def test_quantized_layers_are_read_or_refused_by_name(comfy):
    tensors = tiny_flux_state_dict(TinyFluxConfig(), seed=0)
    kinds.scaled_fp8(comfy.model_file("diffusion_models", "newer-fp8.safetensors"), tensors, "tensors")
    assert comfy.compare(replace(DEV, model="newer-fp8.safetensors", dtype="fp32")).distance < FP32
    layer = "double_blocks.0.img_mlp.0"
    packed = {
        **tensors,
        f"{layer}.weight": torch.zeros(1024, 128, dtype=torch.int8),
        f"{layer}.weight_s_rel": torch.zeros(1024, 16, dtype=torch.float8_e4m3fn),
        f"{layer}.weight_s_channel": torch.ones(1024),
        f"{layer}.comfy_quant": json_tensor({"format": "asym_w4a8_int8", "group_size": 16}),
    }
    name = comfy.tensors("diffusion_models", "newer-w4a8.safetensors", packed)
    error = comfy.client.run(graph(replace(DEV, model=name))).error
    assert error.node_id == "p0_model"
    assert f"'{layer}' is quantized as 'asym_w4a8_int8', which this loader does not read" in error.exception_message
