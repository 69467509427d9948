"""`python -m harness.setup --for test|demo`: everything a fresh machine needs, standard library only.

Each step is skipped when its work is done already. Steps that install packages leave a stamp inside the virtual
environment, written only after they succeeded and holding a hash of what they installed, so that an interrupted
set-up goes on where it stopped and a changed requirements file is installed again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from harness import comfyui, torch_versions
from harness.paths import CHROMIUM_MISSING, REPO, VENV, VENV_PYTHON, find_chromium

MINIMUM_PYTHON = (3, 10)
# Of ComfyUI's requirements: the first three are installed above, the others serve optional nodes that no test uses
# (kornia and spandrel also pull in much, the OpenGL ones need a display).
NOT_FROM_COMFYUI = frozenset(
    ("torch", "torchvision", "torchaudio", "kornia", "spandrel", "pyopengl", "comfy-angle", "glfw")
)
PACK_REQUIREMENTS = (REPO / "requirements.txt", REPO / "requirements-dev.txt")


class SetupError(RuntimeError):
    """A step failed; the message says what to do."""


@dataclass(frozen=True)
class Step:
    """One line of the set-up: a title and work that is safe to do again."""

    title: str
    run: Callable[[], None]


def plan(purpose: str, torch: str = torch_versions.TESTED) -> list[Step]:
    """The steps, in order, for `make test` or `make demo` with a version of torch."""
    steps = [
        Step(f"virtual environment {VENV}", create_venv),
        Step(f"torch {torch} (the largest download, this can take minutes)", partial(install_torch, torch)),
        Step(f"ComfyUI {comfyui.resolve_version()}", fetch_comfyui),
        Step("ComfyUI's requirements", install_comfyui_requirements),
        Step("the pack's and the tests' requirements", partial(install_pack_requirements, torch)),
    ]
    if purpose == "test":
        steps.append(Step("Chromium for the browser tests", ensure_chromium))
    return steps


def create_venv() -> None:
    """Create the virtual environment, or leave a working one alone, whichever Python it was made with."""
    if version := _venv_python_version():
        _say(f"already there (Python {version})")
        return
    # --clear: what an interrupted creation left behind is not worth repairing.
    code = subprocess.call([sys.executable, "-m", "venv", "--clear", str(VENV)])
    if code or not _venv_python_version():
        raise SetupError(
            f"`{sys.executable} -m venv {VENV}` did not give an environment with pip (exit code {code}). "
            "On Debian and Ubuntu install the package python3-venv, then run again."
        )


def install_torch(version: str) -> None:
    """Install torch, torchvision and torchaudio."""
    requirements, torchaudio = torch_versions.requirements(version), torch_versions.torchaudio(version)
    key = _key(*requirements, torchaudio)
    if _is_stamped("torch", key):
        return
    _pip_install(*requirements)
    _pip_install("--no-deps", torchaudio)
    if not imports("torchaudio"):
        drop_extension_of_torchaudio()
    _stamp("torch", key)


def drop_extension_of_torchaudio() -> None:
    """Leave torchaudio's Python alone: its extension refuses a torch for another CUDA than its own.

    No test hears, but ComfyUI imports torchaudio at start.
    """
    removed = [path for path in VENV.rglob("torchaudio/lib/_torchaudio.*") if path.is_file()]
    for path in removed:
        path.unlink()
    if not imports("torchaudio"):
        raise SetupError(f"{VENV}: torchaudio does not load, and ComfyUI does not start without: choose another torch.")
    _say(f"removed {removed[0].name} of torchaudio, which does not load with this torch")


def imports(module: str) -> bool:
    """Whether the environment can import a module."""
    return not subprocess.call([str(VENV_PYTHON), "-I", "-c", f"import {module}"], stderr=subprocess.DEVNULL)


def fetch_comfyui() -> None:
    """Download ComfyUI's source. Runs in the environment, because the system's Python may have no pip."""
    if comfyui.source_path().is_dir():
        _say(f"already there ({comfyui.source_path()})")
        return
    if subprocess.call([str(VENV_PYTHON), "-m", "harness.comfyui"], cwd=REPO, stdout=subprocess.DEVNULL):
        raise SetupError("ComfyUI could not be fetched, the reason is above.")


def comfyui_requirements() -> list[str]:
    """The lines of ComfyUI's own requirements.txt that the harness installs."""
    path = comfyui.source_path() / "requirements.txt"
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    listed = [line for line in lines if line and not line.startswith("#")]
    return [line for line in listed if requirement_name(line) not in NOT_FROM_COMFYUI]


def install_comfyui_requirements() -> None:
    """Install what ComfyUI needs to start."""
    requirements = comfyui_requirements()
    key = _key(*requirements)
    if _is_stamped("comfyui", key):
        return
    _pip_install(*requirements)
    _stamp("comfyui", key)


def install_pack_requirements(torch: str = torch_versions.TESTED) -> None:
    """Install requirements.txt and requirements-dev.txt, and what this torch needs instead of some of it."""
    instead = torch_versions.instead(torch)
    key = _key(*(path.read_text(encoding="utf-8") for path in PACK_REQUIREMENTS), *instead)
    if _is_stamped("pack", key):
        return
    _pip_install(*(word for path in PACK_REQUIREMENTS for word in ("-r", str(path))))
    if instead:
        _pip_install(*instead)
    _stamp("pack", key)


def ensure_chromium() -> None:
    """Install Chromium where that needs no questions; otherwise say what to install.

    A missing Chromium does not stop the set-up: the tests that need it fail with the same message.
    """
    if found := find_chromium():
        _say(f"already there ({found})")
        return
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "chromium"]):
            if code := subprocess.call(command, env=environment):
                _say(f"`{' '.join(command)}` ended with exit code {code}")
                break
    if not find_chromium():
        _say(CHROMIUM_MISSING)


def _venv_python_version() -> str | None:
    """The version of the environment's Python, or None if it does not run or has no pip."""
    probe = "import sys, pip; print('.'.join(map(str, sys.version_info[:3])))"
    try:
        done = subprocess.run([str(VENV_PYTHON), "-I", "-c", probe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _pip_install(*arguments: str) -> None:
    # -I: neither PYTHONPATH nor the repository's folders may shadow pip's modules.
    command = [str(VENV_PYTHON), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    if code := subprocess.call(command):
        raise SetupError(
            f"`pip install {' '.join(arguments)}` ended with exit code {code}, its messages are above. Check that pip "
            f"can reach its package index and that the disk has 8 GB free, then run again; if it keeps failing, delete "
            f"{VENV} and run again."
        )


def requirement_name(requirement: str) -> str:
    """The normalized distribution name at the start of a requirement line."""
    return re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _key(*inputs: str) -> str:
    text = "\n".join((f"python {_venv_python_version()}", *inputs))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_stamped(name: str, key: str) -> bool:
    path = VENV / ".stamps" / name
    done = path.is_file() and path.read_text(encoding="utf-8") == key
    if done:
        _say("already installed")
    return done


def _stamp(name: str, key: str) -> None:
    path = VENV / ".stamps" / name
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(key, encoding="utf-8")
    os.replace(partial, path)


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run all steps; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m harness.setup", description="Set up the tests or the demo.")
    parser.add_argument(
        "--for", dest="purpose", choices=("test", "demo"), default="test", help="the demo needs no browser"
    )
    parser.add_argument(
        "--torch", default=torch_versions.TESTED, metavar="VERSION", help="version of torch (default: %(default)s)"
    )
    chosen = parser.parse_args(arguments)
    if sys.version_info < MINIMUM_PYTHON:
        found, wanted = sys.version.split()[0], ".".join(map(str, MINIMUM_PYTHON))
        advice = "Name a newer one: `make test PYTHON=python3.11`."
        print(f"error: Python {found} at {sys.executable}: expected {wanted} or newer. {advice}", file=sys.stderr)
        return 1
    try:
        steps = plan(chosen.purpose, chosen.torch)
        for number, step in enumerate(steps, start=1):
            print(f"[setup {number}/{len(steps)}] {step.title}", flush=True)
            step.run()
    except (SetupError, comfyui.FetchError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to go on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
