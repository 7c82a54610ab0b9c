"""Images of rollouts on disk: one file for each content, named by its hash; in memory only while they are needed.

What must hold:

1. A file has the very bytes that were put, whole: it is written under another name and renamed. Identical content is
   one file, whoever puts it: any number of threads and processes may at once.
2. What is read is what was put. A file that is missing or has other content is a `RunStoreError`, never another image.
3. A temporary store is gone with its process. What one killed by SIGKILL leaves is removed when the next one is made.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import os
import re
import shutil
import struct
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from managed_vllm import forks
from managed_vllm.agent.types import ImageRef
from managed_vllm.errors import BadRequestError, RunStoreError
from managed_vllm.request.images import Image, StoredImage

_SUFFIXES = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/gif": ".gif",
    "image/webp": ".webp",
    "image/bmp": ".bmp",
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = ".new-"
_UNFINISHED_S = 3600.0
"""Nobody takes that long to write an image: a file of this age under a temporary name is a killed writer's."""
TEMPORARY_PREFIX = "managed-vllm-images-"


class ImageStore:
    """A folder of images by content: `ab/cdef….png`.

    Thread-safe, and safe with other processes on the same folder. Pickled, it opens the same folder; a temporary one
    stays its maker's to remove.

    Args:
        folder: made when the first image is put. Only its parent must exist.

    Raises `RunStoreError` where the folder can't be used, `BadRequestError` for bytes that are no image.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()
        self._synced: set[bytes] = set()
        self._remove: weakref.finalize[..., ImageStore] | None = None

    @classmethod
    def temporary(cls) -> ImageStore:
        """One in a folder of its own below the temp dir, removed by `close`, with the object, or at exit."""
        with _making:
            _remove_stale()
            try:
                folder = tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{os.getuid()}-{os.getpid()}-")
            except OSError as error:
                raise unusable(Path(tempfile.gettempdir()), error) from error
            # The lock says that somebody uses the folder, also to those who can't see our pid (another container).
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # a file system without locks: then the pid alone says so
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        store = cls(folder)
        store._remove = weakref.finalize(store, _remove_own, folder, lock, os.getpid())
        return store

    def __reduce__(self) -> tuple[type[ImageStore], tuple[str]]:
        return ImageStore, (str(self.folder),)

    def __repr__(self) -> str:
        return f"ImageStore({str(self.folder)!r})"

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes a temporary store's folder, if it was made by this process. For others there is nothing to do."""
        if self._remove is not None:
            self._remove()

    def put(self, data: bytes) -> ImageRef:
        """Keeps an image file's bytes; returns what refers to them. What is there already is not written again.

        Raises `BadRequestError` if they are no whole header of a PNG, JPEG, GIF, WebP or BMP file.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise BadRequestError(f"{type(data).__name__} is not the bytes of an image file")
        image = Image.of(data)
        width, height = _size(image)
        ref = ImageRef(image.uuid, image.mime, width, height)
        path = self.path(ref)
        with contextlib.suppress(OSError):
            if path.stat().st_size == len(image.data):
                return ref
        unfinished = path.parent / f"{_UNFINISHED}{os.getpid()}-{next(_numbers)}-{path.stem[:8]}"
        try:
            for folder in (self.folder, path.parent):
                folder.mkdir(exist_ok=True)
            try:
                unfinished.write_bytes(image.data)
                os.replace(unfinished, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    unfinished.unlink()
                raise
        except OSError as error:
            raise unusable(path, error) from error
        self._synced.discard(bytes.fromhex(ref.sha256))  # it was damaged, or removed, and is new
        return ref

    def path(self, ref: ImageRef) -> Path:
        """Where an image's file is, if it was put. Raises `RunStoreError` for a ref that can't be one of ours."""
        suffix = _SUFFIXES.get(ref.mime)
        if suffix is None or not _SHA256.fullmatch(ref.sha256):
            raise RunStoreError(f"{ref} refers to no image of a store", path=str(self.folder))
        return self.folder / ref.sha256[:2] / (ref.sha256[2:] + suffix)

    def read(self, ref: ImageRef) -> bytes:
        """The image file's bytes. Raises `RunStoreError` if they are not there, or not what was put."""
        path = self.path(ref)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise self._missing(ref, path, error) from error
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise RunStoreError(
                f"{path} is damaged: its {len(data)} bytes are not those that were stored (SHA-256 {ref.sha256})",
                path=str(path),
            )
        return data

    def load(self, ref: ImageRef) -> Image:
        """The image, to be put into a message: its file is read when it is sent, and not before.

        Raises `RunStoreError` if the file is not there. If it is gone or changed later, sending raises
        `BadRequestError`.
        """
        path = self.path(ref)
        try:
            os.stat(path)
        except OSError as error:
            raise self._missing(ref, path, error) from error
        return StoredImage(path, ref.mime, ref.sha256)

    def sync(self, refs: Iterable[ImageRef]) -> None:
        """Returns when these images are on the disk, so that they outlast a power failure.

        Raises `RunStoreError` if one of them is not there.
        """
        folders: set[Path] = set()
        done: set[bytes] = set()
        for ref in refs:
            digest = bytes.fromhex(ref.sha256) if _SHA256.fullmatch(ref.sha256) else b""
            if digest in self._synced or digest in done:
                continue
            path = self.path(ref)
            try:
                _sync(path)
            except OSError as error:
                raise self._missing(ref, path, error) from error
            done.add(digest)
            folders.add(path.parent)
        try:
            for folder in folders | ({self.folder} if folders else set()):
                _sync(folder)
        except OSError as error:
            raise unusable(self.folder, error) from error
        self._synced |= done

    def remove_unfinished(self) -> None:
        """Removes what killed writers left, an hour ago or more."""
        for folder in _entries(self.folder):
            if len(folder.name) == 2 and folder.is_dir(follow_symlinks=False):
                for entry in _entries(folder.path):
                    if entry.name.startswith(_UNFINISHED):
                        with contextlib.suppress(OSError):
                            if entry.stat(follow_symlinks=False).st_mtime < time.time() - _UNFINISHED_S:
                                os.unlink(entry.path)

    def _missing(self, ref: ImageRef, path: Path, error: OSError) -> RunStoreError:
        if isinstance(error, FileNotFoundError):
            return RunStoreError(
                f"{path} is missing: the image {ref.sha256[:12]}… was never put into this store, or was removed",
                path=str(path),
            )
        return unusable(path, error)


_numbers = itertools.count()
_making = threading.Lock()


def _after_fork() -> None:
    global _making
    _making = threading.Lock()  # another thread may have held it


forks.call_in_child(_after_fork)


@functools.cache
def own_images() -> ImageStore:
    """This process's own temporary folder for screenshots, gone with it."""
    return ImageStore.temporary()


forks.call_in_child(own_images.cache_clear)


def unusable(path: Path, error: OSError) -> RunStoreError:
    """What an error of the file system means for a store."""
    why = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
    elif error.errno == errno.EROFS:
        why = "the file system is read-only"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        why = "a file is in the place of a folder"
    return RunStoreError(f"{path} can't be used: {why}", path=str(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError:
        return


# -- temporary ones ----------------------------------------------------------------------------------------------------


def _remove_own(folder: str, lock: int, pid: int) -> None:
    if os.getpid() == pid:  # a fork has the finalizer, too
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_stale() -> None:
    """Removes the folders whose makers are dead: nobody holds the lock, and nobody has the pid."""
    prefix = f"{TEMPORARY_PREFIX}{os.getuid()}-"
    for entry in _entries(tempfile.gettempdir()):
        pid = entry.name.removeprefix(prefix).partition("-")[0]
        if not entry.name.startswith(prefix) or not pid.isdigit():
            continue
        if int(pid) != os.getpid() and psutil.pid_exists(int(pid)):
            continue
        try:
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            lock = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry.path, ignore_errors=True)
        except OSError:
            pass  # somebody uses it
        finally:
            os.close(lock)


# -- width and height --------------------------------------------------------------------------------------------------


def _size(image: Image) -> tuple[int, int]:
    """Pixels, as the file's header says, orientation in EXIF data not applied."""
    try:
        width, height = _READERS[image.mime](image.data)
    except (struct.error, IndexError) as error:
        raise BadRequestError(f"the bytes given are cut off within the header of the {image.mime} file") from error
    if not (width > 0 and height > 0):
        raise BadRequestError(f"the header of the {image.mime} file says that it has {width}x{height} pixels")
    return width, height


def _png(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise BadRequestError("the PNG file does not begin with its header (IHDR)")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _gif(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _bmp(data: bytes) -> tuple[int, int]:
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return width, abs(height)  # negative: the rows go from the top


def _webp(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + (struct.unpack_from("<I", data, 26)[0] >> 8)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise BadRequestError(f"the WebP file begins with {kind!r}, which is no picture")


def _jpeg(data: bytes) -> tuple[int, int]:
    """From the first frame header (SOF0 … SOF15), past all other segments."""
    at = 2
    while True:
        if data[at] != 0xFF:
            raise BadRequestError(f"the JPEG file has no marker at byte {at}")
        while data[at] == 0xFF:  # any number of these before a marker
            at += 1
        marker = data[at]
        at += 1
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            continue  # without a segment
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        if marker in (0xD9, 0xDA):
            raise BadRequestError("the JPEG file has no frame header")
        at += max(2, struct.unpack_from(">H", data, at)[0])


_READERS = {"image/png": _png, "image/jpeg": _jpeg, "image/gif": _gif, "image/webp": _webp, "image/bmp": _bmp}
