"""Replicas on the command line: a line, a log and metrics of each."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import standin
from processes import HANG_S, eventually
from prometheus_client.parser import text_string_to_metric_families

from managed_vllm.cli.logs import ServerLogs
from managed_vllm.cli.looks import Looker
from managed_vllm.cli.metrics import exposition
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.event_history import restarts_by_cause

PROGRAM = [sys.executable, "-m", "managed_vllm.cli"]


def said(*words: str) -> str:
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("home")
def test_a_server_with_replicas_is_shown_as_one_and_one_by_one(home: Path) -> None:
    stand_in = ["--command", shlex.join(standin.command())]
    row = json.loads(said("up", "--model", "m", "--name", "pair", "--replicas", "2", *stand_in, "--json"))
    first, second = row["replicas"]
    assert (first["state"], second["state"], row["state"]) == ("ready", "ready", "ready")
    lines = said("status").splitlines()
    assert [line.split()[0] for line in lines if line.strip()][2:5] == [row["id"], "0", "1"]
    for line, one in zip(lines[4:6], (first, second), strict=True):
        assert {one["base_url"], str(one["server_pid"]), str(one["epoch"])} <= set(line.split())

    looker = Looker(home)
    (look,) = eventually(lambda: [one for one in looker.look() if all(each.metrics for each in one.replicas)], "told")
    assert [one.epoch for one in look.metrics.replicas] == [first["epoch"], second["epoch"]]
    assert all(0 < one.memory_bytes < look.memory_bytes for one in look.replicas)
    os.kill(second["server_pid"], signal.SIGKILL)
    eventually(lambda: looker.look()[0].replicas[1].row["epoch"] == 3, "it is started again")
    (look,) = eventually(lambda: [one for one in looker.look() if one.replicas[1].metrics], "it serves again")
    assert [one.row["restarts"] for one in look.replicas] == [0, 1]
    eventually(lambda: all(one.rates for one in looker.look()[0].replicas), "the rates of both are known")

    families = list(text_string_to_metric_families(exposition(home).decode()))
    assert len({family.name for family in families}) == len(families)
    by_name = {sample.name: sample for family in families for sample in family.samples}
    labels = {(sample.name, sample.labels.get("replica")) for family in families for sample in family.samples}
    for name in ("vllm:num_requests_running", "managed_vllm_replica_epoch", "managed_vllm_health_seconds_count"):
        assert {which for told, which in labels if told == name} == {"0", "1"}
    assert by_name["managed_vllm_epoch"].value == 3
    assert restarts_by_cause(Instance(home, row["id"])) == {"killed": 1}

    heads = [line[:4] for line in said("logs", "pair").splitlines()]
    assert set(heads) == {"[0] ", "[1] "}
    assert not said("logs", "pair", "--replica", "1").startswith("[")
    refused = subprocess.run([*PROGRAM, "logs", "--replica", "7"], capture_output=True, text=True)
    assert (refused.returncode, "there are: 0, 1" in refused.stderr) == (2, True)
    said("down", "pair")


def test_logs_of_replicas_are_one_line_by_line(tmp_path: Path) -> None:
    instance = Instance(tmp_path, "m-0123456789")
    instance.folder.mkdir()
    first, second = (instance.of_replica(number).server_log for number in range(2))
    first.write_text("a\nb\n")
    with ServerLogs(instance) as logs:
        assert logs.backlog(1) == "[0] b\n"
        second.write_text("x\nhal")  # it appears later, and its last line is not whole yet
        assert logs.news() == "[1] x\n"
        with second.open("a") as more:
            more.write("f\n")
        assert logs.news() == "[1] half\n"
        assert logs.news() == ""
    with ServerLogs(instance, replica=1) as logs:
        assert logs.backlog(None) == "x\nhalf\n"


def test_events_of_replicas_whose_epochs_interleave_are_counted_once_each(tmp_path: Path) -> None:
    killed = {"diagnosis": {"cause": "killed"}}
    events = [
        {"state": "starting", "epoch": 1, "replica": 0},
        {"state": "starting", "epoch": 2, "replica": 1},
        {"state": "ready", "epoch": 2, "replica": 1},
        {"state": "ready", "epoch": 1, "replica": 0},
        {"state": "restarting", "epoch": 2, "replica": 1, **killed},
        {"state": "restarting", "epoch": 1, "replica": 0},  # requested
        {"state": "restarting", "epoch": 3, "replica": 1, **killed},
        {"state": "restarting", "epoch": 4, "replica": 0},
        {"state": "restarting", "epoch": 4},  # the instance's own word, of the newest epoch
        {"state": "ready", "epoch": 3, "replica": 1},
        {"state": "restarting", "epoch": 3, "replica": 1, **killed},
    ]
    instance = Instance(tmp_path, "m-0123456789")
    instance.folder.mkdir()
    instance.events_path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert restarts_by_cause(instance) == {"killed": 2, "requested": 1}
