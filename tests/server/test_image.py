"""The image process alone, with a package `vllm` that needs no vLLM: what it refuses, and that it says why."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_vllm
import pytest

from managed_vllm import in_server
from managed_vllm.server.image import Image, ImageError, ImageRefusedError, preload

WORDS = ["-m", "vllm.entrypoints.openai.api_server", "--port", "0"]
THREAD = "import threading, time\nthreading.Thread(target=time.sleep, args=[3600], daemon=True).start()\n"
CHILD = "import subprocess\nchild = subprocess.Popen(['cat'], stdin=subprocess.PIPE)  # ends with the image\n"


def start(folder: Path, changes: dict[str, str] | None = None, **variables: str) -> Image:
    """An image whose `vllm` is the fake one, with some of its files changed."""
    path = fake_vllm.write(folder, changes)["PYTHONPATH"]
    return Image(
        [sys.executable, *WORDS],
        environment={**os.environ, "PYTHONPATH": f"{Path(in_server.__file__).parent}{os.pathsep}{path}", **variables},
        preload=None,
        cwd=folder,
        log_path=folder / "image.log",
        on_imports=lambda _: None,
    )


@contextlib.contextmanager
def as_subreaper() -> Iterator[None]:
    """What is orphaned below this process falls to it, as to a supervisor: a server that falls to init ends itself."""
    prctl, of_children = ctypes.CDLL(None).prctl, 36  # PR_SET_CHILD_SUBREAPER
    assert prctl(of_children, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(of_children, 0, 0, 0, 0)


def test_a_forked_server_has_the_descriptors_that_it_is_to_inherit_and_the_image_has_not(tmp_path: Path) -> None:
    held = os.open(tmp_path / "held", os.O_RDWR | os.O_CREAT)

    def has_it(pid: int) -> bool:
        return any(os.path.samestat(os.stat(held), found) for found in map(stat_of, open_in(pid)))

    async def body() -> None:
        image = start(tmp_path)
        server = await image.fork([sys.executable, *WORDS], os.environ, inherited=[held])
        try:
            assert has_it(server.pid)
            assert not has_it(image.pid)
        finally:
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.to_thread(os.waitpid, server.pid, 0)
            os.close(server.output)
            image.end()

    with as_subreaper():
        asyncio.run(body())
    os.close(held)


def open_in(pid: int) -> list[str]:
    return [entry.path for entry in os.scandir(f"/proc/{pid}/fd")]


def stat_of(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError:  # closed meanwhile
        return os.stat("/")


async def why_not(image: Image) -> ImageError:
    """What the image says instead of being ready."""
    try:
        with pytest.raises(ImageError) as error:
            await image.ready()
        return error.value
    finally:
        image.end()


def test_an_image_that_may_be_forked_says_that_it_is_ready(tmp_path: Path) -> None:
    async def body() -> None:
        image = start(tmp_path)
        await image.ready()
        assert len(os.listdir(f"/proc/{image.pid}/task")) == 1
        image.end()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"v1/engine/core.py": THREAD}, "2 threads run in the image"),
        ({"v1/engine/core.py": CHILD}, "the image has a child process"),
        (
            {"model_executor/models/registry.py": "def _look_in_subprocess(fn): ...\n"},
            "vllm.model_executor.models.registry._run_in_subprocess does not exist",
        ),
        (
            {"model_executor/models/registry.py": "def _run_in_subprocess(fn, timeout): ...\n"},
            "vllm.model_executor.models.registry._run_in_subprocess takes (fn, timeout)",
        ),
        (
            {"model_executor/models/registry.py": "from operator import call as _run_in_subprocess\n"},
            "vllm.model_executor.models.registry._run_in_subprocess is no function",
        ),
        (
            {"utils/system_utils.py": ""},
            "vllm.utils.system_utils.get_mp_context does not exist",
        ),
        (
            {"utils/system_utils.py": fake_vllm.FILES["utils/system_utils.py"].replace('"VLLM_W', '"NOT_VLLM_W')},
            "vLLM uses 'spawn' here, though VLLM_WORKER_MULTIPROC_METHOD=fork",
        ),
        (
            {"platforms/cpu.py": fake_vllm.FILES["platforms/cpu.py"].replace("(cls, vllm_config)", "(cls, config)")},
            "vllm.platforms.cpu.CpuPlatform.check_and_update_config takes (config)",
        ),
        (
            {"platforms/cpu.py": fake_vllm.FILES["platforms/cpu.py"].replace("check_and_update", "update")},
            "CpuPlatform.check_and_update_config is not what we know",
        ),
    ],
)
def test_what_is_not_as_we_know_it_is_a_reason_not_to_fork(
    tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    error = asyncio.run(_why_not(tmp_path, changes))
    assert isinstance(error, ImageRefusedError)
    assert error.reason == reason


async def _why_not(folder: Path, changes: dict[str, str], **variables: str) -> ImageError:
    return await why_not(start(folder, changes, **variables))


def test_a_start_method_that_the_user_asked_for_is_respected(tmp_path: Path) -> None:
    error = asyncio.run(_why_not(tmp_path, {}, VLLM_WORKER_MULTIPROC_METHOD="spawn"))
    assert error.reason == "VLLM_WORKER_MULTIPROC_METHOD=spawn is set"


def test_an_image_that_can_not_import_says_what_its_interpreter_said(tmp_path: Path) -> None:
    error = asyncio.run(_why_not(tmp_path, {"v1/engine/core.py": "import no_such_module\n"}))
    assert not isinstance(error, ImageRefusedError)
    assert error.reason == "the image has ended: ModuleNotFoundError: No module named 'no_such_module'"


def test_an_image_that_is_killed_is_noticed(tmp_path: Path) -> None:
    async def body() -> None:
        image = start(tmp_path, {"v1/engine/core.py": "import time\ntime.sleep(3600)\n"})
        os.kill(image.pid, signal.SIGKILL)
        assert (await why_not(image)).reason.startswith("the image has ended")

    asyncio.run(body())


def test_the_preloaded_libraries_are_those_of_vllms_cpu_platform(tmp_path: Path) -> None:
    vllm = tmp_path / "vllm"
    for name in ("torch/lib/libgomp.so.1", "vllm/libs/libtcmalloc_minimal.so.4", "vllm/libs/libtcmalloc.so.4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    gomp, tcmalloc = str(tmp_path / "torch/lib/libgomp.so.1"), str(vllm / "libs/libtcmalloc_minimal.so.4")
    assert preload(vllm, {}) == f"{tcmalloc}:{gomp}"
    assert preload(vllm, {"LD_PRELOAD": "/lib/libgomp.so.1"}) == f"{tcmalloc}:/lib/libgomp.so.1"
    assert preload(vllm, {"LD_PRELOAD": "/lib/libtcmalloc.so"}) == f"/lib/libtcmalloc.so:{gomp}"
    assert preload(None, {}) is None
