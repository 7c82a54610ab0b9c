"""Images of an export: files beside the samples, each once, referred to by relative paths."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from managed_vllm.agent.image_store import ImageStore
from managed_vllm.agent.types import ImageRef
from managed_vllm.errors import ExportError


class ExportedImages:
    """Puts images into `folder/images`: as links to the run's files if that can be, since these never change."""

    def __init__(self, images: ImageStore, folder: Path) -> None:
        self._images = images
        self._folder = folder
        self._there: dict[ImageRef, str] = {}

    def __len__(self) -> int:
        return len(self._there)

    def path(self, ref: ImageRef) -> str:
        """The image's path, relative to the export's folder. Raises `RunStoreError` if it is missing or damaged."""
        found = self._there.get(ref)
        if found is None:
            self._images.read(ref)  # what is exported is what was sent
            source = self._images.path(ref)
            found = f"images/{ref.sha256[:2]}/{source.name}"
            target = self._folder / found
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                try:
                    os.link(source, target)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(source, target)
            self._there[ref] = found
        return found


def load_images(folder: Path, paths: list[str]) -> list[Any]:
    """The images as PIL has them, modes unchanged."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ExportError("images are opened by Pillow, which is missing: pip install pillow") from error
    found = []
    for path in paths:
        try:
            with Image.open(folder / path) as image:
                found.append(image.copy())
        except (OSError, SyntaxError) as error:
            raise ExportError(f"{folder / path} can't be opened: {error}") from error
    return found
