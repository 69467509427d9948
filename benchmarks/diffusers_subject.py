"""diffusers' FLUX transformer as its documentation runs it, with PEFT's LoRA layers: a subject of the ablation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .flux_loras import DTYPE, KEY_PREFIX, STRENGTH
from .report import BenchmarkError
from .sampling import GUIDANCE, Clock, Prompt, euler
from .subjects import Setup, Work

ADAPTER = "default"
# The pack's name of an attention backend -> diffusers'.
ATTENTION = {"auto": None, "sdpa": "native", "flash_3": "_flash_3_hub"}
# A LoRA that is loaded anew compiles anew: in this process, which ends after it, as often as it takes.
RECOMPILE_LIMIT = 64


class DiffusersSubject:
    """The transformer; `hotswap` as `enable_lora_hotswap` and `load_lora_adapter(hotswap=True)` do it.

    Its weights are read by this package's reader, into diffusers' own class. The LoRA tensors are in memory, under
    diffusers' names, before the clock starts.
    """

    def __init__(self, setup: Setup, work: Work) -> None:
        """Read the checkpoint's header and the LoRAs."""
        self._setup = setup
        self._device = torch.device(work.device)
        self._spec = work.spec()
        self._tensors = {path: self._peft_tensors(path) for path in work.loras} if setup.lora else {}
        self._model: Any = None
        self._adapted = self._compiled = False
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT

    def load(self) -> None:
        """See `subjects.Subject`."""
        from accel.build import load_model

        self._model = load_model(self._spec, DTYPE, self._device, lambda done, total: None)
        if self._setup.quantization != "none":
            self._quantize()
        backend = ATTENTION[self._setup.attention]
        if backend is not None:
            self._model.set_attention_backend(backend)
        if self._setup.hotswap:
            self._model.enable_lora_hotswap(target_rank=self._rank())

    def use(self, lora: str | None) -> None:
        """See `subjects.Subject`; compiles after the first LoRA is in, which hotswap needs."""
        hotswap = self._adapted and self._setup.hotswap
        if self._adapted and not hotswap:
            self._model.delete_adapters(ADAPTER)
        if lora is not None:
            self._load_adapter(lora, hotswap)
        self._adapted = lora is not None
        if not self._compiled:
            self._compile()

    def sample(self, prompt: Prompt, clock: Clock) -> Tensor:
        """See `subjects.Subject`."""
        batch, channels, height, width = prompt.noise.shape
        rows, columns = height // 2, width // 2
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
        fixed = {
            "encoder_hidden_states": prompt.context.to(self._device, DTYPE),
            "pooled_projections": prompt.pooled.to(self._device, DTYPE),
            "guidance": torch.full((batch,), GUIDANCE, device=self._device),
            "img_ids": ids.reshape(-1, 3).to(self._device),
            "txt_ids": torch.zeros(prompt.context.shape[1], 3, device=self._device),
            "return_dict": False,
        }

        def velocity(latent: Tensor, sigma: Tensor) -> Tensor:
            patches = latent.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
            tokens = patches.reshape(batch, rows * columns, channels * 4)
            out = self._model(hidden_states=tokens.to(DTYPE), timestep=sigma, **fixed)[0]
            patches = out.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
            return patches.reshape(batch, channels, height, width)

        with torch.no_grad():
            return euler(velocity, prompt, self._device, clock)

    def check(self) -> None:
        """See `subjects.Subject`."""
        layers = sum(ADAPTER in getattr(module, "lora_A", ()) for module in self._model.modules())
        expected = len(next(iter(self._tensors.values()))) // 2 if self._tensors else 0
        if layers != expected:
            raise BenchmarkError(f"diffusers: the model has {layers} LoRA layers, expected {expected}.")

    def _peft_tensors(self, path: str) -> dict[str, Tensor]:
        from accel.lora.kinds.layers import LoraLayer
        from accel.lora.read.file import read_lora

        weights = read_lora(path, self._spec)
        if weights.vectors or not all(isinstance(each, LoraLayer) for each in weights.layers):
            raise BenchmarkError(f"'{weights.name}' is no plain LoRA: diffusers' hotswap takes nothing else.")
        tensors = {}
        for layer in weights.layers:
            # The strength is in lora_B: set_adapters would replace a tensor by a number, and compile again.
            lora_B = (layer.lora_B.float() * (STRENGTH * layer.scale)).to(DTYPE)
            for role, matrix in (("A", layer.lora_A.to(DTYPE)), ("B", lora_B)):
                tensors[f"{KEY_PREFIX}{layer.module}.lora_{role}.weight"] = matrix.contiguous()
        return tensors

    def _rank(self) -> int:
        matrices = (tensors.items() for tensors in self._tensors.values())
        return max(matrix.shape[0] for each in matrices for key, matrix in each if ".lora_A." in key)

    def _load_adapter(self, lora: str, hotswap: bool) -> None:
        # diffusers takes the tensors out of the dictionary.
        tensors = dict(self._tensors[lora])
        self._model.load_lora_adapter(
            tensors, prefix=KEY_PREFIX.rstrip("."), adapter_name=ADAPTER, hotswap=hotswap, low_cpu_mem_usage=False
        )
        self._model.requires_grad_(False)

    def _compile(self) -> None:
        if self._setup.compile == "regional":
            self._model.compile_repeated_blocks(fullgraph=True, dynamic=True)
        elif self._setup.compile == "full":
            self._model.compile(fullgraph=True)
        self._compiled = True

    def _quantize(self) -> None:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )

        configs = {
            "fp8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
            "int8": lambda: Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        }
        quantize_(self._model, configs[self._setup.quantization](), self._quantizes)

    def _quantizes(self, module: nn.Module, name: str) -> bool:
        """The linears that the pack quantizes; modulations have one row, which CUDA's int8 product does not take."""
        linear = self._spec.layout.by_module.get(name)
        if linear is None or not linear.quantizable or not isinstance(module, nn.Linear):
            return False
        return self._setup.quantization != "int8" or self._device.type == "cpu" or not linear.per_picture
