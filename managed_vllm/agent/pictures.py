"""What size the model sees a screenshot in, as the number of its image tokens tells.

Where a model's coordinates are pixels of the resized picture, a click is right only if parser and server resize alike.
The server's limits (`min_pixels`, `max_pixels`) are its own affair: those of its image processor, or of a flag. But a
prompt has one token for each square of 28 x 28 pixels, so its token ids tell the size, and with it the limits. It is
looked at once for each size of screenshots. What can't be right is an error, and what is otherwise than usual is told.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby

from managed_vllm.agent.actions import smart_resize
from managed_vllm.agent.actions.coordinates import FACTOR, MAX_PIXELS, MIN_PIXELS
from managed_vllm.agent.format import PictureParser, Size
from managed_vllm.agent.types import ImageRef
from managed_vllm.errors import ConfigError

log = logging.getLogger("managed_vllm.agent")

_FEWEST = 16
"""Image tokens of a screenshot; a shorter run of one token may be anything."""


class Pictures:
    """The sizes in which a run's screenshots are seen, as far as they are known."""

    def __init__(self) -> None:
        self._seen: dict[Size, Size] = {}
        self._told = False

    def of(self, screenshot: Size) -> Size | None:
        """The picture that the model sees of screenshots of this size; None: not known."""
        return self._seen.get(screenshot)

    def look(self, parser: PictureParser, images: Sequence[ImageRef], prompt_token_ids: Sequence[int]) -> None:
        """Learns from a prompt with these images. Raises `ConfigError`: parser and server can't both be right."""
        sizes = {(image.width, image.height) for image in images}
        if len(sizes) != 1 or sizes <= self._seen.keys():
            return
        (size,) = sizes
        tokens = max((sum(1 for _ in run) for _, run in groupby(prompt_token_ids)), default=0)
        if tokens < _FEWEST:
            self._tell_once(
                "the prompt's token ids show no image tokens: points are taken as those of a picture of %dx%d, for "
                "screenshots of %dx%d",
                *(*_assumed(parser, size), *size),
            )
            return
        self._seen[size] = self._checked(parser, size, tokens)

    def _checked(self, parser: PictureParser, size: Size, tokens: int) -> Size:
        assumed = _assumed(parser, size)
        if _tokens(assumed) == tokens:
            return assumed
        found = picture_of(size, tokens)
        if found is None:
            raise ConfigError(
                f"the server shows the model {tokens} image tokens for a screenshot of {size[0]}x{size[1]}: the image "
                "processor of Qwen2.5-VL makes no such size, so this model's coordinates are not those of the resized "
                "picture. Say what they are: coordinates='relative1000' or 'absolute'",
                field="coordinates",
            )
        if parser.min_pixels is not None or parser.max_pixels is not None:
            raise ConfigError(
                f"min_pixels={parser.min_pixels} and max_pixels={parser.max_pixels} make {assumed[0]}x{assumed[1]} of "
                f"a screenshot of {size[0]}x{size[1]}, but the server shows the model {found[0]}x{found[1]} ({tokens} "
                "image tokens): every click would land elsewhere. Leave them out, or start the server with "
                "mm_processor_kwargs={'min_pixels': …, 'max_pixels': …}",
                field="min_pixels",
            )
        self._tell_once(
            "the server shows the model a picture of %dx%d for screenshots of %dx%d, not of %dx%d as UI-TARS 1.5 was "
            "made for: points are taken as those of what it shows; mm_processor_kwargs of the server change that",
            *(*found, *size, *assumed),
        )
        return found

    def _tell_once(self, message: str, *numbers: int) -> None:
        if not self._told:
            self._told = True
            log.warning(message, *numbers)


def _assumed(parser: PictureParser, size: Size) -> Size:
    least = MIN_PIXELS if parser.min_pixels is None else parser.min_pixels
    most = MAX_PIXELS if parser.max_pixels is None else parser.max_pixels
    return smart_resize(size, min_pixels=least, max_pixels=most)


def _tokens(picture: Size) -> int:
    return (picture[0] // FACTOR) * (picture[1] // FACTOR)


def picture_of(screenshot: Size, tokens: int) -> Size | None:
    """The size with so many squares that `smart_resize` makes of a screenshot under some limits; None: there is none.

    There is one at most: with the limits both sides grow, or shrink, and at least one of them at a time.
    """
    columns, rows = (round(side / FACTOR) for side in screenshot)
    if columns * rows < tokens:
        columns, rows = _stretched(screenshot, tokens)
    elif columns * rows > tokens:
        columns, rows = _shrunk(screenshot, tokens)
    return (columns * FACTOR, rows * FACTOR) if columns * rows == tokens else None


def _stretched(screenshot: Size, tokens: int) -> tuple[int, int]:
    """Squares of both sides, the first that are enough: each side is rounded up."""
    width, height = screenshot
    columns = max(1, width // FACTOR // 2)  # a limit just above the size may shrink one side a little
    rows = -(-height * columns // width)
    while columns * rows < tokens:
        # The scale at which a side begins its next square: columns / width against rows / height.
        across, down = columns * height, rows * width
        columns, rows = columns + (across <= down), rows + (down <= across)
    return columns, rows


def _shrunk(screenshot: Size, tokens: int) -> tuple[int, int]:
    """Squares of both sides, the first that are few enough: each side is rounded down, to one square at least."""
    width, height = screenshot
    columns = -(-width // FACTOR) * 2
    rows = max(1, height * columns // width)
    while columns * rows > tokens:
        across, down = columns * height, rows * width
        narrower = rows == 1 or (columns > 1 and across >= down)
        lower = columns == 1 or (rows > 1 and down >= across)
        columns, rows = columns - narrower, rows - lower
    return columns, rows
