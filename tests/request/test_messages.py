"""Conversations of every shape become the one that the server takes, and the caller's objects stay as they were."""

from __future__ import annotations

import base64
import copy
import io
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from managed_vllm.errors import BadRequestError
from managed_vllm.request.images import Image, ImagePart
from managed_vllm.request.messages import conversation

pillow = pytest.importorskip("PIL.Image")
numpy = pytest.importorskip("numpy")

PICTURE = pillow.new("RGB", (8, 6), (200, 10, 30))


def png() -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return file.getvalue()


PNG = png()
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
HTTP = "https://example.com/a.png"


def parts(*content: Any) -> list[Any]:
    found = conversation([{"role": "user", "content": list(content)}])[0]["content"]
    assert isinstance(found, list)
    return found


def test_what_has_no_images_stays_as_it_is() -> None:
    messages = [
        {"role": "system", "content": "You are"},
        {"content": [{"text": "hi", "type": "text", "cache_control": {}}], "role": "user", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "tool_calls": []},
        {
            "role": "user",
            "content": [
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
                {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}},
                {"type": "image_url", "image_url": {"url": HTTP, "detail": "low"}},
                {"type": "image_url", "image_url": HTTP},
                {"type": "image_url", "image_url": None, "uuid": "mine"},
                {"type": "image_embeds", "image_embeds": "…", "uuid": "x"},
                {"type": "of tomorrow", "whatever": 1},
            ],
        },
    ]
    before: list[Any] = copy.deepcopy(messages)
    found = conversation(messages)
    assert found == before == messages
    assert [list(message) for message in found] == [list(message) for message in before]
    assert [list(part) for part in found[5]["content"]] == [list(part) for part in before[5]["content"]]
    assert all(new is not old for new, old in zip(found, messages, strict=True))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"url": x}])
@pytest.mark.parametrize("of_file", [True, False])
def test_every_shape_of_an_image_becomes_one_part(wrap: Any, of_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    if of_file:
        sources: list[Any] = [PNG, bytearray(PNG), memoryview(PNG), path, str(path), path.as_uri(), DATA_URL]
        sources.append(Image.of(PNG))
    else:
        sources = [PICTURE, numpy.asarray(PICTURE), Image.of(PICTURE)]
    expected = ImagePart(Image.of(sources[0]))
    for source in sources:
        shapes = [
            {"type": "image_url", "image_url": wrap(source)},
            {"type": "image", "image": wrap(source)},
            {"type": "image_pil", "image_pil": wrap(source)},
            {"image_url": wrap(source)},
        ]
        if not isinstance(source, str):
            shapes.append(source)
        if isinstance(source, str | Path):
            shapes += [{"type": "image", "url": source}, {"type": "image", "path": source}]
        assert parts(*shapes) == [expected] * len(shapes)
    assert parts(expected)[0] is expected


def test_texts_and_images_may_stand_in_the_list_as_they_are() -> None:
    found = parts("What is", PICTURE, "there?")
    assert found == [
        {"type": "text", "text": "What is"},
        ImagePart(Image.of(PICTURE)),
        {"type": "text", "text": "there?"},
    ]
    assert conversation(({"role": "user", "content": ("a", PICTURE)},))[0]["content"][1] == found[1]


def test_id_detail_and_other_keys_of_a_part_are_kept() -> None:
    part = {
        "type": "image_url",
        "cache_control": {"a": 1},
        "image_url": {"url": DATA_URL, "detail": "low"},
        "uuid": "u",
    }
    assert parts(part) == [ImagePart(Image.of(PNG), "u", "low", {"cache_control": {"a": 1}})]
    assert parts({"type": "image", "image": PICTURE, "detail": "high"})[0].detail == "high"
    assert parts({"type": "image", "image": HTTP, "uuid": "u", "x": 1}) == [
        {"type": "image_url", "image_url": {"url": HTTP}, "uuid": "u", "x": 1}
    ]


def test_the_callers_objects_are_not_changed() -> None:
    part = {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}}
    message = MappingProxyType({"role": "user", "content": [part, "text"]})
    conversation([message])
    assert part == {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}}
    assert message["content"] == [part, "text"]


@pytest.mark.parametrize(
    ("messages", "place", "why"),
    [
        ("hello", "messages ", "'hello'"),
        ({"role": "user"}, "messages ", "list of mappings"),
        (None, "messages ", "None"),
        (iter([]), "messages ", "list of mappings"),
        (["hello"], "messages[0]:", "'hello'"),
        ([{"content": "x"}], "messages[0]:", "has no role"),
        ([{"role": None, "content": "x"}], "messages[0]:", "has no role"),
        ([{"role": "user", "content": "x"}, {"role": ""}], "messages[1]:", "has no role"),
        ([{"role": "user", "content": 5}], "messages[0].content ", "not 5"),
        ([{"role": "user", "content": PICTURE}], "messages[0].content ", "put an image in a list"),
        ([{"role": "user", "content": {"type": "text"}}], "messages[0].content ", "not dict"),
    ],
)
def test_a_wrong_message_is_named(messages: Any, place: str, why: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        conversation(messages)
    assert caught.value.field == "messages"
    assert caught.value.message.startswith(place)
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (None, "NoneType is no image"),
        (5, "int is no image"),
        ({}, "has no type"),
        ({"type": 7}, "has no type"),
        ({"type": "text"}, "has no text"),
        ({"type": "text", "text": b"x"}, "has no text (bytes)"),
        ({"type": "image"}, "has no 'image' or 'url' or 'path'"),
        ({"type": "image_pil"}, "has no 'image_pil'"),
        ({"type": "image_url", "uuid": "u"}, "has no 'image_url'"),
        ({"type": "image_url", "image_url": None}, "has no image"),
        ({"type": "image_url", "image_url": {}}, "has no image"),
        ({"type": "image_url", "image_url": {"url": 5}}, "int is no image"),
        ({"type": "image_url", "image_url": PICTURE, "uuid": 5}, "has a uuid that is no text"),
        ({"type": "image_url", "image_url": {"url": PICTURE, "detail": 5}}, "has a detail that is no text"),
        ({"type": "image", "image": "/no/such.png"}, "No such file"),
        ({"type": "image", "image": b"no image"}, "not a PNG"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "not a PNG"),
    ],
)
def test_a_wrong_part_is_named(part: Any, why: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        conversation([{"role": "user", "content": "x"}, {"role": "user", "content": ["a", "b", part]}])
    assert caught.value.field == "messages"
    assert caught.value.message.startswith("messages[1].content[2]: ")
    assert why in caught.value.message
