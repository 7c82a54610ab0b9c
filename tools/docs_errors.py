"""Writes the generated parts of docs/errors.md: each cause of a failed start, and the tree of exceptions.

    python tools/docs_errors.py            brings the page up to date
    python tools/docs_errors.py --check    only says whether it is: exit status 1 if not

The tables come from `managed_vllm.status`, `managed_vllm.server.failure_rules` and `managed_vllm.errors`, so that the
page can't say anything else than the code. What stands outside of the two markers is written by hand and left alone.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from generated_page import main, table, with_parts

from managed_vllm import errors
from managed_vllm.server import diagnosis, failure_rules
from managed_vllm.status import Cause, Diagnosis, Progress, Stage

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"


def causes() -> str:
    """One row per cause: what it means, the error, what to do about it, and whether it is retried."""
    meanings = _attribute_docstrings(Cause)
    rows = []
    for cause in Cause:
        remedies, retried = [], set()
        for remedy, is_retried in _remedies(cause):
            if remedy and remedy not in remedies:
                remedies.append(remedy)
            retried.add(is_retried)
        if not remedies:
            raise ValueError(f"what is to be done about {cause}? No rule has it; give an example in _remedies")
        error = errors.error_for(Diagnosis(cause, ""), instance=None, log_path=None)
        answer = retried.pop() if len(retried) == 1 else "depends"
        names = f"`{cause}`<br>`{type(error).__name__}`"
        rows.append((names, meanings[cause.name], "<br>".join(remedies), answer))
    return _table(("`diagnosis.cause`, error", "What it means", "What to do", "Restarted?"), rows)


def tree() -> str:
    """Every exception, indented below the one that it derives from. By four blanks, as Python-Markdown wants it."""
    found = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)]
    ours = [kind for kind in found if kind.__module__ == errors.__name__]

    def below(parent: type[Exception], depth: int) -> Iterator[str]:
        for kind in ours:
            if kind.__bases__[0] is parent:
                others = [f"`{base.__name__}`" for base in kind.__bases__[1:]]
                also = f" (also {', '.join(others)})" if others else ""
                first = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
                yield f"{'    ' * depth}- `{kind.__name__}`{also}: {first}"
                yield from below(kind, depth + 1)

    return "\n".join(below(Exception, 0))


def updated(page: str) -> str:
    """The page with its generated parts made anew. Raises `ValueError` where a marker is missing."""
    return with_parts(page, {"causes": causes(), "tree": tree()})


def _remedies(cause: Cause) -> Iterator[tuple[str, str]]:
    """(what to do, is it retried) for each way in which the cause is found out."""
    for rule in (*failure_rules.RULES, *failure_rules.DEATHS, *failure_rules.FIRST_REQUEST):
        if rule.cause is cause:
            yield rule.remedy, "depends" if callable(rule.permanent) else _retried(rule.permanent)
    # These come from functions, not from a table: for each of them an example.
    stage = Progress(Stage.LOADING)
    killed = diagnosis.diagnose([], returncode=-9)
    for example in (
        killed,
        diagnosis.diagnose([], returncode=-7),
        diagnosis.diagnose([], returncode=-11),
        diagnosis.diagnose([], returncode=1),
        diagnosis.diagnose([], returncode=127),
        diagnosis.diagnose_first_request(None, ""),
        diagnosis.timed_out(stage, limit_s=0, silent=False),
        diagnosis.timed_out(stage, limit_s=0, silent=True),
        diagnosis.crash_loop(killed, restarts=0, window_s=0),
        diagnosis.not_forked(""),
        diagnosis.devices_busy(1, (), wanted="", waited_s=0),
        diagnosis.no_places(""),
        diagnosis.engine_not_restored("", permanent=True),
        diagnosis.weights_lost(""),
        *(diagnosis.unwell(unwell, "") for unwell in diagnosis._UNWELL),
    ):
        if example.cause is cause:
            if cause is Cause.CRASH_LOOP:
                yield "what the last crash asks for: `diagnosis.facts['last_cause']` names it", "no"
            elif cause in (Cause.STARTUP_TIMEOUT, Cause.STARTUP_SILENCE) and "stage" in example.facts:
                keyword = cause.value
                yield (
                    f"raise {keyword}=, or look into what the stage that it had reached is waiting for",
                    _retried(example.permanent),
                )
            else:
                yield example.remedy, _retried(example.permanent)


def _retried(permanent: bool) -> str:
    return "no" if permanent else "yes"


def _attribute_docstrings(kind: type[object]) -> dict[str, str]:
    """The string below each member of a class."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for member, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(member, ast.Assign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(member.targets[0], ast.Name)
            found[member.targets[0].id] = inspect.cleandoc(str(below.value.value)).replace("\n", " ")
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(head, [[re.sub(r"\{(\w+)\}", r"‹\1›", cell) for cell in row] for row in rows])


if __name__ == "__main__":
    sys.exit(main(PAGE, Path(__file__).name, updated, __doc__))
