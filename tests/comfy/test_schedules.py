"""LoRAs that count during a part of the sampling: the picture of ComfyUI's scheduled hooks, by swaps between steps."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from harness.comfyui import fetch
from harness.graphs import Picture, graph, latents, node, relative_distance
from harness.lora_files import in_attention
from harness.paths import REPO

FP32 = 1e-4
VISIBLE = 0.01
BASE = Picture(steps=8)


@pytest.fixture(scope="module")
def loras(comfy):
    first = comfy.lora("schedule-a.safetensors", "kohya", rank=8, alpha=4.0, seed=71)
    return first, comfy.lora("schedule-b.safetensors", "diffusers", rank=12, seed=72, targets=in_attention)


def percents(start, end):
    return {name: value for name, value in (("start_percent", start), ("end_percent", end)) if value is not None}


def scheduled(picture, ranges):
    """Picture 0 by our nodes, picture 1 by ComfyUI's hooks on the conditioning, with the same strength over time."""
    nodes = graph(picture, replace(picture, stock=True, loras=()))
    hooks = {}
    for number, ((name, strength), (start, end)) in enumerate(zip(picture.loras, ranges, strict=True)):
        nodes[f"p0_lora{number}"]["inputs"] |= percents(start, end)
        frames = [(0.0, 0.0)] if start else []
        frames += [(start or 0.0, 1.0)] + ([(end, 0.0)] if end is not None and end < 1.0 else [])
        link = {}
        for place, (percent, factor) in enumerate(frames):
            key = f"p1_frame{number}_{place}"
            nodes[key] = node("CreateHookKeyframe", strength_mult=factor, start_percent=percent, **link)
            link = {"prev_hook_kf": [key, 0]}
        nodes[f"p1_hook{number}"] = node("CreateHookLoraModelOnly", lora_name=name, strength_model=strength)
        nodes[f"p1_set{number}"] = node("SetHookKeyframes", hooks=[f"p1_hook{number}", 0], hook_kf=link["prev_hook_kf"])
        combined = [f"p1_set{number}", 0]
        if hooks:
            nodes[f"p1_both{number}"] = node("CombineHooks2", hooks_A=hooks["hooks"], hooks_B=combined)
            combined = [f"p1_both{number}", 0]
        hooks = {"hooks": combined}
    nodes["p1_pair"] = node(
        "PairConditioningSetProperties", positive_NEW=nodes["p1_sample"]["inputs"]["positive"],
        negative_NEW=nodes["p1_sample"]["inputs"]["negative"], strength=1.0, set_cond_area="default", **hooks,
    )
    nodes["p1_sample"]["inputs"] |= {"positive": ["p1_pair", 0], "negative": ["p1_pair", 1]}
    return nodes


def drawn(comfy, nodes, edit=None):
    for prefix in ("p0_", "p1_"):
        if edit:
            nodes[prefix + "sample"]["inputs"] |= edit
    result = comfy.run(nodes)
    return latents(comfy.client, result, 0), latents(comfy.client, result, 1)


RANGES = {
    "from a point on": (0.4, None),
    "up to a point": (None, 0.5),
    "in the middle": (0.3, 0.7),
    "from a step to a step": (0.25, 0.75),
    "shorter than a step": (0.5, 0.501),
    "late": (0.95, 1.0),
    "of no length": (0.5, 0.5),
    "nothing at all": (0.0, 0.0),
}


@pytest.mark.parametrize(("start", "end"), RANGES.values(), ids=RANGES)
def test_equals_stock_hooks(comfy, loras, start, end):
    ours, stock = drawn(comfy, scheduled(replace(BASE, loras=[(loras[0], 0.9)], cfg=2.0), [(start, end)]))
    assert relative_distance(ours, stock) < FP32


SAMPLINGS = {
    "from an image, starting before the range": {"denoise": 0.9},
    "from an image, starting within the range": {"denoise": 0.4},
    "two calls a step": {"sampler_name": "heun"},
    "ancestral": {"sampler_name": "euler_ancestral"},
    "another schedule": {"scheduler": "beta"},
    "one step": {"steps": 1},
}


@pytest.mark.parametrize("edit", SAMPLINGS.values(), ids=SAMPLINGS)
def test_equals_stock_hooks_in_other_samplings(comfy, loras, edit):
    ours, stock = drawn(comfy, scheduled(replace(BASE, loras=[(loras[0], 0.9)]), [(0.3, 0.7)]), edit)
    assert relative_distance(ours, stock) < FP32


def test_two_schedules_in_a_stack_equal_stock_hooks(comfy, loras):
    picture = replace(BASE, loras=[(loras[0], 0.9), (loras[1], -0.7)], cfg=2.0)
    ours, stock = drawn(comfy, scheduled(picture, [(0.2, 0.6), (0.4, None)]))
    assert relative_distance(ours, stock) < FP32
    whole = comfy.sample(picture)
    assert relative_distance(ours, whole) > VISIBLE
    assert relative_distance(ours, comfy.sample(replace(picture, loras=()))) > VISIBLE


def test_the_whole_range_is_no_schedule(comfy, loras):
    picture = replace(BASE, loras=[(loras[0], 0.9)])
    assert torch.equal(comfy.sample(replace(picture, extra=percents(0.0, 1.0))), comfy.sample(picture))


def test_the_log_has_one_line_and_the_steps_only_bind(comfy, loras):
    picture = replace(BASE, loras=[(loras[0], 0.43)], extra=percents(0.3, 0.7), seed=5)
    comfy.sample(picture)
    mark = comfy.server.mark()
    comfy.sample(replace(picture, seed=6))
    lines = [line for line in comfy.server.log_since(mark).splitlines() if "Flux Hotswap: LoRAs" in line]
    assert len(lines) == 1
    assert "schedule-a.safetensors × 0.43 (30–70 %)" in lines[0]
    # Begin without it, with it, without it: everything was prepared before the first step.
    assert re.search(r"\((\d × )?hot\)", lines[0])
    assert "recompiles 0" in lines[0]


def test_an_end_before_the_start_is_refused_at_the_node(comfy, loras):
    result = comfy.client.run(graph(replace(BASE, loras=[(loras[0], 0.9)], extra=percents(0.6, 0.2))))
    assert result.error.node_id == "p0_lora0"
    assert "start_percent is 0.6 and end_percent is 0.2" in result.error.exception_message


COMPARE = """
import random, sys
sys.path.insert(0, sys.argv[1])
sys.path.append(sys.argv[2])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import torch
from comfy.hooks import HookKeyframe, HookKeyframeGroup
from accel.lora.schedule import Keyframe, Playback, ScheduledStack
from accel.lora.stack import LoraStack, StackEntry
from accel.lora.adapter import Adapter
from accel.files import FileIdentity

class Model:
    class model_sampling:
        percent_to_sigma = staticmethod(lambda percent: (1.0 - percent) ** 0.7)

entry = StackEntry(Adapter(FileIdentity("a", 0, 0), (), ()), 1.0)
random.seed(3)
switches = 0
for case in range(2000):
    percents = sorted(random.choice([0.0, 0.1, 0.25, 0.3, 0.5, 0.52, 0.75, 1.0]) for _ in range(random.randint(1, 5)))
    frames = tuple(Keyframe(percent, random.choice([0.0, 0.5, 1.0, -2.0])) for percent in percents)
    group = HookKeyframeGroup()
    for frame in frames:
        group.add(HookKeyframe(frame.factor, frame.start_percent))
    group.initialize_timesteps(Model)
    group.reset()
    playback = Playback(ScheduledStack(LoraStack((entry,)), (frames,)), Model.model_sampling.percent_to_sigma)
    count, first = random.randint(1, 12), random.choice([1.0, 1.0, 0.8, 0.5 ** 0.7])
    # steps that fall exactly on keyframes among them
    sigmas = first * torch.linspace(1.0, 0.0, count + 1) ** 0.7
    for sigma in sigmas[:-1]:
        for call in range(random.randint(1, 3)):  # cond and uncond at one noise level
            switches += group.prepare_current_keyframe(sigma, {"sample_sigmas": sigmas})
            ours = playback.at(float(sigma), float(sigmas.max())).entries[0].strength
            assert ours == group.strength, (case, frames, sigmas, float(sigma), ours, group.strength)
print("equal", switches)
"""


def test_keyframes_begin_where_those_of_comfyui_do():
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(fetch()), str(REPO)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("equal ")[1]) > 1000
