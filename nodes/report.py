"""The node that says what an accelerated MODEL is and did."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..accel.chart import draw_samplings
from ..accel.report import Reported, write_report
from . import contract
from .files import CATEGORY
from .patcher import accelerated
from .reliance import VERSION

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


class FluxAccelReport(io.ComfyNode):
    """Flux Accel Report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FluxAccelReport",
            display_name="Flux Accel Report",
            category=CATEGORY,
            description="Says what an accelerated model is, how its last samplings went, and what it runs on. Paste "
            "the text into a bug report: it has file names, but no folders and no prompts.",
            inputs=[
                io.Model.Input("model", tooltip="From Accelerated Flux Loader, Hotswap LoRA or Flux Step Cache."),
                io.AnyType.Input(
                    "passthrough",
                    optional=True,
                    tooltip="The sampler's output, or anything made of it: the report then waits for it and has its "
                    "times.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="chart"),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> int:
        """Run in every prompt: the engine changes without its inputs."""
        return time.monotonic_ns()

    @classmethod
    def execute(cls, model, passthrough=None) -> io.NodeOutput:
        """Write and draw."""
        ours = accelerated(model, "Flux Accel Report", "It has nothing to say of others.")
        samplings = tuple(ours.model.samplings)
        text = write_report(
            Reported(ours.engine, ours.loras, ours.step_cache, samplings, ours.model.last_load_s, _host())
        )
        picture = draw_samplings(samplings, Path(ours.engine.spec.file.name).name)
        image = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)[None]
        # Without `cls`: no workflow, and so no prompt, is written into the picture.
        shown = {**ui.PreviewImage(image).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(text, image, ui=shown)


def _host() -> dict[str, str]:
    """Versions of this pack and of ComfyUI."""
    found = re.search(r'^version = "(.+)"', PROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    return {"Flux Hotswap": found.group(1) if found else "unknown", "ComfyUI": _comfyui_version()}


def _comfyui_version() -> str:
    if not contract.holds(VERSION):
        return "unknown"
    from comfyui_version import __version__

    return __version__
