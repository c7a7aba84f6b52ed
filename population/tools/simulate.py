"""The scheduler before it is deployed: synthetic users send events, and `form_wave`, the very
function that a run uses, decides who is served. No model, no store, no clock: an hour takes
seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from populace.configs.schema import Settings
from populace.population.experience.pending import Candidates
from populace.population.waves.scheduler import Served, form_wave, weights_of
from populace.storage.errors import InvalidInput
from populace.storage.lru import Lru

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Who sends how much."""

    users: int = 10_000
    events_per_s: float = 50.0
    hours: float = 1.0
    wave_s: float = 1.0
    """How long a wave takes."""
    zipf: float = 1.0
    """The r-th busiest user of a tenant sends in proportion to 1 / r**zipf; 0: all alike."""
    day_amplitude: float = 0.0
    """0 to 1: how far the rate swings over 24 hours."""
    burst_every_s: float = 0.0
    """Mean time between bursts; 0: none."""
    burst_s: float = 30.0
    burst_factor: float = 5.0
    tokens_per_event: int = 200
    rank: int = 8
    shares: tuple[float, ...] = (1.0,)
    """Tenant by tenant, the share of the events that its users send; the first one is the default
    tenant."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantFigures:
    """How one tenant fared."""

    name: str
    weight: float
    arrived: int
    served: int
    waiting: int
    wait_median_s: float
    wait_99_s: float
    wait_longest_s: float
    """Longest wait of the events served, and of those that still wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationReport:
    """What a simulation showed."""

    tenants: tuple[TenantFigures, ...]
    num_waves: int
    adapters_per_wave: float
    events_per_s: float
    """Served."""
    fairness: float
    """Jain's index of what the tenants that always had something waiting got over their weights; 1
    is fair, 1/n is one taking all (Jain, Chiu, Hawe 1984)."""
    hot_share: float
    """Share of the adapters that a wave needed and that were still in a slot."""
    waves: tuple[NDArray[np.int64], ...]
    """Users of every wave."""


def jain(values: Sequence[float] | Floats) -> float:
    """Jain's fairness index of an allocation."""
    array = np.asarray(values, np.float64)
    return float(array.sum() ** 2 / (len(array) * (array**2).sum())) if array.any() else 1.0


def check(load: Load) -> None:
    """`InvalidInput` for a load that makes no sense."""
    for name in (
        "users",
        "events_per_s",
        "hours",
        "wave_s",
        "burst_s",
        "burst_factor",
        "tokens_per_event",
        "rank",
    ):
        if not getattr(load, name) > 0:
            raise InvalidInput(f"{name} is {getattr(load, name)}; use a number above zero")
    if not 0 <= load.day_amplitude <= 1:
        raise InvalidInput(
            f"day_amplitude is {load.day_amplitude}; use 0 (no swing) to 1 (nobody at night)"
        )
    if load.zipf < 0 or load.burst_every_s < 0 or min(load.shares) <= 0:
        raise InvalidInput(
            "zipf, burst_every_s and the tenants' shares can't be negative, and no share can be 0"
        )
    if load.users < len(load.shares):
        raise InvalidInput(
            f"users is {load.users}; {len(load.shares)} tenants need at least one each"
        )


def simulate(load: Load, settings: Settings) -> SimulationReport:
    """Run `load` against the scheduler of `settings`."""
    check(load)
    scheduler = settings.scheduler
    line = _Line(load, scheduler.events_per_update)
    served, slots = Served.nothing(len(load.shares)), Lru[int](scheduler.slots)
    tally = _Tally(len(load.shares))
    for now, arrivals in _arrivals(load):
        line.arrive(arrivals, now)
        choice = form_wave(line.candidates(slots), scheduler, served, now)
        served, chosen = choice.served, choice.chosen
        tally.always &= line.waiting_by_tenant() > 0
        tally.num_hot += sum(user in slots for user in chosen.tolist())
        for user in chosen.tolist():
            tenant = int(line.tenant[user])
            tally.waits[tenant] += [now - time for time in line.serve(user, now)]
            tally.got[tenant] += 1
            slots.put(user, 1, ())
        if len(chosen):
            tally.waves.append(chosen)
    return _report(load, settings, line, tally)


class _Tally:
    """What the tenants got so far."""

    def __init__(self, num_tenants: int) -> None:
        self.waits: list[list[float]] = [[] for _ in range(num_tenants)]
        """Seconds that each event served had waited, by tenant."""
        self.got = np.zeros(num_tenants)
        """Updates."""
        self.always = np.ones(num_tenants, bool)
        """Whether the tenant had somebody waiting before every wave."""
        self.waves: list[NDArray[np.int64]] = []
        self.num_hot = 0


class _Line:
    """Users and their waiting events, as the pending index keeps them."""

    def __init__(self, load: Load, events_per_update: int) -> None:
        self._load, self._events_per_update = load, events_per_update
        self.tenant = np.arange(load.users, dtype=np.int64) % len(load.shares)
        self.pending: list[deque[float]] = [deque() for _ in range(load.users)]
        self.num_events = np.zeros(load.users, np.uint32)
        self.since, self.updated = np.zeros(load.users), np.full(load.users, -np.inf)
        self.arrived = np.zeros(len(load.shares), np.int64)

    def arrive(self, users: NDArray[np.int64], now: float) -> None:
        fresh = users[self.num_events[users] == 0]
        self.since[fresh] = now
        for user in users.tolist():
            self.pending[user].append(now)
        np.add.at(self.num_events, users, 1)
        np.add.at(self.arrived, self.tenant[users], 1)

    def candidates(self, slots: Lru[int]) -> Candidates:
        is_hot = np.zeros(self._load.users, bool)
        is_hot[list(slots)] = True
        events = np.minimum(self.num_events, self._events_per_update)
        return Candidates(
            row_U=np.flatnonzero(self.num_events),
            since=self.since,
            num_events=self.num_events,
            tokens=(events * self._load.tokens_per_event).astype(np.uint32),
            tenant=self.tenant.astype(np.uint16),
            rank=np.full(self._load.users, self._load.rank, np.uint32),
            is_hot=is_hot,
            updated=self.updated,
        )

    def serve(self, user: int, now: float) -> list[float]:
        """Take one update's events; returns when they arrived."""
        pending = self.pending[user]
        times = [pending.popleft() for _ in range(min(len(pending), self._events_per_update))]
        self.num_events[user] = len(pending)
        self.since[user] = self.updated[user] = now
        return times

    def waiting_by_tenant(self) -> NDArray[np.int64]:
        waiting: NDArray[np.int64] = np.bincount(
            self.tenant, self.num_events, len(self._load.shares)
        ).astype(np.int64)
        return waiting


def _arrivals(load: Load) -> list[tuple[float, NDArray[np.int64]]]:
    """(time, users who send an event) for every wave."""
    random = np.random.default_rng(load.seed)
    rates, users = [], []
    for tenant, share in enumerate(load.shares):
        own = np.arange(tenant, load.users, len(load.shares))
        weight = 1.0 / np.arange(1, len(own) + 1) ** load.zipf
        users.append(own)
        rates.append(share / sum(load.shares) * weight / weight.sum())
    everybody, rate = np.concatenate(users), np.concatenate(rates)
    cumulated = np.cumsum(rate)
    arrivals, burst_until, next_burst = [], 0.0, random.exponential(load.burst_every_s or np.inf)
    for number in range(int(load.hours * 3600 / load.wave_s)):
        now = number * load.wave_s
        if load.burst_every_s and now >= next_burst:
            burst_until, next_burst = (
                now + load.burst_s,
                now + random.exponential(load.burst_every_s),
            )
        # A day begins at midnight; the peak is at noon.
        factor = 1.0 - load.day_amplitude * np.cos(2 * np.pi * now / 86_400)
        factor *= load.burst_factor if now < burst_until else 1.0
        count = random.poisson(load.events_per_s * load.wave_s * factor)
        drawn = np.searchsorted(cumulated, random.random(count) * cumulated[-1])
        arrivals.append((now, everybody[np.minimum(drawn, len(everybody) - 1)]))
    return arrivals


def _report(load: Load, settings: Settings, line: _Line, tally: _Tally) -> SimulationReport:
    end, waiting = load.hours * 3600, line.waiting_by_tenant()
    weight_G = weights_of(settings.scheduler)
    waits, got, waves = tally.waits, tally.got, tally.waves
    names = ("default", *settings.scheduler.tenants)
    tenants = []
    for tenant, name in enumerate(names[: len(load.shares)]):
        heads = [own[0] for own in line.pending[tenant :: len(load.shares)] if own]
        served = np.array(waits[tenant] or [0.0])
        longest = max(float(served.max()), end - min(heads, default=end))
        tenants.append(
            TenantFigures(
                name=name, weight=float(weight_G[tenant]), arrived=int(line.arrived[tenant]),
                served=len(waits[tenant]), waiting=int(waiting[tenant]),
                wait_median_s=float(np.median(served)),
                wait_99_s=float(np.quantile(served, 0.99)), wait_longest_s=longest,
            )
        )  # fmt: skip
    num_served = sum(len(own) for own in waits)
    num_updates = max(1, sum(len(wave) for wave in waves))
    return SimulationReport(
        tenants=tuple(tenants),
        num_waves=len(waves),
        adapters_per_wave=num_updates / max(1, len(waves)),
        events_per_s=num_served / end,
        fairness=jain((got / weight_G[: len(got)])[tally.always]) if tally.always.any() else 1.0,
        hot_share=tally.num_hot / num_updates,
        waves=tuple(waves),
    )
