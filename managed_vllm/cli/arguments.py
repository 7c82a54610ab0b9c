"""The words of the command line: every command, its options and its help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

import managed_vllm

_KEY_FILE = "a file with the key, or - for standard input: ps does not show it"
_WHICH = "name, id, or the beginning of an id; not needed while one server runs"


def build_parser() -> argparse.ArgumentParser:
    """The parser. The result has `run`, the command's function, unless no command was given."""
    parser = argparse.ArgumentParser(
        prog="managed-vllm",
        description="vLLM servers that start on first use, are shared, watched, and gone with their last user.",
        epilog=_examples(
            "managed-vllm demo                     # three processes share one server of the embedded model",
            "managed-vllm up --model Qwen/Qwen3-0.6B --max-model-len 4096",
            "managed-vllm status",
            "managed-vllm down",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"managed-vllm {managed_vllm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(
        name: str, home: str, about: str, *examples: str, more: str = "", passes_flags: bool = False
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.{more}",
            epilog=_examples(*examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=_lazy(home), parser=made, passes_flags=passes_flags)
        return made

    flags = "\nEvery other flag goes to vLLM as it is, e.g. --max-model-len 4096 --enforce-eager."
    serve = command(
        "serve",
        "managed_vllm.cli.serve:serve",
        "run a server in the foreground until Ctrl-C",
        "managed-vllm serve --model demo",
        "managed-vllm serve --model Qwen/Qwen3-0.6B --port 8000 --api-key secret --max-model-len 4096",
        'managed-vllm serve --model my-model --command "my-server --listen {host}:{port}"',
        more=f" Its log goes to standard output.{flags}",
        passes_flags=True,
    )
    _add_server(serve, keep_alive="0")
    up = command(
        "up",
        "managed_vllm.cli.serve:up",
        "run a server in the background until `managed-vllm down`",
        "managed-vllm up --model demo --name mine",
        "managed-vllm up --model Qwen/Qwen3-0.6B --tensor-parallel-size 2 --no-wait",
        more=f" Attaches to it if it runs already.\n{flags}",
        passes_flags=True,
    )
    _add_server(up, keep_alive="5")
    up.add_argument("--no-wait", action="store_true", help="don't wait until it is ready")
    up.add_argument("--json", action="store_true", help="print the server's status as JSON (without the key)")

    down = command(
        "down",
        "managed_vllm.cli.running:down",
        "stop servers, and remove what dead ones have left",
        "managed-vllm down",
        "managed-vllm down mine --force",
        "managed-vllm down --all",
        more=" A server that others still use is only unpinned: it ends with its last user.",
    )
    down.add_argument("which", nargs="*", metavar="NAME_OR_ID", help=_WHICH)
    down.add_argument("--all", action="store_true", help="all servers of this user, and all that dead ones have left")
    down.add_argument("--force", action="store_true", help="stop it for its other users too")

    restart = command(
        "restart",
        "managed_vllm.cli.serve:restart",
        "stop a server and start it again, for all its users",
        "managed-vllm restart",
        "managed-vllm restart mine        # it reads its model's files anew",
        more=" Returns when it is ready.",
    )
    restart.add_argument("which", nargs="?", metavar="NAME_OR_ID", help=_WHICH)

    engine = command(
        "engine",
        "managed_vllm.cli.engine:show",
        "control a server's engine, for all its users",
        "managed-vllm engine loras",
        "managed-vllm engine load-lora mine checkpoints/lora-7",
        "managed-vllm engine pause --mode wait && managed-vllm engine resume",
        more=" What is asked for is there after a restart, too.",
    )
    _add_engine(engine)

    status = command(
        "status",
        "managed_vllm.cli.running:status",
        "show the servers of this user",
        "managed-vllm status",
        "managed-vllm status mine --show-key",
        "managed-vllm status --json",
        more=" Looking starts and stops nothing.",
    )
    status.add_argument("which", nargs="?", metavar="NAME_OR_ID", help="only this one, with its users")
    status.add_argument("--json", action="store_true", help="print a list of objects")
    status.add_argument("--show-key", action="store_true", help="show the API keys too")

    top = command(
        "top",
        "managed_vllm.cli.top:top",
        "watch the servers of this user: state, users, throughput, cache, memory",
        "managed-vllm top",
        "managed-vllm top --once --interval 5",
        more=" Keys show a log, restart, stop. Looking starts and stops nothing.",
    )
    top.add_argument("--once", action="store_true", help="print one table and end")
    top.add_argument("--json", action="store_true", help="print a list of objects and end")
    top.add_argument("--interval", type=_seconds, default=1.0, metavar="SECONDS", help="between two looks (1)")

    metrics = command(
        "metrics",
        "managed_vllm.cli.metrics:metrics",
        "what all servers and their supervisors tell, for Prometheus",
        "managed-vllm metrics",
        "managed-vllm metrics --serve --port 9464 --api-key-file ~/.metrics-key",
        more=" Looking starts and stops nothing.",
    )
    metrics.add_argument("--serve", action="store_true", help="serve them on loopback until Ctrl-C")
    metrics.add_argument("--port", type=_count, default=9464, metavar="N", help="where; 0: a free one (9464)")
    metrics.add_argument("--api-key", metavar="KEY", help="the key that a scraper needs (a random one, printed)")
    metrics.add_argument("--api-key-file", metavar="FILE", help=_KEY_FILE)

    logs = command(
        "logs",
        "managed_vllm.cli.logs:logs",
        "show a server's log",
        "managed-vllm logs -f",
        "managed-vllm logs mine -n 500",
        "managed-vllm logs --failed           # of the last server that failed",
        more=" With --replicas each has its own; a line then begins with its number.",
    )
    logs.add_argument("which", nargs="?", metavar="NAME_OR_ID", help=_WHICH)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C or until the server is gone")
    logs.add_argument("-n", "--lines", type=_count, default=100, metavar="LINES", help="lines to begin with (100)")
    logs.add_argument("--replica", type=_count, metavar="N", help="only that of this replica, as it is")
    logs.add_argument("--failed", action="store_true", help="the newest log that was kept of a failed server")

    check = command(
        "check",
        "managed_vllm.cli.check:check",
        "test any OpenAI-compatible server: health, models, one answer",
        "managed-vllm check",
        "managed-vllm check http://gpu-box:8000 --api-key secret",
        more=" Exit code 0 if all is well.",
    )
    check.add_argument(
        "url", nargs="?", metavar="URL", help="with or without /v1 (default: VLLM_SERVER_URL, else the running server)"
    )
    check.add_argument("--model", help="the model to ask (default: that of VLLM_MODEL_NAME, else the only one)")
    check.add_argument("--api-key", metavar="KEY", help="default: that of VLLM_API_KEY, or the running server's own")
    check.add_argument("--api-key-file", metavar="FILE", help=_KEY_FILE)
    check.add_argument("--json", action="store_true", help="print one object")
    check.add_argument("--timeout", type=_seconds, default=30.0, metavar="SECONDS", help="for each request (30)")

    doctor = command(
        "doctor",
        "managed_vllm.cli.doctor:doctor",
        "look for what keeps servers from starting on this machine",
        "managed-vllm doctor",
        "managed-vllm doctor --fix            # removes what dead servers have left",
        "managed-vllm doctor --python /opt/vllm/bin/python --json",
        more=" Exit code 1 if something must be\nmended before a server can start.",
    )
    doctor.add_argument("--python", metavar="PATH", help="the interpreter that runs vLLM (default: this one)")
    doctor.add_argument("--fix", action="store_true", help="take care of what is ours alone: strays, what they left")
    doctor.add_argument("--offline", action="store_true", help="don't ask for the model hub")
    doctor.add_argument("--json", action="store_true", help="print a list of objects")

    rollout = command(
        "rollout",
        "managed_vllm.cli.rollout:rollout",
        "play tasks × n rollouts of an environment, into a run's folder",
        "managed-vllm rollout --env desktop --tasks 64 --n 4 --out runs/desktop",
        "managed-vllm rollout --env miniwob:click-test-2 --tasks 20 --out runs/click --model my/vlm",
        "managed-vllm rollout --env openenv:http://127.0.0.1:8000 --tasks 20 --out runs/grid --model my/llm",
        "managed-vllm rollout --env my.module:make --tasks tasks.jsonl --out runs/mine",
        more=" The same command goes on with what is missing or\n"
        f"failed. The server is found (VLLM_SERVER_URL, too) or started as `up` does it.\n{flags}",
        passes_flags=True,
    )
    _add_rollout(rollout)
    _add_server(rollout, keep_alive="5", env="--server-env")

    view = command(
        "view",
        "managed_vllm.cli.runs:view",
        "write a recorded run as one HTML file, and sum it up; or serve it, live",
        "managed-vllm view runs/monday",
        "managed-vllm view runs/monday --out monday.html --open",
        "managed-vllm view runs/monday --serve      # of any size, while it goes on",
        "managed-vllm view runs/tuesday --against runs/monday --open",
        more=" A run that still goes on is shown as far as it is.",
    )
    view.add_argument("folder", metavar="RUN", help="the run's folder")
    view.add_argument("--out", metavar="FILE", help="the HTML file (view.html in the run's folder)")
    view.add_argument("--serve", action="store_true", help="serve it on loopback, page by page and live, until Ctrl-C")
    view.add_argument("--port", type=_count, default=0, metavar="N", help="where to serve it (a free one)")
    view.add_argument("--against", metavar="RUN", help="another run, to compare the tasks with")
    view.add_argument("--open", action="store_true", help="open it in the browser")
    view.add_argument("--title", help="of the page (the folder's name)")
    view.add_argument("--by", choices=("task", "kind"), default="kind", help="what makes a line of the summary (kind)")
    view.add_argument(
        "--success-at", type=float, default=0.5, metavar="REWARD", help="from which reward on it is a success (0.5)"
    )
    view.add_argument(
        "--max-mb",
        type=_count,
        default=200,
        metavar="N",
        help="megabytes of images in the page itself; of more than that all are files in a folder beside it (200)",
    )

    export = command(
        "export",
        "managed_vllm.cli.runs:export",
        "write a recorded run in the format of a trainer: verl, SkyRL; as ATIF; or as OSWorld's own results",
        "managed-vllm export runs/monday --to verl --out data/monday",
        "managed-vllm export runs/monday --to atif --include all --out shared/monday",
        more="\nToken ids and logprobs are the server's own; what is left out is counted. The folder is there whole, "
        "or not at all.",
    )
    export.add_argument("folder", metavar="RUN", help="the run's folder")
    export.add_argument("--to", required=True, choices=("verl", "skyrl", "atif", "dart", "osworld"), help="the format")
    export.add_argument("--out", required=True, metavar="DIR", help="a folder that is not there yet, or empty")
    export.add_argument(
        "--per", choices=("step", "trajectory"), default="step", help="what is a sample, not for atif (step)"
    )
    export.add_argument(
        "--logprobs",
        action=argparse.BooleanOptionalAction,
        help="they must be there, or are left out (must be there; for atif as they are)",
    )
    export.add_argument(
        "--include",
        choices=("rewarded", "ok", "all"),
        default="rewarded",
        help="attempts that are ok and have a reward; also those without; also failed ones, for atif, dart, osworld "
        "(rewarded)",
    )

    for reads in (view, export):
        reads.add_argument("--score", metavar="NAME", help="in the rewards' place: a score that `rescore` has made")

    rescore = command(
        "rescore",
        "managed_vllm.cli.runs:rescore",
        "score a recorded run anew, by a reward function of your own",
        "managed-vllm rescore runs/monday --reward my.rewards:short_answers",
        "managed-vllm view runs/monday --score short_answers",
        "managed-vllm export runs/monday --score short_answers --to verl --out data/monday",
        more=" The function, which may be\n`async`, is called with each trajectory, and returns a number, or a number "
        "and details. The score\nis kept beside the run's rewards; the run stays as it is. The same command goes on "
        "with what is\nmissing.",
    )
    rescore.add_argument("folder", metavar="RUN", help="the run's folder")
    rescore.add_argument("--reward", required=True, metavar="MODULE:FUNCTION", help="also of the current folder")
    rescore.add_argument("--name", help="of the score (the function's)")
    rescore.add_argument("--overwrite", action="store_true", help="replace a score of that name")
    rescore.add_argument(
        "--max-concurrency", type=_positive, default=8, metavar="N", help="trajectories at once, of an async one (8)"
    )
    rescore.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="SECONDS", help="for one trajectory, of an async one (600)"
    )
    rescore.add_argument(
        "--success-at", type=float, default=0.5, metavar="REWARD", help="from which score on it is a success (0.5)"
    )

    demo = command(
        "demo",
        "managed_vllm.cli.demo:show",
        "show the whole thing: several processes share one server of the embedded model, which plays a desktop",
        "managed-vllm demo",
        "managed-vllm demo --workers 5 --screens 20 --tasks 100 --n 4 --out runs/demo",
    )
    demo.add_argument("--workers", type=_count, default=3, metavar="N", help="worker processes, at least 3 (3)")
    demo.add_argument("--screens", type=_count, default=8, metavar="N", help="screens for each worker (8)")
    demo.add_argument("--tasks", type=_positive, default=48, metavar="N", help="tasks of the embedded desktop (48)")
    demo.add_argument("--n", type=_positive, default=2, metavar="N", help="rollouts of each (2)")
    demo.add_argument("--out", default="demo-run", metavar="RUN", help="folder of the rollouts, made anew (demo-run)")
    demo.add_argument("--seed", type=int, default=0, help="of the random screens and tasks (0)")
    demo.add_argument("--command", help=argparse.SUPPRESS)
    demo.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", metavar="NAME_OR_ID", help=_WHICH)
    parser.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="for the call (60; update-weights: 600)")
    calls = parser.add_subparsers(title="calls", metavar="CALL")

    def call(name: str, about: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = calls.add_parser(
            name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False
        )
        made.set_defaults(run=_lazy("managed_vllm.cli.engine:call"), call=name.replace("-", "_"))
        return made

    modes = ("keep", "wait", "abort")
    call("pause", "let nothing be generated until `resume`").add_argument(
        "--mode",
        choices=modes,
        default="keep",
        help="what is in flight goes on later, is finished first, or is cut (keep)",
    )
    call("resume", "end a pause")
    sleep = call("sleep", "give the GPU's memory back until `wake`")
    sleep.add_argument("--level", type=int, choices=(0, 1, 2), default=1, help="2 discards the weights, too (1)")
    sleep.add_argument("--mode", choices=modes, default="keep", help="as for pause (keep)")
    call("wake", "end a sleep").add_argument("--tags", nargs="+", metavar="PART", help="only weights, or kv_cache")
    call("loras", "list the LoRA adapters")
    load = call("load-lora", "load a LoRA adapter, whose name is then a model's")
    load.add_argument("name", metavar="NAME")
    load.add_argument("path", metavar="FOLDER")
    load.add_argument("--replace", action="store_true", help="in place of the adapter of that name")
    call("unload-lora", "take a LoRA adapter away").add_argument("name", metavar="NAME")
    call("weights", "show which weights are served")
    update = call("update-weights", "take the weights of another checkpoint of the same model, or leave all as it was")
    update.add_argument("path", metavar="CHECKPOINT", help="its folder, or a hub id that is in the local cache")
    update.add_argument("--version", metavar="TEXT", help="what they are called from then on (the folder's name)")
    update.add_argument("--expect", dest="checksum", metavar="CHECKSUM", help="what they must have")
    update.add_argument(
        "--on-update",
        choices=("finish", "restart", "continue"),
        default="finish",
        help="requests in flight are finished first, begin anew, or go on with the new weights (finish)",
    )
    update.add_argument("--rolling", action="store_true", help="one replica after the other, so that the others answer")


def _add_rollout(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to play")
    what.add_argument(
        "--env",
        dest="environment",
        required=True,
        metavar="NAME",
        help="desktop, miniwob:TASK, openenv:URL or package.module:function",
    )
    what.add_argument(
        "--tasks",
        required=True,
        metavar="N|FILE",
        help="how many, or a file of tasks (JSON lines; OSWorld's test_all.json)",
    )
    what.add_argument("--n", type=_positive, default=1, metavar="N", help="rollouts a task (1)")
    what.add_argument("--reward", metavar="MODULE:FUNCTION", help="says the reward of each (the environment's)")
    what.add_argument("--out", required=True, metavar="RUN", help="the run's folder; one that is there is gone on with")
    what.add_argument("--seed", type=int, default=0, help="of the tasks (0)")
    what.add_argument(
        "--force",
        action="store_true",
        help="go on with a run that was made otherwise (another model, prompt, task …): its finished rollouts stay",
    )
    what.add_argument(
        "--join",
        action="store_true",
        help="share the run with other processes that play it, also on other hosts: each plays what no other one does",
    )
    what.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else")
    how = parser.add_argument_group("how")
    how.add_argument("--max-concurrency", type=_positive, default=16, metavar="N", help="environments at once (16)")
    how.add_argument("--max-attempts", type=_positive, default=3, metavar="N", help="at a rollout that fails (3)")
    how.add_argument("--max-steps", type=_positive, default=15, metavar="N", help="turns of an episode (15)")
    how.add_argument("--max-images", type=_count, default=5, metavar="N", help="newest images in the prompt (5)")
    how.add_argument("--max-tokens", type=_positive, default=512, metavar="N", help="of one answer (512)")
    how.add_argument("--step-timeout", type=_seconds, default=60.0, metavar="SECONDS", help="for one action (60)")
    how.add_argument("--episode-timeout", type=_seconds, metavar="SECONDS", help="for a whole episode (no bound)")
    how.add_argument("--temperature", type=float, default=1.0, help="of sampling (1.0)")
    how.add_argument(
        "--no-exact",
        dest="exact",
        action="store_false",
        help="evaluate on a server that tells no token ids or logprobs; such rollouts can't be exported to trainers",
    )
    how.add_argument("--sampling", metavar="JSON", help="further sampling parameters, as a JSON object")
    how.add_argument(
        "--format",
        metavar="NAME",
        help="how the model is spoken to: ui-tars, qwen3-vl, qwen3-vl-mobile, qwen2.5-vl, opencua, python (pyautogui's "
        "calls), glm-v, autoglm, ui-tars-2, seed, scalecua, scalecua-mobile, holo1.5, holo3, holo3.1 (tool calls), "
        "android-world, gemini, openai, claude (tool calls in their shapes), json, tools, embedded (what fits the "
        "environment and the model)",
    )
    how.add_argument(
        "--coordinates",
        choices=("resized", "relative1000", "relative1", "absolute"),
        help="what the model's numbers are (those of the format)",
    )
    how.add_argument(
        "--retries", type=_count, default=0, metavar="N", help="answers that are sent back as no action, an episode (0)"
    )


_TIME_LIMITS = (
    ("--startup-timeout", 3600.0, "until a start has failed"),
    ("--startup-silence", 600.0, "without any sign of life until a start has failed"),
    ("--first-request-timeout", 300.0, "for the token that proves it ready; it may compile kernels"),
    ("--stop-grace", 5.0, "between SIGTERM and SIGKILL; what is beyond 5 is left to requests in flight"),
    ("--gpu-release-timeout", 30.0, "until the driver must have given an ended server's memory back"),
    ("--wait-for-devices", 3600.0, "to wait in line for devices, with --devices auto"),
)


def _add_server(parser: argparse.ArgumentParser, *, keep_alive: str, env: str = "--env") -> None:
    model = parser.add_argument_group("what to serve")
    model.add_argument("--model", help="Hugging Face id, local folder, or demo")
    model.add_argument("--tensor-parallel-size", "-tp", type=int, metavar="N", help="GPUs for each layer")
    model.add_argument(
        "--gpu-memory-utilization", type=float, metavar="SHARE", help="share of the GPU's memory, 0 to 1"
    )
    model.add_argument(
        "--replicas",
        type=_positive,
        default=1,
        metavar="N",
        help="so many servers of it, as one, each with its own GPUs (1)",
    )
    model.add_argument("--share", choices=("sleep",), help="give them to others while nobody uses the server")
    model.add_argument("--devices", choices=("auto",), help="take free GPUs, or cores, and wait in line for them")
    model.add_argument(
        "--cores", type=_positive, metavar="N", help="for each Worker on a CPU, with --devices auto (all)"
    )
    model.add_argument(
        env,
        dest="env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable for it; repeatable",
    )
    model.add_argument("--python", metavar="PATH", help="another interpreter whose vLLM to run")
    model.add_argument(
        "--command",
        metavar='"WORDS…"',
        help="another program to run, with {host}, {port}, {model}, {name}, {uds} or {args}",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--host", help="address to listen on (127.0.0.1); others need --api-key")
    where.add_argument("--port", type=int, help="TCP port (a free one)")
    where.add_argument("--uds", action="store_true", help="listen on a Unix socket, no TCP at all")
    where.add_argument("--api-key", metavar="KEY", help="the key that clients need (a random one)")
    where.add_argument("--api-key-file", metavar="FILE", help=_KEY_FILE)
    life = parser.add_argument_group("life")
    life.add_argument("--name", help="a readable handle")
    life.add_argument(
        "--keep-alive",
        type=float,
        default=None if keep_alive == "5" else float(keep_alive),
        metavar="SECONDS",
        help=f"how long it outlives its last user ({keep_alive})",
    )
    for name, default, meaning in _TIME_LIMITS:
        life.add_argument(name, type=float, default=default, metavar="SECONDS", help=f"{meaning} ({default:g})")
    life.add_argument(
        "--idle-sleep",
        type=float,
        metavar="SECONDS",
        help="without a request until the engine sleeps, on GPUs; the next request wakes it (never)",
    )
    life.add_argument(
        "--warm",
        choices=("auto", "on", "off"),
        help="fork it from a process that has vLLM's imports done: where that is safe (auto), always, or never",
    )
    life.add_argument(
        "--for-training", action="store_true", help="with what a trainer needs that drives it by vLLM's own routes"
    )


def _lazy(home: str) -> Callable[[argparse.Namespace], int]:
    """The function at `module:name`, imported only when it runs: `--help` is there at once."""

    def run(given: argparse.Namespace) -> int:
        module, _, name = home.partition(":")
        code: int = getattr(import_module(module), name)(given)
        return code

    return run


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def _count(word: str) -> int:
    number = int(word)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{word} is negative")
    return number


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} must be 1 or more")
    return number


def _seconds(word: str) -> float:
    number = float(word)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{word} is no duration")
    return number
