"""The engine in diffusers' FluxPipeline: the same latents as with diffusers' own transformer, and what it refuses."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from accel import Engine, EngineSettings, SettingsError, inspect_checkpoint
from accel.build import load_model
from accel.families.flux1.diffusers_pipeline import PipelineTransformer
from harness.tensor_files import write_tensors
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
