"""Which keys of a LoRA file are for text encoders, and for which layer of a CLIP's encoders each is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .names import WORDS, ModuleNames

# Encoder, as ComfyUI's CLIP calls it -> what files call it. As FLUX has them: CLIP-L first, T5 second; sd-scripts and
# SD3's trainers count T5 as the third, behind a CLIP-G that FLUX does not have.
ENCODERS: Mapping[str, tuple[str, ...]] = {
    "clip_l": ("clip_l", "text_encoder", "text_encoder_1", "te", "te1"),
    "t5xxl": ("t5xxl", "t5", "text_encoder_2", "text_encoder_3", "te2", "te3"),
}
# For none of FLUX's encoders, and for no transformer.
OTHERS = ("clip_g", "clip_h", "te4", "text_encoder_4")
_NAMES = {name: encoder for encoder, names in ENCODERS.items() for name in names} | dict.fromkeys(OTHERS, "")
_BEFORE = rf"(?:(?:text_encoders|{'|'.join(WORDS)})[._]+)*"
_NAMED = re.compile(rf"{_BEFORE}(?P<name>{'|'.join(sorted(_NAMES, key=len, reverse=True))})[._]+(?P<rest>.+)")
# An encoder's own module names say enough where nothing is before them.
_BARE = re.compile(rf"{_BEFORE}(?P<rest>(?:(?P<clip_l>text_model)|(?P<t5xxl>encoder[._]block))[._].+)")


def split_encoder(spelled: str) -> tuple[str, str] | None:
    """The encoder that a key or module name is for ("" for one that FLUX lacks), and what follows; None: for none."""
    named = _NAMED.match(spelled)
    if named is not None:
        return _NAMES[named["name"]], named["rest"]
    bare = _BARE.match(spelled)
    return None if bare is None else ("clip_l" if bare["clip_l"] else "t5xxl", bare["rest"])


class EncoderNames:
    """Names of a CLIP's layers, however a file spells them."""

    def __init__(self, weights: Iterable[str]) -> None:
        """Know a CLIP's weights, such as `t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight`."""
        layers: dict[str, dict[str, str]] = {encoder: {} for encoder in ENCODERS}
        for weight in weights:
            encoder, _, rest = weight.partition(".transformer.")
            if rest.endswith(".weight") and encoder in layers:
                layer = rest.removesuffix(".weight")
                layers[encoder][layer] = weight
                # Since version 5 transformers calls CLIP's layers without it.
                layers[encoder][layer.removeprefix("text_model.")] = weight
        self._layers = {encoder: ModuleNames(names) for encoder, names in layers.items() if names}

    def find(self, spelled: str) -> str | None:
        """The weight that a module name means; None: the CLIP has no such layer, see `missing`."""
        encoder, rest = split_encoder(spelled) or ("", spelled)
        return self._layers[encoder].find(rest) if encoder in self._layers else None

    def missing(self, spelled: str) -> str:
        """Why `find` finds nothing."""
        encoder, rest = split_encoder(spelled) or ("", spelled)
        if not encoder or (encoder == "t5xxl" and rest.startswith("text_model")):
            return "for a text encoder that FLUX.1 does not have, such as SDXL's CLIP-G"
        if encoder not in self._layers:
            return f"for {encoder}, which the connected CLIP does not have"
        return f"for layers that the {encoder} does not have"
