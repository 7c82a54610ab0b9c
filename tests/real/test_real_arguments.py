"""Our canonical form of engine arguments against vLLM's own parser, without starting a server."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from argument_spellings import SAME

from managed_vllm import engine_arguments
from managed_vllm.config import installed_vllm
from managed_vllm.engine_arguments import canonical, from_flags, to_flags, without_defaults

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(installed_vllm() == "vllm missing", reason="vllm is not installed"),
]

PARSE = """
import json, sys
try:
    from vllm.entrypoints.common.cli_args import make_arg_parser  # 0.33
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())

def parsed(words):
    try:
        return {name: repr(value) for name, value in vars(parser.parse_args(["--model=m", *words])).items()}
    except SystemExit:
        return None

def plain(value):
    return value if isinstance(value, bool | int | float | str | None) else repr(value)

actions = {
    action.dest: {
        "flags": action.option_strings,
        "default": plain(action.default),
        "type": getattr(action.type, "__qualname__", str(action.type)),
        "kind": type(action).__name__,
    }
    for action in parser._actions
}
asked = json.load(sys.stdin)
print(json.dumps({"actions": actions, "parsed": [parsed(words) for words in asked]}))
"""


EXAMPLES = """
from dataclasses import asdict
import huggingface_hub
from vllm import EngineArgs
from vllm.config import StructuredOutputsConfig
from vllm.utils.argparse_utils import FlexibleArgumentParser
from managed_vllm import ManagedVLLM

parser = FlexibleArgumentParser()
EngineArgs.add_cli_args(parser)
parser.set_defaults(model="demo")

def asked(given):
    return given._settings.attach.spec

plain = asked(ManagedVLLM("demo"))
assert asked(ManagedVLLM(**vars(parser.parse_args([])))) == plain
assert asked(ManagedVLLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args([])))) == plain
short = asked(ManagedVLLM(**vars(parser.parse_args(["--max-model-len", "256", "--runner", "pooling"]))))
assert asked(ManagedVLLM(**asdict(EngineArgs("demo")))) == plain
assert asked(ManagedVLLM(**asdict(EngineArgs("demo", max_model_len=256, runner="pooling")))) == short
assert short == asked(ManagedVLLM("demo", max_model_len=256, runner="pooling"))
compact = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
assert asked(ManagedVLLM("demo", structured_outputs_config=compact)) == asked(
    ManagedVLLM("demo", structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True})
)
elsewhere = ManagedVLLM(base_url="http://127.0.0.1:1", **vars(parser.parse_args([])))
assert elsewhere._settings.attach.spec is None
huggingface_hub.constants.HF_HUB_OFFLINE = True  # and vLLM's default model is nowhere
assert asked(ManagedVLLM(**vars(parser.parse_args([])))) == asked(ManagedVLLM("demo"))
print("the same")
"""


def test_all_arguments_of_vllms_parser_ask_for_what_differs_from_its_defaults() -> None:
    """`LLM(**vars(args))`, as vLLM's own examples have it, and `from_engine_args`."""
    run = subprocess.run([sys.executable, "-c", EXAMPLES], capture_output=True, text=True, timeout=300)
    assert run.stdout.endswith("the same\n"), run.stderr[-3000:]


def ask_vllm(*asked: list[str]) -> dict[str, Any]:
    """vLLM's table of flags, and what its parser makes of each list of words (None: refused)."""
    found = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(asked), capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-2000:]
    told: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def vllm() -> dict[str, Any]:
    """What vLLM's parser makes of each spelling, in their order: the words themselves, and our flags for them."""
    asked: list[list[str]] = []
    for spellings in known_spellings():
        for spelling in spellings:
            arguments = from_flags(spelling) if isinstance(spelling, list) else canonical(spelling)
            asked += [spelling if isinstance(spelling, list) else to_flags(arguments), to_flags(arguments)]
    return ask_vllm(*asked)


def known_spellings() -> list[tuple[list[str] | dict[str, Any], ...]]:
    """Those of arguments that vLLM has."""
    return [spellings for spellings in SAME if "--a.b.c" not in spellings[0]]


def test_vllm_reads_our_flags_as_it_reads_the_words_themselves(vllm: dict[str, Any]) -> None:
    parsed = iter(vllm["parsed"])
    for spellings in known_spellings():
        forms = [(next(parsed), next(parsed)) for _ in spellings]
        for spelling, (theirs, ours) in zip(spellings, forms, strict=True):
            assert theirs is not None, spelling
            assert ours == theirs, spelling
            assert theirs == forms[0][0], f"{spelling} is not {spellings[0]} to vLLM"


def test_vllm_tells_apart_what_we_tell_apart(vllm: dict[str, Any]) -> None:
    parsed, both = list(vllm["parsed"]), set()
    for spellings in known_spellings():
        first, theirs, parsed = spellings[0], parsed[0], parsed[2 * len(spellings) :]
        ours = without_defaults(from_flags(first) if isinstance(first, list) else canonical(first))
        both.add((json.dumps(ours, sort_keys=True), json.dumps(theirs, sort_keys=True)))
    assert len(both) == len({ours for ours, _ in both}) == len({theirs for _, theirs in both})


def test_our_tables_are_those_of_vllms_parser(vllm: dict[str, Any]) -> None:
    actions = vllm["actions"]
    short = {
        flag: name
        for name, action in actions.items()
        for flag in action["flags"]
        if flag.startswith("-") and not flag.startswith("--") and flag != "-h"
    }
    ours = dict(engine_arguments.SHORT_FLAGS)
    assert ours.pop("-O") == "optimization_level"  # the parser rewrites it by hand
    assert ours == short
    wrong = {
        name: (default, actions[name]["default"])
        for name, default in engine_arguments.DEFAULTS.items()
        if actions[name]["default"] != default
    }
    assert wrong == {}
    objects = {"default_chat_template_kwargs", "reasoning_effort_map"}  # the latter since 0.33; dicts need no table
    assert {n for n, a in actions.items() if a["type"] == "loads"} - objects == set(engine_arguments.JSON_LISTS)
    assert {n for n, a in actions.items() if a["type"] == "float"} <= engine_arguments.DECIMALS
    assert {n for n, a in actions.items() if a["type"].startswith("human_readable_int")} <= (
        engine_arguments.SCALED_NUMBERS
    )
    assert {n for n, a in actions.items() if a["kind"] == "_StoreTrueAction"} | {"hf_token"} == (
        engine_arguments.ONLY_TRUE
    )
