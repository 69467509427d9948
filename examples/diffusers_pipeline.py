"""Put the engine into diffusers' FluxPipeline as its transformer, and switch LoRAs between its calls.

`python -m examples.diffusers_pipeline [PICTURES.png]` from the repository's folder draws one prompt with three LoRAs.
Pocket FLUX has a T5 of its own and no CLIP, so here the pipeline gets its prompt as tensors and gives latents; with
FLUX.1's own text encoders and autoencoder it takes words and gives pictures, as always.
"""

import sys

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from accel import Engine, EngineSettings, LoraStack, inspect_checkpoint
from accel.families.flux1.diffusers_pipeline import PipelineTransformer
from accel.families.streams.positions import unpack
from examples.pocket_files import MODEL, NEON, OUTLINE, STEPS, STRIPES, encode_prompt, save_pictures

engine = Engine(inspect_checkpoint(MODEL), EngineSettings(dtype="fp32", compile="off"))
engine.load()
absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=PipelineTransformer(engine), **absent)

prompt = {"prompt_embeds": encode_prompt("a large green heart"), "pooled_prompt_embeds": torch.zeros(1, 16)}
size = {"width": 96, "height": 96, "num_inference_steps": STEPS, "output_type": "latent"}
drawn = []
for lora in (OUTLINE, NEON, STRIPES):
    engine.swap(LoraStack().with_lora(engine.read_lora(lora), 1.0))
    tokens = pipeline(**prompt, **size, generator=torch.Generator().manual_seed(7)).images
    drawn.append(unpack(tokens, rows=6, columns=6, patch_size=2))

save_pictures(sys.argv[1] if len(sys.argv) > 1 else "diffusers_pipeline.png", drawn)
