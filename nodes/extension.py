"""What ComfyUI's `comfy_entrypoint` returns."""

from __future__ import annotations

import importlib
import logging
import os

from comfy_api.latest import ComfyExtension, io

from ..accel.prove import proofs
from . import contract
from .families import registry
from .files import cache_folder
from .pocket import add_pocket_folders
from .reliance import MODEL, Part

log = logging.getLogger(__name__)

# Module and class of each node, in menu order, and what must hold for it.
NODES: tuple[tuple[str, str, Part | None], ...] = (
    ("loader", "FluxAccelLoader", MODEL),
    ("quantize", "FluxQuantizeTransformer", None),
    ("offload", "FluxOffloadConfig", None),
    ("lora", "FluxHotswapLora", MODEL),
    ("step_cache", "FluxStepCache", MODEL),
    *((f"families.{module}", name, part) for module, name, part in registry.NODES),
    ("report", "FluxAccelReport", MODEL),
)


class FluxHotswapExtension(ComfyExtension):
    """The pack's nodes."""

    async def on_load(self) -> None:
        """Say what this ComfyUI lacks, add the pocket model's folders, and remember what proved itself here."""
        for line in contract.describe():
            log.error("Flux Hotswap: %s", line)
        add_pocket_folders()
        proofs().remember_in(os.path.join(cache_folder(), "proofs"))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node class that this ComfyUI can carry."""
        found = (_node(module, name) for module, name, part in NODES if part is None or contract.holds(part))
        return [node for node in found if node is not None]


def _node(module: str, name: str) -> type[io.ComfyNode] | None:
    """A node; None, and a line in the log, where its module cannot be imported: the others work without it."""
    try:
        return getattr(importlib.import_module(f".{module}", __package__), name)
    except Exception as exc:  # a missing library, a broken one, a class of ComfyUI that is gone: whatever it raises
        log.error(
            "Flux Hotswap: the node %s is left out, because %s: %s. Update this pack and what its requirements.txt "
            "names, or report it.",
            name,
            type(exc).__name__,
            exc,
        )
        return None
