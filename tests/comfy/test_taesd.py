"""Flux TAESD Loader within ComfyUI's own code, in this process: Pocket FLUX.2's VAE, and other files."""

import pytest
import torch

from pocket import autoencoder, draw, files, measure
from pocket.flux1 import FLUX1
from pocket.flux2 import FLUX2

SCENE = draw.Scene("heart", "pink", ground="light blue")


@pytest.fixture(scope="module")
def loader(core):
    """The node, over the folder of the pocket models."""
    module = core("nodes.families.flux2.taesd_node")
    core("nodes.pocket").add_pocket_folders()
    return module.FluxTaesdLoader


def test_it_encodes_and_decodes_as_training_did(loader):
    name = FLUX2.files["vae"].removeprefix("vae/")
    (vae,) = loader.execute(name).result
    picture = torch.from_numpy(draw.draw(SCENE))[None]
    encoded = vae.encode(picture).detach()
    whitening = FLUX2.latents.read(files.load_file(files.MODELS / FLUX2.files["vae"]))
    own = FLUX2.latents.encode(autoencoder.average(picture.permute(0, 3, 1, 2), FLUX2.latents.averaged), whitening)
    assert encoded.shape == (1, 128, 6, 6)
    assert float((encoded - own).abs().max()) < 5e-3
    seen = measure.see(vae.decode(encoded)[0].detach().numpy())
    assert all(measure.follows(seen, SCENE).values())


def test_another_vae_is_refused(loader, core):
    errors = core("accel.errors")
    with pytest.raises(errors.CheckpointError, match=r"of shape \(64, 16, 3, 3\), expected \(64, 32, 3, 3\)"):
        loader.execute(FLUX1.files["vae"].removeprefix("vae/"))
