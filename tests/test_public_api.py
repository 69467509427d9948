"""What `accel` exports: every name is there, the lists agree, and importing the package costs nothing."""

import ast
import subprocess
import sys

import pytest

import accel
from harness.paths import REPO

IMPORTED = "import sys, accel; {statement}; print(*sys.modules)"


def imported_for_type_checkers():
    """Public name -> module, as the block under `TYPE_CHECKING` has it."""
    tree = ast.parse((REPO / "accel" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_the_lists_agree():
    assert imported_for_type_checkers() == accel._HOMES
    assert accel.__all__ == sorted(accel._HOMES)


@pytest.mark.parametrize("name", accel.__all__)
def test_every_name_is_there(name):
    value = getattr(accel, name)
    assert value.__name__ == name
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'engine_room'"):
        _ = accel.engine_room


def modules_after(statement):
    """What a fresh process has imported after `import accel` and a statement."""
    command = [sys.executable, "-c", IMPORTED.format(statement=statement)]
    return set(subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.split())


def test_the_package_imports_nothing():
    assert {"torch", "diffusers", "numpy", "comfy", "safetensors", "accel.engine"}.isdisjoint(modules_after("pass"))


def test_what_reads_headers_imports_no_operator():
    modules = modules_after("accel.inspect_checkpoint, accel.LoraStack, accel.EngineSettings")
    assert "accel.checkpoint.recognise" in modules
    assert {"accel.linear.operators", "diffusers", "torchao", "comfy"}.isdisjoint(modules)
    assert "accel.linear.operators" in modules_after("accel.Engine")


def test_types_are_published():
    assert (REPO / "accel" / "py.typed").is_file()
