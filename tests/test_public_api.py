"""What `accel` exports: every name is there, and the lists agree. What importing it costs: test_imports.py."""

import ast

import pytest

import accel
from harness.paths import REPO


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


def test_types_are_published():
    assert (REPO / "accel" / "py.typed").is_file()
