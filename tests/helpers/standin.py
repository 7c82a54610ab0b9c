"""A stand-in for vLLM's server: OpenAI-shaped, with vLLM's process tree, and it misbehaves on command.

Run as a program it takes vLLM's flags (`--host --port --uds --model --served-model-name`, others are ignored) and the
orders of the environment variable STANDIN, a JSON object:

    start_s      seconds of "loading" before it listens            say        lines to print before anything else
    exit         exit code (or "SIGKILL") with which it ends instead of serving
    exit_after seconds after its first answer to a user (a probe is none), then exit with `exit`
    held       a path: before anything but `count` it waits until that exists
    silent       true: never listens, never says anything          ignore_sigterm  true
    count        file to which it appends a line at each start     token_s    seconds per token, default 0
    tree         true: EngineCore and Worker are processes below it, as vLLM's; else threads in it
    max_seqs     requests that run at once, default 256; the others wait
    faults       folder in which faults are ordered while it runs, see below
    crash_at     n: the n-th generation request crashes it
    lose_port    true: after a second it listens no more; a path: once that exists, which it removes
    falls        a path: when its engine is dead it ends once that exists, and not a moment later
    orphans      true: leaves a process in a session of its own, with its environment, deaf to SIGTERM
    steal_port   true: a stranger takes the port before it, and it ends; a path: only once, after which the path exists
    once         a path: the first start makes it; where it exists, vLLM's command line is refused, with exit code 2
    chatter      a line with {n}, counted up, that it goes on saying for ever; it never listens
    paused       true: /is_paused says so                          echo       true: it echoes, also with `max_tokens`
    control      {"hangs": "/pause"}: that route of engine control never answers; {"without": true}: it has none;
                 {"versions": "end"}: it tells of weight versions as vLLM 0.33; "never": not at all
    shm          true: the Worker maps a segment /dev/shm/psm_…; a path: it is noted there
    poison       a text: a request with that in it ends the server
    map          the server maps these files for as long as it runs
    scale_out    true: it has /inference/v1/generate, as with --enable-scale-out; a path: once that exists
    hold         [n, path]: after n generation requests the others wait until that path exists
    after_first  a path: the tokens after the first of an answer wait until it exists; meanwhile `<path>-first` does
    used         a folder in which it locks a file for each of its GPUs; where it can't, it makes `<GPU>-twice`

A file named `<number>-<kind>` in the folder `faults` is claimed by the next generation request of more than one token
(renamed to `<name>.claimed`) and acted upon once, where it fits after half of that request's tokens:

    crash crash-engine crash-worker        that process ends at once
    hang-api hang-engine hang-worker       that process does nothing any more; hang-api: after the word HANGS
    500 503                                that status
    abort                                  HTTP 200, half of the tokens, finish_reason "abort"
    truncated halfstream                   HTTP 200, the connection is cut in the middle of the answer
    streamerror                            HTTP 200, an error in the stream, then [DONE]; 500 for one without a stream
    garbage                                HTTP 200, but no JSON
    flood                                  100 MB into the log, then the answer
    slow                                   the answer 2 s later

What is generated follows a rule, so that any answer can be checked: `continuation(prompt_ids(prompt), max_tokens)`;
see `standin_engine`. Without `max_tokens`, or with the client's default of 16, the text says "echo <prompt> from <pid>"
instead. `command()` gives the words for `ManagedVLLM(command=…)`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import standin_tokens
from standin_control import Control, VersionSpans
from standin_engine import (
    VOCABULARY,
    Engine,
    EngineDead,
    Fault,
    Generation,
    content_of,
    continuation,
    kv_cache_usage,
    logprob_of,
    prompt_ids,
    text_of,
)

__all__ = ["command", "continuation", "logprob_of", "orders", "prompt_ids", "text_of"]

DEFAULT_MAX_TOKENS = 16
_DEATH_S = 0.8
_SLOW_S = 2.0
_FLOOD_BYTES = 100 << 20

_hung = threading.Event()

_THIEF = """
import http.server, os, sys, threading
if os.fork(): os._exit(0)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    do_POST = do_GET
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler)
threading.Timer(float(sys.argv[3]), os._exit, [0]).start()
print(flush=True); os.close(1)
server.serve_forever()
"""


def command() -> list[str]:
    """The words that start the stand-in under `ManagedVLLM(command=…)`."""
    return [sys.executable, str(Path(__file__).resolve()), "{args}"]


def orders(**what: Any) -> dict[str, str]:
    """The environment that gives the stand-in its orders, for `ManagedVLLM(env=…)`."""
    return {"STANDIN": json.dumps(what)}


# -- faults at run time ------------------------------------------------------------------------------------------------


class Faults:
    """The folder of ordered faults. Each is claimed by exactly one request, of whichever life of the server."""

    def __init__(self, folder: str | None, crash_at: int | None, hold: tuple[int, str] | None = None) -> None:
        self._folder = folder
        self._crash_at = crash_at
        self._free, self._until = hold or (0, "/")
        self._requests = 0
        self._lock = threading.Lock()

    def claim(self, is_gone: Callable[[], bool]) -> str | None:
        """The kind of fault that the request at hand meets; None for none. Raises `_Gone`: it was held so long."""
        with self._lock:
            self._requests += 1
            number = self._requests
        while number > self._free and not os.path.exists(self._until):
            if is_gone():
                raise _Gone
            time.sleep(0.05)
        if number == self._crash_at:
            return "crash"
        if self._folder is None:
            return None
        try:
            names = [name for name in os.listdir(self._folder) if not name.endswith(".claimed")]
        except OSError:
            return None
        for name in sorted(names, key=lambda name: int(name.partition("-")[0])):
            path = os.path.join(self._folder, name)
            try:
                os.rename(path, path + ".claimed")
            except OSError:
                continue
            return name.partition("-")[2]
        return None


# -- HTTP --------------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """HTTP 400 or 404, with vLLM's words."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _Gone(Exception):
    """The client has hung up."""


_DEFAULT_MAX_TOKENS = 16


class _Asked:
    """A generation request, read and checked."""

    def __init__(self, body: dict[str, Any], *, chat: bool, echo: bool) -> None:
        self.chat = chat
        self.stream = bool(body.get("stream"))
        self.choices = int(body.get("n") or 1)
        self.by_tokens: bool | None = body.get("text")
        """Whether an answer by token ids is to have its text; None: it goes by another route."""
        self.with_ids = bool(body.get("return_token_ids"))
        self.with_versions = body.get("return_weight_versions") is True
        self.with_logprobs = body.get("logprobs") is not None and body["logprobs"] is not False  # 0 is a number of them
        self.tokens_as_ids = bool(body.get("return_tokens_as_token_ids"))
        self.with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        if limit is not None and limit < 1:
            raise _Refused(f"max_tokens must be at least 1, got {limit}.")
        if chat:
            messages = body["messages"]
            self.ids = prompt_ids(messages, continued=bool(body.get("continue_final_message")))
            said = content_of(messages[-1])
        else:
            prompt = body["prompt"]
            if isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt):
                raise _Refused("the stand-in takes one prompt at a time")
            self.ids = prompt_ids(prompt)
            said = str(prompt)
        if any(not 0 <= number < VOCABULARY for number in self.ids):
            raise _Refused(f"Token id {max(self.ids)} is out of vocabulary")
        if limit == _DEFAULT_MAX_TOKENS and not isinstance(body.get("prompt"), list):  # else it may be the rest of one
            limit = None
        self.echo = None if limit is not None and not echo else f"echo {said} from {os.getpid()}".split(" ")
        self.n_tokens = len(self.echo) if self.echo else int(limit or 0)
        self.finish_reason = "stop" if self.echo else "length"
        self.is_probe = self.n_tokens == 1
        self.aborted = False

    def text(self, begin: int, ids: list[int]) -> str:
        """The text of the tokens from the `begin`-th on."""
        if self.echo is None:
            return text_of(ids)
        words = self.echo[begin : begin + len(ids)]
        return (" " if begin and words else "") + " ".join(words)

    def logprobs(self, begin: int, ids: list[int], offset: int) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        words = [self.text(begin + index, [token]) for index, token in enumerate(ids)]
        values = [logprob_of(token) for token in ids]
        spelt = [list(word.encode()) for word in words]
        if self.tokens_as_ids:
            words = [f"token_id:{token}" for token in ids]
        if self.chat:
            return {
                "content": [
                    {"token": word, "logprob": value, "bytes": spelling, "top_logprobs": []}
                    for word, value, spelling in zip(words, values, spelt, strict=True)
                ]
            }
        return {
            "tokens": words,
            "token_logprobs": values,
            "top_logprobs": [{word: value} for word, value in zip(words, values, strict=True)],
            "text_offset": [offset + sum(map(len, words[:index])) for index in range(len(words))],
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model = "stand-in"
    key = ""
    token_s = 0.0
    control = Control()
    poison = b""
    echo = False
    scale_out: bool | str = False
    after_first = ""
    faults = Faults(None, None)
    engine: Engine | None = None
    used = threading.Event()
    """Set once a user has been answered."""

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, _Gone):
            self.close_connection = True

    def _engine(self) -> Engine:
        if Handler.engine is None:
            Handler.engine = Engine(tree=False)
        return Handler.engine

    # -- routes

    def do_GET(self) -> None:
        if self.path in ("/health", "/ping"):
            return self._reply(503 if self._engine().dead.is_set() else 200, {})
        if not self._authorized():
            return None
        if self.path == "/v1/models":
            return self._reply(200, {"object": "list", "data": self.control.models(self.model)})
        if answer := self.control.answer(self.path, {}):
            return self._reply(*answer)
        if self.path == "/openapi.json":
            return self._reply(200, standin_tokens.openapi(scale_out=self._has_tokens()))
        if self.path == "/metrics":
            return self._send(200, self._metrics().encode(), "text/plain; version=0.0.4; charset=utf-8")
        return self._error(404, "no such route")

    def do_OPTIONS(self) -> None:
        if self._authorized():
            self._reply(405 if self.control.has(self.path) else 404, {"detail": "no such method, or no such route"})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"
        if not self._authorized():
            return None
        if self.path == "/detokenize":
            return self._reply(200, {"prompt": text_of(json.loads(raw)["tokens"])})
        if self.path == "/tokenize":
            asked = json.loads(raw)
            return self._reply(200, {"tokens": prompt_ids(asked.get("prompt") or asked["messages"])})
        if self.path == standin_tokens.PATH and not self._has_tokens():
            return self._error(403, standin_tokens.OFF)
        if self.path not in ("/v1/completions", "/v1/chat/completions", standin_tokens.PATH):
            answer = self.control.answer(self.path, json.loads(raw))
            return self._reply(*answer) if answer else self._error(404, "no such route")
        try:
            if self.poison and self.poison in raw:
                os._exit(0)
            body = json.loads(raw)
            if self.path == standin_tokens.PATH:
                body = {**standin_tokens.as_completion(body), "model": body.get("model")}
            if not self.control.serves(body.get("model"), self.model):
                raise _Refused(f"The model `{body.get('model')}` does not exist.", 404)
            asked = _Asked(body, chat=self.path == "/v1/chat/completions", echo=self.echo)
        except _Refused as refused:
            return self._error(refused.status, str(refused))
        except (ValueError, KeyError, TypeError) as error:
            return self._error(400, f"{type(error).__name__}: {error}")
        time.sleep(float(body.get("standin_sleep", 0)))
        kind = None if asked.is_probe else self.faults.claim(self._client_is_gone)
        try:
            used = self.control.in_use() if not asked.is_probe else contextlib.nullcontext()
            with used, self.control.in_flight(self._client_is_gone):
                self._generate(asked, kind, float(body.get("standin_token_s", self.token_s)))
            if not asked.is_probe:
                self.used.set()
        except EngineDead:
            self._error(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")

    def _has_tokens(self) -> bool:
        return os.path.exists(self.scale_out) if isinstance(self.scale_out, str) else self.scale_out

    def _metrics(self) -> str:
        stats, lines = self._engine().stats, []
        labels = f'{{engine="0",model_name="{self.model}"}}'
        for name, kind, value in (
            ("num_requests_running", "gauge", stats["running"]),
            ("num_requests_waiting", "gauge", stats["waiting"]),
            ("kv_cache_usage_perc", "gauge", kv_cache_usage(stats)),
            ("generation_tokens_total", "counter", stats["generated"]),
            ("prompt_tokens_total", "counter", stats["prompt"]),
        ):
            lines += [f"# HELP vllm:{name} As vLLM's.", f"# TYPE vllm:{name} {kind}"]
            lines.append(f"vllm:{name}{labels} {float(value)}")
        name, tokens = "iteration_tokens_total", stats["generated"] + stats["prompt"]
        lines += [f"# HELP vllm:{name} As vLLM's.", f"# TYPE vllm:{name} histogram"]
        lines.append(f'vllm:{name}_bucket{labels[:-1]},le="+Inf"}} {float(stats["steps"])}')
        lines += [f"vllm:{name}_count{labels} {float(stats['steps'])}", f"vllm:{name}_sum{labels} {float(tokens)}"]
        return "\n".join(lines) + "\n"

    # -- generation

    def _generate(self, asked: _Asked, kind: str | None, token_s: float) -> None:
        half = asked.n_tokens // 2
        if kind == "flood":
            _flood()
        if kind == "slow":
            time.sleep(_SLOW_S)
        if kind in ("500", "503") or (kind == "streamerror" and not asked.stream):
            return self._error(int(kind) if kind.isdigit() else 500, f"the order was {kind}")
        if kind == "garbage":
            content_type = "text/event-stream" if asked.stream else "application/json"
            data = b"data: <html>Bad\n\n" if asked.stream else b"<html>Bad gateway</html>"
            return self._send(200, data, content_type)
        fault = Fault(kind, half) if kind in ("crash-engine", "crash-worker", "hang-engine", "hang-worker") else None
        generation = self._engine().generate(
            asked.ids, asked.n_tokens, choices=asked.choices, token_s=token_s, fault=fault
        )
        cut = kind if kind in ("crash", "hang-api", "abort", "truncated", "halfstream", "streamerror") else None
        limit = half * asked.choices if cut else None
        tokens = self._tokens(asked, generation, limit)
        try:
            if asked.stream:
                return self._stream(asked, tokens, cut)
            return self._whole(asked, tokens, cut)
        finally:
            tokens.close()  # type: ignore[attr-defined]

    def _tokens(self, asked: _Asked, generation: Generation, limit: int | None) -> Iterator[list[tuple[int, int]]]:
        """The tokens as they come, up to `limit`; ends the request when the client hangs up, as vLLM does."""
        taken, aborts, source = 0, self.control.aborts, generation.tokens()
        try:
            for found in (part for come in source for part in self._parted(asked, come, taken)):
                while not self._may_go_on(taken) and self.control.aborts == aborts:
                    if self._client_is_gone():
                        raise _Gone
                if self.control.aborts != aborts:
                    asked.aborted = True
                    return
                if limit is not None and taken + len(found) >= limit:
                    if limit > taken:
                        yield found[: limit - taken]
                    return
                taken += len(found)
                if found:
                    yield found
                    generation.passed_on(taken)
                elif self._client_is_gone():
                    raise _Gone
        finally:
            source.close()  # type: ignore[attr-defined]

    def _parted(self, asked: _Asked, come: list[Any], taken: int) -> list[list[Any]]:
        return [come] if taken or asked.is_probe or not self.after_first else [come[:1], come[1:]]

    def _may_go_on(self, taken: int) -> bool:
        if self.after_first and taken and not os.path.exists(self.after_first):
            Path(f"{self.after_first}-first").touch()
            time.sleep(0.01)
            return False
        return self.control.may_run()

    def _client_is_gone(self) -> bool:
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _cut(self, cut: str | None) -> None:
        """The faults that end the API server's part of the answer."""
        if cut == "crash":
            os._exit(1)
        if cut == "hang-api":
            _hung.set()
            print("HANGS", flush=True)
        self._gate()

    def _whole(self, asked: _Asked, tokens: Iterator[list[tuple[int, int]]], cut: str | None) -> None:
        generated: list[list[int]] = [[] for _ in range(asked.choices)]
        versions = [VersionSpans() for _ in range(asked.choices)]
        for found in tokens:
            for number, token in found:
                versions[number].add(self.control.version)
                generated[number].append(token)
        cut = "abort" if asked.aborted else cut
        self._cut(cut)
        choices = []
        for index, ids in enumerate(generated):
            choice: dict[str, Any] = {"index": index, "stop_reason": None, "token_ids": ids if asked.with_ids else None}
            choice["finish_reason"] = "abort" if cut == "abort" else asked.finish_reason
            choice["logprobs"] = asked.logprobs(0, ids, 0)
            if asked.with_versions and self.control.tells_versions != "never":
                choice["weight_versions"] = versions[index].spans
            if asked.chat:
                choice["message"] = {"role": "assistant", "content": asked.text(0, ids)}
            else:
                choice["text"] = asked.text(0, ids)
                choice["prompt_token_ids"] = asked.ids if asked.with_ids else None
            choices.append(choice)
        answer = {**self._head(asked, stream=False), "choices": choices, "usage": _usage(asked, generated)}
        if asked.chat:
            answer["prompt_token_ids"] = asked.ids if asked.with_ids else None
        data = json.dumps(_of_route(asked, answer)).encode()
        if cut in ("truncated", "halfstream"):
            self._send(200, data, part=len(data) // 2)
        else:
            self._send(200, data)

    def _stream(self, asked: _Asked, tokens: Iterator[list[tuple[int, int]]], cut: str | None) -> None:
        self._begin_stream()
        head = self._head(asked, stream=True)
        generated: list[list[int]] = [[] for _ in range(asked.choices)]
        offsets = [0] * asked.choices
        versions = [VersionSpans() for _ in range(asked.choices)]

        def event(choice: dict[str, Any], **more: Any) -> None:
            part = {**head, "choices": [{"logprobs": None, "finish_reason": None, **choice}], **more}
            self._event(_of_route(asked, part))

        if asked.chat:
            for index in range(asked.choices):
                more = {"prompt_token_ids": asked.ids if asked.with_ids else None}
                event({"index": index, "delta": {"role": "assistant", "content": ""}}, **more)
        try:
            for found in tokens:
                for index in range(asked.choices):
                    ids = [token for choice, token in found if choice == index]
                    if not ids:
                        continue
                    begin = len(generated[index])
                    generated[index] += ids
                    changes = [versions[index].add(self.control.version) for _ in ids]
                    text = asked.text(begin, ids)
                    piece: dict[str, Any] = {"index": index, "logprobs": asked.logprobs(begin, ids, offsets[index])}
                    offsets[index] += len(text)
                    if asked.with_ids:
                        piece["token_ids"] = ids
                    if len(generated[index]) == asked.n_tokens:
                        piece |= {"finish_reason": asked.finish_reason, "stop_reason": None}
                    if asked.with_versions and self.control.tells(any(changes), ended="finish_reason" in piece):
                        piece["weight_versions"] = versions[index].spans
                    if asked.chat:
                        piece["delta"] = {"content": text}
                    else:
                        piece["text"] = text
                        if asked.with_ids and not begin:
                            piece["prompt_token_ids"] = asked.ids
                    event(piece)
        except EngineDead:
            return self._end_stream_with_error("EngineCore encountered an issue.")
        cut = "abort" if asked.aborted else cut
        self._cut(cut)
        if cut in ("truncated", "halfstream"):
            self.wfile.write(b'1000\r\ndata: {"id": "cmpl-1", "choi')
            self.close_connection = True
            return None
        if cut == "streamerror":
            return self._end_stream_with_error("the order was streamerror")
        if cut == "abort":
            for index in range(asked.choices):
                last = {"delta": {"content": ""}} if asked.chat else {"text": ""}
                event({"index": index, "finish_reason": "abort", "stop_reason": None, "token_ids": [], **last})
        if asked.with_usage:
            self._event({**head, "choices": [], "usage": _usage(asked, generated)})
        return self._end_stream()

    def _head(self, asked: _Asked, *, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if asked.chat else "text_completion"
        number = f"{'chatcmpl' if asked.chat else 'cmpl'}-{time.monotonic_ns():x}"
        return {"id": number, "object": kind, "created": int(time.time()), "model": self.model}

    # -- the wire

    def _gate(self) -> None:
        while _hung.is_set():
            time.sleep(3600)

    def _authorized(self) -> bool:
        if not self.key or self.headers.get("Authorization") == f"Bearer {self.key}":
            return True
        self._error(401, "wrong key")
        return False

    def _error(self, status: int, message: str) -> None:
        self._reply(status, {"error": {"message": message, "type": "Error", "param": None, "code": status}})

    def _reply(self, status: int, body: Any) -> None:
        self._send(status, json.dumps(body).encode())

    def _send(self, status: int, data: bytes, content_type: str = "application/json", part: int | None = None) -> None:
        """An answer of known length; of which only `part` bytes are sent, if that is given, and the connection cut."""
        self._gate()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self._headers_buffer: list[bytes]
        self._headers_buffer += [b"\r\n", data[:part]]  # one write: two would wait for the acknowledgement of the first
        self.flush_headers()
        if part is not None:
            self.close_connection = True

    def _begin_stream(self) -> None:
        self._gate()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _event(self, body: Any) -> None:
        self._chunk(f"data: {json.dumps(body)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self._gate()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _end_stream(self) -> None:
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _end_stream_with_error(self, message: str) -> None:
        self._event({"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}})
        self._end_stream()


class _TCPHandler(Handler):
    disable_nagle_algorithm = True


def _usage(asked: _Asked, generated: list[list[int]]) -> dict[str, int]:
    prompt, answer = len(asked.ids), sum(map(len, generated))
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _of_route(asked: _Asked, answer: dict[str, Any]) -> dict[str, Any]:
    return answer if asked.by_tokens is None else standin_tokens.as_tokens(answer, text=asked.by_tokens)


def _flood() -> None:
    block = (b"x" * 499 + b"\n") * 2000
    for _ in range(_FLOOD_BYTES // len(block)):
        os.write(1, block)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True


class _UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 256


# -- the program -------------------------------------------------------------------------------------------------------


def _mapped(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


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
        # Its children are left to whoever started it; and who hangs does not hear.
        signal.signal(signal.SIGTERM, lambda *_: None if _hung.is_set() else os._exit(0))
    if "count" in order:
        with open(order["count"], "a") as count:
            count.write(f"{os.getpid()}\n")
    if "held" in order:
        _wait_for(order["held"])
    for line in order.get("say", ()):
        print(line, flush=True)
    if "once" in order and not _is_first(order["once"]):
        print("api_server.py: error: unrecognized arguments: --no-such-flag", flush=True)
        sys.exit(2)
    if order.get("silent"):
        time.sleep(3600)
    if "chatter" in order:
        for n in range(36_000):
            print(order["chatter"].format(n=n % 60), flush=True)
            time.sleep(0.1)
    if "exit" in order and "exit_after" not in order:
        if order["exit"] == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(order["exit"])
    used = [_use(path) for path in _devices(order.get("used"))]  # noqa: F841  (as long as this frame)
    mapped = [_mapped(path) for path in order.get("map", ())]  # noqa: F841  (they live as long as this frame)
    if order.get("orphans"):
        subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 3600 & wait; wait"], start_new_session=True)
    if order.get("steal_port") and _is_first(order["steal_port"]):
        _let_it_be_stolen(arguments.host, arguments.port)
    # The children would run this file again, and need nothing of it.
    del sys.modules["__main__"].__file__
    engine = Engine(tree=bool(order.get("tree")), max_seqs=order.get("max_seqs", 256), shm=order.get("shm", False))
    time.sleep(order.get("start_s", 0))
    Handler.engine = engine
    Handler.model = arguments.served_model_name or arguments.model
    Handler.key = os.environ.get("VLLM_API_KEY", "")
    Handler.token_s = order.get("token_s", 0)
    Handler.echo = bool(order.get("echo"))
    Handler.scale_out = order.get("scale_out", False)
    Handler.control = Control(paused=bool(order.get("paused")), **order.get("control", {}))
    Handler.after_first = order.get("after_first", "")
    Handler.poison = str(order.get("poison", "")).encode()
    Handler.faults = Faults(order.get("faults"), order.get("crash_at"), order.get("hold"))
    if "exit_after" in order:
        threading.Thread(target=_exit_after, args=[order["exit_after"], order.get("exit", 1)], daemon=True).start()
    threading.Thread(target=_fall_with, args=[engine, order.get("falls")], daemon=True).start()
    server: Any
    try:
        if arguments.uds:
            server = _UnixServer(arguments.uds, Handler)
        else:
            server = Server((arguments.host, arguments.port), _TCPHandler)
    except OSError:
        traceback.print_exc()
        os._exit(1)
    print("Application startup complete.", flush=True)
    if order.get("lose_port"):
        threading.Thread(target=_lose_port, args=[server, order["lose_port"]], daemon=True).start()
    server.serve_forever()
    server.server_close()
    while True:
        time.sleep(3600)


def _wait_for(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.01)


def _fall_with(engine: Engine, path: str | None) -> None:
    """vLLM's API server ends with exit code 0 when its engine has died."""
    engine.dead.wait()
    if path is None:
        time.sleep(_DEATH_S)
    else:
        _wait_for(path)
    os._exit(0)


def _exit_after(seconds: float, code: int) -> None:
    Handler.used.wait()
    time.sleep(seconds)
    os._exit(code)


def _lose_port(server: Any, when: str | bool) -> None:
    if when is True:
        time.sleep(1.0)
    else:
        _wait_for(str(when))
        os.unlink(str(when))
    server.shutdown()


def _devices(folder: str | None) -> list[str]:
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [os.path.join(folder, name) for name in names if name] if folder else []


def _use(path: str) -> int:
    """Locks the file of a device until this process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        Path(f"{path}-twice").touch()
    return descriptor


def _is_first(where: str | bool) -> bool:
    if where is True:
        return True
    try:
        os.close(os.open(str(where), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _let_it_be_stolen(host: str, port: int) -> None:
    """A stranger, neither our descendant nor marked, listens on the port for a minute."""
    words = [sys.executable, "-S", "-E", "-c", _THIEF, host, str(port), "60"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, env={}
    ) as thief:
        assert thief.stdout is not None
        thief.stdout.readline()


if __name__ == "__main__":
    sys.setswitchinterval(0.001)
    socket.setdefaulttimeout(None)
    main()
