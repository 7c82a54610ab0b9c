"""Which generations of one call go by `/inference/v1/generate`, and how: `ByTokens`.

There are two reasons, and `/v1/completions` is the rule:

1. A field needs it: one of `sampling.ONLY_BY_TOKENS`, or `return_weight_versions=` where the server's `/v1/completions`
   lacks that. Then the servers are asked whether they have the route, and the field; a prompt that is text is made
   token ids by the server first. What does not go there raises an `UnsupportedParameterError` that says why.
2. Nobody wants texts (`detokenize=False`) of a prompt that is token ids. Then it is a little cheaper, and with
   `logprobs` each rank is told. Without these, answers that go together in one request (`completion_groups`) are
   cheaper still. If the route is not there, or refuses, all is as without it.

Cassettes were recorded without the second: with one it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from managed_vllm.errors import AuthenticationError, BadRequestError, UnsupportedParameterError
from managed_vllm.request.attempts import Sender
from managed_vllm.request.http_errors import checked_shape
from managed_vllm.request.outputs import RequestOutput
from managed_vllm.request.pending import JSONRequest
from managed_vllm.request.sampling import ONLY_BY_TOKENS, SamplingParams
from managed_vllm.request.server_routes import is_off
from managed_vllm.request.token_generation import TokenGeneration
from managed_vllm.request.token_outputs import output_of
from managed_vllm.request.token_route import MOST_CANDIDATES, PATH, obstacle

VERSIONS = "return_weight_versions"
_HOW = "start the server with enable_scale_out=True (vLLM 0.29 and later)"


class ByTokens:
    """The part of one call that concerns the route.

    Args:
        sender: sends the requests.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._fields: frozenset[str] = frozenset()
        self._is_there = False
        self._versions = False

    async def take_versions(self, deadline: float | None) -> bool:
        """Whether the route can tell of weight versions, which `/v1/completions` does not; if so, all go by it."""
        self._fields = await self._sender.routes.token_fields(self._sender, deadline)
        self._versions = bool(self._fields)
        return self._versions

    async def look_up(
        self, params: Sequence[SamplingParams | None], prompts: Sequence[Any], deadline: float | None
    ) -> None:
        """Asks the servers for what requests with these parameters may need of them; mostly that is nothing.

        Raises `UnsupportedParameterError` for a field that needs the route where a server lacks either.
        """
        given = [one for one in params if one is not None]
        needed = {name for one in given for name in ONLY_BY_TOKENS.keys() & one.given}
        if needed:
            self._fields = await self._sender.routes.token_fields(self._sender, deadline)
        for name in sorted(needed - self._fields):
            if self._fields:
                raise _unsupported(name, f"needs another vLLM: the server's {PATH} has no such field")
            raise _unsupported(name, f"needs vLLM's {PATH}, which the server does not have: {_HOW}")
        cheaper = not self._sender.one_by_one and any(not one.detokenize for one in given)
        if cheaper and any(not isinstance(prompt, str) for prompt in prompts):
            self._is_there = await self._sender.routes.look_for_tokens(self._sender, deadline)

    def refuse(self, body: Mapping[str, Any], what: str) -> None:
        """Raises `UnsupportedParameterError` for a request that needs the route and is for another one."""
        for name in self._needed(body):
            raise _unsupported(name, f"needs vLLM's {PATH}, by which {what}")

    def _needed(self, body: Mapping[str, Any]) -> list[str]:
        names = [name for name in ONLY_BY_TOKENS if body.get(name) is not None]
        return [*names, VERSIONS] if self._versions else names

    def takes(self, body: Mapping[str, Any], params: SamplingParams | None, grouped: Callable[[], bool]) -> bool:
        """Whether a request in the shape of `/v1/completions` goes by the route.

        `grouped`: whether it would go together with others by `/v1/completions`. Raises `UnsupportedParameterError`.
        """
        if needed := self._needed(body):
            why = self._why_not(body, params)
            if why is not None:
                raise _unsupported(needed[0], f"goes by vLLM's {PATH} only, and {why}")
            return True
        if not self._is_there or params is None or params.detokenize or not isinstance(body.get("prompt"), list):
            return False
        logprobs = body.get("logprobs")
        if logprobs is None and grouped():
            return False
        return (logprobs is None or 0 <= logprobs <= MOST_CANDIDATES) and obstacle(body) is None

    def _why_not(self, body: Mapping[str, Any], params: SamplingParams | None) -> str | None:
        if params is None:
            return "there a request without sampling parameters does not have those of the model: give some"
        if params.detokenize and "output_mode" not in self._fields:
            return "the server's returns no texts: give detokenize=False"
        if params.detokenize and body.get("logprobs"):
            return "candidates come there with ids or with texts: give logprobs=0 or detokenize=False"
        return obstacle(body)

    async def answer(
        self,
        body: Mapping[str, Any],
        params: SamplingParams | None,
        deadline: float | None,
        timeout_s: float | None,
        *,
        stream: bool,
    ) -> RequestOutput | None:
        """The output for one request. None: it must go by `/v1/completions` after all.

        Args:
            body: of the request, in the shape of `/v1/completions`.
            params: its sampling parameters.
            deadline: the call's.
            timeout_s: for the request, from the moment when it is sent.
            stream: whether it is streamed, to be resumed.
        """
        assert params is not None
        prompt = body["prompt"]
        body = await self._with_ids(body, deadline)
        wanted = body.get("logprobs")
        candidates, before = _candidates(wanted), 0
        while True:
            generation = TokenGeneration(body, text=params.detokenize, candidates=candidates, stream=stream)
            try:
                stats = await self._sender.send(generation, deadline, timeout_s=timeout_s)
                break
            except (BadRequestError, AuthenticationError) as error:
                if is_off(error):
                    self._sender.routes.no_tokens_here()
                    self._is_there = False
                if not self._needed(body):
                    return None
                if is_off(error):
                    raise _unsupported(
                        self._needed(body)[0], f"needs vLLM's {PATH}: {_HOW}; {error.message}"
                    ) from error
                if candidates == wanted or "logprobs" not in str(error):
                    raise
                candidates, before = wanted, before + 1
        if not all(one.tells(logprobs=wanted is not None, text=params.detokenize) for one in generation.found.choices):
            self._sender.routes.no_tokens_here()
            self._is_there = False
            if not self._needed(body):
                return None
            raise _unsupported(self._needed(body)[0], f"needs a later vLLM: the server's {PATH} does not tell all")
        text = prompt if isinstance(prompt, str) else None
        with checked_shape(generation.found.raw):
            output = output_of(generation.found, body, stats, prompt=text, wanted=wanted, before=before)
        if self._versions and any(one.weight_versions is None for one in output.outputs):
            raise _unsupported(VERSIONS, "needs a later vLLM: the server does not tell them")
        return output

    async def _with_ids(self, body: Mapping[str, Any], deadline: float | None) -> Mapping[str, Any]:
        prompt = body["prompt"]
        if not isinstance(prompt, str):
            return body
        asked = {name: body[name] for name in ("prompt", "add_special_tokens", "model") if body.get(name) is not None}
        request = JSONRequest("/tokenize", asked, "tokens")
        await self._sender.send(request, deadline)
        with checked_shape(request.answer()):
            return {**body, "prompt": [int(token) for token in request.answer()["tokens"]]}


def _candidates(wanted: int | None) -> int | None:
    """How many to ask for: one more, because the sampled token counts as one of those that come back."""
    return wanted + 1 if wanted is not None and 0 < wanted <= MOST_CANDIDATES else wanted


def _unsupported(name: str, why: str) -> UnsupportedParameterError:
    return UnsupportedParameterError(f"{name}= {why}", field=name)
