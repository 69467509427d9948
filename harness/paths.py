"""Where things are: the repository, the cache, the virtual environment, a Chromium."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def _from_environment(variable: str, default: Path) -> Path:
    # absolute, not resolve: a venv reached through a symlink keeps the name that its scripts were written for.
    return Path(os.path.abspath(Path(os.environ.get(variable) or default).expanduser()))


CACHE = _from_environment("FLUX_HOTSWAP_CACHE", REPO / ".cache")
VENV = _from_environment("FLUX_HOTSWAP_VENV", REPO / ".venv")
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

CHROMIUM_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM_MISSING = (
    f"No Chromium found: none of {', '.join(CHROMIUM_COMMANDS)} is on PATH. The browser tests drive ComfyUI's real "
    "frontend and need one. Install it with your system's package manager, for example `apt-get install chromium` "
    "(Debian), `brew install --cask chromium` (macOS) or `winget install Google.Chrome` (Windows), then run again."
)


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome, or None."""
    for command in CHROMIUM_COMMANDS:
        if found := shutil.which(command):
            return found
    if sys.platform == "darwin":
        places = [Path(f"/Applications/{name}.app/Contents/MacOS/{name}") for name in ("Chromium", "Google Chrome")]
    elif os.name == "nt":
        roots = [os.environ.get(name) for name in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")]
        places = [Path(root) / "Google/Chrome/Application/chrome.exe" for root in roots if root]
    else:
        places = []
    return next((str(place) for place in places if place.is_file()), None)


def require_chromium() -> str:
    """The path of an installed Chromium or Chrome.

    Raises:
        FileNotFoundError: there is none; the message says what to install.
    """
    found = find_chromium()
    if found is None:
        raise FileNotFoundError(CHROMIUM_MISSING)
    return found
