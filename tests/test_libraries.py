"""Optional packages that are broken or heavy must cost the pack nothing.

The broken packages are written by the tests: what matters is what their import raises, and the real ones (xformers
beside flash-attn-4) need a GPU to be of use.
"""

import os
import subprocess
import sys

import pytest

from harness.paths import REPO

pytestmark = pytest.mark.slow

BUILD = """
import logging, sys
logging.basicConfig(format="%(message)s", level=logging.WARNING)
import torch
from accel.errors import LibraryError
from accel.families.flux1 import Flux1, Flux1Config
from harness.attention_trace import one_of_each
try:
    with torch.device("meta"):
        model = Flux1().build(one_of_each(256))
except LibraryError as exc:
    print("LibraryError:", exc)
else:
    print(type(model).__name__, *sorted({"bitsandbytes", "peft", "xformers", "flash_attn"} & set(sys.modules)))
"""


def run(code, folder=None):
    environment = os.environ | ({"PYTHONPATH": str(folder)} if folder else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def write_package(folder, name, files, version="9.9.9"):
    """A package as pip leaves it: diffusers asks for the version before it imports."""
    for file, text in files.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_packages_that_break_the_import_of_diffusers_are_left_out(tmp_path):
    # As xformers 0.0.35 beside flash-attn-4, which is a folder without a module.
    write_package(tmp_path, "xformers", {
        "__init__.py": "", "ops/__init__.py": "import flash_attn\nflash_attn.__version__\n",
    })  # fmt: skip
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    write_package(tmp_path, "sageattention", {"__init__.py": "raise TypeError('built for another torch')\n"})

    # As torchaudio 2.11 beside a torch for another CUDA; it is transformers that imports it, when something is used.
    write_package(tmp_path, "torchaudio", {"__init__.py": "raise RuntimeError('different CUDA versions')\n"}, "99")

    out, err = run(BUILD, tmp_path)

    assert out.split()[0] == "FluxTransformer2DModel"
    assert err.count("diffusers was loaded without") == 3
    for package, reason in (
        ("torchaudio 99", "RuntimeError: different CUDA versions"),
        ("sageattention 9.9.9", "TypeError: built for another torch"),
        ("xformers 9.9.9", "AttributeError: module 'flash_attn' has no attribute '__version__'"),
    ):
        line = next(line for line in err.splitlines() if f"without '{package}'" in line)
        assert reason in line


def test_a_package_that_diffusers_needs_is_named(tmp_path):
    write_package(tmp_path, "huggingface_hub", {"__init__.py": "raise TypeError('damaged')\n"})

    out, _ = run(BUILD, tmp_path)

    assert out.startswith("LibraryError: 'diffusers ")
    assert "TypeError: damaged" in out


def test_bitsandbytes_is_imported_when_it_is_used():
    """Its import opens a CUDA context; diffusers and PEFT, which both import it, are installed beside it here."""
    use = """
import diffusers.quantizers.bitsandbytes.utils as users, peft.helpers
assert users.bnb.nn.Linear4bit is peft.helpers.bnb.nn.Linear4bit is sys.modules["bitsandbytes"].nn.Linear4bit
"""
    out, _ = run(BUILD + use)

    assert out.split() == ["FluxTransformer2DModel", "peft"]
