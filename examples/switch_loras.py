"""Draw with Pocket FLUX and switch its LoRAs, without ComfyUI.

`python -m examples.switch_loras [PICTURES.png]` from the repository's folder draws one prompt four times from the same
noise: without a LoRA, with one, with two, and without again. It says what each switch took. Nothing is compiled,
because four small pictures take less than compiling does; leave `compile` out to compile each block type once.
"""

import sys
from itertools import pairwise

import torch

from accel import Engine, EngineSettings, LoraStack, inspect_checkpoint
from accel.families.flux1 import Flux1Inputs
from examples.pocket_files import MODEL, NEON, STEPS, STRIPES, encode_prompt, save_pictures, starting_noise

engine = Engine(inspect_checkpoint(MODEL), EngineSettings(dtype="fp32", compile="off"))
engine.load()
striped = LoraStack().with_lora(engine.read_lora(STRIPES), 1.0)
glowing = striped.with_lora(engine.read_lora(NEON), 0.8)

prompt, drawn = encode_prompt("a large green heart"), []
for stack in (LoraStack(), striped, glowing, LoraStack()):
    report = engine.swap(stack)
    print(f"{report.loras}: {report.source}, {report.swap_ms:.2f} ms")
    latents = starting_noise(seed=7)
    for sigma, following in pairwise(torch.linspace(1.0, 0.0, STEPS + 1)):
        velocity = engine(Flux1Inputs(latents, sigma.expand(1), prompt))
        latents = latents + (following - sigma) * velocity
    drawn.append(latents)

save_pictures(sys.argv[1] if len(sys.argv) > 1 else "switch_loras.png", drawn)
