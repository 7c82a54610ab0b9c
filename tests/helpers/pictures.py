"""Pictures for tests, made by Pillow; without it, the tests that import this are skipped."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest

pillow = pytest.importorskip("PIL.Image")
numpy = pytest.importorskip("numpy")


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Any:
    channels = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "1": 1}[mode]
    return pillow.frombytes(mode, size, random.Random(seed).randbytes(size[0] * size[1] * channels))


def file_of(image: Any, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
