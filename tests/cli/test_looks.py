"""`managed-vllm top` and `managed-vllm metrics`: what they see of running servers, without becoming a user."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import requests
import standin
from processes import HANG_S, eventually
from prometheus_client.parser import text_string_to_metric_families

from managed_vllm import ManagedVLLM
from managed_vllm.cli.looks import Looker
from managed_vllm.cli.metrics import MetricsServer, exposition
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.event_history import restarts_by_cause

PROGRAM = [sys.executable, "-m", "managed_vllm.cli"]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def labelled(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


def test_a_look_tells_state_users_rates_and_memory_and_is_no_user(home: Path) -> None:
    looker = Looker(home)
    with ManagedVLLM("m", command=standin.command(), keep_alive=0) as llm:
        first = eventually(
            lambda: next((one for one in looker.look() if one.metrics), None), "its metrics came in time"
        )
        assert (first.row["state"], first.row["epoch"], first.rates) == ("ready", 1, None)
        assert [user["pid"] for user in first.row["users"]] == [os.getpid()]
        assert first.memory_bytes > 1 << 20

        def has_generated() -> bool:
            llm.generate("x", {"max_tokens": 40})
            (now,) = looker.look()
            assert len(now.row["users"]) == 1
            return now.rates is not None and (now.rates.generation_tokens_per_s or 0) > 0

        eventually(has_generated, "of two looks, both had metrics that came in time")
        done = subprocess.run([*PROGRAM, "top", "--json", "--interval", "0.1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (told,) = json.loads(done.stdout)
        assert told["metrics"]["generation_tokens"] >= 40
        assert told["rates"]["generation_tokens_per_s"] == 0
        once = subprocess.run([*PROGRAM, "top", "--once", "--interval", "0.1"], capture_output=True, text=True)
        assert once.returncode == 0, once.stderr
        assert str(llm.id) in once.stdout
    eventually(lambda: looker.look() == [], "it ended with its last user")


def test_top_without_a_terminal_says_what_to_use(home: Path) -> None:
    done = subprocess.run([*PROGRAM, "top"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--once" in done.stderr


def test_top_on_a_terminal_restarts_the_chosen_server_and_ends(home: Path) -> None:
    with ManagedVLLM("m", command=standin.command(), keep_alive=0) as llm:
        master, slave = pty.openpty()
        try:
            running = subprocess.Popen(
                [*PROGRAM, "top", "--interval", "0.2"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
            )
            os.close(slave)
            read = threading.Thread(target=_until_closed, args=(master, said := bytearray()), daemon=True)
            read.start()
            eventually(lambda: str(llm.id).encode() in said, "the table is shown")
            os.write(master, b"j\x1b[Ar")  # at once, as they come to one that is busy with looking
            eventually(lambda: llm.status().epoch == 2 and b"serves again" in said, "restarted")
            os.write(master, b"q")
            assert running.wait(HANG_S) == 0
            read.join(HANG_S)  # or it would read what is opened next under this number
        finally:
            os.close(master)


def test_status_on_a_narrow_terminal_cuts_no_word(home: Path) -> None:
    with ManagedVLLM("m", name="a-name-of-some-length", command=standin.command(), keep_alive=0) as llm:
        master, slave = pty.openpty()
        said = bytearray()
        read = threading.Thread(target=_until_closed, args=(master, said), daemon=True)
        read.start()
        environment = {**os.environ, "COLUMNS": "80"}
        done = subprocess.run([*PROGRAM, "status"], stdin=slave, stdout=slave, env=environment, timeout=HANG_S)
        os.close(slave)
        read.join(HANG_S)
        os.close(master)
        assert done.returncode == 0
        words = re.sub(r"\x1b\[[\d;]*m", "", said.decode()).split()
        assert {str(llm.id), "a-name-of-some-length", "ready", llm.base_url} <= set(words)


def _until_closed(terminal: int, said: bytearray) -> None:
    try:
        while chunk := os.read(terminal, 65536):
            said += chunk
    except OSError:  # the other end is closed
        return


def test_metrics_of_two_servers_are_read_by_prometheus_own_parser(home: Path) -> None:
    with (
        ManagedVLLM("one", command=standin.command(), keep_alive=0) as one,
        ManagedVLLM("two", command=standin.command(), keep_alive=0, uds=True) as two,
    ):
        one.generate("x", {"max_tokens": 5})
        one.restart()
        eventually(lambda: one.status().health.answered, "its health was checked")
        found = samples(exposition(home).decode())
        for llm, epoch in ((one, 2.0), (two, 1.0)):
            server = str(llm.id)
            assert found["managed_vllm_epoch", labelled(server=server)] == epoch
            assert found["managed_vllm_state", labelled(server=server, state="ready")] == 1
            assert found["managed_vllm_state", labelled(server=server, state="failed")] == 0
            assert found["managed_vllm_leases", labelled(server=server)] == 1
            assert found["managed_vllm_memory_bytes", labelled(server=server, kind="pss")] > 1 << 20
            running = labelled(server=server, engine="0", model_name=llm.model)
            assert found["vllm:num_requests_running", running] == 0
        requested = labelled(server=str(one.id), cause="requested")
        assert found["managed_vllm_restarts_total", requested] == 1
        dashboard = (Path(__file__).parents[2] / "examples" / "grafana.json").read_text()
        assert json.loads(dashboard)["panels"]
        assert set(re.findall(r"managed_vllm_\w+", dashboard)) <= {name for name, _ in found}


def test_health_latency_and_weight_version_are_told_by_the_supervisor(home: Path) -> None:
    with ManagedVLLM("m", command=standin.command(), keep_alive=0) as llm:
        eventually(lambda: llm.status().health.answered > 0, "checked")
        told = llm.metrics().supervisor
        assert told is not None
        assert told.health_latency_s is not None
        assert 0 < told.health_latency_s < HANG_S
        assert (told.epoch, told.restarts, told.leases, told.weight_version) == (1, {}, 1, "")
        assert told.health_checks > 0
        found, server = samples(exposition(home).decode()), str(llm.id)
        assert found["managed_vllm_health_last_seconds", labelled(server=server)] > 0
        count = found["managed_vllm_health_seconds_count", labelled(server=server)]
        assert count == found["managed_vllm_health_seconds_bucket", labelled(server=server, le="+Inf")] > 0
        unanswered = found["managed_vllm_health_unanswered_total", labelled(server=server)]
        assert told.health_unanswered <= unanswered <= llm.status().health.unanswered  # 0, unless the machine was busy
        assert found["managed_vllm_weights_info", labelled(server=server, version="", checkpoint="")] == 1


def test_served_metrics_want_their_key(home: Path) -> None:
    with MetricsServer(home, "geheim", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            ways: list[dict[str, Any]] = [
                {},
                {"headers": {"Authorization": "Bearer wrong"}},
                {"headers": {"Authorization": "Basic ~"}},
                {"headers": {"Authorization": "Bearer geheim"}},
                {"auth": ("managed", "geheim")},
            ]
            answers = [requests.get(server.url, timeout=HANG_S, **way) for way in ways]
            assert [answer.status_code for answer in answers] == [401, 401, 401, 200, 200]
            assert "managed_vllm_state" in answers[-1].text
            elsewhere = server.url.replace("/metrics", "/")
            assert requests.get(elsewhere, auth=("x", "geheim"), timeout=HANG_S).status_code == 404
        finally:
            server.shutdown()


@pytest.mark.parametrize("rotated", [False, True])
def test_restarts_are_counted_by_their_cause_once_each(tmp_path: Path, rotated: bool) -> None:
    crashed = {"cause": "engine_died"}
    events: list[dict[str, Any]] = [
        {"state": "starting", "epoch": 0},
        {"state": "starting", "epoch": 1},
        {"state": "ready", "epoch": 1},
        {"state": "restarting", "epoch": 1, "diagnosis": {"cause": "engine_hung"}},  # it leaves "ready" …
        {"state": "restarting", "epoch": 1, "diagnosis": {"cause": "engine_hung"}},  # … and is started again
        {"state": "restarting", "epoch": 2, "diagnosis": {"cause": "engine_hung"}},
        {"state": "ready", "epoch": 2},
        {"state": "restarting", "epoch": 2},
        {"state": "restarting", "epoch": 3},
        {"state": "restarting", "epoch": 3, "diagnosis": crashed},
        {"state": "restarting", "epoch": 4, "diagnosis": crashed},
        {"state": "restarting", "epoch": 4, "diagnosis": crashed},
    ]
    lines = [json.dumps(event) + "\n" for event in events]
    instance = Instance(tmp_path, "m-0123456789")
    instance.folder.mkdir()
    cut = 5 if rotated else 0
    instance.events_path.with_name("events.jsonl.1").write_text("".join(lines[:cut]))
    instance.events_path.write_text("".join(lines[cut:]) + '{"state": "rea')
    assert restarts_by_cause(instance) == {"engine_hung": 1, "requested": 1, "engine_died": 2}
