"""The table of kinds: what the end of a key means, and what a set of tensors is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from ...errors import LoraError
from . import dora, refused
from .base import ALPHA, Kind
from .bias import Bias
from .shapes import INSTEAD, TensorHeader

# PEFT's own names of what it adds to a layer, with the adapter's name in the middle ("default" if nobody gave it one).
ADAPTER_NAME = re.compile(r"^(\.[^.]+)\.[^.]+(\.weight|\.bias|)$")


class KindTable:
    """Every kind there is. Immutable.

    Attributes:
        bias: what may come with any kind, or alone.
        endings: end of a key, from one of its last dots on -> role.
        comfyui_endings: role -> how ComfyUI ends such a key.
        unread_by_comfyui: roles that ComfyUI does not read: applying only the rest of a layer would not be this LoRA.
        bias_roles: roles that change a bias.
    """

    def __init__(self, *kinds: Kind, bias: Bias) -> None:
        """Know these kinds, DoRA over them, and what is refused.

        Raises:
            ValueError: two of them claim one ending.
        """
        self._kinds = (*kinds, bias)
        self.bias = bias
        tables = [{f".{ALPHA}": ALPHA}, dora.ENDINGS, refused.ENDINGS, *(kind.endings for kind in self._kinds)]
        self.endings: Mapping[str, str] = {ending: role for table in tables for ending, role in table.items()}
        if len(self.endings) < sum(map(len, tables)):
            raise ValueError("two kinds of LoRA claim one ending of keys.")
        self.comfyui_endings = {role: ending for ending, role in reversed(self.endings.items())}
        heads = [dora.ADAPTER_HEADS, refused.ADAPTER_HEADS, *(kind.adapter_heads for kind in self._kinds)]
        self._adapter_heads = tuple(head for each in heads for head in each)
        unread = [dora.UNREAD_BY_COMFYUI, refused.UNREAD_BY_COMFYUI, *(kind.unread_by_comfyui for kind in self._kinds)]
        self.unread_by_comfyui = frozenset(role for each in unread for role in each)
        self.bias_roles = frozenset(role for kind in self._kinds for role in kind.bias_roles)

    def __iter__(self) -> Iterator[Kind]:
        return iter(self._kinds)

    def role_of(self, ending: str) -> str | None:
        """The role that an end of a key means; None: none."""
        role = self.endings.get(ending)
        if role is None and ending.startswith(self._adapter_heads):
            role = self.endings.get(ADAPTER_NAME.sub(r"\1\2", ending))
        return role

    def found(self, roles: Collection[str]) -> list[Kind]:
        """The kinds of which a tensor is there; a bias only where nothing else is."""
        found = [kind for kind in self._kinds if not kind.roles.isdisjoint(roles)]
        return [kind for kind in found if kind.changes_weight] or found

    def recognise(self, source: str, name: str, headers: Mapping[str, TensorHeader]) -> Kind:
        """The kind that a layer's tensors make.

        Args:
            source: what messages begin with.
            name: the layer as the source calls it.
            headers: role -> tensor.

        Raises:
            LoraError: none, two at once, or a tensor that does not belong to it.
        """
        found = self.found(headers)
        if len(found) > 1:
            names = " and ".join(sorted(kind.name for kind in found))
            raise LoraError(
                f"{source}: '{name}' is changed in two ways at once, {names}: its meaning is not defined. Choose a "
                "file that has one of them."
            )
        if not found or (found[0] is self.bias and not headers.keys() <= self.bias.roles):
            keys = ", ".join(f"'{header.key}'" for header in headers.values())
            raise LoraError(
                f"{source}: {keys} of '{name}' scale a change that is not there. The file is incomplete: get it again."
            )
        allowed = found[0].roles | self.bias.roles | set(found[0].companions)
        for role, header in headers.items():
            if role not in allowed:
                raise LoraError(
                    f"{source}: '{header.key}' does not belong with the {found[0].name} on '{name}'. {INSTEAD}"
                )
        return found[0]
