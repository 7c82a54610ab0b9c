"""What happens in a run, and when: a pure function of its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

STOPS_AND_HANGS = True
"""Whether the library finds servers that hang (`ManagedVLLM(hang=…)`): without it these strikes would end no run."""

KILLS = ("kill-api", "kill-engine", "kill-worker", "kill-supervisor", "kill-supervisor+api")
STOPS = ("stop-api", "stop-engine", "stop-worker")
IMAGE_KILLS = ("kill-image", "kill-supervisor+image", "kill-image+api")
CLIENTS = ("kill-client", "new-client", "client-leaves", "restart")
FAULTS = (
    *("crash", "crash-engine", "crash-worker", "500", "503", "abort", "truncated", "halfstream", "streamerror"),
    *("garbage", "flood", "slow"),
)
WORLD = ("batch-signals", "remove-folder")
"""What a machine does: a batch system signals all processes of a step, somebody clears temporary folders."""
HANGS = ("hang-api", "hang-engine", "hang-worker")
"""`FAULTS` and `HANGS` are ordered in the stand-in's folder of faults: the next request meets them."""

DISRUPTIVE = (
    *KILLS,
    "kill-supervisor+image",
    "kill-image+api",
    *STOPS,
    *HANGS,
    "crash",
    "crash-engine",
    "crash-worker",
)
"""After these the server has to come back."""

_REAL_STRIKES = ("kill-api", "kill-engine", "kill-worker", "kill-supervisor", *STOPS)


@dataclass(frozen=True)
class Strike:
    """`at_s` seconds after the clock began; `victim` chooses among the clients that live then, where one is meant."""

    at_s: float
    kind: str
    victim: int = 0


@dataclass(frozen=True)
class Member:
    """A client process that sends requests from `arrives_s` to `leaves_s`, `threads` at once."""

    arrives_s: float
    leaves_s: float
    threads: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """One run. `orders` are the stand-in's; `@` in them stands for the run's folder.

    The clock begins with the first answer, or with the first client if `from_start`: then it strikes a server that
    starts as well. A kind may be met twice, a victim may be gone.
    """

    seed: int
    lasts_s: float
    keep_alive_s: float
    from_start: bool = False
    orders: dict[str, Any] = field(default_factory=dict)
    members: tuple[Member, ...] = ()
    strikes: tuple[Strike, ...] = ()

    def __str__(self) -> str:
        lines = [f"plan of seed {self.seed}: {self.lasts_s:.1f} s, keep_alive {self.keep_alive_s:g}, {self.orders}"]
        lines[0] += ", from the start" if self.from_start else ""
        lines += [f"  client {m.arrives_s:.2f}-{m.leaves_s:.2f} s, {m.threads} threads" for m in self.members]
        lines += [f"  {s.at_s:.2f} s  {s.kind}" for s in self.strikes]
        return "\n".join(lines)


def plan_for(seed: int) -> Plan:
    """A run against the stand-in: 2-4 clients, 2-5 strikes within some three seconds, half of them one of `WORLD`."""
    rng = random.Random(seed)
    lasts = rng.uniform(1.5, 2.5)
    kinds = [*KILLS, *CLIENTS, *FAULTS, *(STOPS + HANGS if STOPS_AND_HANGS else ())]
    strikes = [
        Strike(round(rng.uniform(0.2, lasts), 3), rng.choice(kinds), rng.randrange(1 << 16))
        for _ in range(rng.randint(2, 5))
    ]
    world = random.Random(f"world {seed}")
    if world.random() < 0.5:
        strikes.append(Strike(round(world.uniform(0.2, lasts), 3), world.choice(WORLD)))
    arrivals = [0.0, *(rng.choice([0.0, 0.0, rng.uniform(0, 1.0)]) for _ in range(rng.randint(1, 3)))]
    arrivals += [strike.at_s for strike in strikes if strike.kind == "new-client"]
    members = [
        Member(
            round(at, 3), round(lasts if rng.random() < 0.8 else rng.uniform(at + 0.5, lasts + 0.5), 3), threads, key
        )
        for at in arrivals
        for threads, key in [(rng.randint(1, 3), rng.randrange(1 << 30))]
    ]
    orders: dict[str, Any] = {"tree": True, "faults": "@/faults", "token_s": rng.choice([0, 0.002, 0.005, 0.02])}
    if rng.random() < 0.3:
        orders["shm"] = "@/segments"
    if rng.random() < 0.1:
        orders["orphans"] = True
    if rng.random() < 0.1:
        orders["ignore_sigterm"] = True
    odd = rng.random()
    if odd < 0.06:
        orders["crash_at"] = rng.randint(5, 30)
    elif odd < 0.12:
        orders["steal_port"] = "@/stolen"
    elif odd < 0.15 and STOPS_AND_HANGS:
        orders["lose_port"] = True
    return Plan(
        seed=seed,
        lasts_s=round(lasts, 3),
        keep_alive_s=rng.choice([0.0, 0.2, 0.5]),
        from_start=rng.random() < 0.25,
        orders=orders,
        members=tuple(members),
        strikes=tuple(sorted(strikes, key=lambda strike: strike.at_s)),
    )


def warm_plan_for(seed: int) -> Plan:
    """`plan_for`, for a server that is forked from a warm image: one more strike, for which the image dies as well."""
    rng = random.Random(-1 - seed)
    plan = plan_for(seed)
    strike = Strike(round(rng.uniform(0.0, plan.lasts_s), 3), rng.choice(IMAGE_KILLS))
    strikes = tuple(sorted((*plan.strikes, strike), key=lambda strike: strike.at_s))
    return replace(plan, strikes=strikes)


def real_plan_for(seed: int) -> Plan:
    """A run against the real vLLM: one client, one or two strikes, the second some seconds after the first."""
    rng = random.Random(seed)
    kinds = [kind for kind in _REAL_STRIKES if STOPS_AND_HANGS or kind not in STOPS]
    # The first of them goes round, so that few runs meet all kinds.
    strikes = [Strike(round(rng.uniform(0.5, 3.0), 3), kinds[seed % len(kinds)])]
    if rng.random() < 0.3:
        strikes.append(Strike(round(strikes[0].at_s + rng.uniform(0.1, 40.0), 3), rng.choice(kinds)))
    lasts = strikes[-1].at_s + 2.0
    members = (Member(0.0, lasts, 2, rng.randrange(1 << 30)),)
    return Plan(seed=seed, lasts_s=lasts, keep_alive_s=5.0, members=members, strikes=tuple(strikes))
