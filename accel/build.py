"""From a checkpoint to a diffusers model in memory, quantized on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .checkpoint import LinearWeights, read_weights
from .errors import CheckpointError
from .families.layout import ModelLinear
from .memory.budgets import free_device_bytes, give_back_freed
from .quantize import Mode
from .quantize.cache import CacheWriter
from .spec import ModelSpec

Progress = Callable[[int, int], None]

# What converting one weight on a GPU takes at most: it in float32 and two intermediates.
CONVERSION_BYTES_PER_WEIGHT = 12
# After so many elements that were read, what was freed of them goes back to the system.
GIVE_BACK_ELEMENTS = 2**28


class Destination(Protocol):
    """Decides where a model's weights go while they are read."""

    def begin(self, model: nn.Module) -> None:
        """Get the model before it has any data."""

    def device_of(self, name: str) -> torch.device:
        """Where the tensors of a module (full name) should be."""

    def placed(self, name: str) -> None:
        """A module has all its data; its parameters may be replaced now by copies of them."""

    def complete(self) -> None:
        """All modules have."""


class OnDevice:
    """Everything on one device."""

    def __init__(self, device: torch.device) -> None:
        """Use this one."""
        self._device = device

    def begin(self, model: nn.Module) -> None:
        """Nothing to prepare."""

    def device_of(self, name: str) -> torch.device:
        """That device."""
        return self._device

    def placed(self, name: str) -> None:
        """Nothing to do."""

    def complete(self) -> None:
        """Nothing to do."""


@dataclass
class Conversion:
    """What became of a model's linears.

    Attributes:
        converted: how many were quantized.
        left: how many the mode does not touch: embedders, final layer.
        unfit: modules that it would have quantized, had its kernels taken their sizes.
    """

    converted: int = 0
    left: int = 0
    unfit: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """For the log."""
        text = f"{self.converted} of {self.converted + self.left + len(self.unfit)} linears quantized"
        if self.unfit:
            text += f", {len(self.unfit)} left because of their sizes ({', '.join(self.unfit[:3])}, …)"
        return text


def load_model(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Progress,
    mode: Mode | None = None,
    writer: CacheWriter | None = None,
    destination: Destination | None = None,
) -> nn.Module:
    """Read the weights into a new diffusers model: one tensor at a time is read, cast, quantized, placed and released.

    Args:
        spec: what `inspect_checkpoint` gave.
        dtype: dtype of all parameters, as the model sees them.
        device: where they go, and where they are converted.
        on_progress: called with (linears and vectors read, both in all).
        mode: what linears are converted to, see `mode_of`.
        writer: gets every parameter as soon as it is placed; not finished here.
        destination: where they go instead.

    Returns:
        The model in eval mode; its parameters do not require gradients, and are no inference tensors.

    Raises:
        FileError: the file is gone or was changed since it was inspected.
        CheckpointError: a tensor holds NaN or infinity.
    """
    total = count_parts(spec)
    destination = destination or OnDevice(device)
    # Parameters made under inference_mode could not be rebound outside it.
    with torch.inference_mode(False), torch.no_grad():
        model = empty_model(spec)
        destination.begin(model)
        # What is to be converted stays where it lies: whether a GPU has the room is known weight by weight.
        read_to = device if mode is None else spec.file.device
        read = 0
        for done, weights in enumerate(read_weights(spec, dtype, read_to), start=1):
            if isinstance(weights, LinearWeights):
                module = weights.module
                names = _place_linear(model, spec, weights, mode, device, destination.device_of(module))
                read += weights.weight.numel()
            else:
                module = weights.parameter.rpartition(".")[0]
                assign(model, weights.parameter, weights.value.to(destination.device_of(module)))
                names = (weights.parameter,)
            if writer is not None:
                for name in names:
                    writer.add(name, model.get_parameter(name))
            destination.placed(module)
            if read > GIVE_BACK_ELEMENTS:
                read = 0
                give_back_freed()
            on_progress(done, total)
        check_complete(model, spec)
        destination.complete()
    return model


def empty_model(spec: ModelSpec) -> nn.Module:
    """The diffusers model of a checkpoint's sizes, without data."""
    with torch.device("meta"):
        return spec.family.build(spec.config).eval().requires_grad_(False)


def count_parts(spec: ModelSpec) -> int:
    """Linears and vectors that `read_weights` yields."""
    return len(spec.layout.by_module) + len(spec.layout.vectors)


def check_complete(model: nn.Module, spec: ModelSpec) -> None:
    """Make sure that every parameter has data.

    Raises:
        CheckpointError: one has none.
    """
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise CheckpointError(f"'{spec.file.name}': no tensor for {', '.join(left[:3])}: a wrong layout.")


def mode_of(linear: ModelLinear, mode: Mode | None) -> Mode | None:
    """The mode that a linear's weight is stored in when the model's is `mode`; None: it keeps its dtype."""
    if mode is None or not linear.quantizable or not mode.fits(linear.out_features, linear.in_features):
        return None
    return mode


def conversion_of(spec: ModelSpec, mode: Mode) -> Conversion:
    """What a mode does to a checkpoint's linears; known from their sizes, before anything is read."""
    result = Conversion()
    for linear in spec.layout.by_module.values():
        if mode_of(linear, mode) is not None:
            result.converted += 1
        elif linear.quantizable:
            result.unfit.append(linear.module)
        else:
            result.left += 1
    return result


def stored_sizes(spec: ModelSpec, dtype: torch.dtype, mode: Mode | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and bytes of each parameter of every linear, and of every vector, as `load_model` will store them.

    Known from the sizes, before anything is read.
    """
    for linear in spec.layout.by_module.values():
        out_features, in_features = linear.out_features, linear.in_features
        stored_in = mode_of(linear, mode)
        if stored_in is None:
            weight = out_features * in_features * dtype.itemsize
        else:
            weight = stored_in.weight_bytes(out_features, in_features)
        yield linear.module, (weight, out_features * dtype.itemsize) if linear.bias else (weight,)
    for vector in spec.layout.vectors:
        yield vector.parameter, (vector.size * dtype.itemsize,)


def model_bytes(spec: ModelSpec, dtype: torch.dtype, mode: Mode | None) -> int:
    """What `load_model` will take on the device."""
    return sum(sum(sizes) for _, sizes in stored_sizes(spec, dtype, mode))


def assign(model: nn.Module, parameter: str, tensor: Tensor) -> None:
    """Put a tensor, plain or quantized, in a parameter's place.

    Raises:
        CheckpointError: the model has a parameter of another shape there.
    """
    module, _, name = parameter.rpartition(".")
    if model.get_submodule(module)._parameters[name] is not None:  # a module made by the cache has no tensors yet
        _check_shape(model, parameter, tensor)
    model.get_submodule(module)._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def _place_linear(
    model: nn.Module,
    spec: ModelSpec,
    weights: LinearWeights,
    mode: Mode | None,
    device: torch.device,
    goes_to: torch.device,
) -> tuple[str, ...]:
    """Put a linear into the model, quantized if the mode does that. Returns the names of its parameters."""
    weight, bias, linear = weights.weight, weights.bias, spec.layout.by_module[weights.module]
    parameters = {f"{linear.module}.weight": weight}
    if bias is not None:
        parameters[f"{linear.module}.bias"] = bias
    for name, tensor in parameters.items():
        _check_shape(model, name, tensor)
    stored_in = mode_of(linear, mode)
    if stored_in is None:
        for name, tensor in parameters.items():
            assign(model, name, tensor.to(goes_to))
        return tuple(parameters)
    if stored_in.needs_device or _conversion_fits(weight, device):
        weight, bias = weight.to(device), bias if bias is None else bias.to(device)
    converted = stored_in.convert(weight, bias, linear.per_picture).to(goes_to).eval()
    model.set_submodule(linear.module, converted)
    return tuple(f"{linear.module}.{parameter}" for parameter, _ in converted.named_parameters())


def _conversion_fits(weight: Tensor, device: torch.device) -> bool:
    """Whether a GPU has the memory to convert a weight; the weights before it are there already."""
    if device.type != "cuda":
        return device.type == "cpu"
    return free_device_bytes(device) > weight.numel() * CONVERSION_BYTES_PER_WEIGHT


def _check_shape(model: nn.Module, parameter: str, tensor: Tensor) -> None:
    expected = tuple(model.get_parameter(parameter).shape)
    if expected != tuple(tensor.shape):
        raise CheckpointError(f"{parameter} is {tuple(tensor.shape)}, diffusers expects {expected}.")
