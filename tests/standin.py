"""A stand-in for vLLM's server: OpenAI-shaped, with vLLM's process tree, and it misbehaves on command.

Run as a program it takes vLLM's flags (`--host --port --uds --model --served-model-name`, others are ignored) and the
orders of the environment variable STANDIN, a JSON object:

    start_s      seconds of "loading" before it listens            say        lines to print before anything else
    exit         exit code with which it ends instead of serving   exit_after seconds of serving, then exit with `exit`
    tree         true: EngineCore and Worker below it              ignore_sigterm  true
    count        file to which it appends a line at each start     silent     true: never listens, never says anything

`command()` gives the words for `ManagedVLLM(command=…)`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_CHILD = """
import subprocess, sys, time, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "EngineCore":
    subprocess.Popen([sys.executable, "-c", open(sys.argv[2]).read(), "Worker", sys.argv[2]], start_new_session=True)
time.sleep(3600)
"""


def command() -> list[str]:
    """The words that start the stand-in under `ManagedVLLM(command=…)`."""
    return [sys.executable, str(Path(__file__).resolve()), "{args}"]


def orders(**what: Any) -> dict[str, str]:
    """The environment that gives the stand-in its orders, for `ManagedVLLM(env=…)`."""
    return {"STANDIN": json.dumps(what)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model = "stand-in"
    key = ""

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            return self._reply(200, {})
        if not self._authorized():
            return None
        if self.path == "/v1/models":
            return self._reply(200, {"object": "list", "data": [{"id": self.model, "object": "model"}]})
        return self._reply(404, {"error": {"message": "no such route"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if not self._authorized():
            return None
        if body.get("model") != self.model:
            return self._reply(404, {"error": {"message": f"The model `{body.get('model')}` does not exist."}})
        time.sleep(float(body.get("standin_sleep", 0)))
        common = {"id": "cmpl-1", "model": self.model, "created": 0, "usage": {"completion_tokens": 1}}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "token_ids": [1, 2]}
        if self.path == "/v1/completions":
            text = f"echo {body['prompt']} from {os.getpid()}"
            return self._reply(200, {**common, "object": "text_completion", "choices": [{**choice, "text": text}]})
        if self.path == "/v1/chat/completions":
            text = f"echo {body['messages'][-1]['content']} from {os.getpid()}"
            message = {"role": "assistant", "content": text}
            answer = {"object": "chat.completion", "prompt_token_ids": [3], "choices": [{**choice, "message": message}]}
            return self._reply(200, {**common, **answer})
        return self._reply(404, {"error": {"message": "no such route"}})

    def _authorized(self) -> bool:
        if not self.key or self.headers.get("Authorization") == f"Bearer {self.key}":
            return True
        self._reply(401, {"error": {"message": "wrong key"}})
        return False

    def _reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True


class _UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--uds")
    parser.add_argument("--model", default="stand-in")
    parser.add_argument("--served-model-name")
    arguments, _ = parser.parse_known_args()
    order = json.loads(os.environ.get("STANDIN", "{}"))
    if order.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if "count" in order:
        with open(order["count"], "a") as count:
            count.write(f"{os.getpid()}\n")
    for line in order.get("say", ()):
        print(line, flush=True)
    if order.get("silent"):
        time.sleep(3600)
    if "exit" in order and "exit_after" not in order:
        sys.exit(order["exit"])
    if order.get("tree"):
        source = Path(os.environ["TMPDIR"]) / "child.py"
        source.write_text(_CHILD)
        subprocess.Popen([sys.executable, "-c", _CHILD, "EngineCore", str(source)], start_new_session=True)
    time.sleep(order.get("start_s", 0))
    _Handler.model = arguments.served_model_name or arguments.model
    _Handler.key = os.environ.get("VLLM_API_KEY", "")
    if "exit_after" in order:
        threading.Timer(order["exit_after"], os._exit, [order.get("exit", 1)]).start()
    server: Any
    if arguments.uds:
        server = _UnixServer(arguments.uds, _Handler)
    else:
        server = _Server((arguments.host, arguments.port), _Handler)
    print("Application startup complete.", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.setswitchinterval(0.001)
    socket.setdefaulttimeout(None)
    main()
