"""Nested dicts of arrays seen as paths `a/b/c`: regex rule tables, counts, bytes, differences.

The same matcher serves weight decay, freezing, sharding and adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")


def path_of(keys: tuple[Any, ...]) -> str:
    """`blocks/attn/qkv/kernel` from a JAX key path."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf}, in tree order."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`function(path, leaf, *other leaves)` over the tree."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(path_of(keys), *leaves), tree, *rest
    )


def first_match(rules: Sequence[tuple[str, T]], path: str) -> T:
    """Value of the first rule whose pattern matches the full path. Raises ValueError if none."""
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise ValueError(f"no rule matches the parameter {path!r}; patterns: {[p for p, _ in rules]}")


def matches(patterns: Sequence[str], path: str) -> bool:
    """Whether any pattern matches the full path."""
    return any(re.fullmatch(p, path) for p in patterns)


def unmatched_patterns(patterns: Sequence[str], tree: Any) -> list[str]:
    """Patterns that match no path: usually a misspelling."""
    return [p for p in patterns if not any(re.fullmatch(p, path) for path in flatten(tree))]


def size(tree: Any) -> int:
    """Number of elements."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves, over all devices."""
    return sum(
        int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_on_device(tree: Any, device: jax.Device) -> int:
    """Bytes of the shards that are on one device of this process."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += sum(s.data.nbytes for s in leaf.addressable_shards if s.device == device)
    return total


def difference(expected: Any, actual: Any) -> list[str]:
    """One line per path that is missing, extra, or of another shape or dtype."""
    a, b = flatten(expected), flatten(actual)
    rows = [f"missing {path}" for path in a if path not in b]
    rows += [f"extra {path}" for path in b if path not in a]
    for path in a.keys() & b.keys():
        expected_form = tuple(a[path].shape), str(a[path].dtype)
        actual_form = tuple(b[path].shape), str(b[path].dtype)
        if expected_form != actual_form:
            rows.append(f"{path}: {actual_form} instead of {expected_form}")
    return sorted(rows)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    result: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return result
