"""Which torchvision and torchaudio go with a torch."""

from __future__ import annotations

import re

TESTED = "2.14.1"
"""The torch of `make test` and `make demo`."""

TORCHVISION = {
    "2.15.0": "0.29.2",
    "2.14.1": "0.29.1",
    "2.14.0": "0.29.0",
    "2.13.0": "0.28.0",
    "2.12.1": "0.27.1",
    "2.12.0": "0.27.0",
    "2.11.0": "0.26.0",
    "2.10.0": "0.25.0",
    "2.9.1": "0.24.1",
    "2.9.0": "0.24.0",
}
"""torch -> the torchvision that was released with it: until 0.29.0 each asks for exactly its own torch."""

NEWEST_TORCHAUDIO = "2.11.0"
"""It asks for its own torch, yet works with newer ones."""


def requirements(version: str) -> tuple[str, ...]:
    """What pip is to install together for a torch.

    Args:
        version: of torch, such as "2.11.0". One that is not in the table is installed with the torchvision that pip
            finds for it.

    Raises:
        ValueError: not a version.
    """
    known = TORCHVISION.get(version)
    # Triton 3.6, of torch 2.11, makes integers of arrays of one element in its interpreter: NumPy 2.4 refuses that.
    bounds = ("numpy<2.4",) if _release(version) < (2, 12) else ()
    return f"torch=={version}", f"torchvision=={known}" if known else "torchvision", *bounds


def instead(version: str) -> tuple[str, ...]:
    """What takes the place of a pin of requirements-dev.txt that is for newer torch."""
    return ("torchao==0.17.0",) if _release(version) < (2, 11) else ()


def torchaudio(version: str) -> str:
    """The torchaudio for a torch, to be installed without dependencies; ComfyUI imports it at start."""
    return f"torchaudio=={min(version, NEWEST_TORCHAUDIO, key=_release)}"


def _release(version: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        known = ", ".join(TORCHVISION)
        raise ValueError(f"torch version {version!r}: expected a release such as 2.11.0 (known: {known}).")
    return tuple(map(int, version.split(".")))
