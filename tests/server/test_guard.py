"""The guard in the server, on the ASGI stack that vLLM builds: what gets past it without the key."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest

from managed_vllm.in_server import managed_vllm_guard
from managed_vllm.in_server.managed_vllm_guard import KeyGuard

applications = pytest.importorskip("starlette.applications", reason="it comes with vLLM")
cors = pytest.importorskip("starlette.middleware.cors")
routing = pytest.importorskip("starlette.routing")
responses = pytest.importorskip("starlette.responses")

PREFLIGHT = {"Origin": "https://here", "Access-Control-Request-Method": "POST"}
reached: list[str] = []


def stack(*origins: str) -> Any:
    """Routes behind CORS behind the guard, as vLLM adds them: CORS always, allowing nobody by default."""

    async def route(request: Any) -> Any:
        reached.append(request.method)
        return responses.PlainTextResponse("generated")

    app = applications.Starlette(routes=[routing.Route("/v1/x", route, methods=["POST", "OPTIONS"])])
    app.add_middleware(cors.CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(KeyGuard)
    return app


def ask(app: Any, method: str, headers: dict[str, str], path: str = "/v1/x") -> tuple[int, dict[str, str]]:
    return answer_of(app, method, headers, path)[:2]


def answer_of(app: Any, method: str, headers: dict[str, str], path: str) -> tuple[int, dict[str, str], bytes]:
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "query_string": b"", "headers": raw}
    asyncio.run(app({**scope, "http_version": "1.1", "scheme": "http"}, receive, send))
    found = {name.decode(): value.decode() for name, value in said[0]["headers"]}
    return said[0]["status"], found, b"".join(one.get("body", b"") for one in said[1:])


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    reached.clear()


def test_a_preflight_passes_where_the_server_was_asked_for_cors() -> None:
    for origins in (["*"], ["https://here"]):
        status, headers = ask(stack(*origins), "OPTIONS", PREFLIGHT)
        assert status == 200
        assert headers["access-control-allow-origin"] in ("*", "https://here")
    assert ask(stack("https://elsewhere"), "OPTIONS", PREFLIGHT)[0] == 400  # vLLM's own answer
    assert reached == []


def test_a_preflight_is_refused_where_nobody_asked_for_cors() -> None:
    assert ask(stack(), "OPTIONS", PREFLIGHT)[0] == 401
    assert reached == []


@pytest.mark.parametrize("origins", [[], ["*"]])
def test_nothing_else_reaches_a_route_without_the_key(origins: list[str]) -> None:
    app = stack(*origins)
    lone = {"Access-Control-Request-Method": "POST"}
    for method, headers in (
        ("OPTIONS", {}),
        ("OPTIONS", lone),
        ("POST", PREFLIGHT),
        ("POST", {"Origin": "https://here"}),
    ):
        assert ask(app, method, headers)[0] == 401
    assert reached == []
    assert ask(app, "POST", {"Authorization": "Bearer secret"})[0] == 200
    assert reached == ["POST"]


def basic(text: bytes) -> str:
    return f"Basic {base64.b64encode(text).decode()}"


def test_the_key_may_be_the_password_of_basic_authentication_and_goes_on_as_a_bearers() -> None:
    """As a URL that holds it gives it: http://managed:secret@127.0.0.1:8000."""
    behind: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        behind.append(dict(scope["headers"])[b"authorization"])
        await responses.PlainTextResponse("generated")(scope, receive, send)

    for given in (b"managed:secret", b":secret"):
        assert ask(KeyGuard(app), "POST", {"Authorization": basic(given)})[0] == 200
    assert behind == [b"Bearer secret"] * 2


@pytest.mark.parametrize(
    "given",
    [basic(b"secret"), basic(b"secret:"), basic(b"managed:secret2"), basic(b"managed:a:secret"), basic(b""), "Basic ",
     "Basic secret", "Basic c2VjcmV0", "Basic \u00fc", "secret"],
)  # fmt: skip
def test_no_other_password_is_the_key(given: str) -> None:
    app = stack()
    assert ask(app, "POST", {"Authorization": given})[0] == 401
    assert reached == []


# -- what only the supervisor may ask for ------------------------------------------------------------------------------


SCALE_OUT_PATHS = ["/inference/v1/generate", "/inference/v1/abort_requests", "/v1/completions/render"]


def dev_stack() -> Any:
    """A server whose development routes the supervisor has switched on, with one that we know nothing of."""

    async def route(request: Any) -> Any:
        reached.append(f"{request.url.path} {request.headers['authorization']}")
        return responses.PlainTextResponse("done")

    async def of_a_later_vllm(request: Any) -> Any:
        return await route(request)

    of_a_later_vllm.__module__ = "vllm.entrypoints.serve.dev.later.api_router"
    paths = ["/pause", "/v1/load_lora_adapter", "/adapters/x", "/reset_prefix_cache", "/v1/x", *SCALE_OUT_PATHS]
    routes = [routing.Route(path, route, methods=["POST"]) for path in paths]
    app = applications.Starlette(routes=[*routes, routing.Route("/later", of_a_later_vllm, methods=["POST"])])
    app.add_middleware(KeyGuard)
    return app


@pytest.mark.parametrize(
    ("controlled", "refused"),
    [
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING VLLM_SERVER_DEV_MODE", {"/pause", "/later", "/v1/load_lora_adapter"}),
        ("VLLM_SERVER_DEV_MODE", {"/pause", "/later"}),
        ("", set()),
    ],
)
def test_what_changes_the_engine_wants_the_supervisors_key_where_the_supervisor_switched_it_on(
    monkeypatch: pytest.MonkeyPatch, controlled: str, refused: set[str]
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_CONTROL_KEY", "control")
    monkeypatch.setenv("MANAGED_VLLM_CONTROLLED", controlled)
    app = dev_stack()
    for path in ("/pause", "/later", "/v1/load_lora_adapter", "/reset_prefix_cache", "/v1/x"):
        assert ask(app, "POST", {"Authorization": "Bearer secret"}, path)[0] == (403 if path in refused else 200)
        assert ask(app, "POST", {}, path)[0] == 401
        assert ask(app, "POST", {"Authorization": "Bearer control"}, path)[0] == 200
        assert reached[-1] == f"{path} Bearer secret"  # vLLM's own check behind knows no other key
    lora = "LORA" in controlled
    assert ask(app, "POST", {"Authorization": "Bearer secret"}, "/adapters/x")[0] == (403 if lora else 200)


@pytest.mark.parametrize("controlled", ["VLLM_SERVER_DEV_MODE enable_scale_out", "VLLM_SERVER_DEV_MODE", ""])
def test_of_what_scale_out_opens_generating_is_for_users_unless_they_asked_for_all(
    monkeypatch: pytest.MonkeyPatch, controlled: str
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_CONTROL_KEY", "control")
    monkeypatch.setenv("MANAGED_VLLM_CONTROLLED", controlled)
    app, ours = dev_stack(), "enable_scale_out" in controlled
    for path in SCALE_OUT_PATHS:
        allowed = not ours or path == "/inference/v1/generate"
        status, _, said = answer_of(app, "POST", {"Authorization": "Bearer secret"}, path)
        assert status == (200 if allowed else 403)
        assert allowed or b"enable_scale_out=True" in said
        assert ask(app, "POST", {}, path)[0] == 401
        assert ask(app, "POST", {"Authorization": "Bearer control"}, path)[0] == 200


def test_users_are_not_answered_while_it_is_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MANAGED_VLLM_CONTROL_KEY", "control")
    hold = tmp_path / "held"
    hold.touch()
    monkeypatch.setenv(managed_vllm_guard.HELD, str(hold))
    key, guard = {"Authorization": "Bearer secret"}, stack()
    supervisor = {**key, "User-Agent": managed_vllm_guard.SUPERVISOR_AGENT.decode()}
    status, headers = ask(guard, "POST", key)
    assert (status, headers["retry-after"], reached) == (503, "1", [])
    assert ask(guard, "POST", {})[0] == 401
    assert ask(guard, "POST", supervisor)[0] == ask(guard, "POST", {"Authorization": "Bearer control"})[0] == 200
    hold.unlink()
    assert ask(guard, "POST", key)[0] == 200
    hold.touch()
    assert ask(guard, "POST", key)[0] == 200  # it is looked for no more


def test_without_a_key_of_the_supervisors_all_is_as_vllm_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANAGED_VLLM_CONTROL_KEY", raising=False)
    app = dev_stack()
    assert ask(app, "POST", {"Authorization": "Bearer secret"}, "/pause")[0] == 200
    for no_key in ("", "control"):
        assert ask(app, "POST", {"Authorization": f"Bearer {no_key}"}, "/pause")[0] == 401


def test_it_tells_how_much_of_the_server_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANAGED_VLLM_CONTROL_KEY", "control")
    key, guard = {"Authorization": "Bearer secret"}, stack()

    def use(name: str) -> bytes:
        status, _, body = answer_of(guard, "GET", {"Authorization": f"Bearer {name}"}, managed_vllm_guard.USE)
        assert status == 200
        return body

    assert use("control") == use("secret") == b'{"in_flight": 0, "requests": 0}'
    ask(guard, "POST", key)
    ask(guard, "POST", {**key, "User-Agent": managed_vllm_guard.SUPERVISOR_AGENT.decode()})
    ask(guard, "POST", {})
    assert use("control") == b'{"in_flight": 0, "requests": 1}'
    assert ask(guard, "GET", {}, managed_vllm_guard.USE)[0] == 401
