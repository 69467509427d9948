"""Entries in which a checkpoint asks ComfyUI for an attention kernel.

ComfyUI (comfy/ops.py and comfy/configurable.py, from about 0.38) saves `X.comfy_attention.config` beside the weights of
a block X: UTF-8 JSON as uint8, one object or a list of them in order of preference, such as
`{"attention": "comfy_kitchen_sol", "tau": 1.0}`. They change no weight, and the kernel is this pack's own choice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..files import TensorInfo
from .source import Checkpoint

END = ".comfy_attention.config"
LONGEST_BYTES = 2**16


def find_requests(file: Checkpoint, prefix: str, names: Mapping[str, TensorInfo]) -> tuple[set[str], str]:
    """Which entries those are, and what they ask for.

    Args:
        file: the checkpoint.
        prefix: what stands before the model's names in the file.
        names: the model's tensors, without the prefix.

    Returns:
        The names of the entries, and the kernels as a person reads them; empty without entries.
    """
    found = [name for name in names if name.endswith(END)]
    if not found:
        return set(), ""
    kernels: dict[str, None] = {}
    with file.open() as rows:
        for name in found:
            if names[name].dtype == torch.uint8 and names[name].numel <= LONGEST_BYTES:
                kernels |= dict.fromkeys(_kernels(bytes(rows(prefix + name)[:].tolist())))
    return set(found), ", ".join(kernels) or "of an unknown kind"


def _kernels(content: bytes) -> list[str]:
    """The kernels that one entry names; none where it is not of a form that is known."""
    try:
        parsed: Any = json.loads(content)
    except ValueError:
        return []
    entries = parsed if isinstance(parsed, list) else [parsed]
    return [str(entry["attention"]) for entry in entries if isinstance(entry, dict) and "attention" in entry]
