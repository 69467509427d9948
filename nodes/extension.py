"""What ComfyUI's `comfy_entrypoint` returns."""

from __future__ import annotations

import os

from comfy_api.latest import ComfyExtension, io

from ..accel.prove import proofs
from .loader import FluxAccelLoader
from .lora import FluxHotswapLora
from .offload import FluxOffloadConfig
from .pocket import add_pocket_folders
from .quantize import FluxQuantizeTransformer, cache_folder
from .report import FluxAccelReport
from .step_cache import FluxStepCache
from .text_encoder import FluxTextEncoderLoader


class FluxHotswapExtension(ComfyExtension):
    """The pack's nodes."""

    async def on_load(self) -> None:
        """Add the folders of the model that comes with the pack, and remember what proved itself on this machine."""
        add_pocket_folders()
        proofs().remember_in(os.path.join(cache_folder(), "proofs"))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node class, in menu order."""
        return [
            FluxAccelLoader,
            FluxQuantizeTransformer,
            FluxOffloadConfig,
            FluxHotswapLora,
            FluxStepCache,
            FluxTextEncoderLoader,
            FluxAccelReport,
        ]
