"""Give an encoder's modules the sizes of a file, and fill them from it, weight by weight."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoint.stored import StoredReader
from ..errors import CheckpointError
from ..spec import StoredTensor
from ..tensors import all_finite
from .linear import WeightOnlyLinear
from .llm import halves
from .modes import resident_dtype, resident_format
from .spec import EncoderSpec


@dataclass(frozen=True)
class LoadReport:
    """What one load did."""

    seconds: float
    bytes: int


class EncoderWeights:
    """The weights of one encoder: absent at first, filled from its file, given back, filled again.

    Args:
        module: ComfyUI's model, on the meta device, whose parameters have Hugging Face's names.
        spec: the file.
        mode: one of `modes.MODES` but `auto`; it is for `linears` of the spec's config.

    Attributes:
        quantized: the layers that took the place of linears, by module name.
    """

    def __init__(self, module: nn.Module, spec: EncoderSpec, mode: str) -> None:
        self.module = module
        self.spec = spec
        self.quantized: dict[str, WeightOnlyLinear] = {}
        linears = spec.config.linears
        for name, stored in spec.weights.items():
            layer = name.removesuffix(".weight")
            weight_format = resident_format(mode, stored, layer in linears)
            if weight_format is not None:
                out_features, in_features = linears[layer]
                self.quantized[layer] = WeightOnlyLinear(in_features, out_features, weight_format)
                module.set_submodule(layer, self.quantized[layer])
        self.clear()

    @property
    def loaded(self) -> bool:
        """Whether the weights are there."""
        return self._loaded

    @property
    def bytes(self) -> int:
        """What the weights take, loaded or not."""
        return sum(parameter.nbytes for parameter in self.module.parameters())

    def clear(self) -> None:
        """Give the memory back; sizes and dtypes stay."""
        self._loaded = False
        for name, stored in self.spec.weights.items():
            owner = self.quantized.get(name.removesuffix(".weight"))
            if owner is None:
                self._set(name, torch.empty(stored.shape, dtype=resident_dtype(stored), device="meta"))
            else:
                for part, parameter in list(owner.named_parameters()):
                    setattr(owner, part, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def fill(
        self, device: torch.device, work_device: torch.device, progress: Callable[[int, int], None]
    ) -> LoadReport:
        """Read every weight, quantize it where `work_device` is, and place it on `device`. One is in memory at a time.

        Args:
            device: where the weights go.
            work_device: where they are quantized, such as the GPU, which is many times as fast.
            progress: called with (done, all) after each weight; may raise to cancel.

        Raises:
            FileError: the file is gone or changed.
            CheckpointError: a weight is not finite. After any error, no weight is there.
        """
        start, total = time.perf_counter(), len(self.spec.weights)
        # Parameters made in ComfyUI's inference mode could not be replaced or patched outside it.
        try:
            with torch.inference_mode(False), torch.no_grad(), self.spec.file.open() as rows:
                reader = StoredReader(self.spec.file.name, rows, torch.device("cpu"))
                for done, (name, stored) in enumerate(self.spec.weights.items(), start=1):
                    self._place(name, stored, reader, device, work_device)
                    progress(done, total)
        except BaseException:
            self.clear()
            raise
        self._loaded = True
        return LoadReport(time.perf_counter() - start, self.bytes)

    def _place(
        self, name: str, stored: StoredTensor, reader: StoredReader, device: torch.device, work_device: torch.device
    ) -> None:
        layer = self.quantized.get(name.removesuffix(".weight"))
        if layer is None:
            self._set(name, self._in_order(name, self._plain(stored, reader)).to(device))
        elif stored.scale is not None and layer.weight.dtype == stored.info.dtype:  # as the file has it
            weight, scale = reader.read_as_stored(stored)
            layer.store({"weight": weight, "scale": scale}, device)
        else:
            expanded = stored.scale is not None or stored.info.packed or stored.info.dtype.itemsize == 1
            weight = self._in_order(name, reader.read(stored, torch.float32 if expanded else stored.info.dtype))
            layer.store(layer.weight_format.quantize(weight.to(work_device)), device)

    def _in_order(self, name: str, weight: Tensor) -> Tensor:
        heads = self.spec.interleaved.get(name)
        return weight if heads is None else halves(weight, heads)

    def _plain(self, stored: StoredTensor, reader: StoredReader) -> Tensor:
        dtype = resident_dtype(stored)
        if not stored.info.packed:
            return reader.read(stored, dtype)
        weight = reader.read(stored, torch.float32).to(dtype)
        if not all_finite(weight):
            raise CheckpointError(
                f"'{self.spec.file.name}': '{stored.key}' has values that float16 cannot hold. Choose a quantization."
            )
        return weight

    def _set(self, name: str, value: Tensor) -> None:
        owner, _, parameter = name.rpartition(".")
        setattr(self.module.get_submodule(owner), parameter, nn.Parameter(value, requires_grad=False))
