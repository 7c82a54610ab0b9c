"""A look, before the episodes have done any work, whether the server takes the images that they will send."""

from __future__ import annotations

import asyncio
import functools
import re
import struct
import zlib

from managed_vllm.client import AsyncVLLMClient
from managed_vllm.errors import BadRequestError, ConfigError, ManagedVLLMError
from managed_vllm.request.sampling import SamplingParams


class Preflight:
    """Looks once whether the server takes as many images in a request as the limits allow.

    vLLM refuses a request with more than `--limit-mm-per-prompt` says; without a look ahead that would show in the
    middle of the episodes only, after all work of the environments.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._checked = 0
        self._error: ConfigError | None = None

    async def check(self, client: AsyncVLLMClient, images: int) -> None:
        """Raises `ConfigError`: the server takes fewer, or no images at all."""
        if images <= self._checked:
            return
        async with self._lock:
            if self._error is not None:
                raise self._error
            if images <= self._checked:
                return
            part = {"type": "image", "image": _blank_png()}
            try:
                await client.chat([{"role": "user", "content": [part] * images}], SamplingParams(max_tokens=1))
            except BadRequestError as error:
                self._error = _as_config_error(error, images)
                if self._error is not None:
                    raise self._error from error
            except ManagedVLLMError:
                return  # no word about images; the episode's own request will meet it, and tell
            self._checked = images


def _as_config_error(error: BadRequestError, images: int) -> ConfigError | None:
    most = re.search(r"[Aa]t most (\d+) image", error.message)
    if most is not None:
        return ConfigError(
            f"the server takes {most[1]} images in a request, Limits.max_images is {images}: start it with "
            f"limit_mm_per_prompt={{'image': {images}}}, or lower max_images",
            field="max_images",
        )
    if re.search(r"not a multimodal model|does not support multimodal|reads text only", error.message):
        return ConfigError(
            f"the model takes no images ({error.message:.200}); Limits(max_images=0) sends text alone",
            field="max_images",
        )
    return None


@functools.cache
def _blank_png(side: int = 56) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x80" * 3 * side) * side
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
