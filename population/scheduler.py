"""Who is updated next: a pure function of columns.

Tenants share a wave in proportion to their weights, by start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM '96):
each has a virtual time, what it was served over its weight, and the one that is behind goes first. Within a tenant
users wait in one line; who was served and has more goes to its end. Pending evidence and being hot move a user ahead by
a bounded time, so that ageing always wins: nobody waits for ever, whatever the weights.

A user's events are consumed in the order in which they arrived: a user's share of a wave is a prefix of what waits.

Suffixes: U users with something waiting, G tenants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from populace.configs.schema import SchedulerSettings
from populace.population.experience import UserId
from populace.population.stream import LoggedEvent
from populace.storage.records import Position, SettledEvent

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Everybody who may be in the next wave; all columns are [U]."""

    since_U: Floats
    """Seconds; when the user got in line."""
    num_events_U: NDArray[np.uint32]
    tokens_U: NDArray[np.uint32]
    """Of the next update, estimated."""
    tenant_U: NDArray[np.uint16]
    rank_U: NDArray[np.int64]
    load_bytes_U: Floats
    """What has to be paged in; 0 for hot adapters."""
    is_hot_U: NDArray[np.bool_]
    updated_U: Floats
    """Seconds; the last update, minus infinity for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one wave may take; None: as much as it likes. Each must have room for any one user."""

    max_adapters: int
    max_tokens: float | None = None
    max_rank: float | None = None
    """Sum over the wave's adapters."""
    max_load_bytes: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """See configs/schema.py, SchedulerSettings."""

    weight_G: Floats
    events_per_update: int
    residency_bonus_s: float = 0.0
    evidence_bonus_s: float = 0.0
    min_events: int = 1
    patience_s: float = 60.0
    cool_down_s: float = 0.0


def policy_of(settings: SchedulerSettings) -> Policy:
    """How the scheduler decides, from the settings."""
    weights = [settings.weight, *(tenant.weight for tenant in settings.tenants.values())]
    return Policy(
        weight_G=np.array(weights, np.float64),
        events_per_update=settings.events_per_update,
        residency_bonus_s=settings.residency_bonus_s,
        evidence_bonus_s=settings.evidence_bonus_s,
        min_events=settings.min_events,
        patience_s=settings.patience_s,
        cool_down_s=settings.cool_down_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the tenants got so far: the scheduler's only memory."""

    time_G: Floats
    """Virtual time: shares of a wave served, over the weight."""

    @staticmethod
    def nothing(num_tenants: int) -> Served:
        return Served(time_G=np.zeros(num_tenants))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The users of a wave, as indices into the candidates in order of service, and the tenants' new account."""

    chosen: NDArray[np.int64]
    served: Served
    was_cut: bool
    """Whether somebody who was ready had to stay out."""


def form_wave(candidates: Candidates, budget: Budget, policy: Policy, served: Served, now_s: float) -> Choice:
    """The next wave. Same inputs, same wave; no budget is ever exceeded.

    A user who doesn't fit beside the others keeps its tenant's later users out of this wave, so that the tenant's
    virtual time stands still until the user is first of all and fits alone."""
    is_ready_U = _is_ready(candidates, policy, now_s)
    num_ready = int(is_ready_U.sum())
    if num_ready == len(is_ready_U):
        order = _fronts(_places_U(candidates, policy), candidates.tenant_U, budget.max_adapters)
    else:
        ready = np.flatnonzero(is_ready_U)
        order = _fronts(_places_U(candidates, policy)[ready], candidates.tenant_U[ready], budget.max_adapters)
        order = ready[order]
    tenant, cost = candidates.tenant_U[order], _cost(candidates, budget, order)
    finish = _finish_times(tenant, cost, policy.weight_G, served.time_G)
    taken = _fill(candidates, budget, order, np.argsort(finish, kind="stable"))
    time_G = served.time_G.copy()
    np.add.at(time_G, tenant[taken], cost[taken] / policy.weight_G[tenant[taken]])
    return Choice(
        chosen=order[taken], served=Served(time_G=_without_credit(time_G, tenant)), was_cut=len(taken) < num_ready
    )


def _is_ready(candidates: Candidates, policy: Policy, now_s: float) -> NDArray[np.bool_]:
    """Enough evidence, or waited long enough for it; not updated a moment ago."""
    ready = now_s - candidates.updated_U >= policy.cool_down_s
    if policy.min_events > 1:
        has_waited = now_s - candidates.since_U >= policy.patience_s
        # Without anything to train on there is only something to settle, which needs no evidence.
        ready &= (candidates.num_events_U >= policy.min_events) | has_waited | (candidates.num_events_U == 0)
    result: NDArray[np.bool_] = ready
    return result


def _places_U(candidates: Candidates, policy: Policy) -> Floats:
    """When everybody got in line, bonuses counted."""
    place_U = candidates.since_U
    if policy.residency_bonus_s:
        place_U = place_U - policy.residency_bonus_s * candidates.is_hot_U
    if policy.evidence_bonus_s:
        # Twice the evidence of an update is as much as counts.
        most = 2 * policy.events_per_update
        place_U = place_U - np.minimum(candidates.num_events_U, most) * (policy.evidence_bonus_s / most)
    return place_U


def _fronts(place_U: Floats, tenant_U: NDArray[np.uint16], length: int) -> NDArray[np.int64]:
    """The first `length` of every tenant's line, tenant by tenant: no wave can take more, and the rest needs no
    sorting."""
    by_tenant = np.argsort(tenant_U, kind="stable")
    sizes = np.bincount(tenant_U) if len(tenant_U) else np.zeros(0, np.int64)
    keep = np.ones(len(by_tenant), bool)
    for start, size in zip((np.cumsum(sizes) - sizes).tolist(), sizes.tolist(), strict=True):
        if size > length:
            own = by_tenant[start : start + size]
            by_tenant[start : start + size] = own[np.argpartition(place_U[own], length)]
            keep[start + length : start + size] = False
    front = by_tenant[keep]
    order: NDArray[np.int64] = front[np.lexsort((place_U[front], tenant_U[front]))]
    return order


def _cost(candidates: Candidates, budget: Budget, order: NDArray[np.int64]) -> Floats:
    """Share of a wave that each takes, by the resource that it takes most of (dominant share)."""
    cost = np.full(len(order), 1.0 / budget.max_adapters)
    for column_U, most in _resources(candidates, budget):
        cost = np.maximum(cost, column_U[order] / most)
    return cost


def _resources(candidates: Candidates, budget: Budget) -> list[tuple[NDArray[Any], float]]:
    columns = (
        (candidates.tokens_U, budget.max_tokens),
        (candidates.rank_U, budget.max_rank),
        (candidates.load_bytes_U, budget.max_load_bytes),
    )
    return [(column, most) for column, most in columns if most is not None]


def _finish_times(tenant: NDArray[np.uint16], cost: Floats, weight_G: Floats, time_G: Floats) -> Floats:
    """Virtual time at which each would be served if its tenant's line moved up to it; `tenant` is sorted."""
    if not len(tenant):
        return cost
    share = cost / weight_G[tenant]
    total = np.cumsum(share)
    starts = np.flatnonzero(np.r_[True, tenant[1:] != tenant[:-1]])
    before = (total - share)[starts]
    lengths = np.diff(np.r_[starts, len(tenant)])
    finish: Floats = total - np.repeat(before, lengths) + time_G[tenant]
    return finish


def _fill(
    candidates: Candidates, budget: Budget, order: NDArray[np.int64], line: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Places in `order` that fit together, in the order of `line`."""
    resources = _resources(candidates, budget)
    left = [most for _, most in resources]
    taken: list[int] = []
    blocked: set[int] = set()
    for start in range(0, len(line), 2 * budget.max_adapters):
        places = line[start : start + 2 * budget.max_adapters]
        rows = order[places]
        wanted = (
            zip(*(column[rows].tolist() for column, _ in resources), strict=True) if resources else [()] * len(rows)
        )
        for place, group, need in zip(places.tolist(), candidates.tenant_U[rows].tolist(), wanted, strict=True):
            if len(taken) == budget.max_adapters:
                return np.array(taken, np.int64)
            if group in blocked:
                continue
            room = [have - amount for have, amount in zip(left, need, strict=True)]
            if min(room, default=0.0) < 0:
                blocked.add(group)
                continue
            left = room
            taken.append(place)
    return np.array(taken, np.int64)


def _without_credit(time_G: Floats, tenant: NDArray[np.uint16]) -> Floats:
    """Who had nothing waiting saves up nothing: it starts again level with those who wait."""
    is_waiting = np.zeros(len(time_G), bool)
    is_waiting[np.unique(tenant)] = True
    if is_waiting.any():
        level = time_G[is_waiting].min()
        time_G = np.where(is_waiting, time_G, np.maximum(time_G, level)) - level  # only differences count
    return time_G


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveMember:
    """One adapter's share of a wave."""

    user: UserId
    pseudonym: str
    partition: int
    events: tuple[LoggedEvent, ...]
    rejected: tuple[SettledEvent, ...]
    """Events in the same prefix that are settled without a try."""

    @property
    def consumed(self) -> Position:
        """Everything of this user up to here is accounted for once the wave commits."""
        positions = [event.ref.position for event in self.events]
        return max(positions + [item.event.position for item in self.rejected])


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """The adapters that one fused step updates. No adapter is in it twice."""

    wave_id: str
    members: tuple[WaveMember, ...]


def wave_of(members: Iterable[WaveMember]) -> Wave:
    """A wave under a name that only this set of adapters and events can have."""
    members = tuple(members)
    digest = hashlib.blake2b(digest_size=12)
    for member in members:
        digest.update(f"{member.pseudonym}:{member.consumed};".encode())
    return Wave(wave_id=digest.hexdigest(), members=members)
