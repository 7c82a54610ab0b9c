"""What users have made of a running engine, as a value: adapters, weights, sleep, pause.

The supervisor keeps it in its record, and puts it back before a server that was started again counts as ready.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

PauseMode = Literal["keep", "wait", "abort"]
"""What becomes of requests in flight: they go on later, are finished first, or end with the tokens so far."""
PAUSE_MODES: tuple[PauseMode, ...] = get_args(PauseMode)
SLEEP_LEVELS = (0, 1, 2)
"""0 only pauses, 1 keeps the weights in the host's memory, 2 discards them."""


@dataclass(frozen=True)
class EngineState:
    """The state of an engine beyond what it was started with. As it starts, it is `EngineState()`.

    Args:
        sleep_level: 0, 1 or 2 while it sleeps; None: awake.
        paused: how it was paused ("keep", "wait", "abort"); None: it is not.
        loras: the adapters that were loaded at run time: name to absolute path.
        weights: the folder of the checkpoint that was loaded last; None: the weights that it was started with.
        weight_version: what the weights are called; empty: nobody has named them.
        weight_checksum: one over all weights, where the server tells it.
        weights_unsaved: whether a trainer sent them, and no checkpoint is known that has them (`weights` is None): a
            server that is started again can't have them.
        updating: how requests are held up by an update of the weights that is under way (as `paused`); None: there is
            none. It ends with the server.
    """

    sleep_level: int | None = None
    paused: PauseMode | None = None
    loras: Mapping[str, str] = field(default_factory=dict, hash=False)
    weights: str | None = None
    weight_version: str = ""
    weight_checksum: str | None = None
    weights_unsaved: bool = False
    updating: PauseMode | None = None

    @property
    def serves(self) -> bool:
        """Whether requests are worked on: it neither sleeps nor is paused, nor are its weights being replaced."""
        return self.sleep_level is None and self.paused is None and self.updating is None

    @property
    def weight_fields(self) -> dict[str, Any]:
        """Those of its fields that say which weights it serves."""
        return {
            "weights": self.weights,
            "weight_version": self.weight_version,
            "weight_checksum": self.weight_checksum,
            "weights_unsaved": self.weights_unsaved,
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "sleep_level": self.sleep_level,
            "paused": self.paused,
            "loras": dict(self.loras),
            **self.weight_fields,
            "updating": self.updating,
        }

    @classmethod
    def from_dict(cls, data: object) -> EngineState:
        """The inverse of `to_dict`. Raises `ValueError` for what no engine can have; missing fields are as at a start.

        A record that can't be read must not pass for an engine as it starts: that would be other weights in silence.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"no state of an engine: {data!r}")
        level, paused, loras = data.get("sleep_level"), data.get("paused"), data.get("loras", {})
        texts = {name: data.get(name) for name in ("weights", "weight_checksum")}
        unsaved = data.get("weights_unsaved", False)
        updating = data.get("updating")
        modes = (None, *PAUSE_MODES)
        known = level in (None, *SLEEP_LEVELS) and paused in modes and updating in modes and isinstance(unsaved, bool)
        if not known or not isinstance(loras, Mapping):
            raise ValueError(f"no state of an engine: {data!r}")
        return cls(
            sleep_level=level,
            paused=paused,
            loras={str(name): str(path) for name, path in loras.items()},
            weight_version=str(data.get("weight_version") or ""),
            weights_unsaved=unsaved,
            updating=updating,
            **{name: None if value is None else str(value) for name, value in texts.items()},
        )
