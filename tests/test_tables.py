"""Nothing that can be chosen or read is missing where people look for it: docs, tooltips, settings and generators.

Names come from the registries; each place is text, or a collection of names. A new kind of LoRA, quantization mode,
stored format or attention backend fails here until every place has it.
"""

import ast
import importlib
import json
import pkgutil
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import accel.lora.kinds
import accel.quantize
from accel.attention import BACKENDS
from accel.checkpoint.gguf_file import FLOATS
from accel.checkpoint.scales import STORED_AS
from accel.files import FLOAT_DTYPES
from accel.hardware import dtype_name
from accel.lora.kinds import KINDS, dora
from accel.lora.kinds.difference import Difference
from accel.lora.kinds.table import KindTable
from accel.quantize import Mode
from accel.quantize.modes import MODES
from accel.settings import ATTENTION_BACKENDS, QUANTIZATION_MODES
from harness import lora_kinds

ROOT = Path(__file__).parents[1]
LANGUAGES = ("en", "zh")

Place = str | Collection[str]


def page(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def rows(path: str, heading: str) -> str:
    """First cells of the table with this heading in a page of docs."""
    _, after = re.split(rf"^\| {re.escape(heading)} \|.*\n\| ---", page(path), maxsplit=1, flags=re.MULTILINE)
    after = after.split("\n\n", 1)[0]
    return "\n".join(line.split("|")[1] for line in after.splitlines() if line.startswith("|"))


def tooltip(language: str, node: str, name: str) -> str:
    return json.loads(page(f"locales/{language}/nodeDefs.json"))[node]["inputs"][name]["tooltip"]


def tooltip_in_code(path: str, name: str) -> str:
    """What a node's own source says of one of its inputs: shown where there is no translation."""
    for node in ast.walk(ast.parse(page(path))):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            said = {each.arg: each.value for each in node.keywords}
            if node.args[0].value == name and "tooltip" in said:
                return ast.literal_eval(said["tooltip"])
    raise LookupError(f"{path} has no input '{name}' with a tooltip")


def has(place: Place, name: str) -> bool:
    """Whether a name, or its plural, is in a place; in text as a word of its own."""
    if not isinstance(place, str):
        return name in place
    return re.search(rf"(?<![\w-]){re.escape(name)}s?(?![\w-])", place, re.ASCII) is not None


def lacking(names: Iterable[str], places: Mapping[str, Place]) -> list[str]:
    """What lacks what, as sentences."""
    return [f"{title} lacks '{name}'" for name in names for title, place in places.items() if not has(place, name)]


def tooltips(node: str, name: str) -> dict[str, Place]:
    return {f"the tooltip of {node}.{name} in locales/{each}": tooltip(each, node, name) for each in LANGUAGES}


LORA_PLACES: Mapping[str, Place] = {
    "README.md": page("README.md"),
    "the table of kinds in web/docs/FluxHotswapLora.md": rows("web/docs/FluxHotswapLora.md", "Kind"),
    "the formulas of accel/lora/kinds": accel.lora.kinds.__doc__,
    "harness.lora_kinds.KINDS": " ".join(lora_kinds.KINDS),
}
MODE_PLACES: Mapping[str, Place] = {
    "settings.QUANTIZATION_MODES": QUANTIZATION_MODES,
    "README.md": page("README.md"),
    "the table of modes in web/docs/FluxQuantizeTransformer.md": rows("web/docs/FluxQuantizeTransformer.md", "`mode`"),
    "docs/devices.md": re.findall(r"^\| quantization (\w+) \|", page("docs/devices.md"), re.MULTILINE),
}
BACKEND_PLACES: Mapping[str, Place] = {
    "settings.ATTENTION_BACKENDS": ATTENTION_BACKENDS,
    "the table of kernels in web/docs/FluxAccelLoader.md": rows("web/docs/FluxAccelLoader.md", "`attention`"),
    "docs/devices.md": re.findall(r"^\| attention (\w+) \|", page("docs/devices.md"), re.MULTILINE),
}
# How docs write a dtype of numbers in a file.
WRITTEN = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.int8: "int8",
}
LOADER_PAGE = page("web/docs/FluxAccelLoader.md")
STORED_PLACES: Mapping[str, Place] = {
    "the files of web/docs/FluxAccelLoader.md": LOADER_PAGE.split("## Files")[1].split("\n## ")[0]
}


def lora_names(kinds: KindTable) -> list[str]:
    return [kind.name for kind in kinds] + [dora.NAME]


def mode_tooltips() -> dict[str, Place]:
    """Modes that differ in that end only are described together there."""
    modes = [mode for mode in MODES if not mode.endswith("_weight_only")]
    places = {
        "the tooltip of mode in nodes/quantize.py": tooltip_in_code("nodes/quantize.py", "mode"),
        **tooltips("FluxQuantizeTransformer", "mode"),
    }
    return {
        title: [mode for mode in MODES if has(text, mode if mode in modes else "…_weight_only")]
        for title, text in places.items()
    }


def defined_modes() -> set[str]:
    """Names of the modes that the modules of `accel.quantize` define."""
    names = [each.name for each in pkgutil.iter_modules(accel.quantize.__path__, "accel.quantize.")]
    modules = [importlib.import_module(name) for name in names]
    return {each.name for module in modules for each in vars(module).values() if isinstance(each, Mode)}


def stored_names() -> list[str]:
    dtypes = (*FLOAT_DTYPES, *STORED_AS.values())
    return [*dict.fromkeys(WRITTEN.get(dtype, dtype_name(dtype)) for dtype in dtypes), *FLOATS]


CHECKED = {
    "kinds of LoRA": lambda: lacking(lora_names(KINDS), LORA_PLACES),
    "quantization modes": lambda: lacking(MODES, {**MODE_PLACES, **mode_tooltips()}),
    "attention backends": lambda: lacking(BACKENDS, BACKEND_PLACES),
    "stored formats": lambda: lacking(stored_names(), STORED_PLACES),
}


@pytest.mark.parametrize("names", CHECKED)
def test_every_place_has_every_name(names):
    assert CHECKED[names]() == []


@pytest.mark.parametrize(
    ("listed", "registry"), [(QUANTIZATION_MODES, MODES), (ATTENTION_BACKENDS, BACKENDS)], ids=["modes", "backends"]
)
def test_settings_offer_nothing_that_is_not_there(listed, registry):
    assert set(listed) - {"auto", "none"} == set(registry)


def test_every_mode_that_a_module_defines_can_be_chosen():
    assert defined_modes() == set(MODES)


def test_every_adapter_of_comfyui_lists_roles_that_are_known():
    """So that a kind that ComfyUI's own loaders bring is read, or refused by name."""
    roles = set(KINDS.comfyui_endings)
    for kind in KINDS:
        if kind.comfyui is not None:
            assert set(kind.comfyui.roles) <= roles
            assert kind.roles - set(kind.unread_by_comfyui) <= set(kind.comfyui.roles)


class Imagined(Difference):
    name: ClassVar[str] = "LoXYZ"
    endings: ClassVar[dict[str, str]] = {".xyz": "xyz"}


def test_a_kind_that_only_the_code_knows_is_found_missing_everywhere():
    kinds = KindTable(*(kind for kind in KINDS if kind is not KINDS.bias), Imagined(), bias=KINDS.bias)
    assert lacking(lora_names(kinds), LORA_PLACES) == [f"{title} lacks 'LoXYZ'" for title in LORA_PLACES]


def test_names_that_are_parts_of_others_are_not_taken_for_them():
    assert lacking(["int4", "fp8"], {"a page": "| `int4_weight_only` |", "a list": ("fp8_weight_only",)}) == [
        "a page lacks 'int4'", "a list lacks 'int4'", "a page lacks 'fp8'", "a list lacks 'fp8'",
    ]  # fmt: skip
