"""The command line, `managed-vllm`: `main` reads the words, runs the command and turns errors into exit codes.

0: done; 1: it failed (the message is on standard error); 2: wrong arguments; 130 and 143: ended by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from managed_vllm.errors import ConfigError, ManagedVLLMError

__all__ = ["main"]


class Terminated(BaseException):
    """SIGTERM arrived (only raised while a command holds a lease, see `serve.terminable`)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. `arguments` are the words after the program's name."""
    from managed_vllm.cli.arguments import build_parser

    parser = build_parser()
    given, rest = parser.parse_known_args(arguments)
    if not hasattr(given, "run"):
        parser.print_help()
        return 0
    if rest and not given.passes_flags:
        given.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    given.rest = rest
    _print_any_path()
    try:
        code: int = given.run(given)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _failed(error, 2)
    except ManagedVLLMError as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    except BrokenPipeError:
        # The reader of our output has closed it. Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ConnectionError, TimeoutError) as error:  # the supervisor went away, or hangs
        return _failed(error, 1)


def _print_any_path() -> None:
    """Paths are printed as they are, also those that are no text: Python refuses to in a UTF-8 locale."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


def _failed(error: Exception, code: int) -> int:
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr)
    return code
