"""Request bodies: what `json` would write, images included; what JSON can't express is refused by name."""

from __future__ import annotations

import base64
import enum
import json
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import pytest
from pictures import file_of, numpy, picture

from managed_vllm.errors import BadRequestError
from managed_vllm.request.bodies import RequestBody, encode_body
from managed_vllm.request.images import Image, ImagePart

PNG = file_of(picture())
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
IMAGE = Image.of(PNG)


def test_a_part_has_the_data_or_only_the_id() -> None:
    part = ImagePart(IMAGE, detail="low", extra={"cache_control": {"type": "ephemeral"}})
    assert part.fields(URL, with_id=True) == {
        "type": "image_url",
        "image_url": {"url": URL, "detail": "low"},
        "cache_control": {"type": "ephemeral"},
        "uuid": IMAGE.uuid,
    }
    assert ImagePart(IMAGE).fields(None, with_id=True) == {"type": "image_url", "image_url": None, "uuid": IMAGE.uuid}
    assert ImagePart(IMAGE, "mine").fields(None, with_id=True)["uuid"] == "mine"
    assert "uuid" not in ImagePart(IMAGE).fields(URL, with_id=False)
    assert ImagePart(IMAGE, "mine").fields(URL, with_id=False)["uuid"] == "mine"


def body_of(*parts: Any) -> dict[str, Any]:
    text = {"type": "text", "text": 'quotes ", zeros \0, ümläute'}
    return {"model": "m", "messages": [{"role": "user", "content": [*parts, text]}], "max_tokens": 5}


def as_json(value: Any, known: Any) -> Any:
    def default(part: ImagePart) -> Any:
        url = f"data:{part.image.mime};base64,{base64.b64encode(part.image.data).decode()}"
        return part.fields(None if known and part.id in known else url, with_id=known is not None)

    return json.loads(json.dumps(value, default=default))


@pytest.mark.parametrize("known", [(), {IMAGE.uuid}, {"mine"}, {IMAGE.uuid, "mine"}, None])
def test_a_body_is_what_json_makes_of_its_fields(known: Any) -> None:
    other = Image.of(file_of(picture(2), "JPEG"))
    body = body_of(ImagePart(IMAGE), ImagePart(other, "mine", "high"), ImagePart(IMAGE))
    encoded = encode_body(body, known=known)
    assert json.loads(encoded.data) == as_json(body, known)
    assert encoded.size == len(encoded.data)
    given = [] if known is None else [IMAGE.uuid, "mine", IMAGE.uuid]
    assert list(encoded.as_ids) == [uuid for uuid in given if uuid in (known or ())]
    assert list(encoded.with_data) == [uuid for uuid in given if uuid not in (known or ())]
    assert sorted(encoded.uuids) == sorted(given)


def test_an_image_may_be_anywhere() -> None:
    body = {"a": IMAGE.uuid, "b": [[(ImagePart(IMAGE),)]], "c": MappingProxyType({"d": ImagePart(IMAGE)})}
    assert encode_body(body).with_data == (IMAGE.uuid,) * 2


def test_a_body_without_images_is_plain_json() -> None:
    class Level(enum.IntEnum):
        HIGH = 3

    class Text(str):
        pass

    body = {
        "messages": [{"role": Text("user"), "content": 'hé "quoted" \u2028'}],
        "temperature": numpy.float64(0.5),
        "level": Level.HIGH,
        "logit_bias": {5: -1.5},
        "tools": (OrderedDict(type="function"), MappingProxyType({"x": [None, True, 2**70]})),
        "empty": [],
        "prompt": [1, 2, 3],
    }
    assert encode_body(body) == RequestBody((encode_body(body).data,), (), ())
    expected = {**body, "tools": [{"type": "function"}, {"x": [None, True, 2**70]}], "logit_bias": {"5": -1.5}}
    assert json.loads(encode_body(body).data) == json.loads(json.dumps(expected))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (float("nan"), "nan is no number"),
        ([1, 2, [float("inf")]], "inf is no number"),
        (numpy.float64("nan"), "nan is no number"),
        ({"a": b"bytes"}, "is a bytes"),
        (bytearray(b"x"), "is a bytearray"),
        ({1, 2}, "is a set"),
        (numpy.int64(3), "is a int64"),
        (object(), "is a object"),
        (IMAGE, "is a Image"),
        ({None: 1}, "None is no key"),
        ({True: 1}, "True is no key"),
        ({b"a": 1}, "is no key"),
        ({1.5: 1}, "1.5 is no key"),
        (ImagePart(IMAGE, extra={"x": float("nan")}), "nan is no number"),
    ],
)
def test_what_json_has_not_is_refused_with_the_name_of_the_field(value: Any, why: str) -> None:
    for place in (value, [value], (value,), {"deep": [value]}):
        with pytest.raises(BadRequestError) as caught:
            encode_body({"model": "m", "wrong": place})
        assert caught.value.field == "wrong"
        assert why in caught.value.message


def test_half_a_character_is_refused() -> None:
    with pytest.raises(BadRequestError, match="can't be written as JSON"):
        encode_body({"wrong": "\ud800"})


def test_a_cycle_is_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(BadRequestError, match="nested too deep"):
        encode_body({"wrong": cycle})
