"""What stays from one prompt to the next, what is noticed, and what is given back."""

import os
import re
from dataclasses import replace

import pytest
import torch

from accel.build import count_parts
from accel.checkpoint import inspect_checkpoint
from harness import tiny_models
from harness.graphs import Picture, graph, latents, relative_distance

DEV = Picture(model="tiny-flux-dev-fp32.safetensors")
# One of ComfyUI's caches for node outputs each; two of the servers behave as newer ComfyUI does, see
# tests/newer_core_pack.
CACHES = ("default cache", "--cache-classic", "--cache-none, newer core", "--cache-lru 4, newer core")
# Wide enough that its weights stand out in the memory of the server process: 91 million parameters.
WIDE = {"hidden": 1280, "depth": 1, "depth_single": 1}


@pytest.fixture(scope="module", params=CACHES)
def any_cache(request, start_comfy):
    """A server with one of the caches; those of the first and the last are shared with other files."""
    shared = {"default cache": "comfy", "--cache-lru 4, newer core": "newer_comfy"}
    if request.param in shared:
        yield request.getfixturevalue(shared[request.param])
        return
    argument, _, core = request.param.partition(", ")
    with start_comfy(argument, newer_core=core == "newer core") as running:
        yield running


def test_the_engine_survives_the_prompt(any_cache):
    """Other seed, size, prompt and LoRA, and a prompt without the pack between: nothing is read or built again."""
    comfy = any_cache
    lora = comfy.lora("cached.safetensors", seed=61)
    comfy.sample(DEV)
    first = comfy.built()
    assert first["loaded"]
    assert first["load_count"] >= 1
    for picture in (
        replace(DEV, seed=2),
        replace(DEV, loras=[(lora, 0.5)]),
        replace(DEV, stock=True),
        replace(DEV, width=96, prompt="another one", batch=2),
    ):
        comfy.sample(picture)
        assert comfy.built() == first


def test_the_lora_file_is_read_again_only_when_it_changed(any_cache):
    comfy = any_cache
    lora = comfy.lora("changing.safetensors", seed=62, scale=0.5)
    picture = replace(DEV, loras=[(lora, 1.0)])
    old = comfy.sample(picture)
    size = comfy.model_file("loras", lora).stat().st_size

    comfy.lora(lora, seed=63, scale=0.5)
    assert comfy.model_file("loras", lora).stat().st_size == size
    new = comfy.sample(picture)
    assert relative_distance(new, old) >= 0.05
    # stock ComfyUI does not notice new content under an old name, so it gets another one
    copy = comfy.lora("changing-stock.safetensors", seed=63, scale=0.5)
    assert relative_distance(new, comfy.sample(replace(picture, stock=True, loras=[(copy, 1.0)]))) <= 1e-4


def test_an_overwritten_checkpoint_is_noticed(any_cache):
    comfy = any_cache
    name = comfy.checkpoint("changing.safetensors", seed=64)
    lora = comfy.lora("steady.safetensors", seed=65)
    picture = replace(DEV, model=name, loras=[(lora, 0.8)])
    old, before = comfy.sample(picture), comfy.engine()

    comfy.checkpoint(name, seed=66)
    new, after = comfy.sample(picture), comfy.engine()
    assert after["size_bytes"] == before["size_bytes"]
    assert after["mtime_ns"] != before["mtime_ns"]
    assert after["serial"] != before["serial"]
    assert relative_distance(new, old) >= 0.05
    copy = comfy.checkpoint("changing-stock.safetensors", seed=66)
    assert relative_distance(new, comfy.sample(replace(picture, stock=True, model=copy))) <= 1e-4


def test_a_touched_file_gives_the_same_picture(comfy):
    lora = comfy.lora("touched.safetensors", seed=67)
    picture = replace(DEV, loras=[(lora, 0.8)])
    before = comfy.sample(picture)
    os.utime(comfy.model_file("loras", lora))
    result = comfy.run(graph(picture))
    assert "p0_lora0" in result.executed
    assert torch.equal(latents(comfy.client, result), before)


def test_a_lora_under_its_old_name_after_another_was_there(comfy):
    """A, then B under the same name, then A's bytes again: three states, each drawn as what it holds."""
    drawn = []
    for seed in (68, 69, 68):
        lora = comfy.lora("back-and-forth.safetensors", seed=seed, scale=0.5)
        drawn.append(comfy.sample(replace(DEV, loras=[(lora, 1.0)])))
    assert torch.equal(drawn[0], drawn[2])
    assert relative_distance(drawn[1], drawn[0]) >= 0.05


@pytest.mark.parametrize("free_memory", [False, True], ids=["unload_models", "unload_models and free_memory"])
def test_free_releases_the_memory(comfy, free_memory):
    model = comfy.checkpoint("wide.safetensors", seed=70, **WIDE)
    lora = comfy.lora("wide.safetensors", config=tiny_models.TinyFluxConfig(**WIDE), seed=70)
    picture = replace(DEV, model=model, loras=[(lora, 0.8)], steps=2)
    before = comfy.sample(picture)
    engine = comfy.engine()
    assert engine["bytes"] > 300e6
    held = comfy.engines()["weight_bytes"][str(engine["serial"])]
    assert held >= engine["bytes"]
    rss = comfy.rss_bytes

    comfy.free(unload_models=True, free_memory=free_memory)
    after = comfy.engines()
    assert after["weight_bytes"][str(engine["serial"])] == 0
    assert rss - comfy.rss_bytes > 0.7 * engine["bytes"]
    assert not after["held"][0]["loaded"]

    comfy.sample(replace(picture, seed=1000))
    assert torch.equal(comfy.sample(picture), before)
    again = comfy.engine()
    assert again["serial"] == engine["serial"]
    assert again["load_count"] == engine["load_count"] + 1


@pytest.mark.parametrize("change", [{"model": "tiny-flux-dev-bf16.safetensors"}, {"dtype": "bf16"}], ids=str)
def test_another_model_evicts_the_old_one(comfy, change):
    comfy.sample(DEV)
    old = comfy.engine()
    comfy.sample(replace(DEV, **change))
    new = comfy.engine()
    assert new["serial"] != old["serial"]
    state = comfy.engines(collect=True)
    assert old["serial"] not in state["alive"]
    assert state["weight_bytes"][str(old["serial"])] == 0

    comfy.sample(DEV)
    assert comfy.engine()["path"] == old["path"]


def test_a_workflow_without_the_loader_lets_free_take_everything(comfy):
    """The engine outlives a workflow that does not use it, but not a request for memory while that one is loaded."""
    comfy.sample(DEV)
    engine = comfy.engine()
    comfy.sample(replace(DEV, stock=True, seed=5))
    assert comfy.engine() == engine
    comfy.free(unload_models=True, free_memory=True)
    assert comfy.engines()["weight_bytes"][str(engine["serial"])] == 0


def interrupt(comfy, picture, total):
    comfy.interrupt_at_total(total)
    result = comfy.client.run(graph(picture))
    assert result.status == "interrupted"


def test_interrupted_while_sampling(comfy):
    lora = comfy.lora("interrupted.safetensors", seed=71)
    with_lora = replace(DEV, loras=[(lora, 0.9)])
    expected = [comfy.sample(DEV), comfy.sample(with_lora)]
    comfy.sample(replace(DEV, seed=1000))

    mark = comfy.server.mark()
    interrupt(comfy, replace(with_lora, steps=13), total=13)
    said = r"Flux Hotswap: LoRAs .* sampling [\d.]+ s"
    assert re.search(said + r", interrupted in step \d+\n", comfy.server.log_since(mark))
    mark = comfy.server.mark()
    assert torch.equal(comfy.sample(DEV), expected[0])
    assert re.search(said + r"\n", comfy.server.log_since(mark))
    interrupt(comfy, replace(DEV, steps=13), total=13)
    assert torch.equal(comfy.sample(with_lora), expected[1])


def test_interrupted_while_loading(comfy):
    lora = comfy.lora("interrupted.safetensors", seed=71)
    picture = replace(DEV, loras=[(lora, 0.9)])
    before = comfy.sample(picture)
    engine = comfy.engine()
    comfy.free(unload_models=True, free_memory=True)

    layers = count_parts(inspect_checkpoint(str(comfy.model_file("diffusion_models", DEV.model))))
    interrupt(comfy, picture, total=layers)
    state = comfy.engines()
    assert not state["held"][0]["loaded"]
    assert state["held"][0]["load_count"] == engine["load_count"]
    assert state["weight_bytes"][str(engine["serial"])] == 0

    result = comfy.run(graph(picture))
    assert torch.equal(latents(comfy.client, result), before)
    assert comfy.engine()["load_count"] == engine["load_count"] + 1
    assert ("p0_sample", f"Loading {layers} layers") in result.progress_texts


def test_the_report_says_what_happened(comfy):
    """The text at the sampler, and the log: which LoRAs, how long, how many recompiles."""
    lora = comfy.lora("reported.safetensors", seed=72)
    mark = comfy.server.mark()
    result = comfy.run(graph(replace(DEV, loras=[(lora, 0.25)], seed=72)))
    texts = [text for at, text in result.progress_texts if at == "p0_sample"]
    assert any(f"LoRAs {lora} × 0.25" in text and "recompiles 0" in text for text in texts)
    assert f"LoRAs {lora} × 0.25" in comfy.server.log_since(mark)


def test_loading_a_vae_between_does_not_disturb(comfy):
    """Decoding loads another model; the engine stays loaded and bound."""
    picture = replace(DEV, decode=True)
    before = comfy.sample(picture)
    engine = comfy.engine()
    comfy.sample(replace(picture, seed=1000))
    assert torch.equal(comfy.sample(picture), before)
    assert comfy.engine() == engine
