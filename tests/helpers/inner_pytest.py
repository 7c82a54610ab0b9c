"""The words of a pytest run within a test, without the plugins that it has no use for: they import for a second."""

from __future__ import annotations

import sys

OPTIONS = (
    *("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:anyio"),
    "--strict-markers",
)
WORDS = (sys.executable, "-m", "pytest", *OPTIONS)
