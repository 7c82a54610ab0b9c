"""The stand-in's engine control: the routes of vLLM's development mode and of its adapters, and what they do.

A pause freezes what is in flight, lets it finish, or aborts it, and lets nothing new begin. Adapters are folders that
exist; weights are folders, too, and their checksum that of the files in them, or what a trainer has sent. Part of what
it sends may be `acts`: {"broken": […]}, {"hangs": true}, {"fails": true}.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

ROUTES = (
    *("/pause", "/resume", "/is_paused", "/sleep", "/wake_up", "/is_sleeping"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/collective_rpc", "/weight_checker", "/weight_info"),
    *("/update_weight_version", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
    *("/update_weights", "/finish_weight_update"),
)


class VersionSpans:
    """Which weights sampled which tokens of an answer, in vLLM's shape."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []

    def add(self, version: str) -> bool:
        """One more token; whether it is of another version than the one before."""
        changed = not self.spans or self.spans[-1]["version"] != version
        if changed:
            end = self.spans[-1]["end"] if self.spans else 0
            self.spans.append({"version": version, "start": end, "end": end})
        self.spans[-1]["end"] += 1
        return changed


class Control:
    """One server's. `hangs`: a route that never answers; `without`: it has none of them;
    `canary`: whether its workers can look at their weights; `versions`: when it tells which of them an answer is of, at
    each "change", at the "end" of a stream, or "never"; `name`: of one server among several, for `standin.json`;
    `refuses`: routes that answer with an error."""

    def __init__(
        self,
        *,
        hangs: str = "",
        without: bool = False,
        paused: bool = False,
        canary: bool = True,
        versions: str = "change",
        name: str = "",
        refuses: Sequence[str] = (),
    ) -> None:
        self.loras: dict[str, str] = {}
        self._used_by = self._uses = 0
        self._counting = threading.Lock()
        self._hangs = hangs
        self._has_canary = canary
        self._name = name
        self._refuses = refuses
        self._salt = ""
        self._without = without
        self._says_paused = paused
        self._weights = ""
        self._coming: list[Any] | None = None
        self._kept: tuple[str, list[str]] = ("", [])
        self._broken: list[str] = []
        self._poisoned = False
        self.version = "default"
        self.tells_versions = versions
        self._sleeps = False
        self.aborts = 0
        self._count = threading.Condition()
        self._in_flight = 0
        self._admits = threading.Event()
        self._admits.set()
        self._runs = threading.Event()
        self._runs.set()

    @contextlib.contextmanager
    def in_flight(self, is_gone: Callable[[], bool]) -> Iterator[None]:
        """A request, once it is admitted. Raises `ConnectionError` where nobody waits for it any more."""
        while not self._admits.wait(0.05):
            if is_gone():
                raise ConnectionError
        with self._count:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._count:
                self._in_flight -= 1
                self._count.notify_all()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Counts a request of a user, as our guard does in a vLLM."""
        with self._counting:
            self._used_by += 1
            self._uses += 1
        try:
            yield
        finally:
            with self._counting:
                self._used_by -= 1

    def may_run(self) -> bool:
        """Whether requests are worked on; waits a little where they are not."""
        return self._runs.wait(0.05)

    def tells(self, changed: bool, *, ended: bool) -> bool:
        """Whether an event of a stream says of which weights the answer is."""
        return self.tells_versions != "never" and (ended or (changed and self.tells_versions == "change"))

    def serves(self, name: object, model: str) -> bool:
        return name == model or name in self.loras

    def has(self, path: str) -> bool:
        return path in (*ROUTES, "/managed_vllm/use") and not self._without

    def models(self, model: str) -> list[dict[str, Any]]:
        cards: list[dict[str, Any]] = [{"id": model, "object": "model", "parent": None, "root": model}]
        return cards + [{"id": name, "root": path, "parent": model} for name, path in self.loras.items()]

    def answer(self, url: str, body: Mapping[str, Any]) -> tuple[int, Any] | None:
        """Status and body; None: that is none of these routes."""
        parts = urlsplit(url)
        if not self.has(parts.path):
            return None
        if parts.path == "/managed_vllm/use":
            return 200, {"in_flight": self._used_by, "requests": self._uses}
        if parts.path == self._hangs:
            print(f"HANGS {url}", flush=True)
            time.sleep(3600)
        if parts.path in self._refuses:
            return 500, {"error": {"message": f"{parts.path} is refused"}}
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        print(f"CONTROL {url}", flush=True)
        do = getattr(self, "do_" + parts.path.strip("/").replace("/", "_"))
        return do({**query, **body})  # type: ignore[no-any-return]

    def do_pause(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        if asked.get("mode") == "wait":
            self._admits.clear()
            with self._count:
                self._count.wait_for(lambda: not self._in_flight)
        self._runs.clear()
        if asked.get("mode") == "abort":
            self.aborts += 1
        return 200, {"status": "paused"}

    def do_resume(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        self._runs.set()
        self._admits.set()
        return 200, {"status": "resumed"}

    def do_is_paused(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        return 200, {"is_paused": self._says_paused or not self._runs.is_set()}

    def do_sleep(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        self._sleeps = True
        self._runs.clear()
        return 200, {"status": "sleeping"}

    def do_wake_up(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        self._sleeps = False
        self._runs.set()
        return 200, {"status": "awake"}

    def do_is_sleeping(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        return 200, {"is_sleeping": self._sleeps or not self._runs.is_set()}

    def do_reset_prefix_cache(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        return 200, {"success": True}

    def do_reset_mm_cache(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        return 200, None

    def do_collective_rpc(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        method = asked["method"].removeprefix("managed_vllm_")
        print(f"WORKERS {method}", flush=True)
        return getattr(self, f"_{method}")(asked)  # type: ignore[no-any-return]

    def _reload(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        """`standin.json` in the folder: {"poisons": true}, {"hangs": true}, {"ignored": true}, {"broken": […]}.

        {"waits_for": path}: until that exists; {"salted": true}: another checksum; {"only": name}: on that server.
        """
        path = (asked.get("kwargs") or {}).get("weights_path", "")
        print(f"RELOAD {path}", flush=True)
        if self._poisoned or (path and not Path(path).is_dir()):
            return 500, {"error": {"message": f"Cannot find any model weights with `{path}`"}}
        acts = Path(path) / "standin.json"
        behaves = json.loads(acts.read_text()) if path and acts.is_file() else {}
        if behaves.get("only", self._name) != self._name:
            behaves = {}
        while "waits_for" in behaves and not Path(behaves["waits_for"].format(name=self._name)).exists():
            time.sleep(0.01)
        if behaves.get("hangs"):
            time.sleep(3600)
        if behaves.get("poisons"):
            self._poisoned = True
            return 500, {"error": {"message": "The size of tensor a must match the size of tensor b"}}
        if not behaves.get("ignored"):
            self._coming = None
            self._weights, self._broken = path, behaves.get("broken", [])
            self._salt = self._name if behaves.get("salted") else ""
        return 200, {"results": [None]}

    def _keep(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        self._kept = self._weights, self._broken
        return 200, {"results": [None]}

    def _put_back(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        (self._weights, self._broken), self._coming = self._kept, None
        return 200, {"results": [None]}

    def _drop(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        self._kept = ("", [])
        return 200, {"results": [None]}

    def _renew(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        return 200, {"results": [None]}

    def _canary(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        if not self._has_canary:
            return 500, {"error": {"message": "'Worker' object has no attribute 'managed_vllm_canary'"}}
        return 200, {"results": [{"broken": self._broken, "logits": "finite"}]}

    def do_weight_checker(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        digest = hashlib.sha256(self._salt.encode())
        digest.update(self._weights.encode() if self._weights.startswith("[") else b"")
        for path in sorted(Path(self._weights).iterdir()) if self._weights.startswith("/") else ():
            digest.update(path.read_bytes())
        return 200, {"checksums": {"all": digest.hexdigest()}}

    def do_init_weight_transfer_engine(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        if asked["init_info"].get("hangs"):
            time.sleep(3600)
        return 200, {"message": "Weight transfer initialized"}

    def do_shutdown_weight_transfer_engine(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        return 200, {"message": "Weight transfer shut down"}

    def do_start_weight_update(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        if self._coming is not None:
            return 500, {"error": {"message": "start_weight_update called while a weight update is already active."}}
        self._coming = []
        return 200, {"message": "Weight update started"}

    def do_update_weights(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        acts = asked["update_info"].get("acts", {})
        if acts.get("hangs"):
            time.sleep(3600)
        if self._coming is None or acts.get("fails"):
            return 500, {"error": {"message": "start_weight_update must be called before update_weights."}}
        self._coming.append(asked["update_info"])
        return 200, {"message": "Weights updated"}

    def do_finish_weight_update(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        coming, self._coming = self._coming or [], None
        self._weights = json.dumps(coming)
        self._broken = [name for one in coming for name in one.get("acts", {}).get("broken", ())]
        return 200, {"message": "Weight update finished"}

    def do_weight_info(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        return 200, {"weight_version": self.version}

    def do_update_weight_version(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        self.version = asked["new_version"]
        return 200, {"success": True}

    def do_v1_load_lora_adapter(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        name, path = asked["lora_name"], asked["lora_path"]
        if name in self.loras and not asked.get("load_inplace"):
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        if not Path(path).is_dir():
            return 404, {"error": {"message": f"Loading lora {name} failed: No adapter found for {path}"}}
        self.loras[name] = path
        return 200, None

    def do_v1_unload_lora_adapter(self, asked: Mapping[str, Any]) -> tuple[int, Any]:
        if self.loras.pop(asked["lora_name"], None) is None:
            return 404, {"error": {"message": f"The lora adapter '{asked['lora_name']}' cannot be found."}}
        return 200, None
