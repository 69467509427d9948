"""The hotswap of PEFT and of diffusers, over the same LoRA tensors and the same base on the meta device.

Neither is prepared for `torch.compile` (`enable_lora_hotswap`): its scaling tensors would make them slower, and with one
rank and one scaling for all LoRAs it is not needed. Both get their tensors in memory, already under the right keys.
"""

from __future__ import annotations

import torch

from accel.families.flux1 import Flux1Config

from .flux_loras import KEY_PREFIX, RANK, RandomLora, check_bound, meta_model

ADAPTER = "default"


class PeftHotswap:
    """PEFT's `hotswap_adapter_from_state_dict` on a model that PEFT injected its layers into."""

    def __init__(self, config: Flux1Config, first: RandomLora) -> None:
        """Load `first`, as a user does before the first switch."""
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        self._model = meta_model(config)
        self._config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(first.pairs))
        inject_adapter_in_model(self._config, self._model, ADAPTER, low_cpu_mem_usage=True)
        # Copies: on a meta model the tensors themselves become the parameters, and a swap overwrites parameters.
        tensors = {key: tensor.clone() for key, tensor in first.state_dict().items()}
        set_peft_model_state_dict(self._model, tensors, ADAPTER, low_cpu_mem_usage=True)
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
        check_bound("peft", self._model, ADAPTER, lora.pairs)


class DiffusersHotswap:
    """diffusers' `load_lora_adapter(…, hotswap=True)` on a transformer without a pipeline around it."""

    def __init__(self, config: Flux1Config, first: RandomLora) -> None:
        """Load `first`, as a user does before the first switch."""
        self._model = meta_model(config)
        tensors = {key: tensor.clone() for key, tensor in first.state_dict(KEY_PREFIX).items()}
        self._load(tensors, hotswap=False, low_cpu_mem_usage=True)
        self.check(first)

    def prepare(self, lora: RandomLora) -> None:
        """Name the tensors as a file does."""
        self._tensors = lora.state_dict(KEY_PREFIX)

    def swap(self) -> None:
        """Switch to the prepared LoRA."""
        self._load(self._tensors, hotswap=True)

    def check(self, lora: RandomLora) -> None:
        """See `check_bound`; the scaling is apart from the tensors here."""
        check_bound("diffusers", self._model, ADAPTER, lora.pairs)

    def _load(self, tensors: dict[str, torch.Tensor], **options: bool) -> None:
        self._model.load_lora_adapter(tensors, prefix=KEY_PREFIX.rstrip("."), adapter_name=ADAPTER, **options)
