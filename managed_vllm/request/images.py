"""Images on their way to the server: encoded once, held once, and sent once to each life of a server.

`Image` is an encoded picture with the id of its content, `ImagePart` one picture in a message. `encode` writes a
request body with any number of them as JSON; a picture that the server has is sent as its id alone. `Ledger` remembers
what a server has. In this order, for each request:

1. `encode(body, known=ledger.known(life))`. A `life` is one life of one server: nothing that it knew outlives it.
2. After an answer: `ledger.learn(life, encoded.uuids)`, not before: the server must have taken the pictures in.
3. Where `is_miss(status, message)`: `ledger.missed(life, encoded.as_ids, message)`, and once more with `known=()`.
   Any other attempt after a lost answer is made with `known=()`, too.

That is vLLM's `uuid` of a content part. What version 0.32 does with it, tried with the model of
`managed_vllm.demo.random_vlm` on two CPU cores:

- `{"type": "image_url", "image_url": null, "uuid": …}` gives the same tokens as the picture itself, if the API server's
  multimodal processor cache (`--mm-processor-cache-gb`, 4 GiB by default) has the id. `image_url` must be there.
- It does not have it: HTTP 400 in 4 ms, "Cache miss for image at index 1 but data is not provided." Nothing is harmed,
  with others beside it or not. One request can have pictures of either kind; one that the server does not have must
  come with data in each of its places, since all are looked up before any is stored.
- Without that cache (0 GiB): HTTP 400, "Failed to apply …Processor on data={'images': [None]}". Several API servers
  have a cache each, so that an id is known to one of them (by vLLM's source; not tried).
- It holds prepared pixels, not files: 1.4 MB for 640x360 (299 tokens). 4 GiB are 3,000 of these, or 750 of 1280 tokens,
  which 1,000 conversations with five each exceed. What was used least recently goes first, and is a miss then.
- The engine has a copy of that cache, which can differ: a request that was refused late (for a regex that is none) has
  left its pictures in the one, not in the other. The next request with such an id gets HTTP 500, "Internal server
  error", with data or without; the one after it works, with data. 450 requests, eight at a time, with a cache of eight
  pictures and twelve in use, were answered or a plain miss.
- Pictures of one request that don't fit into the cache together, some of them known, are HTTP 500, "Expected a cached
  item", with ids or without. One that does not fit by itself is served, and never known.
- An id that is used for two pictures gives wrong answers in silence. So it is a hash of the content.

In none of these cases did the server die. With an id it neither decodes nor hashes the picture: one of 1080p took 45 ms
as an id, 65 ms with data beside an id that was known, 320 to 500 ms when it was new.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import os
import re
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import msgspec

from managed_vllm import forks
from managed_vllm.errors import BadRequestError

CACHE_BYTES = 256 * 2**20
"""Encoded pictures that are kept though nobody holds them: about 400 screenshots of 1920x1080."""

_COMPRESS_LEVEL = 1
"""zlib's for PNG. A drawn 1920x1080 screenshot, and one with a photograph in it (Pillow 13, one core):

    level   0   6,078 KiB   38 ms     6,078 KiB   52 ms
    level   1     632 KiB   53 ms     1,619 KiB   98 ms
    level   6     617 KiB   84 ms     1,501 KiB  130 ms      (Pillow's default)
    level   9     611 KiB  545 ms     1,496 KiB  492 ms

Lossless WebP (454 KiB in 76 ms, 1,436 KiB in 56 ms) takes 35 and 42 ms to decode, PNG of level 1 takes 23 and 31.
"""

_SETTLED_NS = 100_000_000
"""A file that was written later than that, before it was read, may be written again without another time of change."""


# -- one picture -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Image:
    """An encoded picture: `data` (a whole PNG, JPEG, GIF, WebP or BMP file), its `mime` type, and the `uuid` of both.

    `Image.of` makes one. Give the same object for each turn that has the picture: then nothing is hashed or encoded
    again. Two with the same uuid are equal.
    """

    data: bytes = field(repr=False)
    mime: str
    uuid: str = ""
    """Hex SHA-256 of `data`; for pictures that Pillow encoded, of mode, size and pixels, whatever the PNG's bytes."""

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
        """The picture of a source.

        `source` is one of

        - an `Image`, which is returned;
        - the bytes of an image file: `bytes` are referenced, not copied; they are recognized, not decoded;
        - a path (`Path` or text) or a `file://` URL, read here and now; a file that has not changed is kept;
        - a `data:` URL;
        - a `PIL.Image.Image`: its pixels as they are now, as PNG. They are hashed each time (1080p: 6 ms), since they
          may have changed, and encoded when they are new (50 ms and more). An orientation that stands in EXIF data is
          not applied: its pixels are what the picture is;
        - a numpy array of uint8, height x width x 3 (or x 4, or without channels).

        Raises `BadRequestError`: none of these, not readable, no image, or Pillow is needed and missing.
        """
        if isinstance(source, Image):
            return source
        if isinstance(source, bytes | bytearray | memoryview):
            return _encoded(source if isinstance(source, bytes) else bytes(source), "the bytes given")
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
    """A picture whose `data` stay in a file: read where they are asked for, which is when they are sent.

    For rollouts: a thousand conversations with five screenshots each would hold gigabytes. It is equal to the `Image`
    of the same bytes. The file must keep its content: else `data` and `size` raise `BadRequestError`. Since a request
    asks for the `size` of each picture before it is sent, none is cut off in the middle for that.

    Args:
        path: the file.
        mime: `image/png`, …
        sha256: hex digest of the file's bytes; it becomes the `uuid`.
    """

    __slots__ = ("_checked", "path")
    path: str
    _checked: tuple[int, ...] | None
    """What the file system said of the file when its content was right."""

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
        """Bytes of the file, which is read only if it may have changed."""
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
)


def _encoded(data: bytes, what: str) -> Image:
    for magic, mime in _MAGIC:
        if magic.match(data):
            return Image(data, mime)
    found = f"begins with {data[:12]!r}" if data else "is empty"
    raise BadRequestError(
        f"{what}: not a PNG, JPEG, GIF, WebP or BMP file ({found}); open other formats with Pillow and give the image"
    )


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
    return _encoded(data, f"the data: URL {url[:40]}…")


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
            known = _cache.get(key)
            if known is not None:
                return known
            data = file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        hint = ""
        if len(name) > 200:
            hint = "; base64 needs data:image/png;base64, before it"
        reason = getattr(error, "strerror", None) or error
        raise BadRequestError(f"{name:.200} is neither a URL nor a file that can be read: {reason}{hint}") from error
    image = _encoded(data, name)
    settled = len(data) == its.st_size and time.time_ns() - its.st_mtime_ns > _SETTLED_NS
    return _cache.put(key, image) if settled else image


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
        if picture.mode not in ("RGB", "RGBA", "L") or "transparency" in picture.info:
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        width, height = picture.size
        if not width or not height:
            raise ValueError(f"its size is {width}x{height}")
        digest = hashlib.sha256(f"{picture.mode} {width}x{height}\0".encode())
        digest.update(picture.tobytes())
        uuid = digest.hexdigest()
        key = ("pixels", uuid)
        known = _cache.get(key)
        if known is not None:
            return known
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=_COMPRESS_LEVEL, icc_profile=None)
    except (OSError, ValueError, SyntaxError) as error:  # damaged or closed; SyntaxError is Pillow's for a broken PNG
        raise BadRequestError(f"the PIL image can't be read: {error}") from error
    return _cache.put(key, Image(file.getvalue(), "image/png", uuid))


class _Cache:
    """Pictures by what they were made of. Those in use are found as long as they are; others up to a limit in bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self.reset()

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._alive: weakref.WeakValueDictionary[Hashable, Image] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[Hashable, Image] = OrderedDict()
        self.kept_bytes = 0

    def get(self, key: Hashable) -> Image | None:
        with self._lock:
            image = self._alive.get(key)
            if image is not None:
                self._keep(key, image)
            return image

    def put(self, key: Hashable, image: Image) -> Image:
        """Returns what another thread may have put there in the meantime."""
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


_cache = _Cache(CACHE_BYTES)
forks.call_in_child(_cache.reset)  # another thread may have held the lock


# -- in a message ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One picture in a message: what `conversation` puts in the place of a part that carries an image.

    `uuid` is the caller's own id for it, `detail` the request's, `extra` the other keys of the part.
    """

    image: Image
    uuid: str | None = None
    detail: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id under which the server has it."""
        return self.uuid or self.image.uuid

    def fields(self, *, with_data: bool, with_id: bool = True) -> dict[str, Any]:
        """The part as JSON has it; without data the server must have the id. `with_id`: also an id that is not the
        caller's own."""
        url = f"data:{self.image.mime};base64,{base64.b64encode(self.image.data).decode()}" if with_data else None
        return self._fields(url, with_id=with_id)

    def _fields(self, url: Any, *, with_id: bool) -> dict[str, Any]:
        content = None if url is None else {"url": url}
        if content is not None and self.detail is not None:
            content["detail"] = self.detail
        found: dict[str, Any] = {"type": "image_url", "image_url": content, **self.extra}
        if with_id or self.uuid is not None:
            found["uuid"] = self.id
        return found


# -- a request body ----------------------------------------------------------------------------------------------------


_RAW_AT_ONCE = 3 << 14
"""Bytes of an image that become base64 together; a multiple of three."""


class Encoded(NamedTuple):
    """A request body as JSON, and the ids of its images: those sent `with_data`, those sent `as_ids` alone.

    `parts` are JSON, and images in the places of their base64, which is made while it is sent (`pieces`): the bodies of
    a thousand requests in flight, with five screenshots each, would be 1.5 GB.
    """

    parts: tuple[bytes | Image, ...]
    with_data: tuple[str, ...] = ()
    as_ids: tuple[str, ...] = ()

    @property
    def uuids(self) -> tuple[str, ...]:
        """What the server knows once it has answered."""
        return self.as_ids + self.with_data

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return sum(len(part) if isinstance(part, bytes) else (part.size + 2) // 3 * 4 for part in self.parts)

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """The body, little by little."""
        for part in self.parts:
            if isinstance(part, bytes):
                yield part
            else:
                view = memoryview(part.data)
                for start in range(0, len(view), _RAW_AT_ONCE):
                    yield binascii.b2a_base64(view[start : start + _RAW_AT_ONCE], newline=False)


_PLAIN: frozenset[type] = frozenset({str, int, bool, type(None)})
_TEXT = frozenset({str})
_PLACE = b"\0"
"""Stands in the JSON for the text of a data URL: JSON has no such byte, also within texts. So the pictures are written
as base64 once, while they are sent (five of 600 kB: 3.5 ms; by `json.dumps`: 18 ms)."""


def encode(body: Mapping[str, Any], *, known: Container[str] | None = ()) -> Encoded:
    """A request body as JSON. It may have an `ImagePart` anywhere.

    `known`: ids of pictures that the server has; they are sent without data. None: no ids are sent, but for those that
    the caller gave; for servers that don't take them.

    Raises `BadRequestError`, with the `field` to blame: a value that JSON has not, such as NaN, bytes or an object.
    (msgspec alone would write null and base64. Looking at each value takes 1 µs in a small body, writing 0.5 µs.)
    """
    name: str | None = None
    images = False
    try:
        for name in body:
            value = body[name]
            if type(value) not in _PLAIN:
                images = _check((value,)) or images
        name = None
        if not images:
            return Encoded((_encoder.encode(body),))
        writer = _Writer(known)
        return Encoded(writer.parts(body), tuple(writer.with_data), tuple(writer.as_ids))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        what = "the request" if name is None else f"{name}="
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise BadRequestError(f"{what} can't be written as JSON: {why}", field=name) from error


def _check(values: Iterable[Any]) -> bool:
    """Raises for what is not JSON; returns whether there are images."""
    images = False
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind is dict or isinstance(value, Mapping):
            if not _TEXT.issuperset(map(type, value)):
                for key in value:
                    if isinstance(key, bool) or not isinstance(key, str | int):
                        raise TypeError(f"{key!r:.80} is no key")
            images = _check(value.values()) or images
        elif kind is list or kind is tuple:
            if not _PLAIN.issuperset(map(type, value)):
                images = _check(value) or images
        elif kind is ImagePart:
            images = True
            if value.extra:
                _check((value.extra,))
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"{value} is no number there")
        elif isinstance(value, list | tuple):
            images = _check(value) or images
        elif not isinstance(value, str | int):
            raise TypeError(f"{value!r:.80} is a {kind.__name__}")
    return images


def _plain(value: Any) -> Any:
    """What msgspec does not know by itself."""
    for kind, become in _BECOMES:
        if isinstance(value, kind):
            return become(value)
    raise TypeError(f"{value!r:.80} is a {type(value).__name__}")


_BECOMES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (Mapping, dict),
    (float, float.__float__),
    (int, int.__int__),
    (str, str.__str__),
    (list, list),
    (tuple, list),
)
_encoder = msgspec.json.Encoder(enc_hook=_plain)


class _Writer:
    def __init__(self, known: Container[str] | None) -> None:
        self._known = known
        self._data: list[Image] = []
        self.with_data: list[str] = []
        self.as_ids: list[str] = []

    def parts(self, body: Mapping[str, Any]) -> tuple[bytes | Image, ...]:
        first, *rest = _encoder.encode(self._with_fields(body)).split(_PLACE)
        found: list[bytes | Image] = []
        for image, after in zip(self._data, rest, strict=True):
            found += (b'%b"data:%b;base64,' % (first, image.mime.encode()), image)
            first = b'"' + after
        found.append(first)
        return tuple(found)

    def _with_fields(self, value: Any) -> Any:
        """The same with each part as a dict. Not by msgspec's hook: it would write a dataclass without asking."""
        if isinstance(value, ImagePart):
            return self._fields(value)
        if isinstance(value, Mapping):
            return {key: self._with_fields(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._with_fields(each) for each in value]
        return value

    def _fields(self, part: ImagePart) -> dict[str, Any]:
        if self._known is not None and part.id in self._known:
            self.as_ids.append(part.id)
            return part._fields(None, with_id=True)
        if self._known is not None:
            self.with_data.append(part.id)
        self._data.append(part.image)
        return part._fields(msgspec.Raw(_PLACE), with_id=self._known is not None)


# -- what a server has -------------------------------------------------------------------------------------------------

_MISS = re.compile(r"Cache miss for \w+ at index \d+ but data is not provided")
_KEEPS_NONE = re.compile(
    r"Failed to apply \w*Processor on data=.*\bNone\b|image_url\b.*\b(NoneType|None|null)\b", re.DOTALL
)


def is_miss(status: int, message: str) -> bool:
    """Whether the server says that it does not have an image that was sent as an id (see the top of this module).

    Where a server differs from vLLM 0.32 in its words, it is safe to take any 4xx of a request with `as_ids` for one.
    """
    return status in (400, 422) and (_MISS.search(message) or _KEEPS_NONE.search(message)) is not None


_SLOWEST = 7
"""A power of two: images that must be learnt for one more to be believed in."""


class Ledger:
    """Which images each life of a server has, as far as this client knows. Thread-safe.

    The server forgets the least recently used, and others use it, too; so a miss shows how much it holds. What is
    older than the missed image is taken for forgotten, and from then on only half as many are believed in as are newer,
    or as many as were missed together. Each image that is learnt makes it one more; after several misses in a row it
    starts with less, and grows more slowly. With more images in use than the server holds, most are sent with data
    then, and few requests have to be made twice.

    Args:
        most: ids per life; all of them take 8 MB.
        lives: lives that are remembered, the last used ones.
    """

    def __init__(self, most: int = 32_768, lives: int = 16) -> None:
        self._most = most
        self._most_lives = lives
        self._lives: OrderedDict[Hashable, _Life] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, life: Hashable) -> Container[str]:
        """The ids that this life has: a view, that changes with what is learnt."""
        with self._lock:
            its = self._lives.get(life)
            return () if its is None else its.order

    def learn(self, life: Hashable, uuids: Iterable[str]) -> None:
        """The server has answered a request with these."""
        uuids = list(uuids)
        if not uuids:
            return
        with self._lock:
            its = self._lives.setdefault(life, _Life(self._most))
            self._lives.move_to_end(life)
            while len(self._lives) > self._most_lives:
                self._lives.popitem(last=False)
            if its.keeps_none:
                return
            if not its.order.keys().isdisjoint(uuids):
                its.misses = 0
            its.believed = min(self._most, its.believed + len(uuids) / 2**its.misses)
            for uuid in uuids:
                its.order[uuid] = None
                its.order.move_to_end(uuid)
            its.cut(int(its.believed))

    def forget(self, life: Hashable, uuids: Iterable[str] | None = None) -> None:
        """The server does not have these (None: any) any more, or it is not known whether it has."""
        with self._lock:
            if uuids is None:
                self._lives.pop(life, None)
            elif life in self._lives:
                for uuid in uuids:
                    self._lives[life].order.pop(uuid, None)

    def missed(self, life: Hashable, as_ids: Iterable[str], message: str = "") -> None:
        """The server refused these (`is_miss`) with that message."""
        missed = set(as_ids)
        with self._lock:
            its = self._lives.get(life)
            if its is None:
                return
            if _KEEPS_NONE.search(message):
                its.keeps_none = True
                its.order.clear()
                return
            if missed.isdisjoint(its.order):
                return  # another request that was on its way has missed them already
            while its.order.popitem(last=False)[0] not in missed:
                pass
            its.believed = min(its.believed, max(len(its.order) / 2, len(missed) / 2**its.misses))
            its.misses = min(its.misses + 1, _SLOWEST)
            for uuid in missed:
                its.order.pop(uuid, None)
            its.cut(int(its.believed))


class _Life:
    def __init__(self, most: int) -> None:
        self.order: OrderedDict[str, None] = OrderedDict()
        self.believed: float = most
        self.misses = 0
        self.keeps_none = False

    def cut(self, most: int) -> None:
        while len(self.order) > most:
            self.order.popitem(last=False)
