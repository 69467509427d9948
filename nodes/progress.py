"""Show in the graph what takes long: loading and compiling, on the node that runs."""

from __future__ import annotations

import logging

import comfy.utils

from . import contract
from .prompts import executing, server
from .reliance import TEXTS

log = logging.getLogger(__name__)


class NodeObserver:
    """Forwards what an engine does to the running node's progress bar and text, and to the log."""

    def __init__(self) -> None:
        """Start with no bar; one is made per load, because a bar belongs to the node that runs when it is made."""
        self._bar: comfy.utils.ProgressBar | None = None

    def loading(self, done: int, total: int) -> None:
        """Move the bar. May raise ComfyUI's interrupt, which leaves the engine unloaded."""
        if self._bar is None or done == 1:  # an interrupted load leaves its bar behind
            show_text(f"Loading {total} layers")
            self._bar = comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done)
        if done == total:
            self._bar = None

    def notice(self, text: str, warning: bool) -> None:
        """Pass it on."""
        show_text(text)
        log.log(logging.WARNING if warning else logging.INFO, "Flux Hotswap: %s", text)

    def compiling(self, region: str) -> None:
        """Say why the first step takes long."""
        show_text(f"Compiling the {region} blocks, once")
        log.info("Flux Hotswap: compiling the %s blocks (once per machine; later starts use the cache)", region)

    def compiled(self, region: str, seconds: float, count: int, why: str) -> None:
        """Say how long it took, and why."""
        show_text(f"Compiled the {region} blocks in {seconds:.0f} s: {why}")
        log.info("Flux Hotswap: compiled the %s blocks in %.1f s (compile %d of this engine): %s",
                 region, seconds, count, why)  # fmt: skip


def show_text(text: str) -> None:
    """Write a line below the running node, where the frontend and this ComfyUI version can."""
    context, send = executing(), getattr(server(), "send_progress_text", None)
    if context is not None and send is not None and contract.holds(TEXTS):
        send(text, context.node_id)


def say(text: str) -> None:
    """Write to the log and below the running node."""
    log.info("Flux Hotswap: %s", text)
    show_text(text)
