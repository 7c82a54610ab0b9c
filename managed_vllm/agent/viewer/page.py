"""Writing the page: the list first, then the trajectories one by one, then the images.

The order is that of reading. A browser shows the list as soon as it has its lines, and reads a trajectory's JSON when
it is opened, so that a run of 1,000 trajectories is there at once. Neither the trajectories nor the images are ever in
memory together: they wait in a temporary file until the list, which stands before them, is complete.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from managed_vllm.agent.report import SUCCESS_AT, Attempts, Row, entry_row, who_stands
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import ImageRef, Trajectory
from managed_vllm.agent.viewer.record import TrajectoryRecord, row_record, to_json
from managed_vllm.errors import ConfigError, ManagedVLLMError

MAX_BYTES = 200_000_000
"""Of images in the page. Chromium opens one of that size in seconds; several times that, and tabs die."""

_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif", "image/bmp": "bmp"}
MIMES = {suffix: mime for mime, suffix in _SUFFIXES.items()}
"""By a file's suffix."""
_SHA256 = re.compile("[0-9a-f]{64}")


@runtime_checkable
class ReadsImages(Protocol):
    """Where the images are, an `ImageStore` say."""

    def read(self, ref: ImageRef) -> bytes:
        """The image's file. May raise whatever it likes."""
        ...


@dataclass(frozen=True, slots=True)
class WrittenPage(os.PathLike[str]):
    """What was written; stands for its path wherever one is taken.

    Attributes:
        path: the HTML file.
        files: the folder of the images beside it, without which the page has none; None where they are in the page.
        rows: one for each trajectory; `report.summary_table` takes them.
        images, image_bytes: number and size of the different images.
        missing: hash and reason of each image that could not be read; the page says so in its place.
        damaged: what the store found and did not trust; the page says so, too.
    """

    path: Path
    files: Path | None
    rows: tuple[Row, ...] = field(repr=False)
    images: int
    image_bytes: int
    missing: dict[str, str] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        where = f"in {self.files}, which belongs to the page" if self.files else "in the page"
        told = f"{self.path}: {len(self.rows)} attempts, {self.images} images ({self.image_bytes / 1e6:.1f} MB) {where}"
        if self.missing:
            sha256, reason = next(iter(self.missing.items()))
            told += f"; {len(self.missing)} images could not be read, the first one is {sha256[:12]}: {reason}"
        if self.damaged:
            told += f"; {len(self.damaged)} damaged records are left out, the first one is {self.damaged[0]}"
        return told


def write_html(
    source: Attempts | Iterable[Trajectory],
    out: str | os.PathLike[str],
    *,
    images: ReadsImages | Callable[[ImageRef], bytes] | None = None,
    title: str | None = None,
    max_bytes: int = MAX_BYTES,
    success_at: float = SUCCESS_AT,
    against: RunStore | None = None,
) -> WrittenPage:
    """Writes a run as one HTML file, replacing one that is there; readers see the old or the new one, whole.

    Args:
        source: a `RunStore`, or trajectories: all attempts, those that failed included.
        out: the file. Its folder must exist.
        images: an `ImageStore`, or a function that gives the bytes of an image; None: the store's own.
        title: of the page; None: the file's name.
        max_bytes: images are in the page up to this size of them all together, as it is in the page (a third more than
            the files). Above it all of them are files in the folder `<name>_files` beside the page.
        success_at: the reward from which on a rollout is a success.
        against: another run, with which the tasks of this one are compared.

    Raises `ConfigError`: no such folder, no source of images, jinja2 is missing. `ManagedVLLMError`: the file can't be
    written. An image that can't be read is no error, but see `WrittenPage.missing`.
    """
    out = Path(out)
    template, script, style = _template()
    read = _reader(source, images)
    title = out.stem if title is None else title
    if not math.isfinite(success_at):
        raise ConfigError(f"success_at must be a number, not {success_at}", field="success_at")
    if max_bytes < 0:
        raise ConfigError(f"max_bytes must be 0 or more, not {max_bytes}", field="max_bytes")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name the HTML file to write", field="out")
    if not out.parent.is_dir():
        raise ConfigError(f"{out} can't be written: there is no folder {out.parent}", field="out")
    beside = out.with_name(f"{out.stem}_files")
    try:
        with _spool(out.parent) as records, _spool(out.parent) as pictures:
            made, refs = _write_records(source.attempts() if isinstance(source, Attempts) else source, records)
            made = who_stands(made)
            # Known only now: a store finds what is damaged while it is read.
            damaged = tuple(str(each) for each in getattr(source, "damaged", ()))
            stored = _write_images(refs, read, pictures, beside, max_bytes)
            pieces = template.generate(
                title=title,
                served=False,
                policy=_policy(script, style),
                style=_Safe(style),
                script=_Safe(script),
                run=_Safe(
                    to_json(
                        {
                            "title": title,
                            "written": time.time(),
                            "successAt": success_at,
                            "folder": beside.name if stored.beside else None,
                            "suffixes": _SUFFIXES,
                            "missing": stored.missing,
                            "damaged": damaged,
                            "rows": list(map(row_record, made)),
                            **_other(against),
                        }
                    )
                ),
                records=map(_Safe, _lines(records)),
                images=(tuple(map(_Safe, line.split(" "))) for line in _lines(pictures)),
            )
            _replace(out, pieces)
    except OSError as error:
        raise ManagedVLLMError(f"the page {out} can't be written, and is as it was: {error}") from error
    count = len(refs) - len(stored.missing)
    return WrittenPage(out, beside if stored.beside else None, tuple(made), count, stored.size, stored.missing, damaged)


def served_page(title: str, success_at: float, *, against: str | None = None) -> tuple[bytes, str]:
    """The page without a run, which asks its server for it; and its content security policy. Raises `ConfigError`."""
    template, script, style = _template()
    script = files("managed_vllm.agent.viewer").joinpath("served.js").read_text(encoding="utf-8") + script
    policy = _policy(script, style, "connect-src 'self'; img-src 'self' data:")
    run = {
        "title": title,
        "successAt": success_at,
        "served": True,
        "folder": "image",
        "suffixes": _SUFFIXES,
        "against": against,
    }
    text = template.render(
        title=title,
        served=True,
        policy=policy,
        style=_Safe(style),
        script=_Safe(script),
        run=_Safe(to_json({**run, "written": None, "missing": {}, "damaged": [], "rows": []})),
        records=(),
        images=(),
    )
    return text.encode("utf-8", "replace"), policy


def _other(against: RunStore | None) -> dict[str, Any]:
    """What the page needs of the run that this one is compared with: its name and its attempts, without their steps."""
    if against is None:
        return {"against": None}
    made = who_stands([entry_row(entry) for entry in against.entries()])
    return {"against": against.path.name, "againstRows": list(map(row_record, made))}


class _Safe(str):
    """Text that the template takes as it is: our own, or JSON and base64 in which nothing ends a script."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


@dataclass(frozen=True, slots=True)
class _Stored:
    beside: bool
    size: int
    missing: dict[str, str]


def _template() -> tuple[Any, str, str]:
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError("the viewer needs jinja2, which is missing: pip install 'managed-vllm[agent]'") from error
    home = files("managed_vllm.agent.viewer")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(home.joinpath("template.html.j2").read_text(encoding="utf-8"))
    script = "".join(home.joinpath(name).read_text(encoding="utf-8") for name in ("groups.js", "viewer.js"))
    style = home.joinpath("viewer.css").read_text(encoding="utf-8")
    return template, script, style


def _policy(script: str, style: str, more: str = "img-src data: 'self' file:") -> str:
    """The page's content security policy: our own script and style by their hashes, images from here, nothing else."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; {more}; "
        "base-uri 'none'; form-action 'none'"
    )


def _reader(source: Any, images: ReadsImages | Callable[[ImageRef], bytes] | None) -> Callable[[ImageRef], bytes]:
    if images is None:
        images = getattr(source, "images", None)
    if isinstance(images, ReadsImages):
        return images.read
    if callable(images):
        return images
    if images is not None:
        raise ConfigError(f"images must be an ImageStore or a function, not {type(images).__name__}", field="images")

    def refuse(ref: ImageRef) -> bytes:
        raise ConfigError(
            "these trajectories have screenshots: give the ImageStore they are in (images=)", field="images"
        )

    return refuse


@contextlib.contextmanager
def _spool(folder: Path) -> Iterator[IO[str]]:
    # Beside the page, where there is room for what it will hold; /tmp may be memory.
    with tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8", newline="\n") as file:
        yield file


def _lines(file: IO[str]) -> Iterator[str]:
    file.seek(0)
    for line in file:
        yield line[:-1]


def _write_records(source: Iterable[Trajectory], file: IO[str]) -> tuple[list[Row], dict[str, ImageRef]]:
    """A line of JSON a trajectory. Returns their rows, and the images in the order of their appearance, by hash."""
    made: list[Row] = []
    refs: dict[str, ImageRef] = {}
    for trajectory in source:
        record = TrajectoryRecord(trajectory)
        for ref in record.images:
            refs.setdefault(ref.sha256, ref)
        made.append(Row.of(trajectory))
        file.write(to_json(record.value))
        file.write("\n")
    return made, refs


def _write_images(
    refs: dict[str, ImageRef], read: Callable[[ImageRef], bytes], file: IO[str], beside: Path, max_bytes: int
) -> _Stored:
    """A line an image, hash and base64, while they fit; else each as a file in `beside`, and no line."""
    missing: dict[str, str] = {}
    inside = 0
    size = 0
    for ref in refs.values():
        data = _read(ref, read, missing)
        if data is None:
            continue
        size += len(data)
        inside += -(-len(data) // 3) * 4
        if inside > max_bytes:
            break
        file.write(f"{ref.sha256} {base64.b64encode(data).decode()}\n")
    else:
        return _Stored(False, size, missing)
    file.seek(0)
    file.truncate()
    missing.clear()
    size = 0
    beside.mkdir(exist_ok=True)
    for ref in refs.values():
        data = _read(ref, read, missing)
        if data is not None:
            size += len(data)
            path = beside / f"{ref.sha256}.{_SUFFIXES.get(ref.mime, 'bin')}"
            # By its content: what is there is this very image, unless a write of it was cut off.
            if not path.is_file() or path.stat().st_size != len(data):
                _replace(path, [data])
    return _Stored(True, size, missing)


def _read(ref: ImageRef, read: Callable[[ImageRef], bytes], missing: dict[str, str]) -> bytes | None:
    if not _SHA256.fullmatch(ref.sha256):  # it becomes a file's name, and a record can say anything
        missing[ref.sha256] = "its hash is none"
        return None
    try:
        return read(ref)
    except ConfigError:
        raise
    except Exception as error:
        missing[ref.sha256] = f"{type(error).__name__}: {error}"
        return None


def _replace(path: Path, pieces: Iterable[str | bytes]) -> None:
    made = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with made.open("xb") as file:
            for piece in pieces:
                file.write(piece if isinstance(piece, bytes) else piece.encode("utf-8", "replace"))
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
