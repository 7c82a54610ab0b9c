"""Images as callers give them: recognized or encoded once, and held once, however many turns carry them.

`Image` is an encoded picture with the id of its content, `StoredImage` one whose bytes stay in a file, and `ImagePart`
one picture in a message. How they get into a request is in `request.bodies`, what a server has of them already in
`request.server_images`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from managed_vllm import forks
from managed_vllm.errors import BadRequestError

CACHE_BYTES = 256 * 2**20
"""Encoded pictures that the cache keeps though nothing else holds them: about 400 screenshots of 1920x1080."""

_COMPRESS_LEVEL = 1
"""zlib's level for PNG. A drawn 1920x1080 screenshot, and one with a photograph in it (Pillow 13, one core):

    level   0   6,078 KiB   38 ms     6,078 KiB   52 ms
    level   1     632 KiB   53 ms     1,619 KiB   98 ms
    level   6     617 KiB   84 ms     1,501 KiB  130 ms      (Pillow's default)
    level   9     611 KiB  545 ms     1,496 KiB  492 ms

Lossless WebP (454 KiB in 76 ms, 1,436 KiB in 56 ms) takes 35 and 42 ms to decode, PNG of level 1 takes 23 and 31.
"""

_SETTLED_NS = 100_000_000
"""A file changed less than that before it was read may change again without a new time stamp, so it is not cached."""


# -- one picture -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Image:
    """An encoded picture: `data` (a whole file of one of the `FORMATS`), its `mime` type, and the `uuid` of both.

    Made by `Image.of`. Reuse the object for each turn that shows the picture: then nothing is hashed or encoded again.
    Images with the same uuid are equal.
    """

    data: bytes = field(repr=False)
    mime: str
    uuid: str = ""
    """Hex SHA-256 of `data`. Of a picture that Pillow encoded: of mode, size and pixels, whatever the PNG's bytes."""

    def __post_init__(self) -> None:
        if not self.uuid:
            object.__setattr__(self, "uuid", hashlib.sha256(self.data).hexdigest())

    def __eq__(self, other: object) -> bool:
        return (self.mime, self.uuid) == (other.mime, other.uuid) if isinstance(other, Image) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.mime, self.uuid))

    @property
    def size(self) -> int:
        """Bytes of `data`."""
        return len(self.data)

    @classmethod
    def of(cls, source: Any) -> Image:
        """The image of a source, which is one of

        - an `Image`, which is returned as it is;
        - the bytes of an image file, which are recognized but not decoded (`bytes` are not copied, either);
        - a path (`Path` or text) or a `file://` URL, read now; a file that has not changed comes from the cache;
        - a `data:` URL;
        - a `PIL.Image.Image`: its current pixels, as PNG. They are hashed each time (1080p: 6 ms), since they may have
          changed, and encoded when they are new (50 ms and more). An orientation in EXIF data is not applied;
        - a numpy array of uint8, height x width x 3 (or x 4, or without channels).

        Raises `BadRequestError` for anything else, what can't be read or is no image, or where Pillow is missing.
        """
        if isinstance(source, Image):
            return source
        if isinstance(source, bytes | bytearray | memoryview):
            return _recognized(source if isinstance(source, bytes) else bytes(source), "the bytes given")
        if isinstance(source, os.PathLike):
            return _file(os.fspath(source))
        if isinstance(source, str):
            return _of_text(source)
        pillow = sys.modules.get("PIL.Image")  # not imported: then it is no picture of Pillow's
        if pillow is not None and isinstance(source, pillow.Image):
            return _of_pillow(source)
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(source, numpy.ndarray):
            return _of_array(source)
        raise BadRequestError(
            f"{type(source).__name__} is no image; give a PIL image, the bytes of an image file, a path, a data: or "
            "http(s): URL, or a numpy array"
        )


class StoredImage(Image):
    """A picture whose `data` stay in a file and are read when they are sent.

    For rollouts: a thousand conversations with five screenshots each would hold gigabytes. Equal to the `Image` of the
    same bytes. The file must keep its content; otherwise `data` and `size` raise `BadRequestError`. The `size` of each
    picture is asked for before a request is sent, so no request is cut off in the middle for that.

    Args:
        path: the file.
        mime: `image/png`, …
        sha256: hex digest of the file's bytes, which becomes the `uuid`.
    """

    __slots__ = ("_checked", "path")
    path: str
    _checked: tuple[int, ...] | None
    """Size, times and inode of the file when its content was last checked."""

    def __init__(self, path: str | os.PathLike[str], mime: str, sha256: str) -> None:
        for name, value in (("path", os.fspath(path)), ("mime", mime), ("uuid", sha256), ("_checked", None)):
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredImage, (self.path, self.mime, self.uuid)

    @property
    def data(self) -> bytes:
        """The file's bytes, read now."""
        try:
            with open(self.path, "rb") as file:
                its = os.fstat(file.fileno())
                data = file.read()
        except OSError as error:
            raise self._lost(error) from error
        if hashlib.sha256(data).hexdigest() != self.uuid:
            raise BadRequestError(
                f"the image file {self.path} has changed: its {len(data)} bytes do not have the SHA-256 {self.uuid}"
            )
        settled = len(data) == its.st_size and time.time_ns() - its.st_mtime_ns > _SETTLED_NS
        object.__setattr__(self, "_checked", _state_of(its) if settled else None)
        return data

    @property
    def size(self) -> int:
        """Bytes of the file. It is read only if it may have changed."""
        try:
            its = _state_of(os.stat(self.path))
        except OSError as error:
            raise self._lost(error) from error
        return its[0] if its == self._checked else len(self.data)

    def _lost(self, error: OSError) -> BadRequestError:
        return BadRequestError(f"the image file {self.path} can't be read any more: {error.strerror or error}")


def _state_of(its: os.stat_result) -> tuple[int, ...]:
    return its.st_size, its.st_mtime_ns, its.st_ino, its.st_dev


_MAGIC = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb"BM....\0\0\0\0", re.DOTALL), "image/bmp"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "image/tiff"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "image/avif"),
    (re.compile(rb"\0\0\x01\0[^\0]|\0\0\x01\0\0[^\0]"), "image/x-icon"),
    (re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"), "image/jp2"),
    (re.compile(rb"P[1-6]\s"), "image/x-portable-anymap"),
)
FORMATS = "PNG, JPEG, GIF, WebP, BMP, TIFF, AVIF, ICO, JPEG 2000 or PNM"
"""Those that are recognized. vLLM opens whatever its Pillow does."""


def _recognized(data: bytes, what: str) -> Image:
    for magic, mime in _MAGIC:
        if magic.match(data):
            return Image(data, mime)
    found = f"begins with {data[:12]!r}" if data else "is empty"
    raise BadRequestError(f"{what}: not a {FORMATS} file ({found}); open other formats with Pillow and give the image")


def _of_text(source: str) -> Image:
    scheme = source[:8].partition(":")[0].lower() if ":" in source[:8] else ""
    if scheme == "data":
        return _of_data_url(source)
    if scheme == "file":
        parts = urlsplit(source)
        if parts.netloc not in ("", "localhost"):
            raise BadRequestError(f"{source:.200} names a file of another host")
        return _file(url2pathname(parts.path))
    if scheme in ("http", "https"):
        raise BadRequestError(f"{source:.200} is for the server to fetch: give it as it is, in a message")
    return _file(source)


def _of_data_url(url: str) -> Image:
    head, comma, payload = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        data = _of_base64(payload) if head.lower().endswith(";base64") else unquote_to_bytes(payload)
    except ValueError as error:
        raise BadRequestError(f"the data: URL {url[:40]}… can't be decoded: {error}") from error
    return _recognized(data, f"the data: URL {url[:40]}…")


def _of_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return base64.b64decode("".join(text.split()), validate=True)


def _file(path: str | bytes) -> Image:
    name = os.fsdecode(path)
    try:
        with open(name, "rb") as file:
            its = os.fstat(file.fileno())
            key = ("file", os.path.abspath(name), its.st_mtime_ns, its.st_size, its.st_ino)
            known = cache.get(key)
            if known is not None:
                return known
            data = file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        hint = ""
        if len(name) > 200:
            hint = "; base64 needs data:image/png;base64, before it"
        reason = getattr(error, "strerror", None) or error
        raise BadRequestError(f"{name:.200} is neither a URL nor a file that can be read: {reason}{hint}") from error
    image = _recognized(data, name)
    settled = len(data) == its.st_size and time.time_ns() - its.st_mtime_ns > _SETTLED_NS
    return cache.put(key, image) if settled else image


def _of_array(array: Any) -> Image:
    if array.dtype.name != "uint8" or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise BadRequestError(
            f"a numpy array of shape {array.shape} and type {array.dtype} is no image; give height x width x 3 of uint8"
        )
    try:
        from PIL import Image as pillow
    except ImportError as error:
        raise BadRequestError("numpy arrays are encoded by Pillow, which is missing: pip install pillow") from error
    return _of_pillow(pillow.fromarray(array))


def _of_pillow(picture: Any) -> Image:
    try:
        picture = _upright(picture)
        if picture.mode not in ("RGB", "RGBA", "L") or "transparency" in picture.info:
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        width, height = picture.size
        if not width or not height:
            raise ValueError(f"its size is {width}x{height}")
        digest = hashlib.sha256(f"{picture.mode} {width}x{height}\0".encode())
        digest.update(picture.tobytes())
        uuid = digest.hexdigest()
        key = ("pixels", uuid)
        known = cache.get(key)
        if known is not None:
            return known
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=_COMPRESS_LEVEL, icc_profile=None)
    except (OSError, ValueError, SyntaxError) as error:  # damaged or closed; SyntaxError is Pillow's for a broken PNG
        raise BadRequestError(f"the PIL image can't be read: {error}") from error
    return cache.put(key, Image(file.getvalue(), "image/png", uuid))


def _upright(picture: Any) -> Any:
    """As it is meant to be seen, by its EXIF orientation, which does not survive the encoding; as `vllm.LLM` has it."""
    try:
        turned = picture.getexif().get(_ORIENTATION, 1) != 1
        if turned:
            from PIL import ImageOps

            picture = ImageOps.exif_transpose(picture)
    except Exception:  # of a damaged tag, which turns nothing in vLLM either
        return picture
    return picture


_ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned."""


class ImageCache:
    """Images by their sources. Those that something else holds are always found; others up to a limit in bytes.

    `kept_bytes` counts the latter. Thread-safe.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self.reset()

    def reset(self) -> None:
        """Empties the cache, with a new lock: in a forked child another thread may have held the old one."""
        self._lock = threading.Lock()
        self._alive: weakref.WeakValueDictionary[Hashable, Image] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[Hashable, Image] = OrderedDict()
        self.kept_bytes = 0

    def get(self, key: Hashable) -> Image | None:
        """The image of this source, if it is known."""
        with self._lock:
            image = self._alive.get(key)
            if image is not None:
                self._keep(key, image)
            return image

    def put(self, key: Hashable, image: Image) -> Image:
        """Adds an image. Returns the one that another thread has added meanwhile, if any."""
        with self._lock:
            image = self._alive.setdefault(key, image)
            self._keep(key, image)
            return image

    def _keep(self, key: Hashable, image: Image) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        if len(image.data) > self._most_bytes:
            return
        self._kept[key] = image
        self.kept_bytes += len(image.data)
        while self.kept_bytes > self._most_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.kept_bytes -= len(dropped.data)


cache = ImageCache(CACHE_BYTES)
forks.call_in_child(cache.reset)


# -- in a message ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One picture in a message: what `conversation` puts in the place of a part that carries an image.

    Attributes:
        image: the picture.
        uuid: the caller's own id for it.
        detail: OpenAI's `detail`.
        extra: the other keys of the part.
    """

    image: Image
    uuid: str | None = None
    detail: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id under which a server keeps it."""
        return self.uuid or self.image.uuid

    def fields(self, url: Any, *, with_id: bool) -> dict[str, Any]:
        """The part as JSON has it. `url` is its data URL; None: the server has the picture under its id.

        `with_id`: send the id, too. The caller's own id is always sent.
        """
        content = None if url is None else {"url": url}
        if content is not None and self.detail is not None:
            content["detail"] = self.detail
        found: dict[str, Any] = {"type": "image_url", "image_url": content, **self.extra}
        if with_id or self.uuid is not None:
            found["uuid"] = self.id
        return found
