"""Servers forked from a warm image: a fake `vllm`, the stand-in as its server, everything else as it is."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any, Literal

import fake_vllm
import psutil
import pytest
import standin
from processes import INSTANT, assert_nothing_left, eventually, is_live, tree, tree_below

from managed_vllm import ManagedVLLM, RestartPolicy
from managed_vllm.errors import StartupError
from managed_vllm.in_server.managed_vllm_lifeline import start_time
from managed_vllm.instance import cleanup, directory
from managed_vllm.status import Cause

AT_ONCE = RestartPolicy(max_restarts=100, backoff_initial_s=0.05, backoff_max_s=0.2)
THREAD = "import threading, time\nthreading.Thread(target=time.sleep, args=[3600], daemon=True).start()\n"


def server(
    folder: Path,
    changes: dict[str, str] | None = None,
    *,
    warm: bool | Literal["auto"] = "auto",
    restart: RestartPolicy = AT_ONCE,
    env: dict[str, str] | None = None,
    wait: bool = True,
    **order: Any,
) -> ManagedVLLM:
    variables = {**fake_vllm.write(folder, changes), **standin.orders(tree=True, **order), **(env or {})}
    return ManagedVLLM("stand-in", env=variables, keep_alive=INSTANT, restart=restart, warm=warm, wait=wait)


def instance_of(home: Path) -> directory.Instance:
    (instance,) = directory.instances(home)
    return instance


def image_of(llm: ManagedVLLM) -> psutil.Process:
    return psutil.Process(llm.status().image_pid)


def log_of(home: Path) -> str:
    return instance_of(home).server_log.read_text()


def supervisor_log(home: Path) -> str:
    return instance_of(home).supervisor_log.read_text()


def answer(llm: ManagedVLLM) -> list[int]:
    return list(llm.generate(["What next?"], max_tokens=8)[0].outputs[0].token_ids)


EXPECTED = standin.continuation(standin.prompt_ids("What next?"), 8)


def test_a_server_is_forked_its_engine_and_worker_as_well(home: Path, tmp_path: Path) -> None:
    with server(tmp_path) as llm:
        assert llm.status().launch == "forked"
        assert answer(llm) == EXPECTED
        processes = tree(llm)
        assert all("spawn_main" not in " ".join(process.cmdline()) for process in processes.values())
        assert "a new interpreter" not in log_of(home)


def test_a_forked_server_is_the_supervisors_own_child_in_a_session_of_its_own(home: Path, tmp_path: Path) -> None:
    with server(tmp_path) as llm:
        status = llm.status()
        assert status.server_pid is not None
        assert psutil.Process(status.server_pid).ppid() == status.supervisor_pid
        assert os.getsid(status.server_pid) == os.getpgid(status.server_pid) == status.server_pid
        assert psutil.Process(status.server_pid).cwd() == str(instance_of(home).folder)


def test_without_an_image_everything_is_launched_plainly(home: Path, tmp_path: Path) -> None:
    with server(tmp_path, warm=False) as llm:
        assert llm.status().launch == "plain"
        assert answer(llm) == EXPECTED
        assert all("spawn_main" in " ".join(tree(llm)[name].cmdline()) for name in ("EngineCore", "Worker"))
        assert "a new interpreter" in log_of(home)


@pytest.mark.parametrize("victim", ["APIServer", "EngineCore", "Worker"])
def test_the_end_of_any_process_is_the_end_of_all_and_the_next_is_forked(
    home: Path, tmp_path: Path, victim: str
) -> None:
    with server(tmp_path) as llm:
        image, processes = image_of(llm), tree(llm)
        processes[victim].kill()
        assert llm.wait_ready(60, after_epoch=1).epoch == 2
        assert not any(is_live(process) for process in processes.values())
        assert llm.status().launch == "forked"
        assert image_of(llm) == image
        assert answer(llm) == EXPECTED


def test_the_image_learns_what_its_server_has_imported_since(home: Path, tmp_path: Path) -> None:
    with server(tmp_path):
        found = r"the image has imported (\d+) more modules"
        learnt = eventually(lambda: re.search(found, supervisor_log(home)), "learnt")
        assert int(learnt[1]) > 0


def test_a_module_that_makes_the_image_unfit_is_left_out_of_the_next(home: Path, tmp_path: Path) -> None:
    with server(tmp_path, {"found_out_later.py": THREAD}) as llm:
        eventually(lambda: "a new image goes without it" in supervisor_log(home), "told")
        eventually(lambda: "more modules" in supervisor_log(home), "the next image has learnt the rest")
        tree(llm)["APIServer"].kill()
        assert llm.wait_ready(60, after_epoch=1).launch == "forked"
        assert "launched plainly" not in supervisor_log(home)


def test_where_workers_are_started_later_the_launch_is_plain(home: Path, tmp_path: Path) -> None:
    env = {**fake_vllm.write(tmp_path), **standin.orders()}
    with ManagedVLLM("stand-in", env=env, keep_alive=INSTANT, warm="auto", enable_elastic_ep=True) as llm:
        assert llm.status().launch.startswith("plain: with enable_elastic_ep")
        assert llm.status().image_pid is None


def test_an_image_that_refuses_means_a_plain_launch_and_is_told_once(home: Path, tmp_path: Path) -> None:
    with server(tmp_path, {"v1/engine/core.py": THREAD}) as llm:
        assert llm.status().launch == "plain: 2 threads run in the image"
        assert answer(llm) == EXPECTED
        tree(llm)["APIServer"].kill()
        assert llm.wait_ready(60, after_epoch=1).launch == "plain: 2 threads run in the image"
        assert supervisor_log(home).count("launched plainly: 2 threads run in the image") == 1


def test_a_start_that_must_be_forked_fails_where_it_can_not_be(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError) as error, server(tmp_path, {"v1/engine/core.py": THREAD}, warm=True):
        pass
    assert error.value.diagnosis is not None
    assert error.value.diagnosis.cause is Cause.NO_IMAGE
    assert error.value.diagnosis.root_line == "2 threads run in the image"


def test_a_failed_start_has_its_usual_reason(home: Path, tmp_path: Path) -> None:
    said = "api_server.py: error: unrecognized arguments: --no-such-flag"
    with pytest.raises(StartupError) as error, server(tmp_path, say=[said], exit=2):
        pass
    assert error.value.diagnosis is not None
    assert error.value.diagnosis.cause is Cause.INVALID_FLAG


def test_a_start_that_fails_for_no_known_reason_is_tried_once_more_plainly(home: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    with pytest.raises(StartupError) as error, server(tmp_path, exit=5, count=str(count)):
        pass
    assert error.value.diagnosis is not None
    assert error.value.diagnosis.cause is Cause.UNKNOWN
    assert len(count.read_text().splitlines()) == 2


def test_a_server_does_not_notice_the_end_of_its_image_and_there_is_another(home: Path, tmp_path: Path) -> None:
    with server(tmp_path) as llm:
        eventually(lambda: "more modules" in supervisor_log(home), "learnt")
        image, pid = image_of(llm), llm.status().server_pid
        image.kill()
        eventually(lambda: supervisor_log(home).count("more modules") == 2, "the next one has learnt, too")
        assert answer(llm) == EXPECTED
        assert (llm.status().server_pid, llm.status().epoch) == (pid, 1)
        assert image_of(llm) != image


def test_an_image_that_dies_again_and_again_is_done_without(home: Path, tmp_path: Path) -> None:
    dies = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
    guarded = f"import sys\nif 'managed_vllm_image' in ' '.join(sys.orig_argv):\n    {dies.replace(chr(10), ';')}\n"
    with server(tmp_path, {"v1/engine/core.py": guarded}) as llm:
        assert llm.status().launch.startswith("plain: the image has ended")
        assert answer(llm) == EXPECTED


@pytest.mark.parametrize("variable", ["ASKED_FOR", "VLLM_ASKED_FOR"])
def test_the_server_has_the_environment_of_a_plain_launch(home: Path, tmp_path: Path, variable: str) -> None:
    says = (
        "import json, os, sys\nprint('ENV', json.dumps({'environ': dict(os.environ), 'argv': sys.argv}), flush=True)\n"
    )
    launcher = fake_vllm.FILES["entrypoints/openai/api_server.py"].replace(
        "    standin.main()", f"    {says}    standin.main()"
    )
    launcher = launcher.replace("\nprint('ENV'", "\n    print('ENV'")
    found = {}
    for warm in (True, False):
        changes = {"entrypoints/openai/api_server.py": launcher}
        with server(tmp_path, changes, warm=warm, env={variable: "yes"}):
            line = next(line for line in log_of(home).splitlines() if line.startswith("ENV "))
            found[warm] = json.loads(line.removeprefix("ENV "))
        assert_nothing_left(home)
    forked, plain = found[True], found[False]
    port = plain["argv"].index("--port") + 1
    assert forked["argv"][:port] + forked["argv"][port + 1 :] == plain["argv"][:port] + plain["argv"][port + 1 :]
    # What must differ: a key, a folder and a supervisor of its own; and how EngineCore is to be started.
    own = {
        "VLLM_API_KEY",
        "TMPDIR",
        "VLLM_RPC_BASE_PATH",
        "MANAGED_VLLM_SUPERVISOR",
        "MANAGED_VLLM_SERVER_ROOT",
        "VLLM_WORKER_MULTIPROC_METHOD",
        "LD_PRELOAD",
    }
    differing = {
        name
        for name in forked["environ"].keys() | plain["environ"].keys()
        if forked["environ"].get(name) != plain["environ"].get(name)
    }
    assert differing <= own
    assert forked["environ"][variable] == "yes"


def test_the_key_is_in_no_environment_and_on_no_command_line(home: Path, tmp_path: Path) -> None:
    with server(tmp_path) as llm:
        key = llm.api_key.encode()
        status = llm.status()
        assert status.server_pid is not None
        for process in {*tree_below(status.server_pid), image_of(llm)}:
            assert key not in Path(f"/proc/{process.pid}/environ").read_bytes()
            assert key not in Path(f"/proc/{process.pid}/cmdline").read_bytes()


def test_the_shared_memory_of_replicas_bears_the_name_of_each(home: Path, tmp_path: Path) -> None:
    """All of them are forked from one image, which is marked as none of them."""
    noted = tmp_path / "segments"
    variables = {**fake_vllm.write(tmp_path), **standin.orders(tree=True, shm=str(noted))}
    with ManagedVLLM("stand-in", env=variables, keep_alive=INSTANT, warm=True, replicas=2, progress=False):
        instance = instance_of(home)
        both = [cleanup.named_shared_memory(instance.of_replica(number)) for number in (0, 1)]
        made = set(noted.read_text().split())
        assert [len(paths & made) for paths in both] == [1, 1]
    assert_nothing_left(home)
    assert not any(Path(path).exists() for path in made)


@pytest.mark.parametrize("moment", ["importing", "serving"])
def test_nothing_is_left_when_the_supervisor_is_killed(home: Path, tmp_path: Path, moment: str) -> None:
    slow = {"v1/engine/core.py": "import time\ntime.sleep(3600)\n"} if moment == "importing" else {}
    llm = server(tmp_path, slow, wait=moment == "serving")
    llm.start()
    supervisor = psutil.Process(llm.status().supervisor_pid)
    instance = instance_of(home)
    processes = eventually(lambda: cleanup.marked_processes(instance), "launched")
    supervisor.kill()
    eventually(lambda: not any(is_live(process) for process in processes), "all of them have ended")
    llm.close()
    cleanup.remove_instance(instance)


def test_a_server_whose_supervisor_died_before_the_lifeline_was_armed_ends_itself(tmp_path: Path) -> None:
    assert start_time(os.getpid())  # what the image compares is tested in tests/real/test_real_orphans.py


def test_an_end_by_down_leaves_no_image(home: Path, tmp_path: Path) -> None:
    with server(tmp_path, {"v1/engine/core.py": "import time\ntime.sleep(3600)\n"}, wait=False) as llm:
        instance = instance_of(home)
        (image,) = eventually(lambda: cleanup.marked_processes(instance), "launched")
        supervisor = llm.status().supervisor_pid
        assert supervisor is not None
        os.kill(supervisor, signal.SIGTERM)
        eventually(lambda: not is_live(image), "the image has ended")
