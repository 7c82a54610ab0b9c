"""`managed-vllm doctor`: what on this machine keeps servers from starting, or may surprise whoever uses them.

Each check looks at one thing and says what it saw, and what to do. It changes nothing; `fix` of a finding does, and
only to what is ours. A check that can't look (no permission, no such file on this system) says so or nothing, and fails
none of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from managed_vllm.doctor.findings import Finding

Check = Callable[[], "Iterator[Finding]"]


def examine(python: str | None = None, *, network: bool = True) -> Iterator[Finding]:
    """Every finding, as it is made.

    Args:
        python: the interpreter that runs vLLM; None: this one.
        network: whether the model hub is asked for.
    """
    from managed_vllm.doctor import gpus, machine, servers, software
    from managed_vllm.doctor.findings import warning

    checks: list[tuple[str, Check]] = [
        ("interpreter", software.interpreter),
        ("vLLM", lambda: software.vllm(python)),
        ("GPUs", lambda: gpus.gpus(python)),
        ("state directory", servers.state_directory),
        ("dead servers", servers.dead_servers),
        ("strays", servers.strays),
        ("strays", servers.others_strays),
        ("scratch folders", servers.scratch_folders),
        ("open files", machine.open_files),
        ("memory", machine.memory),
        ("/dev/shm", machine.shared_memory),
        ("disks", machine.disks),
        ("variables", machine.variables),
        ("proxies", machine.proxies),
        ("clock", machine.clock),
        ("loopback", machine.loopback),
        ("kernel", machine.kernel),
    ]
    if network:
        checks.append(("model hub", machine.model_hub))
    for topic, check in checks:
        try:
            yield from check()
        except Exception as failure:  # whatever it is, the other checks are worth having
            yield warning(topic, f"could not be looked at: {failure!r}", "please report this")
