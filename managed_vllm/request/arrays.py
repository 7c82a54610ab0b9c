"""Arrays and numbers of numpy's, and tensors of torch's, as Python's own, without importing either."""

from __future__ import annotations

import numbers
from typing import Any


def without_numpy(value: Any) -> Any:
    """An array or a tensor as a list, a number as Python's; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


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
