"""Flux Hotswap: switch LoRAs on a compiled FLUX transformer between queued prompts, in milliseconds.

This is the entry point of a ComfyUI node pack. Nothing is imported until ComfyUI asks for the nodes.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Give ComfyUI the pack's nodes."""
    from .nodes.extension import FluxHotswapExtension

    return FluxHotswapExtension()
