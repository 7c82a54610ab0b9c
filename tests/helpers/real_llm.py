"""A program that runs `vllm.LLM` in a process of its own, for tests/real/test_real_llm.py: JSON in, JSON out.

    python tests/helpers/real_llm.py ORDER ANSWERS

`ORDER` is a file with `{"engine": {engine arguments}, "runs": {name: run}}`; a run is `{"requests": [request, …],
"how": how}`, a request `{"chat": bool, "prompt": text, token ids or messages, "params": {sampling parameters}}`. `how`
is "one" (one after the other), "batch" (one `generate` and one `chat`, each with all of its requests) or "backwards"
(the same in the reverse order, `chat` first: the batches of the steps are composed otherwise). The runs are made in
their order, with one engine, and then the `calls` (see `made`). `ANSWERS` becomes `{name: [output, …]}`, in the order
of the requests; see `plain`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# All attributes of vLLM's `RequestOutput` and `CompletionOutput` (0.32); `run` checks that there are no others.
REQUEST = (
    *("request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished", "metrics"),
    *("lora_request", "encoder_prompt", "encoder_prompt_token_ids", "num_cached_tokens"),
    *("num_cache_creation_tokens", "prompt_token_id_logprobs", "kv_transfer_params", "ec_transfer_params"),
)
COMPLETION = (
    *("index", "text", "token_ids", "cumulative_logprob", "logprobs", "routed_experts", "finish_reason"),
    *("stop_reason", "lora_request", "sampling_mask", "spec_decode_metrics", "weight_versions"),
)


def plain(output: Any) -> dict[str, Any]:
    """What code reads of a `RequestOutput`, vLLM's or ours, for JSON: logprobs as lists of `[id, logprob, rank, text]`.

    `types` has the names of the types of all attributes that vLLM's has, of the output and of its first completion.
    """
    first = output.outputs[0]
    return {
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "prompt_logprobs": _logprobs(output.prompt_logprobs),
        "finished": output.finished,
        "outputs": [
            {
                "index": one.index,
                "text": one.text,
                "token_ids": list(one.token_ids),
                "cumulative_logprob": one.cumulative_logprob,
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
                "finished": one.finished(),
                "logprobs": _logprobs(one.logprobs),
            }
            for one in output.outputs
        ],
        "types": {
            **{name: type(getattr(output, name)).__name__ for name in REQUEST},
            **{f"outputs[0].{name}": type(getattr(first, name)).__name__ for name in COMPLETION},
            **_types_of(output.prompt_logprobs, "prompt_logprobs"),
            **_types_of(first.logprobs, "outputs[0].logprobs"),
        },
    }


def _logprobs(places: Iterable[Mapping[int, Any] | None] | None) -> list[Any] | None:
    if places is None:
        return None
    return [
        None
        if place is None
        else [[token, float(one.logprob), one.rank, one.decoded_token] for token, one in place.items()]
        for place in places
    ]


def _types_of(places: Sequence[Mapping[int, Any] | None] | None, name: str) -> dict[str, str]:
    if not places:
        return {}
    found = {}
    last = places[-1]
    assert last is not None
    token, one = next(iter(last.items()))
    for part, value in ((f"{name}[-1]", last), (f"{name}[-1] keys", token), (f"{name}[-1] values", one)):
        found[part] = type(value).__name__
    for attribute in ("logprob", "rank", "decoded_token"):
        found[f"{name}[-1] values.{attribute}"] = type(getattr(one, attribute)).__name__
    return found


def run(llm: Any, requests: Sequence[Mapping[str, Any]], how: str) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    def ask(indices: Sequence[int], *, chat: bool) -> Iterable[tuple[int, Any]]:
        if not indices:
            return ()
        params = [SamplingParams(**requests[index]["params"]) for index in indices]
        prompts = [requests[index]["prompt"] for index in indices]
        if chat:
            outputs = llm.chat(prompts, params, use_tqdm=False)
        else:
            given = [{"prompt_token_ids": one} if isinstance(one, list) else one for one in prompts]
            outputs = llm.generate(given, params, use_tqdm=False)
        for output in outputs:
            assert set(vars(output)) == set(REQUEST), vars(output)
            assert set(vars(output.outputs[0])) == set(COMPLETION), vars(output.outputs[0])
        return zip(indices, outputs, strict=True)

    found: dict[int, Any] = {}
    if how == "one":
        for index, request in enumerate(requests):
            found.update(ask([index], chat=request["chat"]))
    else:
        step = -1 if how == "backwards" else 1
        for chat in (False, True)[::step]:
            found.update(ask([i for i, one in enumerate(requests) if one["chat"] is chat][::step], chat=chat))
    return [plain(found[index]) for index in range(len(requests))]


def made(llm: Any, setup: str, calls: Sequence[str], names: Mapping[str, Any]) -> list[Any]:
    """What each call, as the source of an expression on `llm`, returns or raises; `setup` is run before them."""
    from functools import partial

    scope = {"llm": llm, "greedy": partial(names["SamplingParams"], temperature=0), **names}
    exec(setup, scope)
    found = []
    for call in calls:
        try:
            found.append(shown(eval(f"llm.{call}", scope)))
        except Exception as error:
            found.append({"raises": [kind.__name__ for kind in type(error).__mro__], "says": str(error)})
    return found


def shown(value: Any) -> Any:
    """What a call returns, for JSON."""
    if isinstance(value, list):
        return [shown(one) for one in value]
    kind = type(value).__name__
    if kind == "RequestOutput":
        found = plain(value)
        del found["types"]
        return found
    if kind == "BeamSearchOutput":
        return [[list(one.tokens), round(one.cum_logprob, 3), one.text] for one in value.sequences]
    if kind == "SamplingParams":
        return {name: getattr(value, name) for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "n")}
    return value


def main(order: Path, answers: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import BeamSearchParams

    wanted = json.loads(order.read_text())
    llm = LLM(**wanted["engine"])
    found: dict[str, Any] = {name: run(llm, one["requests"], one["how"]) for name, one in wanted["runs"].items()}
    names = {"SamplingParams": SamplingParams, "BeamSearchParams": BeamSearchParams}
    found["calls"] = made(llm, wanted["setup"], wanted["calls"], names)
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
