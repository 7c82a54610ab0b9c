"""Arrays and numbers of numpy's, and tensors of torch's, as Python's own, without importing either."""

from __future__ import annotations

import contextlib
import numbers
import sys
from typing import Any


def without_numpy(value: Any) -> Any:
    """An array or a tensor as a list, a number as Python's; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


def as_array(values: list[Any]) -> Any:
    """Numbers as a tensor where the program has loaded torch, else as an array of numpy's where that is installed.

    32 bits each, as the models' poolers make them. A list stays where there is neither, or where its rows differ in
    length.
    """
    torch: Any = sys.modules.get("torch")
    with contextlib.suppress(ImportError, ValueError):
        if hasattr(torch, "tensor"):
            return torch.tensor(values, dtype=torch.float32)
        import numpy

        return numpy.array(values, dtype=numpy.float32)
    return values


def token_ids(values: Any) -> list[int] | None:
    """A list of token ids, numpy's numbers included; None if it is none."""
    if type(values) is list and all(type(token) is int for token in values):
        return values
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        return None
    found = []
    for token in values:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            return None
        found.append(int(token))
    return found
