"""Which keys of a LoRA file are for text encoders, and for which layer of a CLIP's encoders each is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ...errors import LoraError
from ...families.layout import LoraTarget
from ...files import TensorInfo
from .. import kinds
from ..kinds.shapes import Shapes, TensorHeader
from .names import WORDS, ModuleNames, cuts

# It has nothing beside it in a CLIP: files call it by ComfyUI's names for its sizes, or as the first encoder.
LANGUAGE_MODEL = "language model"
# Encoder, as ComfyUI's CLIP calls it -> what files call it. CLIP-L comes first and T5 second; sd-scripts and SD3's
# trainers count T5 as the third, behind a CLIP-G.
ENCODERS: Mapping[str, tuple[str, ...]] = {
    "clip_l": ("clip_l", "text_encoder", "text_encoder_1", "te", "te1"),
    "t5xxl": ("t5xxl", "t5", "text_encoder_2", "text_encoder_3", "te2", "te3"),
    LANGUAGE_MODEL: ("qwen3_4b", "qwen3_8b", "mistral3_24b"),
}
# For neither of these encoders, and for no transformer.
OTHERS = ("clip_g", "clip_h", "te4", "text_encoder_4")
_NAMES = {name: encoder for encoder, names in ENCODERS.items() for name in names} | dict.fromkeys(OTHERS, "")
_BEFORE = rf"(?:(?:text_encoders|{'|'.join(WORDS)})[._]+)*"
_NAMED = re.compile(rf"{_BEFORE}(?P<name>{'|'.join(sorted(_NAMES, key=len, reverse=True))})[._]+(?P<rest>.+)")
# An encoder's own module names say enough where nothing is before them.
_BARE = re.compile(rf"{_BEFORE}(?P<rest>(?:(?P<clip_l>text_model)|(?P<t5xxl>encoder[._]block))[._].+)")
# So do a language model's.
_OF_LANGUAGE_MODEL = re.compile(rf"{_BEFORE}(?:language_model[._])?(?P<rest>layers[._]\d+[._](?:self_attn|mlp)[._].+)")


def split_encoder(spelled: str) -> tuple[str, str] | None:
    """The encoder that a key or module name is for ("" for another than these), and what follows; None: for none."""
    named = _NAMED.match(spelled)
    layer = _OF_LANGUAGE_MODEL.match(named["rest"] if named else spelled)
    if layer is not None:
        return LANGUAGE_MODEL, layer["rest"]
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
            name, _, rest = weight.partition(".transformer.")
            encoder = _NAMES.get(name, "")
            if rest.endswith(".weight") and encoder:
                layer = rest.removesuffix(".weight")
                layers[encoder][layer] = weight
                # transformers calls CLIP's without it since version 5 (seen in 5.24).
                layers[encoder][layer.removeprefix("text_model.")] = weight
                layers[encoder][layer.removeprefix("model.")] = weight
        self._layers = {encoder: ModuleNames(names) for encoder, names in layers.items() if names}

    def find(self, spelled: str) -> str | None:
        """The weight that a module name means; None: the CLIP has no such layer, see `missing`."""
        encoder, rest = split_encoder(spelled) or ("", spelled)
        return self._layers[encoder].find(rest) if encoder in self._layers else None

    def missing(self, spelled: str) -> str:
        """Why `find` finds nothing."""
        encoder, rest = split_encoder(spelled) or ("", spelled)
        if not encoder or (encoder == "t5xxl" and rest.startswith("text_model")):
            return "for a text encoder that this model does not have, such as SDXL's CLIP-G"
        if encoder not in self._layers:
            return f"for {encoder}, which the connected CLIP does not have"
        unread = ", or of which nothing is read" if encoder == LANGUAGE_MODEL else ""
        return f"for layers that the {encoder} does not have{unread}"


@dataclass(frozen=True)
class EncoderKeys:
    """The keys of a file for text encoders, all accounted for.

    Attributes:
        layers: weight of the CLIP -> role -> key.
        left: why keys are left out -> these keys.
    """

    layers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    left: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def applied(self) -> int:
        """Keys that are applied."""
        return sum(map(len, self.layers.values()))

    def without(self, weights: Iterable[str], why: str) -> EncoderKeys:
        """The same, with some layers left out."""
        out = set(weights)
        keys = [key for weight in self.layers if weight in out for key in self.layers[weight].values()]
        layers = {weight: roles for weight, roles in self.layers.items() if weight not in out}
        return EncoderKeys(layers, {**self.left, why: (*self.left.get(why, ()), *keys)} if keys else self.left)

    def __str__(self) -> str:
        """One line: how many keys are applied, how many are not, the first of them, and why."""
        parts = [f"{self.applied} keys for text encoders applied"]
        for why, keys in self.left.items():
            parts.append(f"{len(keys)} not, such as '{keys[0]}': {why}")
        return "; ".join(parts)


def sort_encoder_keys(
    tensors: Mapping[str, TensorInfo],
    keys: Iterable[str],
    names: EncoderNames,
    known: Mapping[str, str],
    sizes: Callable[[str], tuple[int, int] | None],
) -> EncoderKeys:
    """Find the layer of a CLIP that each key is for.

    Args:
        tensors: of the file.
        keys: of these, the ones for text encoders.
        names: of the CLIP's layers.
        known: module names that ComfyUI knows itself -> weights.
        sizes: weight -> (out_features, in_features); None: it is no linear's.
    """
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    spelled: dict[str, str] = {}
    left: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        ends = [(module, role) for module, end in cuts(key) if (role := kinds.role_of(end))]
        found = ((module, role, known.get(module) or names.find(module)) for module, role in ends)
        module, role, weight = next((each for each in found if each[2]), ("", "", None))
        if weight is None:
            left[names.missing(ends[0][0]) if ends else "in a form that ComfyUI does not read"].append(key)
        elif spelled.setdefault(weight, module) != module:
            left[f"the same layer as '{spelled[weight]}'"].append(key)
        else:
            layers[weight][role] = key
    result = EncoderKeys(layers, {why: tuple(found) for why, found in left.items()})
    unread = [weight for weight, roles in layers.items() if not kinds.KINDS.unread_by_comfyui.isdisjoint(roles)]
    result = result.without(unread, "of a kind that ComfyUI does not read for text encoders")
    wrong = [weight for weight, roles in result.layers.items() if not _fits(tensors, roles, sizes(weight))]
    return result.without(wrong, "incomplete, or of another size than the layer")


def _fits(tensors: Mapping[str, TensorInfo], roles: Mapping[str, str], size: tuple[int, int] | None) -> bool:
    """Whether matrices fit a linear; ComfyUI says nothing where they do not, and leaves the layer as it was."""
    if size is None:
        return True
    headers = {role: TensorHeader(key, tensors[key].shape) for role, key in roles.items()}
    shapes = Shapes("", "", LoraTarget((), size[1], size[0], swap_halves=False, bias=True), headers)
    try:
        for kind in kinds.KINDS.found(headers):
            if kind.sized_by_linear:
                kind.check(shapes)
    except LoraError:
        return False
    return True
