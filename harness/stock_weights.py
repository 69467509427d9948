"""What stock ComfyUI makes of a checkpoint's weights when it merges LoRA files: the numbers that all others must equal.

Real ComfyUI code runs in a process of its own: `load_lora_for_models`, then `comfy.lora.calculate_weight` on float32
copies, as `ModelPatcher.patch_weight_to_device` calls it on a CPU. The same process shows what ComfyUI's own loaders
put on the pack's model.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import multiprocessing
import pickle
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .comfyui import fetch, resolve_version
from .paths import REPO

STOP_S = 30
# What the process calls the pack: its folder is a package, as ComfyUI's custom nodes are.
PACK = "flux_hotswap_pack"


class StockWeights:
    """A ComfyUI process that merges LoRA files on request. Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Start ComfyUI; results pass through files in `folder`."""
        self._folder = folder
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, fetch(resolve_version()), folder)
        self._process = context.Process(target=_serve, args=arguments, name="stock-weights", daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> StockWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()

    def merge(self, checkpoint: Path, loras: Sequence[tuple[Path, float]]) -> dict[str, Tensor]:
        """Merge LoRAs into a checkpoint, one after another.

        Args:
            checkpoint: in the original layout.
            loras: file and strength of each.

        Returns:
            The weights, biases and norms that changed, float32, under the checkpoint's names.

        Raises:
            RuntimeError: ComfyUI left a key of a LoRA out, or failed.
        """
        result = self._folder / "merged.safetensors"
        self._ask("merge", checkpoint, loras, result)
        return load_file(result)

    def native(self, checkpoint: Path, loras: Sequence[tuple[Path, float]]) -> Any:
        """Load LoRAs by ComfyUI's own loader, as LoraLoader does, onto the pack's accelerated model.

        Args:
            checkpoint: any that the pack reads.
            loras: file and strength of each.

        Returns:
            The `accel.lora.stack.LoraStack` that the model then carries.

        Raises:
            RuntimeError: ComfyUI or the pack failed.
        """
        result = self._folder / "stack.pickle"
        self._ask("native", checkpoint, loras, result)
        return _Unpickler(io.BytesIO(result.read_bytes())).load()

    def _ask(self, what: str, checkpoint: Path, loras: Sequence[tuple[Path, float]], result: Path) -> None:
        self._connection.send((what, str(checkpoint), [(str(path), strength) for path, strength in loras], str(result)))
        answer = self._connection.recv()
        if answer is not None:
            raise RuntimeError(f"stock ComfyUI: {answer}")


class _Unpickler(pickle.Unpickler):
    """What is of the pack there is of `accel` here."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module.removeprefix(f"{PACK}."), name)


def _serve(connection: Connection, comfyui: Path, folder: Path) -> None:
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # read when comfy.model_management is imported
    comfy.cli_args.args.base_directory = str(folder)  # likewise folder_paths: nothing is written into ComfyUI's own
    logging.getLogger().addHandler(_Raise(logging.ERROR))
    models: dict[str, Any] = {}
    while True:
        try:
            what, checkpoint, loras, result = connection.recv()
        except EOFError:
            return
        try:
            if what == "merge":
                save_file(_merge(models, checkpoint, loras), result)
            else:
                Path(result).write_bytes(pickle.dumps(_native(checkpoint, loras)))
            connection.send(None)
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


class _Raise(logging.Handler):
    """ComfyUI logs a patch that fails, and goes on without it."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError(record.getMessage())


def _merge(models: dict[str, Any], checkpoint: str, loras: Sequence[tuple[str, float]]) -> dict[str, Tensor]:
    import comfy.lora
    import comfy.lora_convert
    import comfy.sd
    import torch

    if checkpoint not in models:
        models[checkpoint] = comfy.sd.load_diffusion_model(checkpoint, model_options={"dtype": torch.float32})
    patcher = models[checkpoint].clone()
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    for path, strength in loras:
        tensors = comfy.lora_convert.convert_lora(load_file(path))
        patches = comfy.lora.load_lora(tensors, key_map)
        used = set().union(*(getattr(patch, "loaded_keys", ()) for patch in patches.values()))
        plain = {key for key in tensors if key.rsplit(".", 1)[-1] in ("diff", "diff_b", "set_weight", "w_norm")}
        left = set(tensors) - used - plain
        left = {key for key in left if not key.endswith((".alpha", ".dora_scale"))}
        added = patcher.add_patches(patches, strength)
        if left or len(added) != len(patches):
            raise ValueError(f"{len(patches) - len(added)} patches and these keys were left out: {sorted(left)[:3]}")
    state = patcher.model.state_dict()
    merged = {}
    with torch.no_grad():
        for key, patches in patcher.patches.items():
            weight = comfy.lora.calculate_weight(patches, state[key].float().clone(), key)
            name = key.removeprefix("diffusion_model.")
            merged[name.replace("_norm.weight", "_norm.scale")] = weight.contiguous()
    return merged


def _native(checkpoint: str, loras: Sequence[tuple[str, float]]) -> Any:
    import comfy.sd

    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, REPO / "__init__.py", submodule_search_locations=[str(REPO)]
        )
        sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACK])
    pack = {name: importlib.import_module(f"{PACK}.{name}") for name in ("nodes.engines", "accel.checkpoint",
                                                                         "accel.settings")}  # fmt: skip
    settings = pack["accel.settings"].EngineSettings(compile="off", device="cpu")
    model = pack["nodes.engines"].model_of(pack["accel.checkpoint"].inspect_checkpoint(checkpoint), settings)
    for path, strength in loras:
        model, _ = comfy.sd.load_lora_for_models(model, None, load_file(path), strength, 0.0)
    return model.loras.stack
