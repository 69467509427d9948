"""Dynamic VRAM, ComfyUI's default on NVIDIA, leaves linears without parameters: what the pack builds has them all.

In this process, with ComfyUI's own switch on. What else it switches needs a GPU, and is not tested here.
"""

import copy

import pytest
import torch

from harness.lora_files import lora_state_dict
from harness.tensor_files import write_tensors
from harness.text_encoder_files import cast
from harness.tiny_others import tiny_clip_l_state_dict, tiny_t5_state_dict

CPU = torch.device("cpu")
MODEL = "tiny-flux-dev-fp32.safetensors"


@pytest.fixture
def switch(core, monkeypatch):
    """`switch(True)` turns it on, with Windows' older condition."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.ops

    def turn(on: bool) -> None:
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", on)
        monkeypatch.setattr(comfy.model_management, "WINDOWS", on)
        # The control: ComfyUI's own linears are empty.
        assert (comfy.ops.disable_weight_init.Linear(2, 2).weight is None) == on

    return turn


@pytest.fixture
def load(core, models, monkeypatch):
    """`load()`: a MODEL of Accelerated Flux Loader; each time a new one."""
    import folder_paths

    folders = copy.deepcopy(folder_paths.folder_names_and_paths)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    folder_paths.add_model_folder_path("diffusion_models", str(models / "diffusion_models"), is_default=True)
    registry = core("accel.registry").ENGINES

    def execute():
        registry.clear()
        return core("nodes.loader").FluxAccelLoader.execute(MODEL, "fp32", "sdpa", "off").args[0]

    yield execute
    registry.clear()


def test_the_model_has_its_names(switch, load):
    """And the shapes, dtypes and LoRA names that follow from them."""
    import comfy.lora

    found = []
    for on in (False, True):
        switch(on)
        model = load().model
        weights = {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in model.state_dict().items()}
        modules = {name: type(module).__name__ for name, module in model.diffusion_model.skeleton.named_modules()}
        found.append((weights, comfy.lora.model_lora_keys_unet(model, {}), modules))
        assert model.diffusion_model.img_in.weight.shape == (256, 64)
    assert found[0] == found[1]
    assert len(found[0][0]) > 50


@pytest.mark.parametrize("format", ["kohya", "diffusers", "native", "onetrainer"])
def test_comfyuis_loader_puts_loras_on_it(switch, load, format):
    import comfy.sd

    stacks = []
    for on in (False, True):
        switch(on)
        tensors = lora_state_dict(format, rank=4)
        patched, _ = comfy.sd.load_lora_for_models(load(), None, tensors, 0.7, 0.0)
        [entry] = patched.loras.stack.entries
        stacks.append([(layer.module, layer.rank) for layer in entry.adapter.layers])
    assert stacks[0] == stacks[1]
    assert stacks[0]


@pytest.mark.parametrize("mode", ["none", "int8"])
def test_text_encoders_have_their_weights(core, switch, tmp_path, mode):
    """Before and after they are read, and the LoRAs that ComfyUI finds for them."""
    import comfy.lora

    recognise, checkpoint = core("accel.text_encoder.recognise"), core("accel.checkpoint")
    clip = core("nodes.families.flux1.clip")
    t5 = write_tensors(tmp_path / "t5.safetensors", cast(tiny_t5_state_dict(), torch.float16))
    clip_l = write_tensors(tmp_path / "clip.safetensors", tiny_clip_l_state_dict(hidden=128, layers=2))
    found, encoded = [], []
    for on in (False, True):
        switch(on)
        made = clip.FluxClip(
            recognise.encoder_spec(checkpoint.read_file(str(t5))),
            recognise.clip_spec(checkpoint.read_file(str(clip_l))),
            mode, CPU, CPU, None,
        )  # fmt: skip
        encoders = made.cond_stage_model
        states = []
        for loaded in (False, True):
            if loaded:
                encoders.fill(CPU, CPU)
            states.append({
                name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in encoders.state_dict().items()
            })
        assert states[0].keys() == states[1].keys()
        found.append((states, comfy.lora.model_lora_keys_clip(encoders, {})))
        with torch.inference_mode():
            encoded.append(encoders.encode_token_weights(made.tokenize("a red fox (jumps:1.3)"))[:2])
    assert found[0] == found[1]
    assert all(torch.equal(off, on) for off, on in zip(*encoded, strict=True))
