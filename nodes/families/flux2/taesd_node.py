"""The node that loads a tiny autoencoder of FLUX.2 from one file."""

from __future__ import annotations

import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ....accel.checkpoint import read_file
from ....accel.errors import CheckpointError, LibraryError
from ....accel.families.flux2 import CHANNELS
from ...files import CATEGORY, find_file, fingerprint

FOLDER = "vae"
# Channels that the decoder's first convolution reads: FLUX.2's latents, unfolded to 2 × 2.
UNFOLDED = CHANNELS // 4
FIRST = "taesd_decoder.1.weight"


class FluxTaesdLoader(io.ComfyNode):
    """Flux TAESD Loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FluxTaesdLoader",
            display_name="Flux TAESD Loader",
            category=CATEGORY,
            description="Loads a tiny autoencoder of FLUX.2 (TAESD), both halves in one file, as a VAE. ComfyUI's own "
            "Load VAE reads it only as two files with fixed names. Pocket FLUX.2 comes with one.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in models/vae with taesd_encoder.* and taesd_decoder.* for FLUX.2's latents.",
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
        """Check the header, and let ComfyUI make its VAE of the file.

        Raises:
            FileError: it is not there, or no safetensors file.
            CheckpointError: it is no tiny autoencoder of FLUX.2.
            LibraryError: ComfyUI is too old.
        """
        path = find_file(FOLDER, vae_name)
        file = read_file(path)
        first = file.tensors.get(FIRST)
        if first is None or len(first.shape) != 4 or first.shape[1] != UNFOLDED:
            found = f"no '{FIRST}'" if first is None else f"a '{FIRST}' of shape {tuple(first.shape)}"
            raise CheckpointError(
                f"'{vae_name}' has {found}, expected (64, {UNFOLDED}, 3, 3): a tiny autoencoder (TAESD) of FLUX.2, "
                "such as pocket-flux2-vae.safetensors. Load any other VAE with ComfyUI's own Load VAE."
            )
        if not hasattr(comfy.taesd.taesd, "DecoderFlux2"):
            raise LibraryError(f"'{vae_name}' is a TAESD for FLUX.2, which this ComfyUI does not have. Update ComfyUI.")
        # From a file's own metadata ComfyUI 0.30 reads the number as text, which it does not take for one.
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(path), metadata={"tae_latent_channels": CHANNELS})
        vae.throw_exception_if_invalid()
        return io.NodeOutput(vae)
