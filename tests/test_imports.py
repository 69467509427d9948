"""What importing brings: nothing before it is needed, ComfyUI never."""

import json
import subprocess
import sys

import pytest

from harness.paths import REPO

# One process for all, as most of its time is torch's import: each step begins with what the ones before it imported.
STEPS = """
import contextlib, json, sys
found = {}
def note(step): found[step] = sorted(sys.modules)

import accel
note("accel")
accel.inspect_checkpoint(sys.argv[1]).layout
note("header")
accel.EngineSettings, accel.LoraStack, accel.read_lora
note("stack")
import torch
operators = hasattr(torch.ops.flux_hotswap, "linears")
import accel.text_encoder.load, accel.text_encoder.modes
note("text encoder")
accel.Engine
import accel.registry
note("engine")
import accel.plan
with contextlib.redirect_stdout(sys.stderr):
    accel.plan.main(["flux1-dev"])
note("plan")
print(json.dumps({"modules": found, "operators": operators}))
"""


@pytest.fixture(scope="module")
def finished(models):
    file = models / "diffusion_models" / "tiny-flux-dev-fp32.safetensors"
    done = subprocess.run([sys.executable, "-c", STEPS, str(file)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def modules(finished):
    """Step -> what is imported after it."""
    return {step: set(names) for step, names in finished[0]["modules"].items()}


def test_the_package_imports_nothing(modules):
    assert {"torch", "diffusers", "numpy", "safetensors", "accel.engine"}.isdisjoint(modules["accel"])


def test_headers_and_stacks_register_no_operator(finished, modules):
    assert "accel.checkpoint.recognise" in modules["header"]
    assert not [name for name in modules["header"] if name.startswith("accel.linear.")]
    assert {"accel.linear.operators", "diffusers", "torchao"}.isdisjoint(modules["stack"])
    assert not finished[0]["operators"]


def test_text_encoders_import_no_optional_library(modules):
    assert {"bitsandbytes", "gguf", "torchao"}.isdisjoint(modules["text encoder"])


def test_the_engine_imports_no_heavy_library(modules):
    assert "accel.linear.operators" in modules["engine"]
    assert {"diffusers", "peft"}.isdisjoint(modules["engine"])


def test_the_command_plan_runs_without_comfyui(finished, modules):
    assert "57 of 57" in finished[1]
    assert {"comfy", "folder_paths"}.isdisjoint(modules["plan"])
