"""Rollouts over a Ray cluster: `run_on_ray` has a task of Ray's on each node, and each of them joins the same run.

Ray places the workers, and starts them again when they or their nodes die. Who plays which rollout is not its business:
the workers agree on that by the run's folder (`RunStore.join`), so that a killed worker's rollouts are played by the
others, and each is in the store once. The folder must be the same one on all nodes.
"""

from __future__ import annotations

import inspect
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from managed_vllm.agent.run import MakeEnvironment
from managed_vllm.agent.scheduler import StreamingTaskScheduler
from managed_vllm.agent.store import RunStore, StoredTrajectories
from managed_vllm.agent.tasks import Tasks, as_task, begun_at
from managed_vllm.agent.types import Task
from managed_vllm.errors import ConfigError, RunStoreError

log = logging.getLogger("managed_vllm.agent")

_LAST_S = 10.0
"""Seconds for the other workers to see that all has ended, once one has; then for those that are cancelled to end."""


@dataclass(frozen=True, slots=True)
class _Share:
    """What each worker is told. `token`: a file of the driver's in the run's folder."""

    path: Path
    config: Mapping[str, Any] | None
    force: bool
    token: Path
    make_llm: Callable[[], Any]
    make_environment: MakeEnvironment
    options: Mapping[str, Any]


def run_on_ray(
    tasks: Tasks,
    make_llm: Callable[[], Any],
    make_environment: MakeEnvironment,
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    force: bool = False,
    workers: int | None = None,
    worker_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> StoredTrajectories:
    """Plays the rollouts of the tasks on all nodes of a Ray cluster, into one run; waits until all of them have ended.

    The cluster is the one that the program is connected to, else the one that `ray.init()` finds or starts. Needs
    `pip install 'managed-vllm[ray]'`, on each node. Run it again to go on with what is missing or failed.

    Args:
        tasks: as for `StreamingTaskScheduler`, but not endless, nor asynchronous.
        make_llm: called in each worker; returns a `ManagedVLLM`, which attaches to the server of the worker's node or
            starts it, or one with `base_urls=` of servers elsewhere, or a `VLLMClient`. It is entered and left there.
        make_environment: as for `StreamingTaskScheduler`.
        path: the run's folder, on a file system that all nodes share.
        config, notes, force: as for `RunStore.join`.
        workers: how many; None: one on each node that has what a worker takes.
        worker_options: Ray's own for the task that a worker is: `num_gpus`, `num_cpus`, `resources`, `runtime_env`,
            `max_retries`. The GPUs of `num_gpus` are those that a server can have which the worker starts.
        **options: of `StreamingTaskScheduler`: `n`, `sampling_params`, `limits`, `agent`, …; `max_concurrency` is that
            of each worker. They travel to the workers, as do both functions.

    Returns the rollouts in the order of tasks and numbers, read from the store each time that one is asked for.

    A worker that ends with an error leaves its rollouts to the others, and a warning says so. Only if no worker comes
    to the end, the first one's error is raised: what `StreamingTaskScheduler.run_all` and `make_llm` raise, or one of
    Ray's own (`ray.exceptions`) where workers or nodes died more often than `max_retries` allows. `ConfigError`: Ray is
    missing, or no node has what a worker takes. `RunStoreError`: as for `RunStore.join`, or a node's folder is another.
    """
    ray = _ray()
    inspect.signature(StreamingTaskScheduler).bind(None, make_environment, **options)  # TypeError here, not over there
    if "store" in options or "images" in options:
        raise ConfigError("the workers join the run at path=; store= and images= can't be given", field="store")
    given = _listed(tasks)
    with RunStore.join(path, config, notes=notes, force=force) as store:
        assert store.claims is not None
        share = _Share(store.path, config, force, store.claims.token, make_llm, make_environment, options)
        if not ray.is_initialized():
            ray.init()
        _wait(ray, _begun(ray, share, given, workers, dict(worker_options or {})))
        store.refresh()
        return store.selected((task.id, rollout) for task in given for rollout in range(options.get("n", 1)))


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("run_on_ray needs Ray, which is missing: pip install 'managed-vllm[ray]'") from error
    return ray


def _listed(tasks: Tasks) -> list[Task]:
    if isinstance(tasks, str | Mapping | Task) or not hasattr(tasks, "__iter__"):
        raise ConfigError("tasks must be an iterable of tasks, and not an asynchronous one", field="tasks")
    return [as_task(task) for task in tasks]


def _begun(
    ray: Any, share: _Share, tasks: Sequence[Task], workers: int | None, asked: dict[str, Any]
) -> dict[Any, str]:
    """The workers, by Ray's references to their results, with the node that each is meant for."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _fitting(ray.nodes(), asked)
    count = len(nodes) if workers is None else workers
    if count < 1:
        raise ConfigError("workers must be 1 or more", field="workers")
    told = ray.put((share, tuple(tasks)))
    begun = {}
    for number in range(count):
        node = nodes[number % len(nodes)]
        # Soft: what is tried again after the node's death may be tried elsewhere.
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        play = ray.remote(_play).options(**{"name": "managed-vllm rollouts", "scheduling_strategy": place, **asked})
        begun[play.remote(told, number / count)] = str(node["NodeName"])
    return begun


def _fitting(nodes: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The living nodes that have, in all, what a worker takes."""
    takes = {"CPU": asked.get("num_cpus", 1), "GPU": asked.get("num_gpus", 0), **asked.get("resources", {})}
    takes = {name: amount for name, amount in takes.items() if amount}
    found = [
        node
        for node in nodes
        if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in takes.items())
    ]
    if not found:
        raise ConfigError(f"no node of the Ray cluster has what a worker takes: {takes}", field="worker_options")
    return sorted(found, key=lambda node: str(node["NodeID"]))


def _play(told: tuple[_Share, tuple[Task, ...]], begin: float) -> None:
    """A worker, in a process of Ray's: plays what no other one does. `begin`: where in the tasks, a share of them."""
    share, tasks = told
    if not share.token.exists():
        raise RunStoreError(
            f"the folder {share.path} of {socket.gethostname()} is not that of the driver: all nodes of the cluster "
            "must share it (NFS, Lustre, …), under the same path",
            path=str(share.path),
        )
    with share.make_llm() as llm, RunStore.join(share.path, share.config, force=share.force) as store:
        scheduler = StreamingTaskScheduler(llm, share.make_environment, store=store, **share.options)
        scheduler.run_all(begun_at(tasks, begin), keep=False)


def _wait(ray: Any, workers: dict[Any, str]) -> None:
    """Until one of them has come to the end: then all rollouts have ended, and the others are about to."""
    left, over = list(workers), False
    first_error: BaseException | None = None
    try:
        while left:
            ended, left = ray.wait(left, timeout=_LAST_S if over else None)
            if not ended:
                return
            try:
                ray.get(ended[0])
                over = True
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error  # what was raised over there
                log.warning(
                    "the worker on %s ended with an error: %s: %s", workers[ended[0]], type(cause).__name__, cause
                )
                first_error = first_error or cause
        if not over and first_error is not None:
            raise first_error
    finally:
        for worker in left:
            ray.cancel(worker)
        if left:
            _, deaf = ray.wait(left, num_returns=len(left), timeout=_LAST_S)
            for worker in deaf:
                ray.cancel(worker, force=True)
