"""The node that loads a tiny autoencoder of FLUX.2 from one file."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ....accel.errors import CheckpointError, LibraryError
from ....accel.families.flux2 import CHANNELS
from ...files import CATEGORY, find_file, fingerprint

FOLDER = "vae"
# What of TAESD's tensors tells how many channels it has, and how many FLUX.2's has: 2 × 2 of them are one latent.
FIRST, FOLDED = "taesd_decoder.1.weight", 4


class FluxTinyVaeLoader(io.ComfyNode):
    """Flux Tiny VAE Loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FluxTinyVaeLoader",
            display_name="Flux Tiny VAE Loader",
            category=CATEGORY,
            description="Loads a tiny VAE of FLUX.2 (TAESD) from one file, such as the one of Pocket FLUX.2. ComfyUI's "
            "VAELoader takes such VAEs as taef2 alone, from two files in models/vae_approx.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A TAESD for FLUX.2 in models/vae, with both halves: taesd_encoder.* and taesd_decoder.*. "
                    "For other VAEs use VAELoader.",
                ),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str) -> tuple[int, int]:
        """Run again when the file changes."""
        return fingerprint(FOLDER, vae_name)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        """Load it as ComfyUI loads its `taef2`."""
        tensors = comfy.utils.load_torch_file(find_file(FOLDER, vae_name))
        check(vae_name, tensors)
        # From a file's own metadata ComfyUI 0.30 reads the number as text, which it does not take for one.
        vae: Any = comfy.sd.VAE(sd=tensors, metadata={"tae_latent_channels": CHANNELS})
        vae.throw_exception_if_invalid()
        return io.NodeOutput(vae)


def check(name: str, tensors: dict[str, Tensor]) -> None:
    """Make sure that a file holds a TAESD for FLUX.2, and that this ComfyUI has its classes.

    Raises:
        CheckpointError: it holds something else.
        LibraryError: ComfyUI is too old.
    """
    first = tensors.get(FIRST)
    if first is None or first.ndim != 4 or first.shape[1] * FOLDED != CHANNELS:
        found = f"'{FIRST}' is {'missing' if first is None else f'of shape {tuple(first.shape)}'}"
        raise CheckpointError(
            f"'{name}' is no TAESD for FLUX.2: {found}, expected (64, {CHANNELS // FOLDED}, 3, 3). Load other VAEs "
            "with VAELoader."
        )
    if not hasattr(comfy.taesd.taesd, "DecoderFlux2"):
        raise LibraryError(f"'{name}' is a TAESD for FLUX.2, which this ComfyUI does not have. Update ComfyUI.")
