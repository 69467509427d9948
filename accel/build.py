"""From a checkpoint to a diffusers model in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .checkpoint import LinearWeights, read_weights
from .errors import CheckpointError
from .spec import ModelSpec

Progress = Callable[[int, int], None]


def load_model(spec: ModelSpec, dtype: torch.dtype, device: torch.device, on_progress: Progress) -> nn.Module:
    """Read the weights into a new diffusers model, one tensor at a time.

    Args:
        spec: what `inspect_checkpoint` gave.
        dtype: dtype of all parameters.
        device: where they go.
        on_progress: called with (linears and vectors read, both in all).

    Returns:
        The model in eval mode; its parameters do not require gradients, and are no inference tensors.

    Raises:
        FileError: the file is gone or was changed since it was inspected.
        CheckpointError: a tensor holds NaN or infinity.
    """
    layout = spec.family.layout(spec.config)
    total = sum(len(linear.parts) for linear in layout.linears) + len(layout.vectors)
    # Parameters made under inference_mode could not be rebound outside it.
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            model = spec.family.build(spec.config).eval().requires_grad_(False)
        for done, weights in enumerate(read_weights(spec, dtype, device), start=1):
            if isinstance(weights, LinearWeights):
                _assign(model, f"{weights.module}.weight", weights.weight)
                _assign(model, f"{weights.module}.bias", weights.bias)
            else:
                _assign(model, weights.parameter, weights.value)
            on_progress(done, total)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise CheckpointError(f"'{spec.file.name}': no tensor for {', '.join(left[:3])}: a wrong layout.")
    return model


def _assign(model: nn.Module, parameter: str, tensor: Tensor) -> None:
    module_name, _, name = parameter.rpartition(".")
    module = model.get_submodule(module_name)
    expected = tuple(module._parameters[name].shape)
    if expected != tuple(tensor.shape):
        raise CheckpointError(f"{parameter} is {tuple(tensor.shape)}, diffusers expects {expected}.")
    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
