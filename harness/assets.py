"""The model files of the demo and the tests: what they are, and writing those that are missing."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import lora_files
from .tensor_files import is_current, write_tensors
from .tiny_flux2 import TinyFlux2Config, tiny_flux2_state_dict
from .tiny_models import TinyFluxConfig, tiny_flux_state_dict
from .tiny_others import tiny_clip_l_state_dict, tiny_taesd_state_dict

GENERATOR_VERSION = 1
"""Part of every file's stamp: raise it when generated values change, so that files from before are replaced."""


@dataclass(frozen=True)
class Asset:
    """One file to generate.

    Args:
        stamp: Everything that the content depends on.
        build: Makes the tensors.
    """

    stamp: str
    build: Callable[[], dict[str, Tensor]]


def _asset(build: Callable[..., dict[str, Tensor]], **arguments: object) -> Asset:
    stamp = json.dumps({"version": GENERATOR_VERSION, "of": build.__name__, **arguments}, sort_keys=True, default=str)
    return Asset(stamp, lambda: build(**arguments))


def _flux_in(dtype: torch.dtype, config: TinyFluxConfig, seed: int) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tiny_flux_state_dict(config, seed).items()}


def _flux2_in(dtype: torch.dtype, config: TinyFlux2Config, seed: int) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tiny_flux2_state_dict(config, seed).items()}


def assets() -> dict[str, Asset]:
    """The files of `write_all`, by path relative to ComfyUI's `models` folder."""
    dev, schnell = TinyFluxConfig(), TinyFluxConfig(guidance=False)
    klein, dev2 = TinyFlux2Config(), TinyFlux2Config(guidance=True)
    return {
        "diffusion_models/tiny-flux-dev-fp32.safetensors": _asset(_flux_in, dtype=torch.float32, config=dev, seed=0),
        "diffusion_models/tiny-flux-dev-bf16.safetensors": _asset(_flux_in, dtype=torch.bfloat16, config=dev, seed=0),
        "diffusion_models/tiny-flux-schnell-fp32.safetensors": _asset(
            _flux_in, dtype=torch.float32, config=schnell, seed=1),
        "diffusion_models/tiny-flux-schnell-bf16.safetensors": _asset(
            _flux_in, dtype=torch.bfloat16, config=schnell, seed=1),
        "diffusion_models/tiny-flux2-klein-fp32.safetensors": _asset(
            _flux2_in, dtype=torch.float32, config=klein, seed=2),
        "diffusion_models/tiny-flux2-klein-bf16.safetensors": _asset(
            _flux2_in, dtype=torch.bfloat16, config=klein, seed=2),
        "diffusion_models/tiny-flux2-dev-fp32.safetensors": _asset(
            _flux2_in, dtype=torch.float32, config=dev2, seed=3),
        "vae/tiny-taesd.safetensors": _asset(tiny_taesd_state_dict, seed=0),
        "text_encoders/tiny-clip-l.safetensors": _asset(tiny_clip_l_state_dict, seed=0),
        "loras/demo-a.safetensors": _asset(lora_files.demo_a),
        "loras/demo-b.safetensors": _asset(lora_files.demo_b),
    }


def write_all(models_root: Path | str, which: Iterable[str] | None = None,
              progress: Callable[[str], None] = lambda line: None) -> dict[str, Path]:
    """Write the demo's and the tests' model files; files that are there already stay as they are.

    Args:
        models_root: ComfyUI's `models` folder; made if missing.
        which: Names out of `assets()`; all of them by default.
        progress: Called with one line of text per file.
    Returns:
        The path of each file asked for, by its name in `assets()`.
    Raises:
        KeyError: A name in `which` is not in `assets()`.
    """
    known = assets()
    names = list(known) if which is None else list(which)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise KeyError(f"No such asset: {', '.join(unknown)}. Known: {', '.join(known)}.")
    paths = {}
    for number, name in enumerate(names, start=1):
        asset, path = known[name], Path(models_root) / name
        current = is_current(path, asset.stamp)
        progress(f"[{number}/{len(names)}] {name}: {'is there' if current else 'writing'}")
        if not current:
            write_tensors(path, asset.build(), asset.stamp)
        paths[name] = path
    return paths
