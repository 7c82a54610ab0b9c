"""The machine and the environment: limits, memory, disks, variables, network, clock, kernel."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import psutil
import requests

import managed_vllm
from managed_vllm import variables as variables_of_servers
from managed_vllm.doctor.findings import Finding, error, ok, warning
from managed_vllm.errors import ConfigError
from managed_vllm.instance import external
from managed_vllm.masking import without_passwords

_FILES = 4096
"""Open files that a server under load and its users need."""
_FEW_FILES = 1024
_GIB = 2**30
_HUB_S = 10.0
_SKEW_S = 300.0
"""Seconds by which a clock may be wrong: what a signed URL or a token allows."""
_FOLDER_ROOM = {"state": 0.05, "temporary": 1.0, "cache": 2.0, "model": 10.0}
"""GiB below which a disk is said to be nearly full, by what lies on it."""


def open_files() -> Iterator[Finding]:
    """The limit of open files: supervisors raise theirs to the hard one, users don't."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    text = f"{'unlimited' if soft == unlimited else soft} (hard limit {'unlimited' if hard == unlimited else hard})"
    if hard != unlimited and hard < _FEW_FILES:
        yield error(
            "open files", text, f"a server needs more: raise the hard limit to {_FILES} (limits.conf, LimitNOFILE=)"
        )
    elif soft != unlimited and soft < _FEW_FILES:
        yield warning("open files", text, f"before many requests at once: ulimit -n {_FILES}")
    else:
        yield ok("open files", text)


def memory() -> Iterator[Finding]:
    """Memory of the machine, or of the cgroup that we are in, whichever is less."""
    machine = psutil.virtual_memory()
    limit = _cgroup_limit()
    free = machine.available if limit is None else min(machine.available, limit - _cgroup_usage())
    text = f"{free / _GIB:.1f} GiB free of {machine.total / _GIB:.1f} GiB"
    if limit is not None and limit < machine.total:
        text += f", of which this cgroup may use {limit / _GIB:.1f} GiB"
    if free < 2 * _GIB:
        yield warning("memory", text, "vLLM needs some 2 GiB beside the weights: end something, or raise the limit")
    else:
        yield ok("memory", text)


def _cgroup_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _first_line(path)
        if text is not None and text.isdecimal() and int(text) < 2**60:
            return int(text)
    return None


def _cgroup_usage() -> int:
    for path in ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes"):
        text = _first_line(path)
        if text is not None and text.isdecimal():
            return int(text)
    return 0


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().partition("\n")[0].strip()
    except OSError:
        return None


def shared_memory() -> Iterator[Finding]:
    """`/dev/shm`, through which vLLM's processes talk; Docker gives 64 MiB of it."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as failure:
        yield error("/dev/shm", f"is not there: {failure.strerror}", "mount a tmpfs on it")
        return
    text = f"{usage.free / _GIB:.2f} of {usage.total / _GIB:.2f} GiB free"
    if not os.access("/dev/shm", os.W_OK):
        yield error("/dev/shm", "can't be written", "chmod 1777 /dev/shm")
    elif usage.free < 128 << 20:
        yield warning("/dev/shm", text, "start the container with --shm-size=1g or --ipc=host, or remove what fills it")
    else:
        yield ok("/dev/shm", text)


def disks() -> Iterator[Finding]:
    """Room where servers put their state, temporary files, compiled code and models."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser()
    for what, folder in (
        ("state", Path(os.environ.get("MANAGED_VLLM_HOME") or "/tmp").expanduser()),
        ("temporary", Path(tempfile.gettempdir())),
        ("cache", cache),
        ("model", hub),
    ):
        there = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
        free = shutil.disk_usage(there).free / _GIB
        text = f"{what} files, {folder}: {free:.1f} GiB free"
        if not os.access(there, os.W_OK):
            yield warning("disks", f"{text}, but it can't be written", f"give another folder for {what} files")
        elif free < _FOLDER_ROOM[what]:
            yield warning("disks", text, "make room, or put them on another disk")
        else:
            yield ok("disks", text)


def variables() -> Iterator[Finding]:
    """Variables that lead elsewhere than one may think."""
    links = sorted(variables_of_servers.service_links(os.environ))
    if links:
        text = f"{', '.join(links)} come from a Kubernetes service named vllm; servers get none of them"
        yield warning("variables", text, "nothing need be done; enableServiceLinks: false keeps them out of the pod")
    try:
        variables_of_servers.inherited(os.environ)
    except ConfigError as failure:
        yield error("variables", failure.message, f"unset {failure.field}")
    urls = [without_passwords(url) for url in external.urls_from_environment()]
    if urls:
        yield warning(
            "variables",
            f"VLLM_SERVER_URL={','.join(urls)}: ManagedVLLM without base_url uses that server, and starts none",
            "unset it to start servers here; managed-vllm check asks that one",
        )
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield warning("variables", "HF_HUB_OFFLINE=1: models must be there already", "unset it to download some")


def proxies() -> Iterator[Finding]:
    """Proxies: ours bypass them for this machine, other programs' requests to a server may not."""
    names = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)]
    if names and not requests.utils.should_bypass_proxies("http://127.0.0.1", no_proxy=None):
        text = f"{', '.join(names)} applies to 127.0.0.1: curl and the OpenAI SDK ask the proxy for a server of ours"
        yield warning("proxies", text, "export no_proxy=127.0.0.1,localhost")


def clock() -> Iterator[Finding]:
    """A clock before the time at which these files were made is wrong: certificates fail, logs mislead."""
    made = Path(managed_vllm.__file__).stat().st_mtime
    if time.time() < made - 60:
        yield error("clock", f"it is {time.ctime()}, before managed_vllm was installed", "set the clock")


def loopback() -> Iterator[Finding]:
    """A server's port must be there, and reachable on 127.0.0.1."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as failure:
        if failure.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
            ports = (_first_line("/proc/sys/net/ipv4/ip_local_port_range") or "?").replace("\t", " to ")
            text = f"no port is free: programs hold those that the system gives away, {ports}"
            yield error("loopback", text, "end what holds them (ss -tanp), or widen net.ipv4.ip_local_port_range")
        else:
            yield error("loopback", f"127.0.0.1 can't be reached: {failure}", "ip link set lo up")


def kernel() -> Iterator[Finding]:
    """What supervisors use of the kernel."""
    if platform.system() != "Linux":
        yield error("kernel", f"{platform.system()} is not supported", "use Linux, or a server on Linux by base_url=")
        return
    yield ok(
        "kernel", f"Linux {platform.release()}, {os.cpu_count()} CPUs, {len(os.sched_getaffinity(0))} of them for us"
    )
    if _first_line("/proc/sys/kernel/yama/ptrace_scope") in ("2", "3"):
        yield warning("kernel", "ptrace_scope forbids stacks of a hung server", "nothing need be done")


def model_hub() -> Iterator[Finding]:
    """Whether the hub answers from which models that are no folder come."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    host = urllib.parse.urlsplit(url).hostname
    try:
        answer = requests.head(url, timeout=_HUB_S, allow_redirects=True)
        yield ok("model hub", f"{host} answers")
        yield from _clock_against(host, answer.headers.get("Date", ""))
    except (requests.RequestException, ValueError) as failure:
        why = "it did not answer in time" if isinstance(failure, requests.Timeout) else type(failure).__name__
        yield warning(
            "model hub", f"{host} can't be reached: {why}", "give models as folders, or set HF_ENDPOINT or a proxy"
        )


def _clock_against(host: str | None, date: str) -> Iterator[Finding]:
    with contextlib.suppress(TypeError, ValueError):  # it gives none
        skew_s = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
        if abs(skew_s) > _SKEW_S:
            way = "fast" if skew_s > 0 else "slow"
            yield warning("clock", f"{abs(skew_s) / 60:.0f} minutes {way}, says {host}", "set the clock, or run NTP")
