"""Bits of flags, also of those that have no name."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_nowhere_is_the_complement_taken_of_a_flag_with_a_name() -> None:
    """In Python 3.11 ``~Flag.X`` has only bits with a name: what is masked with it loses all others."""
    for package in ("nbdserve", "overlay", "recipes"):
        for source in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text())):
                if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
                    place = f"{source.relative_to(ROOT)}:{node.lineno}"
                    assert not names_a_member(node.operand), f"{place}: say ~int(...)"


def names_a_member(operand: ast.expr) -> bool:
    """Whether an expression is made of members of enumerations: ``Flag.X``, ``Flag.X | Flag.Y``."""
    if isinstance(operand, ast.BinOp):
        return names_a_member(operand.left) or names_a_member(operand.right)
    if not isinstance(operand, ast.Attribute) or not isinstance(operand.value, ast.Name):
        return False
    # A module's constant is a plain number.
    return operand.attr.isupper() and operand.value.id[0].isupper()
