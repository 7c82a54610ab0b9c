"""Fields that not every vLLM has: the server is asked before one is sent, and none is dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scripted_server import ANSWER, Script, client_of, says

from managed_vllm.errors import UnsupportedParameterError


def openapi(*names: str) -> dict[str, Any]:
    reference = {"$ref": "#/components/schemas/CompletionRequest"}
    post = {"requestBody": {"content": {"application/json": {"schema": reference}}}}
    properties = {name: {"type": "boolean"} for name in names}
    return {
        "paths": {"/v1/completions": {"post": post}},
        "components": {"schemas": {"CompletionRequest": {"properties": properties}}},
    }


def test_a_newer_field_is_sent_to_a_server_that_has_it(script: Callable[..., Script]) -> None:
    server = script(says(openapi("prompt", "return_weight_versions", "quux")), says(ANSWER))
    with client_of(server) as client:
        client.generate("x", {"max_tokens": 2}, return_weight_versions=True)
        client.generate("x", {"max_tokens": 2}, quux=True)  # type: ignore[call-arg]
    paths = [path for path, _ in server.requests]
    assert paths == ["/openapi.json", "/v1/completions", "/v1/completions"]  # it is asked once
    assert server.requests[1][1]["return_weight_versions"] is True
    assert server.requests[2][1]["quux"] is True


def test_a_newer_field_is_refused_where_the_server_does_not_have_it(script: Callable[..., Script]) -> None:
    with client_of(script(says(openapi("prompt")), says(ANSWER))) as client:
        with pytest.raises(UnsupportedParameterError, match=r"vLLM 0.33 and later have it, the server does not"):
            client.generate("x", return_weight_versions=True)
        with pytest.raises(UnsupportedParameterError, match="nor has the server"):
            client.generate("x", quux=True)  # type: ignore[call-arg]


def test_a_server_that_does_not_tell_its_fields_is_sent_none_that_is_not_known(script: Callable[..., Script]) -> None:
    for answer in (says({"detail": "Not Found"}, 404), says({"paths": {}, "components": {}})):
        with client_of(script(answer)) as client, pytest.raises(UnsupportedParameterError):
            client.generate("x", quux=True)  # type: ignore[call-arg]


def test_for_fields_that_every_server_has_nothing_is_asked(script: Callable[..., Script]) -> None:
    server = script(says(ANSWER))
    with client_of(server) as client:
        client.generate("x", {"max_tokens": 2}, priority=1, return_weight_versions=None)
        with pytest.raises(UnsupportedParameterError, match="did you mean"):
            client.generate("x", prioritty=1)  # type: ignore[call-arg]
    assert len(server.requests) == 1
