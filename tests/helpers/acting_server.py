"""A model server for rollouts, in a thread: what it answers is decided by a function of the messages.

`/v1/completions` asks that function with the prompt as a user's message. It takes several prompts as vLLM 0.32 does:
choices in the order of the prompts, one error for all of them, and usage that is their sum.

Token ids are the bytes of the text, logprobs follow a rule (`logprob_of`), prompt ids are the bytes of the messages'
JSON: so a test can tell exactly what a record must have. All requests are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web
from processes import HANG_S

from managed_vllm import AsyncVLLMClient, RetryPolicy

MODEL = "acting"


@dataclass(frozen=True)
class Refusal:
    """An answer that is an error; with status 0 the connection is closed instead."""

    status: int
    message: str


Tells = Literal["cached tokens", "cached tokens of each", "tokens of each", "times"]
"""What a server may tell: `--enable-prompt-tokens-details`, `--enable-per-request-metrics`; of each: with our patch."""
Answer = Callable[[list[dict[str, Any]]], "str | Refusal | Mapping[str, Any] | Awaitable[str | Refusal]"]
"""From the messages: the text, an error, or a whole message (`{"content": …, "tool_calls": […]}`)."""


def logprob_of(token: int) -> float:
    return -(1 + token % 50) / 64


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def text_of(message: Mapping[str, Any]) -> str:
    """A message's words; its images are left out."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


class ActingServer:
    """`requests` are the bodies so far, `in_flight` how many are being answered, `most` how many there were at once.

    `most_prompts` counts the prompts of completions in the same way.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        token_ids: bool = True,
        logprobs: bool = True,
        most_images: int = 99,
        tokens_of_image: int | None = None,
        model: str = MODEL,
        port: int = 0,
        tells: Tells | None = None,
        takes_lists: bool = True,
    ) -> None:
        self.port = port
        self.answer = answer
        self.prompts_in_flight = self.most_prompts = 0
        self._tells = tells
        self._takes_lists = takes_lists
        self.requests: list[dict[str, Any]] = []
        self.in_flight = self.most = 0
        self._token_ids = token_ids
        self._logprobs = logprobs
        self._most_images = most_images
        self._tokens_of_image = tokens_of_image
        self._model = model
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(HANG_S)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, **options: Any) -> AsyncVLLMClient:
        quick = RetryPolicy(max_lost=2, backoff_initial_s=0.01)
        return AsyncVLLMClient(self.url, None, MODEL, **{"retry": quick, **options})

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANG_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        for path in ("/v1/embeddings", "/classify", "/score", "/pooling"):
            app.router.add_post(path, self._pooled)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        listening = socket.create_server(("127.0.0.1", self.port), backlog=4096)
        await web.SockSite(self._runner, listening, backlog=4096).start()
        self.port = listening.getsockname()[1]

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            images = sum(
                part.get("type") == "image_url"
                for message in body["messages"]
                if isinstance(message["content"], list)
                for part in message["content"]
            )
            if images > self._most_images:
                return self._refuse(
                    Refusal(400, f"At most {self._most_images} image(s) may be provided in one prompt.")
                )
            said = self.answer(body["messages"]) if any(map(text_of, body["messages"])) else "."  # a look ahead
            if isinstance(said, Awaitable):
                said = await said
            return self._refuse(said) if isinstance(said, Refusal) else web.json_response(self._answered(body, said))
        finally:
            self.in_flight -= 1

    async def _completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        prompts = prompts_of(body)
        if len(prompts) > 1 and not self._takes_lists:
            return self._refuse(Refusal(400, "one prompt at a time"))
        self.prompts_in_flight += len(prompts)
        self.most_prompts = max(self.most_prompts, self.prompts_in_flight)
        try:
            said = await asyncio.gather(*map(self._said_to, prompts))
        finally:
            self.prompts_in_flight -= len(prompts)
        for refusal in said:
            if isinstance(refusal, Refusal):
                return self._refuse_or_hang_up(request, refusal)
        return web.json_response(self._completed(body, prompts, said))

    async def _said_to(self, prompt: str | list[int]) -> Any:
        said = self.answer([{"role": "user", "content": text_of_prompt(prompt)}])
        return await said if isinstance(said, Awaitable) else said

    async def _pooled(self, request: web.Request) -> web.Response:
        """The texts' lengths for vectors and scores, whichever route it is."""
        body = await request.json()
        self.requests.append(body)
        prompts = prompts_of(body)
        said = await asyncio.gather(*map(self._said_to, prompts))
        for refusal in said:
            if isinstance(refusal, Refusal):
                return self._refuse_or_hang_up(request, refusal)
        data = []
        for index, text in enumerate(said):
            values = [float(len(text)), float(sum(text.encode()))]
            data.append({"index": index, "embedding": values, "data": values, "probs": values, "score": values[1]})
        counts = [len(text_of_prompt(prompt).encode()) for prompt in prompts]
        usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts), "completion_tokens": 0}
        answer = {"id": f"embd-{uuid.uuid4().hex}", "data": data, "usage": usage}
        told = {"X-Prompt-Tokens": ",".join(map(str, counts))} if self._tells == "tokens of each" else {}
        return web.json_response(answer, headers=told)

    def _refuse_or_hang_up(self, request: web.Request, refusal: Refusal) -> web.Response:
        if not refusal.status and request.transport is not None:
            request.transport.close()
        return self._refuse(Refusal(refusal.status or 500, refusal.message))

    def _completed(self, body: dict[str, Any], prompts: list[Any], said: list[Any]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for prompt, text in zip(prompts, said, strict=True):
            for number in range(body.get("n") or 1):
                ids = ids_of(f"{number}{text}{body.get('seed')}")[: body["max_tokens"]]
                choices.append(completed(len(choices), prompt, ids, body))
        count = sum(len(ids_of(text_of_prompt(prompt))) for prompt in prompts)
        made = sum(len(one["token_ids"]) for one in choices)
        usage: dict[str, Any] = {"prompt_tokens": count, "completion_tokens": made, "total_tokens": count + made}
        usage["prompt_tokens_details"] = None
        if self._tells == "cached tokens of each":
            for choice in choices:
                choice["cached_tokens"] = len(choice["prompt_token_ids"]) // 2
        if self._tells in ("cached tokens", "cached tokens of each"):
            usage["prompt_tokens_details"] = {"cached_tokens": len(text_of_prompt(prompts[-1]).encode()) // 2}
        metrics = {"time_to_first_token_ms": 1.5} if self._tells == "times" and len(choices) == 1 else None
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "model": body["model"]}
        return {**head, "choices": choices, "usage": usage, "metrics": metrics}

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self._tokens_of_image is None:
            return ids_of(prompt)
        words = [ids_of(words) for words in prompt.split("<image>")]
        found = words[0]
        for each in words[1:]:
            found += [IMAGE_TOKEN] * self._tokens_of_image + each
        return found

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self._model, "object": "model"}]})

    @staticmethod
    def _refuse(refusal: Refusal) -> web.Response:
        return web.json_response({"error": {"message": refusal.message, "code": refusal.status}}, status=refusal.status)

    def _answered(self, body: dict[str, Any], said: Any) -> dict[str, Any]:
        message = {"role": "assistant", **({"content": said} if isinstance(said, str) else said)}
        ids = ids_of(message.get("content") or "")
        bound = body.get("max_tokens") or body.get("max_completion_tokens")
        finish = "stop"
        if bound is not None and len(ids) > bound:
            ids, finish = ids[:bound], "length"
            message["content"] = bytes(ids).decode(errors="ignore")
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish}
        if self._token_ids:
            choice["token_ids"] = ids
        if self._logprobs:
            choice["logprobs"] = {
                "content": [
                    {"token": f"token_id:{one}", "logprob": logprob_of(one), "bytes": [one], "top_logprobs": []}
                    for one in ids
                ]
            }
        answer: dict[str, Any] = {"id": "1", "model": body["model"], "choices": [choice]}
        if self._token_ids:
            answer["prompt_token_ids"] = self._prompt_ids(prompt_of(body["messages"]))
        return answer


def prompts_of(body: Mapping[str, Any]) -> list[Any]:
    """The prompts of a body: texts, or lists of ids; pairs are joined."""
    if "text_1" in body:
        pair = [[body[name]] if isinstance(body[name], str) else body[name] for name in ("text_1", "text_2")]
        return [one + other for one, other in zip(*pair, strict=True)]
    prompt = body.get("prompt", body.get("input"))
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def text_of_prompt(prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else bytes(prompt).decode()


def completed(index: int, prompt: str | list[int], ids: list[int], body: Mapping[str, Any]) -> dict[str, Any]:
    """A choice of a completion."""
    choice: dict[str, Any] = {"index": index, "text": bytes(ids).decode(errors="ignore"), "token_ids": ids}
    choice["finish_reason"] = "length" if len(ids) == body["max_tokens"] else "stop"
    choice["prompt_token_ids"] = ids_of(text_of_prompt(prompt))
    if body.get("logprobs") is not None:
        names = [f"token_id:{one}" for one in ids]
        values = [logprob_of(one) for one in ids]
        tops = [{name: value} for name, value in zip(names, values, strict=True)]
        choice["logprobs"] = {"tokens": names, "token_logprobs": values, "top_logprobs": tops}
    if body.get("prompt_logprobs") is not None:
        place = {str(one): {"logprob": logprob_of(one), "rank": 1, "decoded_token": "x"} for one in ids_of("p")}
        choice["prompt_logprobs"] = [None, *[place] * (len(choice["prompt_token_ids"]) - 1)]
    choice["weight_versions"] = [{"version": "v1", "start": 0, "end": len(ids)}]
    return choice


IMAGE_TOKEN = 256
"""Beyond all bytes: stands so many times for each image as `tokens_of_image` says."""


def prompt_of(messages: list[dict[str, Any]]) -> str:
    """What the prompt's ids are made of: roles and words; an image is a mark."""
    marks = [
        "".join("<image>" if part.get("type") == "image_url" else part["text"] for part in message["content"])
        if isinstance(message["content"], list)
        else message["content"]
        for message in messages
    ]
    return json.dumps([[message["role"], mark] for message, mark in zip(messages, marks, strict=True)])


@contextlib.contextmanager
def acting(answer: Answer, **options: Any) -> Iterator[ActingServer]:
    server = ActingServer(answer, **options)
    try:
        yield server
    finally:
        server.close()
