"""Quantized parameters as plain tensors and JSON, and back.

torchao's weights are tensor subclasses over plain tensors (`__tensor_flatten__`) with attributes that are constants,
dtypes, enums, named tuples and dataclasses; those become JSON. Only torchao's own classes are made from it.

Not `torchao.prototype.safetensors` (torchao 0.18): it takes a whole state dict apart at once, and the cache is written
tensor by tensor; it looks at all tensors for each that it puts together; and it knows a list of torchao's classes, not
those of a newer one, nor bitsandbytes' linears. As a prototype it may also write another format with every version.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..hardware import dtype_name
from .bitsandbytes_modes import Nf4Linear
from .linears import is_quantized

TRUSTED = "torchao."


class CodecError(Exception):
    """A value cannot be written as JSON, or a description names what is not there."""


def flatten(name: str, parameter: Tensor) -> tuple[dict[str, Tensor], Any]:
    """Take a parameter apart.

    Returns:
        Plain tensors by name, the first of which is `name` itself or begins with it; and what makes the parameter of
        them, as JSON, or None for a plain one.
    """
    if not is_quantized(parameter):
        return {name: parameter}, None
    inner, attributes = parameter.__tensor_flatten__()
    tensors, parts = {}, {}
    for part in inner:
        plain, parts[part] = flatten(f"{name}.{part}", getattr(parameter, part))
        tensors.update(plain)
    described = {"class": _class_name(type(parameter)), "attributes": encode(attributes), "parts": parts}
    described["shape"] = list(parameter.shape)
    return tensors, described


def unflatten(name: str, description: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """Put a parameter together again.

    Raises:
        CodecError: the description does not fit the installed torchao.
    """
    if description is None:
        return tensors[name]
    inner = {part: unflatten(f"{name}.{part}", below, tensors) for part, below in description["parts"].items()}
    kind = _class(description["class"])
    if not issubclass(kind, Tensor):
        raise CodecError(f"{description['class']} is no tensor")
    shape = torch.Size(description["shape"])
    stride = torch.empty(shape, device="meta").stride()
    return kind.__tensor_unflatten__(inner, decode(description["attributes"]), shape, stride)


def described_modules(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The modules that stand in place of an `nn.Linear`, with what makes them."""
    for name, module in model.named_modules():
        if isinstance(module, Nf4Linear):
            yield name, {"kind": "nf4", "in_features": module.in_features, "out_features": module.out_features}


def make_module(description: Mapping[str, Any]) -> nn.Module:
    """A module of `described_modules` without data.

    Raises:
        CodecError: unknown.
    """
    if description["kind"] != "nf4":
        raise CodecError(f"'{description['kind']}' is no kind of linear")
    import bitsandbytes  # noqa: F401 - registers torch.ops.bitsandbytes

    return Nf4Linear(description["in_features"], description["out_features"])


def encode(value: Any) -> Any:
    """A constant, dtype, enum member, dataclass, or list or dictionary of such, as JSON.

    Raises:
        CodecError: none of these.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, enum.Enum):
        return {"enum": _class_name(type(value)), "member": value.name}
    if dataclasses.is_dataclass(value):
        fields = {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"dataclass": _class_name(type(value)), "fields": fields}
    if isinstance(value, Mapping):
        return {"mapping": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"namedtuple": _class_name(type(value)), "items": [encode(item) for item in value]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [encode(item) for item in value]}
    raise CodecError(f"a {type(value).__name__} cannot be written as JSON")


def decode(value: Any) -> Any:
    """The inverse of `encode`.

    Raises:
        CodecError: it names what is not in the installed torchao.
    """
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        found = getattr(torch, value["dtype"], None)
        if not isinstance(found, torch.dtype):
            raise CodecError(f"there is no dtype {value['dtype']}")
        return found
    if "enum" in value:
        kind = _class(value["enum"])
        if not issubclass(kind, enum.Enum) or value["member"] not in kind.__members__:
            raise CodecError(f"{value['enum']} has no member {value['member']}")
        return kind[value["member"]]
    if "dataclass" in value:
        kind = _class(value["dataclass"])
        if not dataclasses.is_dataclass(kind):
            raise CodecError(f"{value['dataclass']} is no dataclass")
        return kind(**{name: decode(item) for name, item in value["fields"].items()})
    if "namedtuple" in value:
        kind = _class(value["namedtuple"])
        if not issubclass(kind, tuple):
            raise CodecError(f"{value['namedtuple']} is no tuple")
        return kind(*(decode(item) for item in value["items"]))
    if "mapping" in value:
        return {decode(key): decode(item) for key, item in value["mapping"]}
    if "tuple" in value:
        return tuple(decode(item) for item in value["tuple"])
    return [decode(item) for item in value["list"]]


def _class_name(kind: type) -> str:
    if not kind.__module__.startswith(TRUSTED):
        raise CodecError(f"{kind.__module__}.{kind.__qualname__} is not torchao's")
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str) -> type:
    module, _, qualified = name.partition(":")
    if not module.startswith(TRUSTED) or "." in qualified:
        raise CodecError(f"{name} is not torchao's")
    try:
        kind = getattr(importlib.import_module(module), qualified)
    except (ImportError, AttributeError) as exc:
        raise CodecError(f"torchao has no {name} ({exc})") from exc
    if not isinstance(kind, type):
        raise CodecError(f"{name} is no class")
    return kind
