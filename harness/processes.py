"""Processes of the harness: their group, their end, and a port for them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def signal_group(process: subprocess.Popen[bytes], *, force: bool) -> None:
    """End a process and its children: at once with `force`, or by asking."""
    if os.name == "nt":
        process.kill() if force else process.terminate()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)


def die_with_parent() -> Callable[[], None] | None:
    """What the child does before it becomes the server: ask Linux to kill it when its parent dies.

    Covers what no `finally` can, a parent that gets SIGKILL. Other systems have nothing like it.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec as little as possible may happen
    except (OSError, AttributeError):
        return None
    parent = os.getpid()

    def hook() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)

    return hook


def free_port(host: str) -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
