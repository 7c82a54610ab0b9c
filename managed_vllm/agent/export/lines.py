"""`samples.jsonl` of an export for a trainer: one sample a line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from managed_vllm.agent.export.image_files import ExportedImages
from managed_vllm.agent.export.samples import Per, Sample, samples_of
from managed_vllm.agent.types import Trajectory
from managed_vllm.errors import ExportError

SAMPLES = "samples.jsonl"
ABOUT = "export.json"


class LinesWriter:
    """Writes what `line_of` makes of each sample. `cuts`: where steps did not join, by reason."""

    def __init__(
        self,
        folder: Path,
        images: ExportedImages,
        per: Per,
        logprobs: bool,
        line_of: Callable[[Sample, ExportedImages], dict[str, Any]],
    ) -> None:
        self._file = (folder / SAMPLES).open("w", encoding="utf-8")
        self._images = images
        self._per = per
        self._logprobs = logprobs
        self._line_of = line_of
        self.cuts: Counter[str] = Counter()

    def add(self, trajectory: Trajectory) -> int:
        samples = list(samples_of(trajectory, self._per, logprobs=self._logprobs))
        for sample in samples:
            if sample.cut is not None:
                self.cuts[sample.cut] += 1
            line = self._line_of(sample, self._images)
            self._file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        return len(samples)

    @property
    def images(self) -> int:
        """Distinct images so far."""
        return len(self._images)

    def close(self) -> None:
        self._file.close()


def read_lines(folder: Path, of: str) -> Iterator[dict[str, Any]]:
    """The lines of an export. Raises `ExportError` if it is none of that format."""
    try:
        found = json.loads((folder / ABOUT).read_bytes()).get("format")
        if found != of:
            raise ExportError(f"{folder} is an export for {found}, not for {of}")
        with (folder / SAMPLES).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{folder} is no export for {of}: {error}") from error
