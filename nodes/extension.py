"""What ComfyUI's `comfy_entrypoint` returns."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .loader import FluxAccelLoader
from .lora import FluxHotswapLora
from .offload import FluxOffloadConfig
from .pocket import add_pocket_folders
from .quantize import FluxQuantizeTransformer
from .report import FluxAccelReport
from .step_cache import FluxStepCache
from .text_encoder import FluxTextEncoderLoader


class FluxHotswapExtension(ComfyExtension):
    """The pack's nodes."""

    async def on_load(self) -> None:
        """Add the folders of the model that comes with the pack."""
        add_pocket_folders()

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
