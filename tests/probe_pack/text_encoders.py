"""Looks into the text encoders that the pack keeps."""

import sys

from aiohttp import web
from server import PromptServer


@PromptServer.instance.routes.get("/probe/text_encoders")
async def text_encoders(request):
    """The registry's CLIPs: what is loaded, how often each encoder ran, and the quantization."""
    name = next(name for name in sys.modules if name.endswith(".accel.registry"))
    return web.json_response([
        {
            "loaded": clip.cond_stage_model.loaded,
            "mode": clip.cond_stage_model.mode,
            "quantized": len(clip.cond_stage_model.quantized),
            "encode_counts": clip.cond_stage_model.encode_counts,
        }
        for clip in sys.modules[name].TEXT_ENCODERS.values()
    ])
