"""Recognise a CLIP-L text encoder from its header: names and sizes, or why it is the wrong CLIP."""

from __future__ import annotations

from ..checkpoint.source import Checkpoint
from ..errors import CheckpointError
from ..spec import StoredTensor
from .config import ClipConfig
from .spec import EncoderSpec, complete, find_prefix, layer_count, with_scales

# Names of the encoder's tensors in Hugging Face's layout, after what stands before them.
NAMES = r"(.*?)text_model\.(?:encoder\.layers\.|embeddings\.|final_layer_norm\.).*"


def matches(file: Checkpoint) -> bool:
    """Whether a file holds a CLIP text encoder, complete or not."""
    return find_prefix(file, NAMES) is not None


def read(file: Checkpoint) -> EncoderSpec:
    """The sizes and tensors of a CLIP-L text encoder of any size, in a file that `matches`.

    Raises:
        CheckpointError: another CLIP, or tensors missing or of a wrong shape.
    """
    names = _names(file, find_prefix(file, NAMES) or "")
    tokens, positions = (names.get(f"text_model.embeddings.{part}_embedding.weight") for part in ("token", "position"))
    fc1 = names.get("text_model.encoder.layers.0.mlp.fc1.weight")
    if any(stored is None or len(stored.shape) != 2 for stored in (tokens, positions, fc1)):
        raise CheckpointError(
            f"'{file.name}': the embeddings or the first layer are missing, or are no matrices. The CLIP is "
            "incomplete: get the complete text encoder."
        )
    layers = layer_count(names, r"text_model\.encoder\.layers\.(\d+)\.")
    known = {(1280, 32): "CLIP-G (of SDXL and SD3)", (1024, 24): "CLIP-H (of Stable Diffusion 2)"}
    other = known.get((tokens.shape[1], layers))
    if other:
        raise CheckpointError(
            f"'{file.name}' is {other}, expected CLIP-L: the transformer was trained with that one. "
            "Choose clip_l.safetensors."
        )
    config = ClipConfig(layers, tokens.shape[1], fc1.shape[0], positions.shape[0])
    shapes = config.shapes()
    if "text_projection.weight" in names:
        shapes["text_projection.weight"] = (config.hidden_size, config.hidden_size)
    return EncoderSpec(file, config, complete(file, names, shapes))


def _names(file: Checkpoint, prefix: str) -> dict[str, StoredTensor]:
    # Beside the text model, published files may hold the picture half, a temperature and token positions.
    wanted = (f"{prefix}text_model.", f"{prefix}text_projection.weight")
    keys = (key for key in file.tensors if key.startswith(wanted) and not key.endswith(".position_ids"))
    return with_scales(file, prefix, keys)
