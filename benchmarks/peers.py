"""The hotswap of PEFT and of diffusers, over the same LoRA tensors and diffusers' own model on the meta device.

Neither is prepared for `torch.compile` (`enable_lora_hotswap`): its scaling tensors would make them slower, and where
all LoRAs have one rank and one scaling it is not needed. Both find their tensors in host memory, under the right keys.
"""

from __future__ import annotations

import torch
from torch import nn

from .families.base import Config
from .flux_loras import KEY_PREFIX, RANK, RandomLora, check_bound, diffusers_model, pairs_on

ADAPTER = "default"


class PeftHotswap:
    """PEFT's `hotswap_adapter_from_state_dict` on a model that PEFT injected its layers into."""

    def __init__(self, config: Config, first: RandomLora, device: torch.device) -> None:
        """Load `first`, as a user does before the first switch."""
        from peft import LoraConfig, inject_adapter_in_model

        self._model = diffusers_model(config)
        self._config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(first.matrices))
        inject_adapter_in_model(self._config, self._model, ADAPTER, low_cpu_mem_usage=True)
        _materialize(self._model, first, device)
        self._device = device
        self.check(first)

    def prepare(self, lora: RandomLora) -> None:
        """Name the tensors as the swap wants them."""
        self._tensors = lora.state_dict(adapter=ADAPTER)

    @torch.no_grad()
    def swap(self) -> None:
        """Switch to the prepared LoRA."""
        from peft.utils.hotswap import hotswap_adapter_from_state_dict

        hotswap_adapter_from_state_dict(self._model, self._tensors, ADAPTER, self._config)

    def check(self, lora: RandomLora) -> None:
        """See `check_bound`; the scaling is apart from the tensors here."""
        check_bound("peft", self._model, ADAPTER, pairs_on(self._device, lora.matrices))


class DiffusersHotswap:
    """diffusers' `load_lora_adapter(…, hotswap=True)` on a transformer without a pipeline around it."""

    def __init__(self, config: Config, first: RandomLora, device: torch.device) -> None:
        """Load `first`, as a user does before the first switch."""
        self._model = diffusers_model(config)
        self._load(first.state_dict(KEY_PREFIX), hotswap=False, low_cpu_mem_usage=True)
        _materialize(self._model, first, device)
        self._device = device
        self.check(first)

    def prepare(self, lora: RandomLora) -> None:
        """Name the tensors as a file does."""
        self._tensors = lora.state_dict(KEY_PREFIX)

    def swap(self) -> None:
        """Switch to the prepared LoRA."""
        self._load(self._tensors, hotswap=True)

    def check(self, lora: RandomLora) -> None:
        """See `check_bound`; the scaling is apart from the tensors here."""
        check_bound("diffusers", self._model, ADAPTER, pairs_on(self._device, lora.matrices))

    def _load(self, tensors: dict[str, torch.Tensor], **options: bool) -> None:
        self._model.load_lora_adapter(tensors, prefix=KEY_PREFIX.rstrip("."), adapter_name=ADAPTER, **options)


def _materialize(model: nn.Module, lora: RandomLora, device: torch.device) -> None:
    """Give the LoRA layers memory: both libraries move them to where the base weights are, the meta device."""
    for module, pair in lora.matrices.items():
        layer = model.get_submodule(module)
        for half, tensor in zip((layer.lora_A, layer.lora_B), pair, strict=True):
            half[ADAPTER].weight = nn.Parameter(tensor.to(device, copy=True), requires_grad=False)
