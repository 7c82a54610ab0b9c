"""Servers that somebody else runs: found by URL, checked, not supervised."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import standin
from free_ports import free_port
from processes import HANG_S, eventually

from managed_vllm import HangPolicy, ManagedVLLM, RestartPolicy
from managed_vllm.errors import (
    AuthenticationError,
    ConfigError,
    ModelNotServedError,
    ServerUnreachableError,
)
from managed_vllm.instance.external import http_session
from managed_vllm.request.connections import proxy_for
from managed_vllm.status import is_loopback
from managed_vllm.urls import normalized_url


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    port = free_port()
    with subprocess.Popen(
        [sys.executable, standin.__file__, "--port", str(port), "--served-model-name", "theirs"],
        env={**os.environ, "VLLM_API_KEY": "right"},
        stdout=subprocess.DEVNULL,
    ) as server:

        def answers() -> bool:
            try:
                return requests.get(f"http://127.0.0.1:{port}/health", timeout=HANG_S).ok
            except requests.ConnectionError:
                return False

        eventually(answers, "the other server is up")
        yield port
        server.kill()


@pytest.mark.parametrize(
    "form", ["http://127.0.0.1:{}", "http://127.0.0.1:{}/v1", "http://127.0.0.1:{}/v1/", "127.0.0.1:{}/"]
)
def test_every_form_of_the_url_is_taken(home: Path, port: int, form: str) -> None:
    with ManagedVLLM(base_url=form.format(port), api_key="right") as llm:
        assert llm.base_url == f"http://127.0.0.1:{port}/v1"
        assert llm.model == "theirs"
        assert not llm.supervised
        assert llm.chat([{"role": "user", "content": "hi"}])[0].outputs[0].text.startswith("echo hi")
        assert llm.openai.models.list().data[0].id == "theirs"
        with pytest.raises(ConfigError):
            llm.restart()


def test_the_service_scripts_variables_are_read(home: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("VLLM_MODEL_NAME", "theirs")
    monkeypatch.setenv("VLLM_API_KEY", "right")
    with ManagedVLLM() as llm:
        assert llm.model == "theirs"
        assert llm.environ()["VLLM_SERVER_URL"] == llm.base_url


def test_an_explicit_model_goes_before_that_of_the_environment(
    home: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SERVER_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("VLLM_MODEL_NAME", "another")
    monkeypatch.setenv("VLLM_API_KEY", "right")
    with ManagedVLLM("theirs") as llm:
        assert llm.model == "theirs"
    with pytest.raises(ModelNotServedError, match="'another'"):
        ManagedVLLM().start()


def test_a_key_of_the_environment_is_sent_to_the_server_of_the_environment_only(
    home: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{port}/v1"
    monkeypatch.setenv("VLLM_API_KEY", "right")
    monkeypatch.setenv("VLLM_MODEL_NAME", "another")
    with pytest.raises(AuthenticationError, match="wants an API key"):
        ManagedVLLM(base_url=url).start()
    monkeypatch.setenv("VLLM_SERVER_URL", "http://127.0.0.2:1")
    with pytest.raises(AuthenticationError, match="wants an API key"):
        ManagedVLLM(base_url=url).start()
    with ManagedVLLM(base_url=url, api_key="right") as llm:
        assert llm.model == "theirs"
    monkeypatch.setenv("VLLM_SERVER_URL", f"127.0.0.1:{port}/")
    with ManagedVLLM("theirs", base_url=url):
        pass


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"max_model_len": 512}, "max_model_len"),
        ({"no_such_argument": 1}, "no_such_argument"),
        ({"command": ["serve", "{port}"]}, "command"),
        ({"env": {"A": "b"}}, "env"),
        ({"python": "/usr/bin/python3"}, "python"),
        ({"port": 8000}, "port"),
        ({"uds": True}, "uds"),
        ({"warm": True}, "warm"),
        ({"restart": RestartPolicy()}, "restart"),
        ({"hang": HangPolicy()}, "hang"),
    ],
)
def test_what_only_a_server_of_ours_can_heed_is_an_error_for_one_by_url(
    home: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError, match=f"base_url= names .* {field}=") as caught:
        ManagedVLLM("m", base_url="http://127.0.0.1:1", **arguments)
    assert caught.value.field == field
    monkeypatch.setenv("VLLM_SERVER_URL", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=f"VLLM_SERVER_URL names .* {field}="):
        ManagedVLLM("m", **arguments)


def test_what_holds_for_a_server_by_url_anyway_is_taken(home: Path) -> None:
    ManagedVLLM("m", base_url="http://127.0.0.1:1", keep_alive=300, startup_timeout=60, env={}, command=None, uds=False)
    with pytest.raises(ConfigError, match="name="):
        ManagedVLLM("m", base_url="http://127.0.0.1:1", name="judge")


def test_a_wrong_key_a_wrong_model_and_nobody_there_are_told_apart(home: Path, port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(AuthenticationError, match="refuses this API key"):
        ManagedVLLM(base_url=url, api_key="wrong").start()
    with pytest.raises(AuthenticationError, match="wants an API key"):
        ManagedVLLM(base_url=url).start()
    with pytest.raises(ModelNotServedError, match="it serves: theirs") as caught:
        ManagedVLLM(base_url=url, api_key="right", model="mine").start()
    assert caught.value.served == ("theirs",)
    with pytest.raises(ServerUnreachableError, match="nothing answers"):
        ManagedVLLM(base_url=f"http://127.0.0.1:{free_port()}").start()
    with pytest.raises(ServerUnreachableError, match="does not speak"):
        ManagedVLLM(base_url=f"{url}/elsewhere", api_key="right").start()


@pytest.mark.parametrize("url", ["", "ftp://host/", "http://", "http://host:notaport"])
def test_no_url_at_all(home: Path, url: str) -> None:
    with pytest.raises(ConfigError):
        normalized_url(url)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.10", "::1", "[::1]"])
def test_a_host_of_this_machine_alone(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "::", "10.0.0.1", "127.example.org", "127.0.0.1.example.org", "1270.0.1"]
)
def test_a_host_that_others_reach_or_are(host: str) -> None:
    assert not is_loopback(host)


OF_THIS_MACHINE = [
    "127.0.0.2",
    "[::1]",
    "localhost",
    "vllm.localhost",
    "0.0.0.0",
    "[::]",
    "[::ffff:127.0.0.1]",
    socket.gethostname(),
    socket.gethostname().upper() + ".",
]


@pytest.mark.parametrize("host", OF_THIS_MACHINE)
def test_a_proxy_does_not_see_what_is_meant_for_this_machine(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    url = f"http://{host}:8000/v1"
    assert not http_session(url, None).trust_env
    assert proxy_for(url) is None


@pytest.mark.parametrize("host", ["gpu-box", "192.0.2.1", "[2001:db8::1]", f"not-{socket.gethostname()}"])
def test_a_proxy_sees_what_is_meant_for_others(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    url = f"http://{host}:8000/v1"
    assert http_session(url, None).trust_env
    assert proxy_for(url) == "http://127.0.0.1:9"


def test_a_key_that_is_given_goes_before_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    url = "http://gpu-box:8000/v1"
    sent = {
        given: http_session(place, given).prepare_request(requests.Request("GET", place)).headers.get("Authorization")
        for given, place in (("mine", url), (None, url))
    }
    assert sent == {"mine": "Bearer mine", None: None}
    with_password = "http://me:pass@gpu-box:8000/v1"
    [basic] = [http_session(with_password, None).prepare_request(requests.Request("GET", with_password))]
    assert basic.headers["Authorization"].startswith("Basic ")


@pytest.fixture
def redirecting() -> Iterator[str]:
    """The URL of a server that redirects everything, as one behind a proxy does that wants https or a slash."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(308)
            self.send_header("Location", f"https://gpu-box{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_that_redirects_is_an_error_on_entering_that_says_where_to(redirecting: str) -> None:
    with pytest.raises(ServerUnreachableError, match=r"redirects to https://gpu-box/v1 \(HTTP 308\)"):
        ManagedVLLM(base_url=redirecting).start()


# -- threads that are none ---------------------------------------------------------------------------------------------

GREEN = """
from gevent import monkey

monkey.patch_all()
import standin
from managed_vllm import ManagedVLLM, VLLMClient
from managed_vllm.errors import ConfigError

for use in (
    lambda: ManagedVLLM("m", command=standin.command()).start(),
    lambda: ManagedVLLM(base_url="http://127.0.0.1:9").start(),
    lambda: VLLMClient("http://127.0.0.1:9", "key", "m").generate("x"),
):
    try:
        use()
    except ConfigError as error:
        print(error)
"""


def test_a_program_whose_threads_gevent_has_patched_is_told_so(home: Path) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", GREEN],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout.count("gevent has replaced the threads of this program") == 3, done.stderr
