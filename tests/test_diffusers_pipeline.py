"""The engine in diffusers' pipelines: the same latents as with diffusers' own transformer, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
)
from PIL import Image

from accel import Engine, EngineSettings, SettingsError, inspect_checkpoint
from accel.build import load_model
from accel.families.flux1.diffusers_pipeline import PipelineTransformer
from accel.families.flux2.diffusers_pipeline import PipelineTransformer as Flux2PipelineTransformer
from harness.tensor_files import write_tensors
from harness.tiny_flux2 import TinyFlux2Config, as_diffusers, tiny_flux2_state_dict
from harness.tiny_models import TinyFluxConfig, tiny_flux_state_dict

CONFIG = TinyFluxConfig(hidden=128, depth=1, depth_single=1, context=32, pooled=16)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    write_tensors(path, tiny_flux_state_dict(CONFIG))
    return inspect_checkpoint(path)


@pytest.fixture(scope="module")
def engine(spec):
    engine = Engine(spec, EngineSettings(dtype="fp32", compile="off"))
    engine.load()
    return engine


def draw(transformer, **options):
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **absent)
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(1)
    prompt = {"prompt_embeds": torch.randn(1, 5, 32, generator=random), "num_images_per_prompt": 2}
    prompt["pooled_prompt_embeds"] = torch.randn(1, 16, generator=random)
    size = {"width": 96, "height": 64, "num_inference_steps": 3, "output_type": "latent"}
    return pipeline(**prompt, **size, generator=random, **options).images


def test_the_same_latents_as_diffusers_own_transformer(spec, engine):
    own = load_model(spec, torch.float32, torch.device("cpu"), lambda done, total: None)
    expected = draw(own, guidance_scale=3.0)
    drawn = draw(PipelineTransformer(engine), guidance_scale=3.0)
    assert drawn.shape == (2, 4 * 6, 64)
    assert float((drawn - expected).norm() / expected.norm()) < 1e-5
    control = draw(PipelineTransformer(engine), guidance_scale=1.0)
    assert float((control - expected).norm() / expected.norm()) > 1e-3


def test_a_scale_of_peft_is_refused(engine):
    with pytest.raises(SettingsError, match=r"'scale': 0\.5.*Engine\.swap"):
        draw(PipelineTransformer(engine), joint_attention_kwargs={"scale": 0.5})


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]),  # a reference behind the image
        torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]),  # column by column
        torch.tensor([[0, 0, 0], [0, 0, 1]]),  # fewer than there are tokens
    ],
)
def test_other_positions_are_refused(engine, ids):
    tokens, text = torch.zeros(1, 4, 64), torch.zeros(1, 2, 32)
    with pytest.raises(SettingsError, match="one image"):
        PipelineTransformer(engine)(tokens, torch.ones(1), text, None, ids.float(), torch.zeros(2, 3))


# FLUX.2.

KLEIN = TinyFlux2Config(hidden=128, depth=1, depth_single=1, context=32)


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "klein.safetensors"
    engine = Engine(
        inspect_checkpoint(write_tensors(path, tiny_flux2_state_dict(KLEIN))),
        EngineSettings(dtype="fp32", compile="off"),
    )
    engine.load()
    return engine


def draw_klein(transformer, references=0):
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipeline = Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **absent)
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(1)
    latents = [torch.randn(1, 128, 3, 2 + number, generator=random) for number in range(references)]
    tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in latents], dim=1).expand(2, -1, -1) if latents else 0
    ids = pipeline._prepare_image_ids(latents).expand(2, -1, -1) if latents else None
    # Without an autoencoder: its whitening of latents, and what it makes of pictures.
    whitening = {"running_mean": torch.zeros(128), "running_var": torch.ones(128)}
    pipeline.vae = SimpleNamespace(
        bn=SimpleNamespace(**whitening), config=SimpleNamespace(batch_norm_eps=0.0), dtype=torch.float32
    )
    pipeline.prepare_image_latents = lambda **_: (tokens, ids)
    prompt = {"prompt_embeds": torch.randn(1, 5, 32, generator=random), "num_images_per_prompt": 2}
    negative = {"negative_prompt_embeds": torch.randn(1, 5, 32, generator=random), "guidance_scale": 2.0}
    size = {"width": 96, "height": 64, "num_inference_steps": 3, "output_type": "latent"}
    pictures = {"image": [Image.new("RGB", (64, 64))] * references} if references else {}
    return pipeline(**prompt, **negative, **size, **pictures, generator=random).images


@pytest.mark.parametrize("references", [0, 2])
def test_flux2_gives_the_same_latents_as_diffusers_own_transformer(klein, references):
    own = Flux2Transformer2DModel(**klein.spec.family.diffusers_config(klein.spec.config)).eval()
    own.load_state_dict(as_diffusers(klein.spec, tiny_flux2_state_dict(KLEIN)))
    expected = draw_klein(own, references)
    drawn = draw_klein(Flux2PipelineTransformer(klein), references)
    assert drawn.shape[0] == 2
    assert float((drawn - expected).norm() / expected.norm()) < 1e-5


def test_other_positions_of_flux2_are_refused(klein):
    tokens, text, text_ids = torch.zeros(1, 4, 128), torch.zeros(1, 2, 32), torch.zeros(2, 4)
    text_ids[:, 3] = torch.arange(2)
    grid = torch.cartesian_prod(*(torch.arange(count) for count in (1, 2, 2, 1))).float()
    call = Flux2PipelineTransformer(klein)
    assert call(tokens, torch.ones(1), text, grid, text_ids)[0].shape == (1, 4, 128)
    for ids, of_text in ((grid.flip(0), text_ids), (grid[:2], text_ids), (grid, torch.zeros(2, 4))):
        with pytest.raises(SettingsError, match="not where Flux2Pipeline puts"):
            call(tokens, torch.ones(1), text, ids, of_text)
