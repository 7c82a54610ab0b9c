"""Coordinates as a model says them, to and from pixels of the screenshot.

A model speaks of one of four frames, which is for the caller to say and never guessed:

- `resized`: pixels of the picture as the image processor hands it to the model (`smart_resize`). UI-TARS 1.5, Qwen2-VL
  and Qwen2.5-VL. The server's `min_pixels` and `max_pixels` count, if it was given any.
- `relative1000`: 0 to 1000 over the width, and over the height. Hosted UI-TARS, Qwen3-VL, GLM-V.
- `relative1`: 0 to 1. OpenCUA with Qwen2, Kimi, Aguvis.
- `absolute`: pixels of the screenshot.

A point is exact: the decimal number that was written, scaled as a fraction, then rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from typing import Any, Literal, TypedDict, get_args

from managed_vllm.errors import ConfigError

Coordinates = Literal["resized", "relative1000", "relative1", "absolute"]
OffScreen = Literal["error", "clamp"]


class FrameOptions(TypedDict, total=False):
    """What parsers are told of the picture, beside what the numbers are: arguments of `Frame.of`."""

    min_pixels: int
    max_pixels: int
    factor: int
    off_screen: OffScreen
    picture: tuple[int, int] | None


FACTOR = 28
MIN_PIXELS = 100 * 28**2
MAX_PIXELS = 16384 * 28**2
MAX_ASPECT_RATIO = 200


class OffScreenError(ValueError):
    """A point is not on the screenshot."""


def smart_resize(
    image_size: tuple[int, int], *, factor: int = FACTOR, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Width and height of what the model sees of an image of this width and height, both multiples of `factor`.

    As the image processors of Qwen2-VL and Qwen2.5-VL do it (transformers 5.19; there in the order height, width):
    each side to the nearest multiple; if that has more or fewer pixels than allowed, both sides are scaled first, and
    rounded towards the bound. The bounds are UI-TARS 1.5's. 1920x1080 → 1932x1092.

    Raises `ConfigError`: no size, or one side is more than 200 times the other, which the model can't take.
    """
    width, height = _size(image_size)
    for name, value in (("factor", factor), ("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if not _is_count(value):
            raise ConfigError(f"{name} must be an integer of 1 or more, not {value!r}", field=name)
    if min_pixels > max_pixels:
        raise ConfigError(f"min_pixels, {min_pixels}, is more than max_pixels, {max_pixels}", field="min_pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ConfigError(
            f"an image of {width}x{height} is too narrow: one side may be {MAX_ASPECT_RATIO} times the other at most; "
            "crop it, or use coordinates='absolute' or 'relative1000'",
            field="image_size",
        )
    resized = round(width / factor) * factor, round(height / factor) * factor
    if resized[0] * resized[1] > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        return _floor(width / shrink, factor), _floor(height / shrink, factor)
    if resized[0] * resized[1] < min_pixels:
        stretch = math.sqrt(min_pixels / (width * height))
        return math.ceil(width * stretch / factor) * factor, math.ceil(height * stretch / factor) * factor
    return resized


def _floor(side: float, factor: int) -> int:
    return max(factor, math.floor(side / factor) * factor)


def _size(image_size: tuple[int, int]) -> tuple[int, int]:
    sides: Any = image_size
    try:
        width, height = sides
    except (TypeError, ValueError):
        raise ConfigError(f"image_size must be (width, height), not {image_size!r:.80}", field="image_size") from None
    for side in (width, height):
        if not _is_count(side):
            raise ConfigError(
                f"image_size must be two integers of 1 or more, not {image_size!r:.80}", field="image_size"
            )
    return width, height


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def frame_in_words(coordinates: Coordinates, image_size: tuple[int, int]) -> str:
    """What the numbers of a point are, for a prompt: `… are {frame_in_words(…)}`."""
    width, height = _size(image_size)
    if coordinates == "absolute":
        return f"pixels of the screenshot, which is {width} wide and {height} high"
    if coordinates == "resized":
        return "pixels of the picture as you see it"
    if coordinates == "relative1":
        return "shares of the screen: x from 0 (left) to 1 (right), y from 0 (top) to 1 (bottom)"
    return "thousandths of the screen: x from 0 (left) to 1000 (right), y from 0 (top) to 1000 (bottom)"


@dataclass(frozen=True, slots=True)
class Frame:
    """The screenshot's size, and how many of the model's units its sides have."""

    width: int
    height: int
    units_x: int
    units_y: int
    off_screen: OffScreen = "error"

    @classmethod
    def of(
        cls,
        image_size: tuple[int, int],
        coordinates: Coordinates,
        *,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        factor: int = FACTOR,
        off_screen: OffScreen = "error",
        picture: tuple[int, int] | None = None,
    ) -> Frame:
        """`picture`: what the model sees, for `resized`, if known. Raises `ConfigError`: an argument is wrong."""
        width, height = _size(image_size)
        if off_screen not in get_args(OffScreen):
            raise ConfigError(f"off_screen must be 'error' or 'clamp', not {off_screen!r:.80}", field="off_screen")
        if coordinates == "resized" and picture is not None:
            units = _size(picture)
        elif coordinates == "resized":
            units = smart_resize((width, height), factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
        elif coordinates == "relative1000":
            units = 1000, 1000
        elif coordinates == "relative1":
            units = 1, 1
        elif coordinates == "absolute":
            units = width, height
        else:
            raise ConfigError(
                f"coordinates must be one of {', '.join(get_args(Coordinates))}, not {coordinates!r:.80}",
                field="coordinates",
            )
        return cls(width, height, *units, off_screen=off_screen)

    def point(self, x: Fraction | float, y: Fraction | float) -> tuple[float, float]:
        """The pixel of the screenshot. Raises `OffScreenError`."""
        return self._pixel(x, self.width, self.units_x, "x"), self._pixel(y, self.height, self.units_y, "y")

    def _pixel(self, value: Fraction | float, pixels: int, units: int, axis: str) -> float:
        exact = Fraction(value) * pixels / units
        if self.off_screen == "error" and not 0 <= exact <= pixels:
            raise OffScreenError(f"{axis} = {_short(value)} is outside of the image, whose range is 0 to {units}")
        # The last pixel is pixels - 1. A model that says the very edge means it.
        return float(min(max(exact, Fraction(0)), Fraction(pixels - 1)))

    def written(self, x: float, y: float, decimals: int | None = None) -> tuple[str, str]:
        """The model's numbers for a pixel. `decimals` None: as many as it takes for `point` to give the same floats."""
        return self._number(x, self.width, self.units_x, decimals), self._number(y, self.height, self.units_y, decimals)

    def _number(self, value: float, pixels: int, units: int, decimals: int | None) -> str:
        if not (math.isfinite(value) and 0 <= value <= pixels - 1):
            raise OffScreenError(f"{value} is not within the image, 0 to {pixels - 1}")
        exact = Fraction(value) * units / pixels
        if decimals is not None:
            return _fixed(exact, decimals)
        for places in range(18):
            text = _fixed(exact, places)
            if float(Fraction(text) * pixels / units) == value:
                return text
        context = Context(prec=30, rounding=ROUND_HALF_EVEN)
        return format(context.divide(Decimal(exact.numerator), Decimal(exact.denominator)), "f")


def _fixed(value: Fraction, places: int) -> str:
    """The number with so many decimals, without the zeros at its end."""
    digits = str(round(value * 10**places)).rjust(places + 1, "0")
    if places == 0:
        return digits
    return f"{digits[:-places]}.{digits[-places:]}".rstrip("0").rstrip(".")


def _short(value: Fraction | float) -> str:
    try:
        return f"{float(value):.6g}"
    except OverflowError:
        return "a huge number"
