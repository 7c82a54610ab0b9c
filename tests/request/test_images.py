"""Images on their way to the server: recognized, encoded once, held once, and sent as an id to who has them."""

from __future__ import annotations

import base64
import copy
import gc
import hashlib
import io
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import file_of, numpy, picture, pillow
from scripted_server import ANSWER, Script, client_of, says

from managed_vllm.errors import BadRequestError
from managed_vllm.request import images
from managed_vllm.request.bodies import encode_body
from managed_vllm.request.images import Image, ImagePart, StoredImage


def pixels(image: Image) -> bytes:
    return bytes(pillow.open(io.BytesIO(image.data)).convert("RGB").tobytes())


def has_avif() -> bool:
    pillow.init()
    return "AVIF" in pillow.SAVE


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    images.cache.reset()


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "mime"),
    [
        *[("PNG", "image/png"), ("JPEG", "image/jpeg"), ("GIF", "image/gif"), ("WEBP", "image/webp")],
        *[("BMP", "image/bmp"), ("TIFF", "image/tiff"), ("ICO", "image/x-icon"), ("JPEG2000", "image/jp2")],
        ("PPM", "image/x-portable-anymap"),
        pytest.param("AVIF", "image/avif", marks=pytest.mark.skipif(not has_avif(), reason="this Pillow has no AVIF")),
    ],
)
def test_the_bytes_of_an_image_file_are_recognized_and_not_copied(form: str, mime: str) -> None:
    data = file_of(picture(), form)
    image = Image.of(data)
    assert image.data is data
    assert (image.mime, image.uuid) == (mime, hashlib.sha256(data).hexdigest())
    for other in (bytearray(data), memoryview(data)):
        assert Image.of(other) == image
    assert Image.of(image) is image


def test_what_a_bytearray_holds_later_does_not_count() -> None:
    data = bytearray(file_of(picture()))
    image = Image.of(data)
    data[:] = b"x" * len(data)
    assert image.data.startswith(b"\x89PNG")


def test_every_source_of_one_file_has_one_id(tmp_path: Path) -> None:
    data = file_of(picture())
    path = tmp_path / "a picture%20.png"
    path.write_bytes(data)
    plain = base64.b64encode(data).decode()
    sources = [data, path, str(path), path.as_uri(), f"data:image/png;base64,{plain}"]
    sources += [f"DATA:image/png;charset=x;BASE64,{plain[:60]}\n{plain[60:]}"]
    assert {Image.of(source).uuid for source in sources} == {hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (b"", "is empty"),
        (b"GIF8", "begins with b'GIF8'"),
        (b"RIFF1234WAVEfmt ", "not a PNG"),
        (b"BM is not always a bitmap", "not a PNG"),
        ("nowhere.png", "neither a URL nor a file that can be read: No such file"),
        ("/", "Is a directory"),
        ("a\0b", "neither a URL nor a file"),
        ("iVBORw0KGgo" * 40, "base64 needs data:image/png;base64,"),
        ("data:image/png;base64", "it has no comma"),
        ("data:image/png;base64,????", "can't be decoded"),
        ("data:text/plain,hello", "not a PNG"),
        ("file://elsewhere/a.png", "another host"),
        ("https://example.com/a.png", "for the server to fetch"),
        (17, "int is no image"),
        (numpy.zeros((4, 4, 3)), "of uint8"),
        (numpy.zeros((4, 4, 2), numpy.uint8), "height x width x 3"),
        (pillow.new("RGB", (0, 5)), "its size is 0x5"),
    ],
)
def test_what_is_no_image_is_refused(source: Any, why: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        Image.of(source)
    assert why in caught.value.message
    assert len(caught.value.message) < 500


def test_a_damaged_or_closed_pillow_image_is_refused(tmp_path: Path) -> None:
    damaged = pillow.open(io.BytesIO(file_of(picture(size=(200, 200)))[:5000]))
    closed = pillow.open(io.BytesIO(file_of(picture())))
    closed.close()
    for source in (damaged, closed):
        with pytest.raises(BadRequestError, match="PIL image can't be read"):
            Image.of(source)


def test_pillow_missing_is_said_and_not_needed_for_files() -> None:
    program = """
import sys
sys.modules["PIL"] = None
import numpy
from managed_vllm.errors import BadRequestError
from managed_vllm.request.images import Image
Image.of(bytes.fromhex(sys.argv[1]))
try:
    Image.of(numpy.zeros((4, 4, 3), numpy.uint8))
except BadRequestError as error:
    print(error.message)
"""
    words = [sys.executable, "-c", program, file_of(picture()).hex()]
    assert "pip install pillow" in subprocess.run(words, check=True, capture_output=True, text=True).stdout


def test_neither_pillow_nor_numpy_is_imported_by_this_module() -> None:
    program = "import sys; import managed_vllm.request.messages; print({'PIL', 'numpy'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout == b"set()\n"


# -- Pillow's ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1"])
def test_a_pillow_image_keeps_its_pixels(mode: str) -> None:
    source = picture(mode=mode) if mode != "1" else picture(mode="L").convert("1")
    image = Image.of(source)
    assert image.mime == "image/png"
    assert pixels(image) == source.convert("RGB").tobytes()


def test_transparency_is_kept() -> None:
    clear = picture(mode="P")
    clear.info["transparency"] = 3
    for source in (picture(mode="RGBA"), picture(mode="LA"), clear):
        again = pillow.open(io.BytesIO(Image.of(source).data))
        assert again.mode == "RGBA"
        assert again.tobytes() == source.convert("RGBA").tobytes()


def test_the_same_pixels_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = pillow.Image.save

    def counted(*given: Any, **options: Any) -> None:
        saved.append(1)
        save(*given, **options)

    monkeypatch.setattr(pillow.Image, "save", counted)
    source = picture()
    first = Image.of(source)
    assert Image.of(source) is first
    assert Image.of(source.copy()) is first
    assert Image.of(numpy.asarray(source)) is first
    assert len(saved) == 1


def test_a_pillow_image_that_was_changed_is_another_one() -> None:
    source = picture()
    first = Image.of(source)
    source.putpixel((0, 0), (1, 2, 3))
    second = Image.of(source)
    assert second.uuid != first.uuid
    assert pixels(second) == source.tobytes()


def test_the_same_bytes_in_another_size_or_mode_are_another_picture() -> None:
    raw = random.Random(0).randbytes(1200)
    made = [("RGB", (20, 20)), ("RGB", (40, 10)), ("L", (40, 30)), ("RGBA", (30, 10)), ("RGB", (10, 40))]
    assert len({Image.of(pillow.frombytes(mode, size, raw)).uuid for mode, size in made}) == len(made)


def test_what_info_says_beside_the_pixels_does_not_count() -> None:
    plain, profiled = picture(), picture()
    profiled.info.update(icc_profile=b"x" * 1000, dpi=(72, 72))
    images.cache.reset()
    first = Image.of(profiled).data
    images.cache.reset()
    assert first == Image.of(plain).data


# -- what is held ------------------------------------------------------------------------------------------------------


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "screen.png"
    path.write_bytes(file_of(picture(1)))
    os.utime(path, ns=(0, time.time_ns() - 10**9))
    first = Image.of(path)
    assert Image.of(str(path)) is first
    path.write_bytes(file_of(picture(2)))
    assert pixels(Image.of(path)) == picture(2).tobytes()


def test_a_file_just_written_is_read_again(tmp_path: Path) -> None:
    """Two writes within one tick of the file system's clock can't be told apart."""
    path = tmp_path / "screen.bmp"
    now = time.time_ns() + 60 * 10**9  # by a clock that is ahead: it stays "just written", however long this takes
    for seed in (1, 2):
        path.write_bytes(file_of(picture(seed), "BMP"))
        os.utime(path, ns=(now, now))
        assert pixels(Image.of(path)) == picture(seed).tobytes()


def test_what_is_kept_is_bounded_in_bytes_and_what_is_in_use_is_found_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = len(Image.of(picture(0)).data)
    monkeypatch.setattr(images, "cache", images.ImageCache(3 * one + 100))
    used = Image.of(picture(0))
    for seed in range(1, 20):
        Image.of(picture(seed))
    assert one <= images.cache.kept_bytes <= 3 * one + 100
    assert Image.of(picture(0)) is used
    newest, used = Image.of(picture(19)), None  # type: ignore[assignment]
    for seed in range(20, 40):
        Image.of(picture(seed))
    assert newest.uuid == Image.of(picture(19)).uuid
    large = Image.of(picture(99, size=(400, 300)))
    assert images.cache.kept_bytes <= 3 * one + 100
    assert Image.of(picture(99, size=(400, 300))) is large


def test_many_threads_get_one_image_and_the_count_stays_right() -> None:
    sources = [picture(seed) for seed in range(8)]
    found: list[list[Image]] = []

    def work() -> None:
        found.append([Image.of(source) for source in sources])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine[index] is found[0][index] for mine in found for index in range(8))
    assert images.cache.kept_bytes == sum(len(image.data) for image in found[0])


def test_a_thousand_conversations_with_five_images_each_cost_little_more_than_the_images() -> None:
    data = [b"\x89PNG\r\n\x1a\n" + random.Random(seed).randbytes(100_000) for seed in range(50)]
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        bodies = []
        for number in range(1000):
            parts = [ImagePart(Image.of(data[(number + step) % 50])) for step in range(5)]
            body = {"messages": [{"role": "user", "content": parts}]}
            encode_body(body)
            bodies.append(body)
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 5 * 1000 * 1500  # less than 2 kB an image; the images are 100 kB each
    assert peak - after < 5 * 100_000 * 4  # one body at a time


PNG = file_of(picture())
IMAGE = Image.of(PNG)


def body_of(*parts: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


# -- in a file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> StoredImage:
    path = tmp_path / "screen.png"
    path.write_bytes(PNG)
    return StoredImage(path, "image/png", hashlib.sha256(PNG).hexdigest())


def test_a_stored_image_is_equal_to_the_image_of_its_bytes(stored: StoredImage) -> None:
    assert stored == IMAGE
    assert IMAGE.__eq__(stored) is True
    assert hash(stored) == hash(IMAGE)
    assert stored != Image(PNG, "image/jpeg")
    assert stored != "an image"
    assert (stored.data, stored.size, stored.mime, stored.uuid) == (PNG, len(PNG), IMAGE.mime, IMAGE.uuid)
    assert Image.of(stored) is stored


@pytest.mark.parametrize("known", [(), {IMAGE.uuid}, None])
def test_a_body_with_a_stored_image_is_that_with_its_bytes(stored: StoredImage, known: Any) -> None:
    body, same = body_of(ImagePart(stored), ImagePart(IMAGE)), body_of(ImagePart(IMAGE), ImagePart(IMAGE))
    assert encode_body(body, known=known).data == encode_body(same, known=known).data
    assert encode_body(body, known=known).size == len(encode_body(same, known=known).data)


def test_a_stored_image_pickles_and_copies_without_its_bytes(stored: StoredImage) -> None:
    assert len(pickle.dumps(stored)) < 400
    for other in (pickle.loads(pickle.dumps(stored)), copy.copy(stored), copy.deepcopy(stored)):
        assert other == stored
        assert other.data == PNG


def test_a_stored_image_whose_file_is_lost_or_changed_is_refused_before_it_is_sent(stored: StoredImage) -> None:
    path = Path(stored.path)
    assert stored.data == PNG
    for changed in (PNG[:-1] + b"x", PNG + b"x", b""):
        path.write_bytes(changed)
        encoded = encode_body(body_of(ImagePart(stored)))
        for of, name in ((encoded, "size"), (encoded, "data"), (stored, "data")):
            with pytest.raises(BadRequestError, match="has changed") as caught:
                getattr(of, name)
            assert str(path) in caught.value.message
    path.write_bytes(PNG)
    assert stored.data == PNG
    path.unlink()
    with pytest.raises(BadRequestError, match=r"can't be read any more: No such file"):
        encode_body(body_of(ImagePart(stored))).size  # noqa: B018


def test_a_request_with_a_lost_image_fails_at_once_and_is_not_sent(
    script: Callable[..., Script], stored: StoredImage
) -> None:
    server = script(says(ANSWER))
    with client_of(server) as client:
        Path(stored.path).unlink()
        with pytest.raises(BadRequestError, match="can't be read any more"):
            client.chat([{"role": "user", "content": [{"type": "image", "image": stored}]}])


def test_the_size_of_a_stored_image_is_known_without_reading_it_again(stored: StoredImage) -> None:
    os.utime(stored.path, ns=(0, time.time_ns() - 10**9))
    assert stored.size == len(PNG)  # read once
    its = os.stat(stored.path)
    Path(stored.path).write_bytes(b"x" * len(PNG))
    os.utime(stored.path, ns=(0, its.st_mtime_ns))  # nobody does that; but it shows that the file was not read
    assert stored.size == len(PNG)
    with pytest.raises(BadRequestError, match="has changed"):
        stored.data  # noqa: B018


def test_a_stored_image_is_read_when_it_is_sent_and_not_held(tmp_path: Path) -> None:
    parts = []
    for seed in range(20):
        data = b"\x89PNG\r\n\x1a\n" + random.Random(seed).randbytes(1_000_000)
        (tmp_path / f"{seed}.png").write_bytes(data)
        parts.append(ImagePart(StoredImage(tmp_path / f"{seed}.png", "image/png", hashlib.sha256(data).hexdigest())))
    del data
    tracemalloc.start()
    try:
        encoded = encode_body(body_of(*parts))
        assert encoded.size > 20 * 1_333_000
        assert sum(map(len, encoded.pieces())) == encoded.size
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 500_000  # half of one; other threads may hold something meanwhile
    assert peak < 3_000_000  # one at a time
