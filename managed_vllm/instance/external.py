"""Servers that somebody else runs, given by URL: they are checked, and never supervised.

What is given explicitly goes before the environment, whose model and key are those of the environment's server: they
are not sent to another one. What can only be said of a server of ours is an error.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from managed_vllm.errors import AuthenticationError, ConfigError, ModelNotServedError, ServerUnreachableError
from managed_vllm.masking import Secret, without_passwords
from managed_vllm.status import Connection
from managed_vllm.urls import checked_api_key, is_this_machine, normalized_url

if TYPE_CHECKING:
    import requests

URL_VARIABLE, MODEL_VARIABLE, KEY_VARIABLE = "VLLM_SERVER_URL", "VLLM_MODEL_NAME", "VLLM_API_KEY"
log = logging.getLogger("managed_vllm")

_MOST_AT_ONCE = 16


def urls_from_environment() -> tuple[str, ...]:
    """`VLLM_SERVER_URL`: one server, or several of the same model with commas between them; empty counts as not set."""
    return tuple(url for url in re.split(r"[,\s]+", os.environ.get(URL_VARIABLE, "")) if url)


def checked_urls(urls: Sequence[str] | None) -> tuple[str, ...]:
    """The argument `base_urls=`, each server once. Raises `ConfigError` for what is no list of URLs."""
    if urls is None:
        return ()
    if isinstance(urls, str) or not all(isinstance(url, str) for url in urls) or not urls:
        raise ConfigError(f"base_urls is a list of one or more URLs, not {urls!r:.80}", field="base_urls")
    return tuple(dict.fromkeys(normalized_url(url) for url in urls))


def model_for(urls: Sequence[str], given: str | None, *, unowned: bool = False) -> str | None:
    """The model to ask for: the one given, else `VLLM_MODEL_NAME` if the servers are those of the environment.

    `unowned`: also where that names no server, so that nothing says whose model it is.
    """
    return given if given is not None else _from_environment(MODEL_VARIABLE, urls, unowned)


def key_for(urls: Sequence[str], given: str | None, *, unowned: bool = False) -> Secret | None:
    """The key to send: as `model_for`, with `VLLM_API_KEY`."""
    key = given or _from_environment(KEY_VARIABLE, urls, unowned)
    return checked_api_key(key) if key else None


def _from_environment(variable: str, urls: Sequence[str], unowned: bool) -> str | None:
    theirs = {normalized_url(url) for url in urls_from_environment()}
    is_its = all(normalized_url(url) in theirs for url in urls) if theirs else unowned
    return (os.environ.get(variable) or None) if is_its else None


def check_applicable(arguments: Mapping[str, Any], *, explicit: bool) -> None:
    """Raises `ConfigError` where an argument that only a server of ours can heed is not None.

    `explicit`: the URL was given as `base_url=`, not by the environment.
    """
    unfit = [name for name, value in arguments.items() if value is not None]
    if not unfit:
        return
    where = "base_url= names" if explicit else f"the variable {URL_VARIABLE} names"
    instead = "base_url" if explicit else URL_VARIABLE
    raise ConfigError(
        f"{where} a server that somebody else runs, to which this can't be applied: "
        f"{', '.join(f'{name}=' for name in unfit)}. Leave it out, or {instead}, to start a server of yours",
        field=unfit[0],
    )


def attach(base_url: str, api_key: str | None, model: str | None, *, timeout_s: float = 10.0) -> Connection:
    """Checks that the server at `base_url` answers, takes the key and serves the model.

    Without a model the server must serve exactly one (LoRA adapters of it don't count). Raises `ConfigError`,
    `ServerUnreachableError`, `AuthenticationError` or `ModelNotServedError`.
    """
    import requests  # here: loading it takes longer than everything else of attaching

    url = normalized_url(base_url)
    shown = without_passwords(url)
    try:
        with http_session(url, api_key) as http:
            response = http.get(f"{url}/models", timeout=timeout_s)
    except requests.TooManyRedirects as error:
        raise _redirected(shown, error.response) from error
    except requests.ConnectionError as error:
        raise ServerUnreachableError(
            f"nothing answers at {shown} ({_reason(error)}); is the server running, are host and port right?",
            base_url=shown,
        ) from error
    except requests.RequestException as error:
        raise ServerUnreachableError(
            f"{shown} gave no answer within {timeout_s:g} s: {without_passwords(str(error))}", base_url=shown
        ) from error
    if response.status_code in (401, 403):
        what = "refuses this API key" if api_key else "wants an API key"
        raise AuthenticationError(
            f"the server at {shown} {what} (HTTP {response.status_code}); give api_key=, "
            f"or set {KEY_VARIABLE} beside {URL_VARIABLE}",
            base_url=shown,
        )
    served = _served(response)
    if served is None:
        raise ServerUnreachableError(
            f"what answers at {shown} does not speak the OpenAI API: GET /models gave HTTP {response.status_code}: "
            f"{response.text[:200]!r}",
            base_url=shown,
        )
    roots = [name for name, parent in served if parent is None]
    names = tuple(name for name, _ in served)
    if model is None and len(roots) != 1:
        raise ModelNotServedError(
            f"the server at {shown} serves {', '.join(names) or 'no model'}; say which with model=, "
            f"or with {MODEL_VARIABLE} beside {URL_VARIABLE}",
            base_url=shown,
            served=names,
        )
    if model is not None and model not in names:
        raise ModelNotServedError(
            f"the server at {shown} does not serve {model!r}; it serves: {', '.join(names) or 'nothing'}",
            base_url=shown,
            served=names,
        )
    return Connection(base_url=url, api_key=Secret(api_key or ""), model=model or roots[0])


Servers = Sequence[tuple[Connection, bool]]
"""Servers of the same model, and whether each was up when they were asked."""


def attach_all(urls: Sequence[str], api_key: str | None, model: str | None, *, timeout_s: float = 10.0) -> Servers:
    """As `attach`, for one server or several at once, which must serve the same model. Those of several that don't
    answer are down.

    Raises `ServerUnreachableError` if none answers, and what any of them is to blame for otherwise.
    """
    if len(urls) == 1:
        found_one = attach(urls[0], api_key, model, timeout_s=timeout_s)
        log.info("attached to %s: an external server, not supervised", without_passwords(found_one.base_url))
        return ((found_one, True),)
    with ThreadPoolExecutor(min(len(urls), _MOST_AT_ONCE), thread_name_prefix="managed-vllm-attach") as threads:
        asked = [threads.submit(attach, url, api_key, model, timeout_s=timeout_s) for url in urls]
    silent = [one.exception() for one in asked if isinstance(one.exception(), ServerUnreachableError)]
    if len(silent) == len(urls):
        shown = ", ".join(without_passwords(url) for url in urls)
        raise ServerUnreachableError(f"none of {shown} can be used; the first: {silent[0]}", base_url=shown)
    found = [None if isinstance(one.exception(), ServerUnreachableError) else one.result() for one in asked]
    names = {connection.model: connection for connection in found if connection is not None}
    if len(names) > 1:
        served = "; ".join(f"{without_passwords(one.base_url)} serves {name}" for name, one in names.items())
        raise ModelNotServedError(
            f"several servers must serve the same model: {served}. Say which with model=, or take the others out",
            base_url=without_passwords(urls[0]),
            served=tuple(names),
        )
    (name,) = names
    down = functools.partial(Connection, api_key=Secret(api_key or ""), model=name)
    for url, connection in zip(urls, found, strict=True):
        if connection is None:
            log.warning("%s does not answer, and is left out until it does", without_passwords(url))
    return [
        (down(base_url=normalized_url(url)), False) if connection is None else (connection, True)
        for url, connection in zip(urls, found, strict=True)
    ]


def http_session(url: str, api_key: str | None) -> requests.Session:
    """A session for a server at `url` that sends its key, and takes no other from `~/.netrc`.

    No proxy sees what is meant for this machine. A redirect is an error (`requests.TooManyRedirects`): of the requests
    that follow, which are POSTs, it would lose the body.
    """
    import requests

    session = requests.Session()
    session.trust_env = not is_this_machine(urlsplit(url).hostname or "")
    session.max_redirects = 0
    session.auth = functools.partial(_with_key, api_key)
    return session


def _with_key(api_key: str | None, request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Adds the key, else the user and password that the URL has. Whoever does this himself keeps `requests` from it."""
    from requests.auth import HTTPBasicAuth
    from requests.utils import get_auth_from_url

    user, password = get_auth_from_url(request.url or "")
    if api_key:
        request.headers["Authorization"] = f"Bearer {api_key}"
    elif user or password:
        HTTPBasicAuth(user, password)(request)
    return request


def _redirected(shown: str, response: requests.Response | None) -> ServerUnreachableError:
    status = "" if response is None else f" (HTTP {response.status_code})"
    place = "" if response is None else urljoin(response.url, response.headers.get("Location", ""))
    base_url = without_passwords(place.removesuffix("/").removesuffix("/models"))
    return ServerUnreachableError(
        f"{shown} redirects to {base_url or 'nowhere'}{status}; give the address itself as base_url=", base_url=shown
    )


def _served(response: requests.Response) -> Sequence[tuple[str, str | None]] | None:
    try:
        return [(str(entry["id"]), entry.get("parent")) for entry in response.json()["data"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _reason(error: Exception) -> str:
    """What the operating system said, below the layers of urllib3."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return without_passwords(getattr(cause, "strerror", None) or str(cause))
