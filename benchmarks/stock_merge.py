"""ComfyUI's own way to switch a LoRA: merge it into every weight that it changes.

Real ComfyUI code runs, in a process of its own, on a model with one double and one single block of the real width; the
time of each block is multiplied by how many of its kind the model has. What is timed are ComfyUI's calls of
`ModelPatcher.patch_weight_to_device`, as `load_models_gpu` makes them before sampling.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.comfyui import fetch, resolve_version

from .families.base import Config
from .families.registry import of
from .flux_loras import DTYPE, KEY_PREFIX, STRENGTH, RandomLora
from .report import BenchmarkError

SAMPLED = (f"{KEY_PREFIX}transformer_blocks.0.", f"{KEY_PREFIX}single_transformer_blocks.0.")
BLOCK_TYPES = ("double_blocks", "single_blocks")
STOP_S = 30
# Rounding to bf16 is off by 2**-9 at most, relative to each value.
BF16_ERROR = 2**-9
# Of every tensor of a checkpoint in the original layout.
Shapes = Mapping[str, tuple[int, ...]]


class StockMerge:
    """A ComfyUI process that holds the sampled blocks and merges LoRAs into them on request."""

    def __init__(self, config: Config, loras: Mapping[str, RandomLora]) -> None:
        """Start ComfyUI and hand it the sampled blocks' share of each LoRA."""
        self.version = resolve_version()
        self._block_counts = {"double_blocks": config.depth, "single_blocks": config.depth_single}
        shares = {
            name: {key: tensor for key, tensor in lora.state_dict(KEY_PREFIX).items() if key.startswith(SAMPLED)}
            for name, lora in loras.items()
        }
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # As int16 arrays: numpy has no bfloat16, and torch's own way to send tensors shares the memory.
        sent = {
            name: {key: tensor.view(torch.int16).numpy() for key, tensor in share.items()}
            for name, share in shares.items()
        }
        sampled: Any = replace(config, depth=1, depth_single=1)
        shapes = of(config).family.layout(sampled).expected_shapes()
        arguments = (theirs, fetch(self.version), shapes)
        self._process = context.Process(target=_serve, args=arguments, name="stock-merge", daemon=True)
        self._process.start()
        theirs.close()
        self._connection.send(sent)
        per_block = self._receive()
        self.sampled_layers = sum(per_block.values())
        self.layers = sum(per_block[kind] * count for kind, count in self._block_counts.items())

    def merge(self, name: str) -> float:
        """Switch to one of the LoRAs; returns the milliseconds that the whole model would take."""
        self._connection.send(name)
        block_ms = self._receive()
        return sum(block_ms[kind] * count for kind, count in self._block_counts.items())

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError as exc:
            self._process.join(STOP_S)
            raise BenchmarkError(
                f"stock: the ComfyUI process ended with exit code {self._process.exitcode}; see its messages above."
            ) from exc
        if isinstance(answer, BenchmarkError):
            raise answer
        return answer


def _serve(connection: Connection, comfyui: Path, shapes: Shapes) -> None:
    """The process: answer each LoRA name with {block type: ms}, until the other end closes."""
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # read when comfy.model_management is imported

    try:
        merge = _Merge(shapes, connection.recv())
        connection.send(merge.layers_per_block)
        while True:
            connection.send(merge.switch(connection.recv()))
    except BenchmarkError as error:
        connection.send(error)
    except EOFError:
        return


class _Merge:
    """The sampled model in ComfyUI's hands, and one clone of it with each LoRA."""

    def __init__(self, shapes: Shapes, loras: Mapping[str, Mapping[str, Any]]) -> None:
        import comfy.lora
        import comfy.sd

        # The dtype by name: ComfyUI keeps a whole model in bf16 on a CPU, but would load these few blocks in fp32.
        root = comfy.sd.load_diffusion_model_state_dict(_checkpoint(shapes), model_options={"dtype": DTYPE})
        self._model = root.model
        self._originals = {key: tensor.clone() for key, tensor in self._model.state_dict().items()}
        self._block_ms: dict[str, float] = {}
        key_map = comfy.lora.model_lora_keys_unet(self._model, {})
        self._clones, self._patches = {}, {}
        for name, arrays in loras.items():
            tensors = {key: torch.from_numpy(array).view(DTYPE) for key, array in arrays.items()}
            patches = comfy.lora.load_lora(tensors, key_map)
            clone = root.clone()
            added = clone.add_patches(patches, STRENGTH)
            if 2 * len(added) != len(tensors):
                raise BenchmarkError(f"stock: ComfyUI took {len(added)} of the LoRA's {len(tensors) // 2} layers.")
            self._clones[name] = self._timed(clone)
        weights = {key for clone in self._clones.values() for key in clone.patches}
        self._weights = sorted(weights)
        self.layers_per_block = {kind: sum(_kind(key) == kind for key in weights) for kind in BLOCK_TYPES}

    def switch(self, name: str) -> dict[str, float]:
        """Merge one LoRA in place of the last one; ms per block type."""
        from comfy.model_management import load_models_gpu

        before = self._bits()
        self._block_ms = defaultdict(float)
        with torch.inference_mode():  # ComfyUI executes nodes in it
            load_models_gpu([self._clones[name]])
        self._check(name, before)
        return dict(self._block_ms)

    def _timed(self, clone: Any) -> Any:
        """Measure the clone's `patch_weight_to_device` where it really merges something."""
        patch = clone.patch_weight_to_device

        def timed(key: str, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = patch(key, *args, **kwargs)
            if key in clone.patches:
                self._block_ms[_kind(key)] += (time.perf_counter() - start) * 1e3
            return result

        clone.patch_weight_to_device = timed
        return clone

    def _bits(self) -> dict[str, Tensor]:
        state = self._model.state_dict()
        return {key: state[key] for key in self._weights}

    def _check(self, name: str, before: Mapping[str, Tensor]) -> None:
        """Every merged weight is W + strength · B A within bf16's rounding, and is not what it was."""
        for key, merged in self._bits().items():
            if torch.equal(merged, before[key]):
                raise BenchmarkError(f"stock: {key} did not change.")
            wanted = self._originals[key].to(torch.float32, copy=True)
            for strength, adapter, _, offset, _ in self._clones[name].patches[key]:
                up, down = adapter.weights[:2]
                rows = wanted if offset is None else wanted.narrow(*offset)
                rows += strength * (up.float() @ down.float())
            error = (merged.float() - wanted).norm() / wanted.norm()
            if merged.dtype != DTYPE or not error < BF16_ERROR:
                raise BenchmarkError(
                    f"stock: {key} is {error:.2g} (relative L2) from the weight plus LoRA '{name}', in {merged.dtype}; "
                    f"expected at most {BF16_ERROR:g} in {DTYPE}."
                )


def _kind(key: str) -> str:
    return next((kind for kind in BLOCK_TYPES if f".{kind}." in key), "other")


def _checkpoint(shapes: Shapes) -> dict[str, Tensor]:
    """Random weights of a trained model's scale, bf16; no biases."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        value = torch.ones(shape, dtype=DTYPE) if name.endswith("norm.scale") else torch.zeros(shape, dtype=DTYPE)
        tensors[name] = value.normal_(0.0, 0.02) if len(shape) == 2 else value
    return tensors
