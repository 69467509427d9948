"""An engine where ComfyUI expects the transformer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ..accel.engine import Engine
from ..accel.offload.planner import Planner
from .planning import out_of_memory

log = logging.getLogger(__name__)

# An entry of transformer_options: a function that starts a call of the step cache, see `SamplingRecord.note_call`; or
# None.
STEP_CACHE = "flux_hotswap_step_cache"


class EngineTransformer(nn.Module):
    """Stands where ComfyUI expects the transformer. A family's subclass translates the arguments for the engine.

    A subclass has a `forward` with the arguments of ComfyUI's own model, which hands them to `_through_wrappers`; and
    what that ends in makes the family's inputs, and hands them to `_run`.

    Attributes:
        engine: what computes.
        planner: what decides how much of the device it takes.
        skeleton: ComfyUI's own transformer of these sizes without data.
        dtype: what the engine computes in.
        patch_size: how many rows, and columns, of the latent are one token; ComfyUI reads it, too.
    """

    patch_size: ClassVar[int]

    def __init__(self, engine: Engine, planner: Planner, skeleton: nn.Module) -> None:
        """Hide engine and skeleton from nn.Module, so that ComfyUI's walks over modules and `.to` do not see them."""
        super().__init__()
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "skeleton", skeleton)
        self.planner = planner
        self.dtype = engine.dtype
        self._warned: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        """Answer for what ComfyUI's model has, such as `img_in` or `params`."""
        skeleton = self.__dict__.get("skeleton")
        if skeleton is None:
            return super().__getattr__(name)
        return getattr(skeleton, name)

    def _through_wrappers(self, call: Callable, options: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Call a method of this transformer with the wrappers that other nodes put around it.

        Args:
            call: takes `args` and `kwargs`.
            options: the transformer options, which have the wrappers.
            args: as ComfyUI's own model hands them on: wrappers of other packs count on their order.
            kwargs: likewise.
        """
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(call, self, wrappers)
        return executor.execute(*args, **kwargs)

    def _run(self, inputs: Any, x: Tensor) -> Tensor:
        """Run the engine.

        Args:
            inputs: the family's.
            x: (B, C, h, w), what ComfyUI gave; for messages.

        Raises:
            DeviceMemoryError: the device has no room for the step; the engine has given its part back.
        """
        try:
            return self.engine(inputs)
        except torch.OutOfMemoryError as exc:
            exc.__traceback__ = None  # its frames hold the tensors of the step
            pixels = self.engine.spec.family.pixels_per_latent
            width, height = pixels * x.shape[-1], pixels * x.shape[-2]
            during = f"a step of {width}×{height}, batch {x.shape[0]}"
            raise out_of_memory(self.engine, self.planner, during) from exc

    def _warn_once(self, what: str, message: str, *args: Any) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning(message, *args)

    def _warn_of_attention_override(self, options: dict[str, Any]) -> None:
        if "optimized_attention_override" in options:
            self._warn_once(
                "override",
                "Flux Hotswap: a node replaces ComfyUI's attention function (optimized_attention_override). The "
                "accelerated model has its own, chosen in Accelerated Flux Loader, and goes on without it. For this "
                "effect use ComfyUI's Load Diffusion Model.",
            )
