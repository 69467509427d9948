"""How programs spell a module's name in LoRA files: words before it, and dots or underscores in it.

Three small tables that combine, so that a spelling which no program had when this was written is read, too:

    transformer.  base_model.model.  transformer_blocks.0.attn.to_q  .lora_A.weight
    lora_         unet_              double_blocks_0_img_attn_qkv    .lora_down.weight
    words, any number of them        a module's name, `ModuleNames`  a role, `kinds.role_of`
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...families.base import Config, Family
from ...families.layout import LoraTarget, VectorWeight

# Words that may stand before a module's name, in any order and number.
WORDS = (
    "lora",  # sd-scripts, OneTrainer: `lora_unet_`, `lora_transformer_`
    "lycoris",  # LyCORIS
    "unet",
    "transformer",  # diffusers, OneTrainer
    "diffusion_model",  # ComfyUI, ai-toolkit
    "model",  # `model.diffusion_model.`, as in checkpoints; `base_model.model.`
    "base_model",  # PEFT's save_pretrained
    "pipe",  # DiffSynth: `pipe.dit.`
    "dit",
    "module",  # torch's DistributedDataParallel
    "orig_mod",  # torch.compile
)
WORD = re.compile(rf"_*(?:{'|'.join(WORDS)})[._]+")

Target = TypeVar("Target")


class ModuleNames(Generic[Target]):
    """Module names -> what they mean, however a file spells them.

    Attributes:
        targets: the names as their programs have them, with dots, without words before them.
    """

    def __init__(self, targets: Mapping[str, Target]) -> None:
        """Know these names, and the same with underscores.

        A name has one or the other: `double_blocks.0.img_attn_qkv`, with both, is a layer of HunyuanVideo.
        """
        self.targets = targets
        self._spelled = {
            spelling: target for name, target in targets.items() for spelling in (name.replace(".", "_"), name)
        }

    def find(self, spelled: str) -> Target | None:
        """What a name in a file means; None: nothing here."""
        name = spelled.rstrip("._")
        while (target := self._spelled.get(name)) is None:
            word = WORD.match(name)
            if word is None:
                return None
            name = name[word.end() :]
        return target


@dataclass(frozen=True)
class KnownModules:
    """See `families.base.LoraNames`, however a file spells them."""

    linears: ModuleNames[LoraTarget]
    norms: ModuleNames[VectorWeight]
    absent: ModuleNames[str]


@functools.lru_cache(maxsize=8)
def known_names(family: Family[Config], config: Config) -> KnownModules:
    """The names of a model's layers; thousands, wanted for every LoRA that is read."""
    names = family.lora_names(config)
    return KnownModules(ModuleNames(names.linears), ModuleNames(names.norms), ModuleNames(names.absent))


def cuts(key: str) -> Iterator[tuple[str, str]]:
    """The ways to cut a key into a module's name and an end: at its last four dots, and before a final `_lora.…`.

    The longest end comes first: `.down.weight` is the end of `.lora.down.weight`, too.
    """
    dots, dot = [], len(key)
    for _ in range(4):
        dot = key.rfind(".", 0, dot)
        if dot < 0:
            break
        dots.append(dot)
    for dot in reversed(dots):
        yield key[:dot], key[dot:]
    module, found, end = key.rpartition("_lora.")
    if found:
        yield module, found + end
