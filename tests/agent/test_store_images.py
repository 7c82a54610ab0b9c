"""Images by content on disk: whole, once, the very bytes, and gone where they were only for a while."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from agent_samples import screenshot
from PIL import Image as pillow
from processes import HANG_S

from managed_vllm.agent.image_store import TEMPORARY_PREFIX, ImageStore
from managed_vllm.agent.types import ImageRef
from managed_vllm.errors import BadRequestError, RunStoreError
from managed_vllm.request.images import Image


@pytest.fixture
def images(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def files(images: ImageStore) -> list[str]:
    return sorted(str(path.relative_to(images.folder)) for path in images.folder.rglob("*") if path.is_file())


def picture(form: str, size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    pillow.effect_noise(size, 50).convert(mode).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (257, 129), (1921, 7)])
@pytest.mark.parametrize(
    ("form", "suffix", "options"),
    [
        ("PNG", ".png", {}),
        ("PNG", ".png", {"mode": "P"}),
        ("JPEG", ".jpg", {}),
        ("JPEG", ".jpg", {"progressive": True, "quality": 30}),
        ("JPEG", ".jpg", {"mode": "L", "comment": b"\xff\xc0 no frame", "dpi": (72, 72)}),
        ("GIF", ".gif", {}),
        ("WEBP", ".webp", {}),
        ("WEBP", ".webp", {"lossless": True}),
        ("WEBP", ".webp", {"mode": "RGBA"}),
        ("WEBP", ".webp", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
        ("BMP", ".bmp", {}),
    ],
)
def test_type_and_size_are_read_from_the_header(
    images: ImageStore, form: str, suffix: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    data = picture(form, size, **options)
    ref = images.put(data)
    assert (ref.width, ref.height) == size
    assert ref.mime == f"image/{form.lower()}"
    digest = hashlib.sha256(data).hexdigest()
    assert ref.sha256 == digest
    assert files(images) == [f"{digest[:2]}/{digest[2:]}{suffix}"]
    assert images.read(ref) == images.path(ref).read_bytes() == data


def test_a_bitmap_from_the_top_and_one_of_os2_have_their_size(images: ImageStore) -> None:
    os2 = b"BM" + (26 + 12).to_bytes(4, "little") + bytes(4) + (26).to_bytes(4, "little")
    os2 += (
        (12).to_bytes(4, "little") + (2).to_bytes(2, "little") + (2).to_bytes(2, "little") + b"\1\0\x18\0" + bytes(12)
    )
    assert pillow.open(io.BytesIO(os2)).size == (2, 2)
    assert (images.put(os2).width, images.put(os2).height) == (2, 2)
    from_top = bytearray(picture("BMP", (5, 3)))
    from_top[22:26] = (-3).to_bytes(4, "little", signed=True)
    ref = images.put(bytes(from_top))
    assert (ref.width, ref.height) == (5, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_a_header_that_is_cut_off_is_refused_and_no_other_error_comes(images: ImageStore, form: str) -> None:
    data = picture(form, (64, 48))
    for length in range(0, 64):
        try:
            images.put(data[:length])
        except BadRequestError:
            continue
        assert length >= 10  # the size is in it
    with pytest.raises(BadRequestError):
        images.put(data[:9])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"no image at all", "not a PNG"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "does not begin with its header"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(20), "0x0 pixels"),
        (b"\xff\xd8\xff\xda" + b"x" * 50, "no frame header"),
        (b"\xff\xd8\xff\xe0\0\2abc", "no marker"),
        (b"\xff\xd8" + b"\xff" * 1000, "cut off"),
        (b"RIFF1234WEBPxxxx" + bytes(30), "no picture"),
        ("screen.png", "str is not the bytes"),
        (None, "NoneType is not the bytes"),
    ],
)
def test_what_is_no_image_is_refused(images: ImageStore, data: Any, why: str) -> None:
    with pytest.raises(BadRequestError, match=why):
        images.put(data)
    assert not images.folder.exists()


def test_the_same_bytes_are_one_file_and_are_not_written_again(images: ImageStore) -> None:
    data = screenshot("OK", (100, 80))
    first = images.put(data)
    its = images.path(first).stat()
    assert images.put(bytearray(data)) == first  # type: ignore[arg-type]
    assert images.path(first).stat().st_ino == its.st_ino
    assert len(files(images)) == 1


def test_a_file_that_was_cut_off_is_healed_by_the_next_put(images: ImageStore) -> None:
    data = screenshot("OK", (100, 80))
    ref = images.put(data)
    os.truncate(images.path(ref), 100)
    assert images.put(data) == ref
    assert images.read(ref) == data


PUTTING = """
import sys
from agent_samples import screenshot
from managed_vllm.agent.image_store import ImageStore
images = ImageStore(sys.argv[1])
pictures = [screenshot("OK", (60 + n, 80)) for n in range(40)]
print("ready", flush=True)
sys.stdin.readline()
print([images.put(picture).sha256 for picture in pictures])
"""


def test_many_threads_and_processes_put_the_same_images_at_once(images: ImageStore) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PUTTING, str(images.folder)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    others = [subprocess.Popen(command, **pipes) for _ in range(3)]
    try:
        for other in others:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
        for other in others:
            assert other.stdin is not None
            other.stdin.write("go\n")
            other.stdin.flush()
        pictures = [screenshot("OK", (60 + n, 80)) for n in range(40)]
        found: list[list[ImageRef]] = []
        threads = [
            threading.Thread(target=lambda: found.append([images.put(each) for each in pictures])) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hashes = str([hashlib.sha256(each).hexdigest() for each in pictures])
        assert [other.communicate(timeout=HANG_S)[0].strip() for other in others] == [hashes] * 3
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert [[ref.sha256 for ref in refs] for refs in found] == [[ref.sha256 for ref in found[0]]] * 4
    assert len(files(images)) == 40  # and nothing under another name
    assert [images.read(ref) for ref in found[0]] == pictures


def test_a_missing_or_changed_file_is_said_with_its_path(images: ImageStore) -> None:
    data = screenshot("OK", (100, 80))
    ref = images.put(data)
    loaded = images.load(ref)
    path = images.path(ref)
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(RunStoreError, match="is damaged") as caught:
        images.read(ref)
    assert caught.value.path == str(path)
    with pytest.raises(BadRequestError, match="has changed"):
        images.load(ref).data  # noqa: B018
    path.unlink()
    for call in (images.read, images.load, lambda ref: images.sync([ref])):
        with pytest.raises(RunStoreError, match="is missing") as caught:
            call(ref)
        assert caught.value.path == str(path)
    with pytest.raises(BadRequestError, match="can't be read any more"):
        loaded.size  # noqa: B018


@pytest.mark.parametrize(
    "ref",
    [
        ImageRef("../../../etc/passwd", "image/png", 1, 1),
        ImageRef("0" * 63, "image/png", 1, 1),
        ImageRef("A" * 64, "image/png", 1, 1),
        ImageRef("0" * 64, "image/tiff", 1, 1),
    ],
)
def test_a_ref_that_is_none_leads_nowhere(images: ImageStore, ref: ImageRef) -> None:
    for call in (images.path, images.read, images.load, lambda ref: images.sync([ref])):
        with pytest.raises(RunStoreError, match="refers to no image"):
            call(ref)


def test_a_loaded_image_is_the_same_picture_for_requests(images: ImageStore) -> None:
    data = screenshot("OK", (100, 80), form="JPEG")
    loaded = images.load(images.put(data))
    assert loaded == Image.of(data)
    assert Image.of(loaded) is loaded
    assert (loaded.data, loaded.mime, loaded.uuid, loaded.size) == (
        data,
        "image/jpeg",
        hashlib.sha256(data).hexdigest(),
        len(data),
    )


def test_a_folder_that_can_not_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunStoreError, match="a file is in the place of a folder"):
        ImageStore(tmp_path / "file").put(screenshot("OK", (100, 80)))


def test_what_killed_writers_left_is_removed_when_it_is_old(images: ImageStore) -> None:
    ref = images.put(screenshot("OK", (100, 80)))
    old, young = (images.path(ref).with_name(f".new-123-{name}") for name in ("old", "young"))
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    images.remove_unfinished()
    assert [path.exists() for path in (old, young, images.path(ref))] == [False, True, True]


# -- temporary ones ----------------------------------------------------------------------------------------------------


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temp dir, of this test alone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def run(program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    prelude = "from agent_samples import screenshot\nfrom managed_vllm.agent.image_store import ImageStore\nimport os\n"
    prelude += "images = ImageStore.temporary()\nimages.put(screenshot('OK', (100, 80)))\n"
    command = [sys.executable, "-c", prelude + program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def test_a_temporary_store_is_gone_when_it_is_closed_or_forgotten(temp: Path) -> None:
    with ImageStore.temporary() as images:
        assert images.folder.name.startswith(f"{TEMPORARY_PREFIX}{os.getuid()}-{os.getpid()}-")
        assert images.folder.parent == temp
        images.read(images.put(screenshot("OK", (100, 80))))
    images.close()
    assert not images.folder.exists()
    images = ImageStore.temporary()
    folder = images.folder
    images.put(screenshot("OK", (100, 80)))
    del images
    gc.collect()
    assert not folder.exists()


def test_a_temporary_store_is_gone_at_exit_also_after_an_exception(temp: Path) -> None:
    for end in ("", "raise SystemExit(3)", "1 / 0", "pid = os.fork()\nif pid: os.waitpid(pid, 0)"):
        run(end)
        assert list(temp.iterdir()) == []


def test_a_fork_and_a_pickle_do_not_remove_it(temp: Path) -> None:
    program = """
import pickle
copy = pickle.loads(pickle.dumps(images))
copy.close()
del copy
pid = os.fork()
if pid == 0:
    raise SystemExit(0)
os.waitpid(pid, 0)
print(len(os.listdir(images.folder)))
"""
    assert run(program) == "1\n"


def test_what_a_killed_process_left_is_removed_when_the_next_is_made(temp: Path) -> None:
    run("os.kill(os.getpid(), 9)")
    (left,) = temp.iterdir()
    assert list(left.rglob("*.png"))
    with ImageStore.temporary() as images:
        assert list(temp.iterdir()) == [images.folder]


def test_what_is_in_use_or_not_ours_is_not_removed(temp: Path) -> None:
    dead = int(run("print(os.getpid())"))
    foreign = [temp / f"{TEMPORARY_PREFIX}x", temp / f"{TEMPORARY_PREFIX}{os.getuid()}-x-y", temp / "else"]
    elsewhere = temp / "else" / "kept.png"
    for folder in foreign:
        folder.mkdir()
    elsewhere.touch()
    link = temp / f"{TEMPORARY_PREFIX}{os.getuid()}-{dead}-link"
    link.symlink_to(temp / "else")
    with ImageStore.temporary() as first:
        # To another container the maker's pid says nothing: the lock does.
        renamed = first.folder.rename(temp / f"{TEMPORARY_PREFIX}{os.getuid()}-{dead}-abc")
        with ImageStore.temporary():
            assert renamed.exists()
            assert elsewhere.exists()
            assert all(folder.exists() for folder in foreign)
        renamed.rename(first.folder)


def test_a_store_pickles(images: ImageStore) -> None:
    ref = images.put(screenshot("OK", (100, 80)))
    assert pickle.loads(pickle.dumps(images)).read(ref) == images.read(ref)


def test_sigterm_is_an_end_like_others_where_python_makes_it_one(temp: Path) -> None:
    run(f"import signal\nsignal.signal(15, lambda *_: exit(1))\nos.kill(os.getpid(), {int(signal.SIGTERM)})")
    assert list(temp.iterdir()) == []
