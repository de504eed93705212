"""Sizes as formulas of a configuration's keys: ``num_attention_heads*head_dim+2*num_key_value_heads*head_dim``."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def value(formula: str, size_of: Callable[[str], int]) -> int:
    """A sum of products of whole numbers and of the sizes that ``size_of`` knows by name."""
    total = 0
    for term in formula.split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor) if factor.isdigit() else size_of(factor)
        total += product
    return total


def num_patches(image: int | Sequence[int], patch: int | Sequence[int]) -> int:
    """Square patches of an image of which both sides are given, or one of equal ones."""
    sides, parts = ((size, size) if isinstance(size, int) else size for size in (image, patch))
    return (sides[0] // parts[0]) * (sides[1] // parts[1])
