"""The file of a cassette, and what is found in it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from pathlib import Path

import pytest

from managed_vllm.cassettes.cassette import Cassette, Interaction, Response, Server, merge, read
from managed_vllm.cassettes.player import Player
from managed_vllm.cassettes.requests import canonical, difference, key_of, nearest
from managed_vllm.errors import CassetteError, CassetteMismatchError

SERVER = Server("m", {"max_model_len": 64})
JSON = "application/json"


def asked(prompt: object, **more: object) -> dict[str, object]:
    return canonical("POST", "/v1/completions", json.dumps({"prompt": prompt, **more}).encode())


def interaction(test: str, prompt: str, body: bytes = b"{}", content_type: str = JSON) -> Interaction:
    return Interaction(test, SERVER.id, asked(prompt), Response(200, content_type, body))


# -- requests ----------------------------------------------------------------------------------------------------------


def test_the_same_is_asked_whatever_the_order_of_names_and_what_differs_each_time() -> None:
    one = canonical("POST", "/p", b'{"a": 1, "b": {"y": 2, "x": [1.5]}, "request_id": "1", "session_id": "s"}')
    two = canonical("POST", "/p", b'{"b": {"x": [1.5], "y": 2}, "session_id": "t", "a": 1, "cache_salt": "z"}')
    assert one == two
    assert key_of(one) == key_of(two)
    assert key_of(one) != key_of(canonical("POST", "/p", b'{"a": 2}'))
    assert list(one["body"]) == ["a", "b"]


def test_files_stand_there_by_the_hash_of_their_bytes() -> None:
    data = bytes(range(256)) * 1000
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    found = asked([{"image_url": {"url": url}}, "data: no URL", "data:image/png;base64,???"])
    prompt = found["body"]["prompt"]  # type: ignore[index]
    assert prompt[0]["image_url"]["url"] == f"data:image/png;base64,sha256={hashlib.sha256(data).hexdigest()}"
    assert prompt[1] == "data: no URL"
    assert prompt[2] != url


@pytest.mark.parametrize("body", [b"\xff\xfe", b"{", b"[" * 100_000, b"--boundary\r\n"])
def test_a_body_that_is_no_json_stands_there_as_its_hash(body: bytes) -> None:
    assert canonical("POST", "/p", body)["body"] == {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}


def test_the_nearest_request_is_that_with_the_shortest_difference() -> None:
    others = [asked("x" * 50), asked("the quick brown fox", max_tokens=3), asked("the quick brown dog", max_tokens=4)]
    near = nearest(asked("the quick brown fox", max_tokens=5), others)
    assert near == others[1]
    said = difference(asked("the quick brown fox", max_tokens=5), others[1])
    assert '-  "max_tokens": 3,' in said
    assert '+  "max_tokens": 5,' in said
    assert nearest(canonical("GET", "/else", b""), others) is None
    assert len(difference(asked(["y"] * 10_000), asked(["x"] * 10_000)).splitlines()) < 100


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response",
    [
        Response(200, JSON, b'{"logprob":-0.12345678901234567,"big":123456789012345678901234567890,"text":"\\u00e9"}'),
        Response(200, JSON, b'{"lone":"\\ud800","nan":NaN}'),
        Response(404, JSON, b"no json"),
        Response(200, "text/plain; version=0.0.4", "métrique 1\n".encode()),
        Response(200, "application/octet-stream", bytes(range(256))),
        Response(200, JSON, b"\xff\xfe"),
        Response(200, "text/event-stream", events=(b'{"a":[1.5]}', b"plain", b"[DONE]")),
        Response(200, "text/event-stream", events=(b'{"a":1}',), cut=True),
    ],
)
def test_a_response_comes_back_as_it_was(tmp_path: Path, response: Response) -> None:
    path = tmp_path / "folder" / "c.jsonl"
    merge(path, [SERVER], [Interaction("t", SERVER.id, asked("x"), response)], (), ())
    [found] = read(path).interactions
    if response.content_type == JSON and response.body.startswith(b"{"):
        ours, theirs = (json.loads(each.body) for each in (found.response, response))
        assert repr(ours) == repr(theirs)
    else:
        assert found.response == response


def test_several_that_write_at_once_add_up_and_replace_their_own_tests_only(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    merge(path, [SERVER], [interaction("kept", "k"), interaction("t0", "old"), interaction("", "between")], (), ())

    def write(number: int) -> None:
        new = [interaction(f"t{number}", f"{number}/{place}") for place in range(3)]
        merge(path, [SERVER], [*new, interaction("", "between", b'{"n":1}')], [f"t{number}"], ())

    threads = [threading.Thread(target=write, args=[number]) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    found = [(each.test, each.request["body"]["prompt"]) for each in read(path).interactions]
    expected = [(f"t{number}", f"{number}/{place}") for number in range(8) for place in range(3)]
    assert found == [("", "between"), ("kept", "k"), *expected]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"cassette": 1}\n{"test": "x", "server": "m", "requ', "line 2 of .* is damaged"),
        (b'<<<<<<< HEAD\n{"cassette": 1}\n', "line 1 of .* is damaged"),
        (b"", "is empty"),
        (b'{"cassette": 99}\n', "format 99"),
        (b"\xff\xfe\x00", "line 1 of .* is damaged"),
        (b'{"cassette": 1}\n{"test": 1, "server": 2, "request": 3, "response": 4}\n', "line 2 of .* is damaged"),
        (b'{"cassette": 1}\n' + b"[" * 100_000, "line 2 of .* is damaged"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_line_and_is_left_alone(
    tmp_path: Path, text: bytes, said: str
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(text)
    with pytest.raises(CassetteError, match=said):
        read(path)
    with pytest.raises(CassetteError, match=said):
        merge(path, [SERVER], [interaction("t", "x")], (), ())
    assert path.read_bytes() == text
    with pytest.raises(CassetteError, match="can't be read"):
        read(tmp_path)


def test_another_server_is_refused_with_what_differs() -> None:
    path = Path("c.jsonl")
    known = Cassette({SERVER.id: SERVER, "url": Server("u", None)})
    assert known.server_for(Server("m", {"max_model_len": 64}, "0.99"), path) == SERVER.id
    assert known.server_for(Server("u", {"anything": 1}), path) == "url"
    with pytest.raises(CassetteMismatchError) as caught:
        Cassette({SERVER.id: SERVER}).server_for(Server("m", {"seed": 1, "max_model_len": 32}), path)
    assert caught.value.differences == (
        "max_model_len: 64 was recorded, now it is 32",
        "seed: unset was recorded, now it is 1",
    )
    with pytest.raises(CassetteMismatchError, match="model: 'u' was recorded, now it is 'x'"):
        known.server_for(Server("x", {"max_model_len": 32}), path)


# -- playing -----------------------------------------------------------------------------------------------------------


def test_a_test_gets_its_own_answers_in_order_and_then_none() -> None:
    recorded = [interaction("one", "x", b"1"), interaction("one", "x", b"2"), interaction("two", "x", b"3")]
    player = Player(Cassette({SERVER.id: SERVER}, recorded), SERVER.id, "c.jsonl")

    def play(test: str) -> bytes | None:
        found = player.play(test, asked("x"))
        return None if found is None else found.body

    assert [play("one"), play("two"), play("one"), play("one"), play("two")] == [b"1", b"3", b"2", None, None]
    assert [play("fixture's") for _ in range(4)] == [b"1", b"2", b"3", None]
    player.begin("one")
    assert play("one") == b"1", "a test that runs once more begins anew"
    assert "recorded 2 times" in player.miss("one", asked("x")).message
    assert Player(Cassette({}, recorded), "other", "c.jsonl").play("one", asked("x")) is None
