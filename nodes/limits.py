"""ComfyUI's patcher without what cannot be done to an engine: each is refused, or ignored, with what to do instead."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_patcher

from ..accel.engine import Engine
from ..accel.errors import SettingsError

log = logging.getLogger(__name__)


class LimitedPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher around an engine that takes the patches which an engine can heed."""

    @property
    def engine(self) -> Engine:
        """The engine that all clones share."""
        return self.model.diffusion_model.engine

    @property
    def _title(self) -> str:
        """What messages call the model."""
        return f"accelerated {self.engine.spec.family.name} model"

    def _no_merging(self) -> SettingsError:
        return SettingsError(
            f"The {self._title} cannot be merged with another. Merge with ComfyUI's Load Diffusion Model, "
            "save the result, and load that file here."
        )

    def get_key_patches(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuse merging of models."""
        raise self._no_merging()

    def add_hook_patches(self, *args: Any, **kwargs: Any) -> None:
        """Refuse weight hooks."""
        raise SettingsError(
            f"The {self._title} does not take LoRAs scheduled as hooks on the conditioning. Use Hotswap LoRA "
            "on the model, or ComfyUI's Load Diffusion Model for this graph."
        )

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuse saving."""
        raise SettingsError(
            f"The {self._title} cannot be saved: it holds the weights of its file unchanged. Copy "
            f"'{self.engine.spec.file.name}', or save from ComfyUI's Load Diffusion Model."
        )

    # Versions of ComfyUI differ in the name.
    model_state_dict_for_saving = state_dict_for_saving

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> LimitedPatcher:
        """Refuse copies on further GPUs."""
        raise SettingsError(f"The {self._title} runs on one GPU. Remove the multi-GPU node from its path.")

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any, *args: Any, **kwargs: Any) -> None:
        """Take any wrapper but that of TorchCompileModel: the engine is compiled already, and better."""
        if key == "torch.compile":
            log.warning(
                "Flux Hotswap: TorchCompileModel has no effect on the accelerated model, which compiles itself (see "
                "'compile' in Accelerated Flux Loader)."
            )
            return
        super().add_wrapper_with_key(wrapper_type, key, wrapper, *args, **kwargs)

    def set_injections(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Take any injection but that of the bypass loader, which replaces the forward of modules that do not run."""
        if key == "bypass_lora":
            raise SettingsError(
                f"Load LoRA (Bypass) does not work on the {self._title}, and is not "
                "needed: Load LoRA and Hotswap LoRA leave its weights untouched. Use one of them."
            )
        super().set_injections(key, *args, **kwargs)

    def add_object_patch(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Take any object patch, and warn of those on parts of the transformer, which compute nothing here.

        Its `params` are read all the same: Flux KV Cache changes how references are placed there.
        """
        if name.startswith("diffusion_model.") and not name.startswith("diffusion_model.params."):
            log.warning(
                "Flux Hotswap: a node replaces %s, which has no effect on the accelerated model. For this effect use "
                "ComfyUI's Load Diffusion Model.",
                name,
            )
        super().add_object_patch(name, *args, **kwargs)
