"""The house, as rules over the source: who may import whom, and how large a thing may become.

Nothing is imported here; everything is read from the syntax trees. What a module imports inside its functions counts:
a late import is an arrow like any other. What stands under `if TYPE_CHECKING` does not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = ("accel", "nodes", "pocket", "benchmarks", "harness")

# The parts of `accel`, lowest first: a part imports from lower rows only. A part is a package or a module, and what has
# no row of its own belongs to the package it is in. A family's contract is apart from the families, because what serves
# every family imports it; and what a family offers to other hosts stands above the engine that it wraps.
LAYERS = (
    "errors observer",
    "hardware tensors",
    "memory settings",
    "files step_cache history families.layout families.wording",
    "store",
    "compile prove",
    "families.base linear",
    "spec quantize attention",
    "families",
    "lora",
    "checkpoint",
    "build text_encoder",
    "load offload recipe",
    "assemble",
    "engine plan",
    "families.streams.diffusers_pipeline",
    "registry prefetch report chart selftest families.flux1.diffusers_pipeline families.flux2.diffusers_pipeline",
)
RANKS = {part: rank for rank, row in enumerate(LAYERS) for part in row.split()}

MODULE_LINES = 300
FUNCTION_LINES = 50  # without the docstring
PUBLIC_METHODS = 15


@cache
def modules(tree: str) -> Mapping[str, Path]:
    """Dotted name -> file, of a package and everything in it."""
    found = {}
    for path in sorted((ROOT / tree).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(name: str, path: Path) -> Iterator[str]:
    """Dotted names that a module imports; of `from x import y` both `x.y` and, for what is no module, `x`."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            # Above the top: the pack's own root, as `..accel` in nodes.
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}".lstrip(".") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(parsed(path))


def arrows(*trees: str) -> Mapping[str, set[str]]:
    """Module -> the modules of these trees that it imports."""
    known = {name: path for tree in trees for name, path in modules(tree).items()}

    def module_of(name: str) -> str | None:
        return name if name in known else next((p for p in [name.rpartition(".")[0]] if p in known), None)

    found = {}
    for name, path in known.items():
        targets = {module_of(each) for each in imported(name, path)}
        found[name] = targets - {None, name}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """What lies on a circle: what is left when everything that imports nothing else, or that nothing imports, goes."""
    left = dict(graph)
    while True:
        aimed_at = set().union(*left.values())
        kept = {name: set(targets) & left.keys() for name, targets in left.items() if name in aimed_at}
        kept = {name: targets for name, targets in kept.items() if targets}
        kept = {name: targets & kept.keys() for name, targets in kept.items()}
        if kept == left:
            return sorted(left)
        left = kept


def part_of(module: str) -> str | None:
    """The part of `accel` that a module belongs to; None for the package itself, which stands above all of them."""
    names = module.split(".")[1:]
    longest_first = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((name for name in longest_first if name in RANKS), names[0] if names else None)


def test_every_part_of_accel_has_a_place():
    assert {part_of(name) for name in modules("accel")} - RANKS.keys() == {None}


def test_arrows_point_down():
    wrong = [
        f"{name} imports {target}"
        for name, targets in arrows("accel").items() if part_of(name) is not None
        for target in targets if part_of(target) != part_of(name)
        if RANKS.get(part_of(target), len(LAYERS)) >= RANKS[part_of(name)]
    ]  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize("tree", TREES)
def test_no_circle_among_modules(tree):
    assert circles(arrows(tree)) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]


@pytest.mark.parametrize(("tree", "foreign"), [
    ("accel", {"comfy", "comfy_api", "comfy_extras", "execution", "folder_paths", "nodes", "server", "harness"}),
    ("nodes", {"harness", "benchmarks", "pocket", "tests"}),
])  # fmt: skip
def test_what_a_tree_never_imports(tree, foreign):
    found = {
        f"{name} imports {each}"
        for name, path in modules(tree).items()
        for each in imported(name, path) if each.partition(".")[0] in foreign and not each.startswith(f"{tree}.")
    }  # fmt: skip
    assert found == set()


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node, clean=False) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def definitions(kind: type | tuple[type, ...]) -> Iterator[tuple[str, ast.AST]]:
    for tree in TREES:
        for name, path in modules(tree).items():
            for node in ast.walk(parsed(path)):
                if isinstance(node, kind):
                    yield f"{name}.{node.name}", node


def test_no_module_is_long():
    found = {}
    for tree in TREES:
        for name, path in modules(tree).items():
            found[name] = len(path.read_text(encoding="utf-8").splitlines())
    assert {name: lines for name, lines in found.items() if lines > MODULE_LINES} == {}


def test_no_function_is_long():
    found = {
        name: node.end_lineno - node.lineno + 1 - docstring_lines(node)
        for name, node in definitions((ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: lines for name, lines in found.items() if lines > FUNCTION_LINES} == {}


def test_no_class_has_many_public_methods_without_saying_why():
    """A class that has more says "Public methods:" in its docstring, and why."""
    found = {}
    for name, node in definitions(ast.ClassDef):
        methods = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
        public = sum(not method.name.startswith("_") for method in methods)
        if public > PUBLIC_METHODS and "Public methods:" not in (ast.get_docstring(node) or ""):
            found[name] = public
    assert found == {}


# Names of models and of their blocks. Names of nodes and of the pack ("Accelerated Flux Loader") are no model's.
A_FAMILY = re.compile(r"FLUX\.\d|[Ff]lux_?\d|(?<![a-z_])((double|single)_blocks|(single_)?transformer_blocks)")


def said(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every name and string in a module, without docstrings and comments."""
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.lineno, node.value
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, (ast.Name, ast.Attribute, ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, next(value for name, value in ast.iter_fields(node) if name in ("id", "attr", "name"))


@pytest.mark.parametrize("tree", ["accel", "nodes"])
def test_only_families_name_a_model_or_its_blocks(tree):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text[:80]}"
        for name, path in modules(tree).items() if not name.startswith(f"{tree}.families")
        for line, text in said(parsed(path)) if A_FAMILY.search(text)
    ]  # fmt: skip
    assert wrong == []


def test_a_name_of_a_family_is_found():
    source = '"""Of FLUX.1."""\nfrom .families.flux1 import X\nx = model.transformer_blocks  # FLUX.1\ny = "a FLUX.1"'
    assert [line for line, text in said(ast.parse(source)) if A_FAMILY.search(text)] == [2, 3, 4]
