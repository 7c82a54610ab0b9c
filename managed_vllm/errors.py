"""Every exception of the library, in one tree; in brackets, the built-in classes that some also derive from.

    ManagedVLLMError
      ConfigError (ValueError)
        ConfigMismatchError
      StateDirectoryError (OSError)
      NoServerError (LookupError)
      ExternalServerError
        ServerUnreachableError (ConnectionError)
        ModelNotServedError
      ServerError
        SupervisorError
        OtherNetworkError (ConnectionError)
        ServerStoppedError
        EngineControlError
          EngineUnsupportedError
          EngineTimeoutError (TimeoutError)
          EngineLostError (ConnectionError)
          BadWeightsError (ValueError)
          CheckpointError (ValueError)
        StartupError
          ModelUnavailableError
          BrokenModelError
          EngineArgumentError
          AddressError
          OutOfMemoryError
          DeviceError
            DevicesBusyError (TimeoutError)
          LaunchError
          EngineDiedError
          WeightsLostError
          StartupTimeoutError (TimeoutError)
      RequestError
        BadRequestError (ValueError)
          UnsupportedParameterError
          ContextLengthError
          ModelNotFoundError (LookupError)
        AuthenticationError
        ServerBusyError
        ServerDiedError (ConnectionError)
          DeadlyRequestError
        RequestTimeoutError (TimeoutError)
        CassetteMissError (LookupError)
      UnsupportedMethodError (AttributeError)
      EnvironmentFailedError
        EnvironmentTimeoutError (TimeoutError)
        EnvironmentRaisedError
        EnvironmentDiedError
      RolloutsFailedError
      ScoringFailedError
      ActionParseError (ValueError)
      RunStoreError
      ExportError (ValueError)
      CassetteError
        CassetteMismatchError

Each error says what happened, to which server, where its log is and what to do next, and carries the same facts as
attributes so that a program can decide too. Errors cross process boundaries (the control channel, multiprocessing,
pytest-xdist), so every one of them pickles: positional arguments are never needed to rebuild it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from managed_vllm.status import Cause, CheckpointFault, Diagnosis


class ManagedVLLMError(Exception):
    """Root of the tree. `instance` is the server's short id, `log_path` its log; both are None where there is none.

    `results` is set where a batch of requests failed in part: one item each, in input order, a `RequestOutput` or the
    error.
    """

    results: list[Any] | None = None

    def __init__(self, message: str, *, instance: str | None = None, log_path: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.instance = instance
        self.log_path = log_path

    def __str__(self) -> str:
        parts = [self.message]
        if self.instance:
            parts.append(f"  server: {self.instance}")
        if self.log_path:
            parts.append(f"  log:    {self.log_path}")
        return "\n".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))


def _rebuild(cls: type[ManagedVLLMError], args: tuple[Any, ...], state: dict[str, Any]) -> ManagedVLLMError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


# -- what was asked for ------------------------------------------------------------------------------------------------


class ConfigError(ManagedVLLMError, ValueError):
    """An argument is wrong by itself, known before anything was started. `field` names it where one is to blame."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigMismatchError(ConfigError):
    """A server is running, but it is not what was asked for: arguments, address, or files that changed meanwhile.

    `differences` maps each differing field, or file, to `(asked for, running)`; secrets are stars.
    """

    def __init__(
        self, message: str, *, differences: Mapping[str, tuple[Any, Any]], instance: str | None = None
    ) -> None:
        lines = [message] + [
            f"  {name}: asked for {asked!r}, running with {running!r}"
            for name, (asked, running) in sorted(differences.items())
        ]
        super().__init__("\n".join(lines))
        self.differences = dict(differences)
        self.instance = instance


class StateDirectoryError(ManagedVLLMError, OSError):
    """The state directory can't be used: not ours, wrong mode, read-only, or the disk is full. `path` names it."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


# -- finding a server --------------------------------------------------------------------------------------------------


class NoServerError(ManagedVLLMError, LookupError):
    """`ManagedVLLM()` without a model found no single server to attach to. `candidates` lists those running."""

    def __init__(self, message: str, *, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.candidates = candidates


class ExternalServerError(ManagedVLLMError):
    """A server given by `base_url=` or `VLLM_SERVER_URL` can't be used. `base_url` is what was tried."""

    def __init__(self, message: str, *, base_url: str) -> None:
        super().__init__(message)
        self.base_url = base_url


class ServerUnreachableError(ExternalServerError, ConnectionError):
    """Nothing answers at the URL, or what answers does not speak the OpenAI API."""


class ModelNotServedError(ExternalServerError):
    """The server does not serve the model asked for. `served` lists what it does serve."""

    def __init__(self, message: str, *, base_url: str, served: tuple[str, ...]) -> None:
        super().__init__(message, base_url=base_url)
        self.served = served


# -- a server of ours --------------------------------------------------------------------------------------------------


class ServerError(ManagedVLLMError):
    """A server that we supervise failed."""


class SupervisorError(ServerError):
    """The supervisor process could not be started or reached."""


class OtherNetworkError(ServerError, ConnectionError):
    """The server listens on TCP in another network namespace than ours; `uds=True` works across them."""


class ServerStoppedError(ServerError):
    """The server was stopped (`managed-vllm down --force`, a signal to its supervisor) while this user held it."""


class EngineControlError(ServerError):
    """A call of `llm.engine` failed, and the engine is as it was before.

    `call` is the method's name, `status` the HTTP status that the server answered with, None where there is none.
    """

    def __init__(self, message: str, *, call: str, status: int | None = None, instance: str | None = None) -> None:
        super().__init__(message, instance=instance)
        self.call = call
        self.status = status


class EngineUnsupportedError(EngineControlError):
    """The server can't do that. The message says why, and what it would have to be started with."""


class EngineTimeoutError(EngineControlError, TimeoutError):
    """The call was not done within its time."""


class EngineLostError(EngineControlError, ConnectionError):
    """The server or its supervisor ended in the middle of the call, or within `with llm.engine.paused()`."""


class BadWeightsError(EngineControlError, ValueError):
    """Weights that a trainer sent can't be served: not finite, not all there, other shapes. Those before serve on."""


ENGINE_ERRORS: Mapping[str, type[EngineControlError]] = {
    kind.__name__: kind for kind in (EngineUnsupportedError, EngineTimeoutError, EngineLostError, BadWeightsError)
}
"""By the names under which the control channel carries them."""


class CheckpointError(EngineControlError, ValueError):
    """A checkpoint (`path`) can't take the place of the weights that are served, and these serve on.

    `faults` has all that speaks against it: `CheckpointFault`s, each with `text` and `remedy`.
    """

    def __init__(self, path: str, faults: tuple[CheckpointFault, ...], *, instance: str | None = None) -> None:
        lines = [f"the checkpoint {path} can't be loaded into this server"]
        for fault in faults:
            lines += [f"  - {fault.text}", *([f"    remedy: {fault.remedy}"] if fault.remedy else [])]
        super().__init__("\n".join(lines), call="update_weights", instance=instance)
        self.path = path
        self.faults = faults

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, for the control channel."""
        return {"path": self.path, "faults": [[fault.text, fault.remedy] for fault in self.faults]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CheckpointError:
        """The inverse of `to_dict`."""
        return cls(str(data["path"]), tuple(CheckpointFault(text, remedy) for text, remedy in data["faults"]))


class StartupError(ServerError):
    """The server could not be started, or not be restarted. `diagnosis` says why and what to do.

    The subclasses group the causes by what the remedy touches; `diagnosis.cause` is the exact one.
    """

    def __init__(self, diagnosis: Diagnosis, *, instance: str | None = None, log_path: str | None = None) -> None:
        lines = [diagnosis.summary]
        if diagnosis.root_line:
            lines.append(f"  vLLM:   {diagnosis.root_line}")
        if diagnosis.remedy:
            lines.append(f"  remedy: {diagnosis.remedy}")
        super().__init__("\n".join(lines), instance=instance, log_path=log_path)
        self.diagnosis = diagnosis

    def __str__(self) -> str:
        return f"{super().__str__()}\n  doctor: managed-vllm doctor looks for what is wrong with this machine"


class ModelUnavailableError(StartupError):
    """The model can't be had: no such path or id, offline, gated, or a folder without a config."""


class BrokenModelError(StartupError):
    """The model was found but can't be run: damaged weights, no weights, unknown architecture, no tokenizer."""


class EngineArgumentError(StartupError):
    """vLLM refuses an argument, or arguments don't fit the model or each other."""


class AddressError(StartupError):
    """The server can't listen where it was told to: port taken, no such address."""


class OutOfMemoryError(StartupError):
    """The model, its KV cache or its activations don't fit into the memory there is."""


class DeviceError(StartupError):
    """No device, too few devices, or the devices can't talk to each other."""


class DevicesBusyError(DeviceError, TimeoutError):
    """Not enough devices were free within `wait_for_devices` seconds. `holders` says who has them, or came before."""

    @property
    def holders(self) -> tuple[str, ...]:
        """One text each: the device, the instance that has it, of which user, its supervisor's pid, since when."""
        return tuple(str(self.diagnosis.facts.get("holders", "")).split("; "))


class LaunchError(StartupError):
    """The server's program can't be run at all: no vLLM in that interpreter, no such command."""


class EngineDiedError(StartupError):
    """The engine or a worker died without a cause that we know, was killed, or crashes again and again."""


class WeightsLostError(StartupError):
    """The server ended, and the weights that a trainer had sent were nowhere else: it must send them again."""


class StartupTimeoutError(StartupError, TimeoutError):
    """The server was not ready within `startup_timeout`, or said nothing for `startup_silence` seconds."""


_ERROR_OF: dict[Cause, type[StartupError]] = {
    Cause.MODEL_NOT_FOUND: ModelUnavailableError,
    Cause.HUB_OFFLINE: ModelUnavailableError,
    Cause.GATED_MODEL: ModelUnavailableError,
    Cause.NO_CONFIG: ModelUnavailableError,
    Cause.CORRUPT_WEIGHTS: BrokenModelError,
    Cause.NO_WEIGHTS: BrokenModelError,
    Cause.NO_TOKENIZER: BrokenModelError,
    Cause.UNSUPPORTED_ARCHITECTURE: BrokenModelError,
    Cause.INVALID_FLAG: EngineArgumentError,
    Cause.INVALID_ENGINE_ARGUMENT: EngineArgumentError,
    Cause.MAX_MODEL_LEN: EngineArgumentError,
    Cause.TENSOR_PARALLEL_HEADS: EngineArgumentError,
    Cause.LORA_NOT_FOUND: EngineArgumentError,
    Cause.CHAT_TEMPLATE: EngineArgumentError,
    Cause.PORT_IN_USE: AddressError,
    Cause.BAD_HOST: AddressError,
    Cause.KV_CACHE_TOO_SMALL: OutOfMemoryError,
    Cause.GPU_MEMORY: OutOfMemoryError,
    Cause.HOST_MEMORY: OutOfMemoryError,
    Cause.NO_DEVICE: DeviceError,
    Cause.TENSOR_PARALLEL_DEVICES: DeviceError,
    Cause.NCCL: DeviceError,
    Cause.DEVICES_BUSY: DevicesBusyError,
    Cause.DEVICES_DIRECTORY: DeviceError,
    Cause.VLLM_MISSING: LaunchError,
    Cause.BROKEN_INSTALL: LaunchError,
    Cause.LAUNCHER_NOT_FOUND: LaunchError,
    Cause.NO_IMAGE: LaunchError,
    Cause.DISK_FULL: LaunchError,
    Cause.SHM_FULL: LaunchError,
    Cause.ENGINE_TIMEOUT: EngineDiedError,
    Cause.ENGINE_DIED: EngineDiedError,
    Cause.WORKER_DIED: EngineDiedError,
    Cause.KILLED: EngineDiedError,
    Cause.CRASH_LOOP: EngineDiedError,
    Cause.ENGINE_HUNG: EngineDiedError,
    Cause.API_SERVER_HUNG: EngineDiedError,
    Cause.PROCESS_STOPPED: EngineDiedError,
    Cause.ENGINE_BROKEN: EngineDiedError,
    Cause.ENGINE_STATE: BrokenModelError,
    Cause.WEIGHTS_LOST: WeightsLostError,
    Cause.STARTUP_TIMEOUT: StartupTimeoutError,
    Cause.STARTUP_SILENCE: StartupTimeoutError,
    Cause.UNKNOWN: EngineDiedError,
}


def error_for(diagnosis: Diagnosis, *, instance: str | None, log_path: str | None) -> StartupError:
    """The exception for `diagnosis`: the subclass of `StartupError` that its cause belongs to."""
    return _ERROR_OF[diagnosis.cause](diagnosis, instance=instance, log_path=log_path)


# -- requests ----------------------------------------------------------------------------------------------------------


class RequestError(ManagedVLLMError):
    """One request failed for good. `index` is its place in the batch (None for a single request).

    Of this very class: what the server says each time that it is asked (HTTP 500 twice from one that is healthy, a
    redirect, a page in place of JSON), and answers of another shape. `status` is the HTTP status, if there is one.
    """

    def __init__(
        self, message: str, *, index: int | None = None, status: int | None = None, instance: str | None = None
    ) -> None:
        super().__init__(message, instance=instance)
        self.index = index
        self.status = status


class BadRequestError(RequestError, ValueError):
    """The request is wrong: known before it was sent, or by the server (HTTP 4xx). Sent again it would be again.

    `field` names the parameter that is to blame; None where there is no single one, or only the server knows.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        index: int | None = None,
        status: int | None = None,
        instance: str | None = None,
    ) -> None:
        super().__init__(message, index=index, status=status, instance=instance)
        self.field = field


class UnsupportedParameterError(BadRequestError):
    """A parameter (`field`) can't be passed on to a server. vLLM ignores unknown fields silently; we don't."""


class ContextLengthError(BadRequestError):
    """Prompt and answer are longer than the model's context.

    In tokens, as far as the server tells: `max_model_len` is the bound, `prompt_tokens` what the prompt has (at least),
    `max_tokens` what was asked for the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        max_model_len: int | None = None,
        prompt_tokens: int | None = None,
        max_tokens: int | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message, status=status)
        self.max_model_len = max_model_len
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens


class ModelNotFoundError(BadRequestError, LookupError):
    """The server does not serve the model that the request names (HTTP 404). `model` is that name."""

    def __init__(self, message: str, *, model: str, status: int | None = None) -> None:
        super().__init__(message, field="model", status=status)
        self.model = model


class AuthenticationError(RequestError):
    """The server at `base_url` refuses the API key, or wants one (HTTP 401, 403), of a handle or of a request."""

    def __init__(self, message: str, *, base_url: str, status: int | None = None) -> None:
        super().__init__(message, status=status)
        self.base_url = base_url


class ServerBusyError(RequestError):
    """The server took the request in none of many times that it was sent (HTTP 429).

    Also where it wants a longer rest (`Retry-After`) than the caller's deadline leaves.
    """


class ServerDiedError(RequestError, ConnectionError):
    """The server died under this request, and no retry was possible."""


class DeadlyRequestError(ServerDiedError):
    """The server died each time that this request was in flight: it may be what kills it, and is not sent again.

    `epochs` are the lives of the server that ended so. A request that had company at all of these deaths may be
    innocent; one that was alone is refused from then on by the same client, without being sent.
    """

    def __init__(self, message: str, *, epochs: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.epochs = epochs


class RequestTimeoutError(RequestError, TimeoutError):
    """The caller's time ran out before the answer came."""


class CassetteMissError(RequestError, LookupError):
    """A test asks what its cassette has no answer for. The message has the nearest recorded request, as a diff."""


class UnsupportedMethodError(ManagedVLLMError, AttributeError):
    """A method or attribute of `vllm.LLM` (`method`) that a server can't give, with the reason and what to use instead.

    An `AttributeError`, too: `hasattr(llm, "collective_rpc")` is False.
    """

    def __init__(self, message: str, *, method: str) -> None:
        super().__init__(message)
        self.method = method


# -- rollouts ----------------------------------------------------------------------------------------------------------


class EnvironmentFailedError(ManagedVLLMError):
    """An environment can't go on: it raised, died, or can't be made. The attempt fails, and has no reward."""


class EnvironmentTimeoutError(EnvironmentFailedError, TimeoutError):
    """An environment did not return within its limit, and was ended."""


class EnvironmentRaisedError(EnvironmentFailedError):
    """A method of a synchronous environment raised, in its process or thread; or one on an OpenEnv server.

    `call` is `make`, `reset`, `step`, `evaluate` or `close`; `error_type` the class of what was raised, with its module
    where it is no builtin (OpenEnv: the server's code, `EXECUTION_ERROR` say); `error_message` its text,
    `error_traceback` the whole traceback.
    """

    def __init__(self, message: str, *, call: str, error_type: str, error_message: str, error_traceback: str) -> None:
        super().__init__(message)
        self.call = call
        self.error_type = error_type
        self.error_message = error_message
        self.error_traceback = error_traceback


class EnvironmentDiedError(EnvironmentFailedError):
    """The process of an environment ended by itself, or was killed from outside.

    `call` is what was being done, or `between two calls`; `exit_code` as `subprocess.Popen.returncode` (negative for a
    signal; None if it is not known); `output` the last of what it wrote to standard output and error.
    """

    def __init__(self, message: str, *, call: str, exit_code: int | None, output: str) -> None:
        super().__init__(message)
        self.call = call
        self.exit_code = exit_code
        self.output = output


class RolloutsFailedError(ManagedVLLMError):
    """A run was ended early, as its attempts all failed the same way: `count` of them, `last` says how."""

    def __init__(self, message: str, *, count: int, last: str) -> None:
        super().__init__(message)
        self.count = count
        self.last = last


class ScoringFailedError(ManagedVLLMError):
    """A run could not be scored anew, as the reward function raised each time: `count` times in a row; `last` says for
    which attempt, and what."""

    def __init__(self, message: str, *, count: int, last: str) -> None:
        super().__init__(message)
        self.count = count
        self.last = last


class ActionParseError(ManagedVLLMError, ValueError):
    """A model's answer is no action.

    `text` is the answer, `span` the characters of it that are to blame: `text[span[0]:span[1]]`.
    """

    def __init__(self, message: str, *, text: str, span: tuple[int, int]) -> None:
        super().__init__(message)
        self.text = text
        self.span = span


class RunStoreError(ManagedVLLMError):
    """A run's folder can't be used: it is none, belongs to another run, or another process writes to it. `path` names
    it."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class ExportError(ManagedVLLMError, ValueError):
    """A run can't be exported as asked: exact token ids or logprobs are missing, or the format can't hold it."""


# -- cassettes ---------------------------------------------------------------------------------------------------------


class CassetteError(ManagedVLLMError):
    """A cassette can't be used: it is missing, damaged, of a later version, or can't be written. `path` names it."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class CassetteMismatchError(CassetteError):
    """A cassette was recorded with another model server; `differences` says in words what differs."""

    def __init__(self, message: str, *, path: str, differences: tuple[str, ...] = ()) -> None:
        super().__init__(message, path=path)
        self.differences = differences
