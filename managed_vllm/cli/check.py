"""`managed-vllm check`: does a server answer, whoever runs it? Health, models, one answer, with the time each took."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import requests

from managed_vllm.cli import running
from managed_vllm.cli.keys import given_key
from managed_vllm.errors import AuthenticationError, ConfigError, ExternalServerError, NoServerError
from managed_vllm.instance import directory, external
from managed_vllm.masking import reveal
from managed_vllm.status import Connection
from managed_vllm.urls import normalized_url

_ABSENT = (404, 405, 501)


@dataclass(frozen=True)
class Result:
    """What one check found. `latency_s` is None where it was left out."""

    name: str
    ok: bool
    latency_s: float | None
    detail: str


class _CheckError(Exception):
    """The server answered a check, and the answer is not good. The message says why."""


def check(given: argparse.Namespace) -> int:
    """`managed-vllm check`."""
    url, key, model = _target(given)
    results, error = run_checks(url, key, model, timeout_s=given.timeout)
    ok = all(result.ok for result in results)
    if given.json:
        problem = {"type": type(error).__name__, "message": error.message} if error else None
        print(json.dumps({"url": url, "ok": ok, "checks": [asdict(r) for r in results], "error": problem}, indent=2))
    else:
        _print_table(url, results)
        if not ok:
            print("managed-vllm doctor looks for what is wrong with this machine.")
    if error is not None and not given.json:
        raise error
    return 0 if ok else 1


def _target(given: argparse.Namespace) -> tuple[str, str | None, str | None]:
    """URL, key and model: as given, else from the environment, else of the one server that runs."""
    own = given_key(given)
    urls = (given.url,) if given.url else external.urls_from_environment()
    if len(urls) > 1:
        raise ConfigError(f"{external.URL_VARIABLE} names {len(urls)} servers; say which to check", field="url")
    if urls:
        # A person who types the URL sees what is in the shell. A program's base_url= gets no key that may be another's.
        key = external.key_for(urls, own, unowned=True)
        return normalized_url(urls[0]), reveal(key), external.model_for(urls, given.model or None, unowned=True)
    try:
        instance = running.the_only_one(directory.state_home())
    except NoServerError as error:
        raise ConfigError(f"{error.message}; give a URL, or set {external.URL_VARIABLE}", field="url") from None
    seen = running.peek(instance)
    if seen is None or seen.connection is None:
        raise NoServerError(
            f"{instance.id} is not ready ({seen.state if seen else 'no answer'}); see managed-vllm status"
        )
    if seen.connection.uds:
        raise ConfigError(
            f"{instance.id} listens on a Unix socket, which has no URL; its supervisor checks it. By hand: "
            f"curl --unix-socket {seen.connection.uds} http://localhost/health",
            field="url",
        )
    return (
        seen.connection.base_url,
        own or seen.connection.api_key.reveal(),
        given.model or seen.connection.model,
    )


def run_checks(
    url: str, key: str | None, model: str | None, *, timeout_s: float
) -> tuple[list[Result], ExternalServerError | AuthenticationError | None]:
    """Runs all checks; returns their results, and the error after which the others were left out."""
    results: list[Result] = []
    with external.http_session(url, key) as http:
        results.append(_timed("health", lambda: _health(http, url, timeout_s)))
        started = time.monotonic()
        try:
            connection = external.attach(url, key, model, timeout_s=timeout_s)
        except (ExternalServerError, AuthenticationError) as error:
            results.append(Result("models", False, time.monotonic() - started, type(error).__name__))
            results.append(Result("answer", False, None, "left out"))
            return results, error
        results.append(Result("models", True, time.monotonic() - started, connection.model))
        results.append(_timed("answer", lambda: _answer(http, connection, timeout_s)))
    return results, None


def _timed(name: str, ask: Callable[[], str]) -> Result:
    started = time.monotonic()
    try:
        detail, ok = ask(), True
    except _CheckError as error:
        detail, ok = str(error), False
    except requests.Timeout:
        detail, ok = "no answer in time", False
    except requests.RequestException as error:
        detail, ok = type(error).__name__, False
    return Result(name, ok, time.monotonic() - started, detail)


def _health(http: requests.Session, url: str, timeout_s: float) -> str:
    response = http.get(f"{url.removesuffix('/v1')}/health", timeout=timeout_s)
    if response.status_code in _ABSENT:
        return "no such route: not vLLM"
    if not response.ok:
        raise _CheckError(f"HTTP {response.status_code}")
    return "HTTP 200"


def _answer(http: requests.Session, connection: Connection, timeout_s: float) -> str:
    """One short chat; a completion where the server or the model can't chat."""
    common: dict[str, Any] = {"model": connection.model, "max_tokens": 16, "temperature": 0}
    chat = {**common, "messages": [{"role": "user", "content": "Hello"}]}
    response = http.post(f"{connection.base_url}/chat/completions", json=chat, timeout=timeout_s)
    if response.status_code in _ABSENT or (response.status_code == 400 and "template" in response.text):
        prompt = {**common, "prompt": "Hello"}
        response = http.post(f"{connection.base_url}/completions", json=prompt, timeout=timeout_s)
    if not response.ok:
        raise _CheckError(f"HTTP {response.status_code}: {response.text[:300]}")
    try:
        choice = response.json()["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"].get("content") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _CheckError(f"not in OpenAI's form: {response.text[:300]}") from None
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def _print_table(url: str, results: list[Result]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(url), title_justify="left")
    table.add_column("check")
    table.add_column("result")
    table.add_column("ms", justify="right")
    table.add_column("detail", overflow="fold")
    for result in results:
        verdict = Text("ok", style="green") if result.ok else Text("failed", style="red")
        latency = "" if result.latency_s is None else f"{1000 * result.latency_s:.0f}"
        table.add_row(result.name, verdict, latency, Text(result.detail))
    running.console().print(table)
