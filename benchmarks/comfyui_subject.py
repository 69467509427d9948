"""Stock ComfyUI with its own LoRA patching, sampler and TorchCompileModel: a subject of the ablation.

Real ComfyUI code runs, in the order in which the nodes Load Diffusion Model, LoraLoaderModelOnly, TorchCompileModel and
SamplerCustomAdvanced call it.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor

from .flux_loras import DTYPE, STRENGTH
from .report import BenchmarkError
from .sampling import GUIDANCE, Clock, Prompt
from .subjects import Setup, Work


class ComfySubject:
    """ComfyUI's MODEL; a new LoRA is a new clone of it, as each execution of a LoRA node makes one."""

    def __init__(self, setup: Setup, work: Work) -> None:
        """Import ComfyUI into this process."""
        sys.path.insert(0, work.comfyui)
        import comfy.cli_args

        comfy.cli_args.args.cpu = work.device == "cpu"  # read when comfy.model_management is imported
        import comfy.sample
        import comfy.samplers
        import comfy.sd
        import comfy.utils

        if setup.compile != "off":
            import comfy_extras.nodes_torch_compile  # noqa: F401
        logging.getLogger().setLevel(logging.WARNING)
        self._setup = setup
        self._work = work
        self._root: Any = None
        self._patched: Any = None

    def load(self) -> None:
        """See `subjects.Subject`."""
        import comfy.ops
        import comfy.sd

        # All of FLUX.1 stays in bfloat16 on a CPU; a model of few blocks would be loaded in float32.
        options: dict[str, Any] = {"dtype": DTYPE}
        if not self._setup.fp32_compute:
            options["custom_operations"] = comfy.ops.disable_weight_init  # those without a cast at each call
        if isinstance(self._work.model, str):
            self._root = comfy.sd.load_diffusion_model(self._work.model, model_options=options)
        else:
            self._root = comfy.sd.load_diffusion_model_state_dict(self._made(), model_options=options)
        if not self._setup.fp32_compute:
            self._root.model.manual_cast_dtype = None
        expected = torch.float32 if self._setup.fp32_compute else DTYPE
        if (self._root.model.get_dtype(), self._root.model.get_dtype_inference()) != (DTYPE, expected):
            raise BenchmarkError(f"ComfyUI computes in {self._root.model.get_dtype_inference()}, expected {expected}.")

    def _made(self) -> dict[str, Tensor]:
        """Random weights in host memory, where a file's would be."""
        file = self._work.spec().file
        with file.open() as tensor:
            return {name: tensor(name).cpu() for name in file.tensors}

    def use(self, lora: str | None) -> None:
        """See `subjects.Subject`. Merging happens when the next image begins, as in ComfyUI."""
        import comfy.sd
        import comfy.utils

        self._patched = self._root
        if lora is not None:
            tensors = comfy.utils.load_torch_file(lora, safe_load=True)
            self._patched, _ = comfy.sd.load_lora_for_models(self._root, None, tensors, STRENGTH, 0.0)
        if self._setup.compile != "off":
            from comfy_extras.nodes_torch_compile import TorchCompileModel

            self._patched = TorchCompileModel.execute(self._patched, "inductor").args[0]

    def sample(self, prompt: Prompt, clock: Clock) -> Tensor:
        """See `subjects.Subject`."""
        import comfy.sample
        import comfy.samplers

        condition = [[prompt.context, {"pooled_output": prompt.pooled, "guidance": GUIDANCE}]]
        with torch.inference_mode():  # ComfyUI executes nodes in it
            samples = comfy.sample.sample_custom(
                self._patched, prompt.noise, 1.0, comfy.samplers.sampler_object("euler"), prompt.sigmas,
                condition, condition, torch.zeros_like(prompt.noise),
                callback=lambda *_: clock.step(), disable_pbar=True, seed=0,
            )  # fmt: skip
            return self._patched.model.process_latent_in(samples).float().cpu().clone()

    def check(self) -> None:
        """See `subjects.Subject`."""
        if bool(self._patched.patches) != self._setup.lora:
            raise BenchmarkError(f"ComfyUI merged {len(self._patched.patches)} weights; a LoRA: {self._setup.lora}.")
