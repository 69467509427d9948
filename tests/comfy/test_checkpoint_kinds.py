"""Every kind of checkpoint file in a real ComfyUI: the picture is stock ComfyUI's, or that of the plain file."""

import json
from dataclasses import replace

import pytest
import torch

from harness import checkpoint_kinds as kinds
from harness.client import http_request
from harness.graphs import Picture, graph, latents, node, relative_distance
from harness.tensor_files import write_tensors
from harness.tiny_models import TinyFluxConfig, tiny_flux_state_dict
from harness.tiny_others import tiny_taesd_state_dict

DEV = Picture(model="tiny-flux-dev-fp32.safetensors", dtype="fp32")
# Stock ComfyUI multiplies scaled fp8 out in its compute dtype, which is float32 on this CPU.
EQUAL = 1e-4


@pytest.fixture(scope="module")
def tensors():
    """The weights of `DEV`."""
    return tiny_flux_state_dict(TinyFluxConfig(), seed=0)


def listed(comfy):
    info = json.loads(http_request(f"{comfy.server.url}/object_info/FluxAccelLoader"))
    options = info["FluxAccelLoader"]["input"]["required"]["model_name"]
    return options[1]["options"] if options[0] == "COMBO" else options[0]


@pytest.mark.parametrize("form", ["marker", "tensors", "metadata"])
def test_scaled_fp8_is_what_stock_comfyui_draws(comfy, tensors, form):
    name = f"scaled-{form}.safetensors"
    kinds.scaled_fp8(comfy.model_file("diffusion_models", name), tensors, form)
    drawn = comfy.compare(replace(DEV, model=name), plain=DEV)
    assert drawn.distance <= EQUAL
    # the quantization itself is visible, and small: without scales the picture would have nothing in common
    assert 10 * EQUAL <= drawn.effect <= 0.3


def test_all_in_one_checkpoint(comfy, tensors):
    """In the folder `checkpoints`, with an autoencoder, as stock ComfyUI's Load Checkpoint reads it."""
    others = {f"vae.{key}": tensor for key, tensor in tiny_taesd_state_dict(seed=0).items()}
    path = comfy.model_file("checkpoints", "all-in-one.safetensors")
    kinds.all_in_one(path, tensors, torch.float32, others)
    assert path.name in listed(comfy)
    nodes = graph(replace(DEV, model=path.name), replace(DEV, stock=True))
    nodes["p1_model"] = node("CheckpointLoaderSimple", ckpt_name=path.name)
    result = comfy.run(nodes)
    ours, stock = (latents(comfy.client, result, index) for index in (0, 1))
    assert relative_distance(ours, stock) <= EQUAL
    assert torch.equal(ours, comfy.sample(DEV))


@pytest.mark.parametrize("pipeline", [False, True], ids=["model", "pipeline"])
def test_diffusers_folder_in_shards(comfy, tensors, pipeline):
    name = "diffusers-pipeline" if pipeline else "diffusers-model"
    folder = comfy.model_file("diffusion_models", name)
    kinds.diffusers_folder(folder, tensors, TinyFluxConfig(), torch.float32, shard_bytes=4_000_000, pipeline=pipeline)
    names = listed(comfy)
    assert f"{name}/" in names
    assert not any("-00001-of-" in other for other in names)
    assert len(list(folder.rglob("*-of-*.safetensors"))) > 2
    assert torch.equal(comfy.sample(replace(DEV, model=f"{name}/")), comfy.sample(DEV))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf(comfy, tensors, kind):
    """Against stock ComfyUI with the same numbers in float32: it does not read GGUF itself."""
    name = f"tiny-{kind}.gguf"
    written = kinds.gguf(comfy.model_file("diffusion_models", name), tensors, kind)
    assert name in listed(comfy)
    exact = f"tiny-{kind}-exact.safetensors"
    write_tensors(comfy.model_file("diffusion_models", exact), written.tensors)
    ours = comfy.sample(replace(DEV, model=name))
    assert relative_distance(ours, comfy.sample(replace(DEV, model=exact, stock=True))) <= EQUAL
    difference = relative_distance(ours, comfy.sample(DEV))
    assert difference >= 10 * EQUAL
    if kind == "Q8_0":
        assert difference <= 0.1


def test_a_shard_that_changed_is_noticed(comfy, tensors):
    """Another model under the same names: ComfyUI runs the loader again, and the picture is the new one's."""
    folder = comfy.model_file("diffusion_models", "diffusers-changing")
    picture = replace(DEV, model="diffusers-changing/")
    kinds.diffusers_folder(folder, tensors, TinyFluxConfig(), torch.float32, shard_bytes=4_000_000)
    before = comfy.sample(picture)
    other = tiny_flux_state_dict(TinyFluxConfig(), seed=5)
    kinds.diffusers_folder(folder, other, TinyFluxConfig(), torch.float32, shard_bytes=4_000_000)
    name = comfy.checkpoint("same-as-changed.safetensors", seed=5)
    after = comfy.sample(picture)
    assert relative_distance(after, before) >= 0.05
    assert torch.equal(after, comfy.sample(replace(DEV, model=name)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: next(iter(folder.glob("*-00002-of-*"))).unlink(), ["shards are missing", "get the rest"]),
        (lambda folder: (folder / "config.json").write_text('{"num_layers": 19}'), ["num_layers = 19", "tensors say"]),
    ],
    ids=["missing shard", "config in conflict"],
)
def test_a_wrong_folder_fails_at_the_loader(comfy, tensors, change, words):
    folder = comfy.model_file("diffusion_models", "diffusers-wrong")
    kinds.diffusers_folder(folder, tensors, TinyFluxConfig(), torch.float32, shard_bytes=4_000_000)
    change(folder)
    result = comfy.client.run(graph(replace(DEV, model="diffusers-wrong/")))
    assert result.status == "error"
    assert result.error.node_id == "p0_model"
    for word in words:
        assert word in result.error.exception_message
