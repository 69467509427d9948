"""LoRA files of every trainer's format and every kind of change, drawn by the pack and by stock ComfyUI."""

from dataclasses import replace

import pytest
import torch

from harness.graphs import Picture
from harness.lora_files import kind_state_dict, norm_state_dict
from harness.lora_formats import STOCK_FORMATS

FP32 = 1e-4
BF16 = 0.03
VISIBLE = 0.05
DEV = Picture()


def assert_equal(comfy, loras, picture=DEV, tolerance=FP32):
    compared = comfy.compare(replace(picture, loras=loras), plain=picture)
    assert compared.distance < tolerance
    assert compared.effect > VISIBLE


@pytest.mark.parametrize("format", [name for name in STOCK_FORMATS if name not in ("kohya", "diffusers", "native")])
def test_formats(comfy, format):
    name = comfy.lora(f"format-{format}.safetensors", format, rank=5, alpha=4.0)
    assert_equal(comfy, [(name, 0.8)])


KINDS = {
    "GLoRA": {"alpha": 2.0},
    "difference": {},
    "LoCon": {}, "LoHa": {"alpha": 2.0}, "LoKr": {"alpha": 2.0}, "LoRA 1x1": {}, "DoRA": {"alpha": 4.0, "rms": 0.01},
    "LoKr DoRA": {"rms": 0.01}, "LoKr full": {}, "LoKr full DoRA": {"rms": 0.01}, "OFT": {}, "bias": {},
}


# What these add is not in proportion to the strength, so that 1 is a case of its own.
CURVED = ("DoRA", "LoKr DoRA", "LoKr full DoRA", "OFT")


@pytest.mark.parametrize(("kind", "strength"), [*((kind, 0.6) for kind in KINDS), *((kind, 1.0) for kind in CURVED)])
def test_kinds(comfy, kind, strength):
    file = kind_state_dict(kind, **KINDS[kind])
    name = comfy.tensors("loras", f"kind-{kind.replace(' ', '-')}.safetensors", file)
    assert_equal(comfy, [(name, strength)])


def test_norms(comfy):
    name = comfy.tensors("loras", "norms.safetensors", norm_state_dict(std=0.6))
    assert_equal(comfy, [(name, 1.0)])


STACK = (("DoRA", 0.8), ("LoKr full", 0.5), ("OFT", 0.6), ("LoRA", -0.7), ("bias", 0.5), ("DoRA", 0.4))


def stack_of(comfy):
    return [
        (
            comfy.tensors("loras", f"stack-{number}.safetensors", kind_state_dict(kind, seed=number, rms=0.01)),
            strength,
        )
        for number, (kind, strength) in enumerate(STACK)
    ]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_stack_of_kinds_in_its_order(comfy, reverse):
    loras = stack_of(comfy)
    assert_equal(comfy, loras[::-1] if reverse else loras)


def test_kinds_in_bf16(comfy):
    picture = Picture(model="tiny-flux-dev-bf16.safetensors", dtype="auto")
    assert_equal(comfy, stack_of(comfy), picture, BF16)


def test_after_any_kind_the_base_is_bit_identical(comfy):
    before = comfy.sample(DEV)
    plain = comfy.lora("plain.safetensors", "kohya", rank=8)
    with_plain = comfy.sample(replace(DEV, loras=[(plain, 0.8)]))
    engine = comfy.engine()
    for kind in ("DoRA", "OFT", "bias", "LoKr full"):
        name = comfy.tensors("loras", f"kind-{kind}.safetensors", kind_state_dict(kind))
        assert not torch.equal(comfy.sample(replace(DEV, loras=[(name, 1.0)])), before)
        assert torch.equal(comfy.sample(replace(DEV, loras=[(plain, 0.8)])), with_plain)
        assert torch.equal(comfy.sample(DEV), before)
    assert comfy.engine()["load_count"] == engine["load_count"]
