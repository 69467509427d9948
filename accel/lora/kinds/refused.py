"""Tensors that are recognised, and refused: what they are, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import LoraError
from .shapes import INSTEAD, TensorHeader

UNREAD = "ComfyUI does not read it either: choose a LoRA of another kind."


@dataclass(frozen=True)
class Refused:
    """A tensor that cannot be carried beside the weights.

    Attributes:
        endings: of its keys.
        what: it is, with the reason if there is one to say.
        comfyui_reads_it: whether ComfyUI's own loader could be used instead.
    """

    endings: tuple[str, ...]
    what: str
    comfyui_reads_it: bool


# Role -> what is refused.
REFUSED: Mapping[str, Refused] = {
    "set_weight": Refused((".set_weight",), "a whole weight, which is as large as the model", True),
    "reshape_weight": Refused(
        (".reshape_weight",),
        "a reshaped weight, as BFL's control LoRAs have: the model's input has another width then",
        True,
    ),
    "oft_R": Refused(
        (".oft_R.weight", ".oft_R.scaled_oft"), "PEFT's or OneTrainer's OFT, which rotates the layer's input", False
    ),
    "ia3": Refused((".on_input",), "IA3", False),
    "w_norm": Refused((".w_norm",), "a norm's difference on a linear layer", True),
    "b_norm": Refused((".b_norm",), "a norm's bias on a linear layer", True),
    "weight": Refused((".weight",), "a whole weight, as in a checkpoint or in a control LoRA of ai-toolkit", False),
}
ENDINGS: Mapping[str, str] = {ending: role for role, refused in REFUSED.items() for ending in refused.endings}
# Behind which PEFT writes the name of an adapter.
ADAPTER_HEADS = (".oft_R.",)
UNREAD_BY_COMFYUI = tuple(role for role, refused in REFUSED.items() if not refused.comfyui_reads_it)


def refuse(source: str, headers: Mapping[str, TensorHeader]) -> None:
    """Raise if a tensor is among those that cannot be carried.

    Raises:
        LoraError: it names the tensor, and says what to do.
    """
    for role, refused in REFUSED.items():
        if role in headers:
            advice = INSTEAD if refused.comfyui_reads_it else UNREAD
            raise LoraError(f"{source}: '{headers[role].key}' is {refused.what}. {advice}")
