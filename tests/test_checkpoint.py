"""Recognising and loading checkpoints without ComfyUI."""


import pytest
import torch
from safetensors.torch import load_file

from accel.build import load_model
from accel.checkpoint import inspect_checkpoint
from accel.errors import CheckpointError, FileError
from accel.families.flux1 import Flux1Config
from accel.families.flux2 import Flux2Config
from harness import broken_files
from harness.tensor_files import write_tensors
from harness.tiny_flux2 import TinyFlux2Config, tiny_flux2_state_dict
from harness.tiny_models import TinyFluxConfig, tiny_flux_state_dict

CPU = torch.device("cpu")


def load(spec, dtype=torch.float32):
    return load_model(spec, dtype, CPU, lambda done, total: None)


@pytest.fixture
def dev(models) -> str:
    return str(models / "diffusion_models/tiny-flux-dev-fp32.safetensors")


def test_sizes_come_from_the_header(models):
    dev = inspect_checkpoint(str(models / "diffusion_models/tiny-flux-dev-bf16.safetensors"))
    assert dev.config == Flux1Config(256, 2, 2, 64, 64, 768, 768, 1024, True)
    assert (dev.config.variant, dev.stored_dtype, dev.config.num_heads) == ("dev", torch.bfloat16, 2)
    schnell = inspect_checkpoint(str(models / "diffusion_models/tiny-flux-schnell-fp32.safetensors"))
    assert (schnell.config.variant, schnell.config.guidance) == ("schnell", False)
    assert dev.parameter_count > schnell.parameter_count > 0


@pytest.mark.parametrize(("channels", "variant"), [(128, "control"), (384, "fill")])
def test_variants_by_their_inputs(tmp_path, channels, variant):
    path = tmp_path / "variant.safetensors"
    write_tensors(path, tiny_flux_state_dict(TinyFluxConfig(in_channels=channels)))
    spec = inspect_checkpoint(str(path))
    assert spec.config.variant == variant
    assert load(spec).x_embedder.weight.shape == (256, channels)


def test_every_value_arrives(dev):
    """Each tensor of the file, found again in the diffusers model where its layout says."""
    stored, spec = load_file(dev), inspect_checkpoint(dev)
    parameters = dict(load(spec).named_parameters())
    seen = 0
    for linear in spec.layout.linears:
        for kind in ("weight", "bias"):
            ours = torch.cat([parameters[f"{part.module}.{kind}"] for part in linear.parts])
            theirs = stored[f"{linear.name}.{kind}"]
            if linear.name == "final_layer.adaLN_modulation.1":
                theirs = torch.cat([theirs[256:], theirs[:256]])
            assert torch.equal(ours, theirs), linear.name
            seen += theirs.numel()
    for vector in spec.layout.vectors:
        assert torch.equal(parameters[vector.parameter], stored[vector.name])
        seen += vector.size
    assert seen == sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in parameters.values())


def test_the_loaded_model_is_what_diffusers_computes(dev):
    """diffusers' own forward over the loaded weights, where it does the same: a timestep that needs no rounding."""
    from accel.engine import Engine
    from accel.families.flux1 import PATCH_SIZE, POSITIONS, Flux1Inputs
    from accel.families.streams.positions import pack, unpack
    from accel.settings import EngineSettings

    spec = inspect_checkpoint(dev)
    engine = Engine(spec, EngineSettings(compile="off"))
    engine.load()
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 16, 12, 20, generator=generator)
    text, pooled = torch.randn(2, 77, 768, generator=generator), torch.randn(2, 768, generator=generator)
    timestep, guidance = torch.full((2,), 0.5), torch.full((2,), 4.0)
    placement = POSITIONS.place(latent, (), None, 77)
    with torch.inference_mode():
        reference = load(spec)(
            hidden_states=pack(latent, PATCH_SIZE),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timestep,
            guidance=guidance,
            img_ids=POSITIONS.image_ids(placement, CPU),
            txt_ids=torch.zeros(77, 3),
            return_dict=False,
        )[0]
    ours = engine(Flux1Inputs(latent, timestep, text, pooled, guidance))
    assert (ours - unpack(reference, 6, 10, PATCH_SIZE)).norm() < 1e-5 * ours.norm()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_plain_low_precision_files_load(tmp_path, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in tiny_flux_state_dict(TinyFluxConfig()).items()}
    path = tmp_path / "low.safetensors"
    write_tensors(path, tensors)
    spec = inspect_checkpoint(str(path))
    model = load(spec, torch.bfloat16)
    assert spec.stored_dtype == dtype
    assert torch.equal(model.x_embedder.weight, tensors["img_in.weight"].to(torch.bfloat16))


REFUSED = {
    "sdxl_checkpoint": ["Stable Diffusion", "FLUX.1", "Choose"],
    "flux_vae": ["a VAE", "FLUX.1"],
    "flux_missing_block": ["single_blocks.0", "missing", "get it again"],
    "flux_missing_tensor": ["missing", "complete"],
    "flux_wrong_shape": ["has shape", "expected"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_checkpoints_are_explained(tmp_path, name):
    path = getattr(broken_files, name)(tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(str(path))
    for words in [f"'{name}.safetensors'", *REFUSED[name]]:
        assert words in str(caught.value)


def test_a_checkpoint_with_nan_is_refused_when_it_loads(tmp_path):
    spec = inspect_checkpoint(str(broken_files.flux_nan(tmp_path / "nan.safetensors")))
    with pytest.raises(CheckpointError, match=r"'nan\.safetensors'.*NaN or infinity.*get it again"):
        load(spec)


RELATIVES = {
    "Chroma": "distilled_guidance_layer.in_proj.weight",
}


def test_flux2_is_a_family_of_its_own(tmp_path):
    """FLUX.1 has a name for it as for any relative; yet it is loaded, not refused."""
    path = write_tensors(tmp_path / "flux2.safetensors", tiny_flux2_state_dict(TinyFlux2Config()))
    spec = inspect_checkpoint(str(path))
    assert (spec.family.name, spec.config) == ("FLUX.2", Flux2Config(256, 2, 2, 768, 768, False))
    assert (spec.config.variant, spec.config.num_heads) == ("klein", 2)


@pytest.mark.parametrize(("model", "key"), RELATIVES.items())
def test_relatives_are_named(tmp_path, model, key):
    path = tmp_path / "relative.safetensors"
    write_tensors(path, {**tiny_flux_state_dict(TinyFluxConfig()), key: torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=f"'relative.safetensors' is a {model} checkpoint.*FLUX.1 .*and FLUX.2 "):
        inspect_checkpoint(str(path))


def test_a_checkpoint_replaced_after_inspection_is_refused(tmp_path):
    path = tmp_path / "changing.safetensors"
    write_tensors(path, tiny_flux_state_dict(TinyFluxConfig()))
    spec = inspect_checkpoint(str(path))
    write_tensors(path, tiny_flux_state_dict(TinyFluxConfig(), seed=1))
    with pytest.raises(FileError, match="was changed"):
        load(spec)
