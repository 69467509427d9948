"""Offload Config in a real ComfyUI: streamed pictures, refusals at their node, /free and back, memory that runs out."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo

from accel.checkpoint import inspect_checkpoint
from accel.memory.budgets import GB
from accel.offload.plan import demand_of, lora_share
from accel.settings import DTYPES
from harness.graphs import Picture, graph, latents, node

DEV = Picture(model="tiny-flux-dev-fp32.safetensors", dtype="fp32")
COMPILE_TIMEOUT_S = 600
OTHER = replace(DEV, model="tiny-flux-dev-bf16.safetensors", dtype="bf16")


def budget_for(comfy, picture, resident, quantization="none"):
    """A vram_budget_gb that leaves so many blocks on the device: tests/test_plan.py has the arithmetic."""
    demand = demand_for(comfy, picture, quantization)
    return (demand.weights.on_device(resident) + lora_share(0) + demand.activation_bytes + 1) / GB


def demand_for(comfy, picture, quantization="none"):
    spec = inspect_checkpoint(str(comfy.model_file("diffusion_models", picture.model)))
    device = torch.device("cpu")
    return demand_of(spec, DTYPES[picture.dtype], quantization, picture.compile != "off", device=device)


def budget_below(comfy, picture):
    """A vram_budget_gb that is too small even with every block streamed, but would do with quantized weights."""
    return (min(needed for _, needed in demand_for(comfy, picture).quantized) + lora_share(0) + 1) / GB


def offloaded(picture, mode="stream", budget=0.0, reserve=1.0):
    nodes = graph(picture)
    nodes["offload"] = node("FluxOffloadConfig", mode=mode, vram_budget_gb=budget, reserve_gb=reserve)
    nodes["p0_model"]["inputs"]["offload"] = ["offload", 0]
    return nodes


def draw(comfy, picture, **settings):
    return latents(comfy.client, comfy.run(offloaded(picture, **settings)))


def sentence_of(result, at="p0_model"):
    (text,) = [text for where, text in result.progress_texts if where == at and text.startswith("offload ")]
    return text


@pytest.mark.parametrize("resident_blocks", [0, 1])
def test_streamed_pictures_with_loras_are_the_same_bit_for_bit(comfy, resident_blocks):
    lora, other = (comfy.lora(f"streamed{seed}.safetensors", seed=seed, scale=0.4) for seed in (91, 92))
    stacks = [(), [(lora, 0.8)], [(lora, 0.8), (other, -0.5)], [(other, 1.0)], ()]
    pictures = [replace(DEV, loras=stack, seed=90) for stack in stacks]
    resident = [comfy.sample(picture) for picture in pictures]
    assert not torch.equal(resident[0], resident[1])

    settings = {"budget": budget_for(comfy, DEV, resident_blocks)}
    first = comfy.run(offloaded(pictures[0], **settings))
    plan = comfy.engine()["plan"]
    assert (plan["mode"], plan["resident_blocks"], plan["total_blocks"]) == ("stream", resident_blocks, 4)
    assert f"{resident_blocks} of 4 blocks stay" in sentence_of(first)
    drawn = [latents(comfy.client, first)]
    drawn += [draw(comfy, picture, **settings) for picture in pictures[1:]]
    assert comfy.engine()["ring"]
    for streamed, whole in zip(drawn, resident, strict=True):
        assert torch.equal(streamed, whole)


@pytest.mark.parametrize(("compile", "quantization"), [("regional", "none"), ("off", "int8")])
def test_compiled_or_quantized_it_streams_without_recompiling(comfy, compile, quantization):
    picture = replace(DEV, compile=compile, seed=93)
    lora = comfy.lora("streamed93.safetensors", seed=93, scale=0.4)
    settings = {"budget": budget_for(comfy, picture, 1, quantization)}

    def quantized(nodes):
        nodes["quantize"] = node("FluxQuantizeTransformer", mode=quantization, cache=False, cache_limit_gb=1)
        nodes["p0_model"]["inputs"]["quantization"] = ["quantize", 0]
        result = comfy.client.run(nodes, timeout=COMPILE_TIMEOUT_S, check=True)
        return latents(comfy.client, result)

    both = [picture, replace(picture, loras=[(lora, 0.7)], width=96)]
    resident = [quantized(graph(each)) for each in both]
    streamed = [quantized(offloaded(each, **settings)) for each in (*both, both[0])]
    engine = comfy.engine()
    assert (engine["plan"]["mode"], engine["plan"]["resident_blocks"], engine["ring"]) == ("stream", 1, True)
    # What the resident engine compiled and stored serves this one: where weights lie changes no code. torch 2.11 stores
    # no traces, and traces anew.
    traces_anew = compile != "off" and not getattr(torch._dynamo.config, "enable_aot_compile", False)
    assert (engine["compile_count"], engine["recompile_count"]) == (2 if traces_anew else 0, 0)
    for drawn, whole in zip(streamed, (*resident, resident[0]), strict=True):
        assert torch.equal(drawn, whole)


def test_auto_on_a_cpu_keeps_everything(comfy):
    plain = comfy.sample(replace(DEV, seed=94))
    serial = comfy.engine()["serial"]
    result = comfy.run(offloaded(replace(DEV, seed=95), mode="auto"))
    assert comfy.engine()["plan"]["mode"] == "none"
    # The same engine as without the node: that is what it does by default.
    assert comfy.engine()["serial"] == serial
    assert not any(text.startswith("offload ") for at, text in result.progress_texts if at == "offload")
    assert torch.equal(draw(comfy, replace(DEV, seed=94), mode="auto"), plain)


@pytest.mark.parametrize(
    ("settings", "at", "words"),
    [
        (lambda comfy: {"budget": 0.3}, "p0_model", ("even with every block streamed", "for the engine (a higher")),
        (lambda comfy: {"budget": budget_below(comfy, DEV)}, "p0_model", ("What would fit: quantization '",)),
        (lambda comfy: {"mode": "model"}, "offload", ("'model'", "runs on the CPU", "'auto' or 'none'")),
    ],
    ids=["nothing-fits", "quantized-fits", "mode"],
)
def test_what_cannot_be_is_refused_at_its_node(comfy, settings, at, words):
    settings = settings(comfy)
    before = comfy.sample(DEV)
    engine = comfy.built()
    result = comfy.client.run(offloaded(DEV, **settings))
    assert result.status == "error"
    assert result.error.node_id == at
    assert all(word in result.error.exception_message for word in words)
    assert comfy.built() == engine
    assert torch.equal(comfy.sample(DEV), before)


def test_free_and_back(comfy):
    picture = replace(DEV, seed=96, compile="regional")
    settings = {"budget": budget_for(comfy, picture, 1)}
    before = draw(comfy, picture, **settings)
    engine = comfy.engine()
    assert engine["device_bytes"] == pytest.approx(engine["plan"]["device_bytes"], rel=0.02)
    for everything in (False, True):
        comfy.free(unload_models=True, free_memory=everything)
        freed = comfy.engine()
        assert (freed["loaded"], freed["device_bytes"], freed["host_bytes"]) == (False, 0, 0)
        draw(comfy, replace(picture, seed=97), **settings)
        assert torch.equal(draw(comfy, picture, **settings), before)
        after = comfy.engine()
        assert after["serial"] == engine["serial"]
        assert after["plan"] == engine["plan"]
        assert (after["compile_count"], after["recompile_count"]) == (engine["compile_count"], 0)


def test_two_engines_in_turn_with_a_vae_between(comfy):
    """One engine at a time by default: the other one is dropped whole each time, and comes back the same."""
    pictures = [replace(picture, decode=True, seed=98) for picture in (DEV, OTHER)]
    settings = [{"budget": budget_for(comfy, picture, 1)} for picture in pictures]
    expected = [draw(comfy, picture, **own) for picture, own in zip(pictures, settings, strict=True)]
    sizes = []
    for turn in range(3):
        for picture, own, before in zip(pictures, settings, expected, strict=True):
            draw(comfy, replace(picture, seed=200 + turn), **own)
            assert torch.equal(draw(comfy, picture, **own), before)
        state = comfy.engines(collect=True)
        assert len(state["held"]) == len(state["alive"]) == 1
        sizes.append(sum(state["weight_bytes"].values()))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("block", [("double_block", 1), ("single_block", 1)], ids=str)
def test_memory_that_runs_out_in_the_middle_of_a_step(comfy, block):
    lora = comfy.lora("streamed91.safetensors", seed=91, scale=0.4)
    picture = replace(DEV, loras=[(lora, 0.8)], seed=99)
    settings = {"budget": budget_for(comfy, picture, 1)}
    before = draw(comfy, picture, **settings)
    engine = comfy.engine()

    nodes = offloaded(replace(picture, seed=100), **settings)
    kind, index = block
    model = nodes["p0_sample"]["inputs"]["model"]
    nodes["patch"] = node("ProbeOutOfMemory", model=model, kind=kind, index=index, step=2)
    nodes["p0_sample"]["inputs"]["model"] = ["patch", 0]
    result = comfy.client.run(nodes)
    assert result.status == "error"
    assert result.error.node_id == "p0_sample"
    for words in ("ran out of memory in a step of 64×64, batch 1", "has given them back", "What to change: "):
        assert words in result.error.exception_message
    assert comfy.engine()["device_bytes"] == 0

    assert torch.equal(draw(comfy, picture, **settings), before)
    assert comfy.engine()["serial"] == engine["serial"]


# ComfyUI frees and loads models only where there is a GPU. What it would call there is called here, on an engine in a
# pool of host memory that stands for one.


MIB = 2**20
# All weights of the tiny model (32 MB), LoRAs, and a step; ComfyUI's own allocations are not in the pool.
POOL_BYTES = 520 * MIB


def pooled(picture, mode="auto"):
    nodes = graph(picture)
    nodes["pool"] = node("ProbePool", model=["p0_model", 0], mode=mode, free_bytes=POOL_BYTES)
    for each in nodes.values():
        if each["class_type"] in ("KSampler", "FluxHotswapLora") and each["inputs"]["model"] == ["p0_model", 0]:
            each["inputs"]["model"] = ["pool", 0]
    return nodes


def press(comfy, picture, mode="auto", unload=0, more=0):
    """Ask for memory (unload) or offer some (more), as ComfyUI does, and see what comes of it."""
    nodes = {key: value for key, value in pooled(picture, mode).items() if key in ("p0_model", "pool")}
    nodes["press"] = node("ProbePress", model=["pool", 0], unload_bytes=unload, more_bytes=more)
    return comfy.run(nodes).outputs["press"]["seen"][0]


def draw_pooled(comfy, picture, mode="auto"):
    return latents(comfy.client, comfy.run(pooled(picture, mode)))


def test_it_gives_way_in_part_and_comes_back(comfy):
    lora = comfy.lora("pressed.safetensors", seed=111, scale=0.4)
    picture = replace(DEV, loras=[(lora, 0.8)], seed=110, compile="regional")
    resident = comfy.sample(picture)
    assert torch.equal(draw_pooled(comfy, picture), resident)
    whole = press(comfy, picture)
    assert (whole["plan"]["mode"], whole["load_count"], whole["compiles"]) == ("none", 1, 2)
    assert whole["plan"]["device_bytes"] < whole["before"] <= whole["size"]

    part = press(comfy, picture, unload=5 * MIB)
    assert not part["unloaded"]
    assert part["before"] - part["after"] >= 5 * MIB
    assert (part["plan"]["mode"], part["ring"]) == ("stream", True)
    assert part["device_bytes"] == part["after"] == part["pool_bytes"]
    before = draw_pooled(comfy, replace(picture, seed=112))
    assert torch.equal(draw_pooled(comfy, picture), resident)
    # Sampling brought everything back: on a CPU ComfyUI lets a model have all it wants.
    again = press(comfy, picture, more=-5 * MIB)
    assert again["before"] == whole["before"]
    assert again["before"] - again["after"] >= 5 * MIB
    assert again["gained"] == again["after"] - again["before"]
    more = press(comfy, picture, more=POOL_BYTES)
    assert more["plan"]["mode"] == "none"
    assert torch.equal(draw_pooled(comfy, replace(picture, seed=112)), before)
    assert (more["load_count"], more["compiles"], more["recompiles"]) == (1, 2, 0)
    assert more["pool_peak_bytes"] <= 1.02 * whole["before"]


def test_it_goes_whole_when_more_is_needed_and_comes_back_without_reading(comfy):
    picture = replace(DEV, seed=113)
    resident = comfy.sample(picture)
    assert torch.equal(draw_pooled(comfy, picture, "stream"), resident)
    gone = press(comfy, picture, "stream", unload=10**12)
    assert gone["unloaded"]
    assert (gone["after"], gone["pool_bytes"]) == (0, 0)
    assert gone["host_bytes"] > 0.9 * 4 * 7_000_000
    draw_pooled(comfy, replace(picture, seed=114), "stream")
    assert torch.equal(draw_pooled(comfy, picture, "stream"), resident)
    assert press(comfy, picture, "stream")["load_count"] == 1


def test_mode_none_goes_whole_or_not_at_all(comfy):
    picture = replace(DEV, seed=115)
    drawn = draw_pooled(comfy, picture, "none")
    assert press(comfy, picture, "none", unload=MIB)["unloaded"]
    assert torch.equal(draw_pooled(comfy, replace(picture, steps=3), "none"), comfy.sample(replace(picture, steps=3)))
    assert torch.equal(draw_pooled(comfy, replace(picture, steps=4), "none"), drawn)


def test_mode_model_leaves_the_device_between_samplings(comfy):
    picture = replace(DEV, seed=116)
    assert torch.equal(draw_pooled(comfy, picture, "model"), comfy.sample(picture))
    seen = press(comfy, picture, "model")
    assert (seen["after"], seen["pool_bytes"]) == (0, 0)
    assert seen["pool_peak_bytes"] >= seen["plan"]["device_bytes"]
    draw_pooled(comfy, replace(picture, seed=117), "model")
    assert press(comfy, picture, "model")["load_count"] == 1


def test_free_takes_the_host_memory_too(comfy):
    """ComfyUI unloads the model, then drops the outputs that hold it: then nothing of it is left."""
    picture = replace(DEV, seed=118)
    before = draw_pooled(comfy, picture, "stream")
    assert press(comfy, picture, "stream")["host_bytes"] > 0
    comfy.free(unload_models=True, free_memory=True)
    draw_pooled(comfy, replace(picture, seed=119), "stream")
    assert torch.equal(draw_pooled(comfy, picture, "stream"), before)
    assert press(comfy, picture, "stream")["load_count"] >= 2
