"""Who is updated next: a pure function of columns.

Tenants share a wave in proportion to their weights, by start-time fair queueing (Goyal, Vin, Cheng,
SIGCOMM '96): each has a virtual time, what it was served over its weight, and the one that is
behind goes first. Within a tenant users wait in one line; who was served and has more goes to its
end. Pending evidence and being hot move a user ahead by a bounded time, so that ageing always wins:
nobody waits for ever, whatever the weights.

A user's events are consumed in the order in which they arrived: a user's share of a wave is a
prefix of what waits.

Suffixes: U users with something waiting, G tenants.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from populace.configs.schema import SchedulerSettings
from populace.population.experience.pending import Candidates, Floats


def weights_of(settings: SchedulerSettings) -> Floats:
    """[G] weights of the tenants: first of the users that belong to none."""
    tenants = settings.tenants.values()
    return np.array([settings.weight, *(tenant.weight for tenant in tenants)], np.float64)


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
    """The rows of a wave's users in order of service, and the tenants' new account."""

    chosen: NDArray[np.int64]
    served: Served
    was_cut: bool
    """Whether somebody who was ready had to stay out."""


def form_wave(
    candidates: Candidates, settings: SchedulerSettings, served: Served, now_s: float
) -> Choice:
    """The next wave. Same inputs, same wave; no budget of `settings` is exceeded, except by a user
    who alone is above it.

    A user who doesn't fit beside the others keeps its tenant's later users out of this wave, so
    that the tenant's virtual time stands still until the user is first of all and fits alone."""
    most, weight_G = settings.max_adapters_per_wave, weights_of(settings)
    row_U = _ready(candidates, settings, now_s)
    place_U = _places(candidates, settings, row_U)
    front = row_U[_fronts(place_U, candidates.tenant[row_U], most)]
    tenant, demands = candidates.tenant[front], _demands(candidates, settings, front)
    # A tenant pays for the resource of which a user takes the largest share of a wave.
    shares = [np.full(len(front), 1 / most), *(column / budget for column, budget in demands)]
    cost = np.maximum.reduce(shares)
    finish = _finish_times(tenant, cost, weight_G, served.time_G)
    taken = _fill(np.argsort(finish, kind="stable"), tenant, demands, most)
    time_G = served.time_G.copy()
    np.add.at(time_G, tenant[taken], cost[taken] / weight_G[tenant[taken]])
    return Choice(
        chosen=front[taken],
        served=Served(time_G=_settled_up(time_G, tenant, weight_G)),
        was_cut=len(taken) < len(row_U),
    )


def _ready(candidates: Candidates, settings: SchedulerSettings, now_s: float) -> NDArray[np.int64]:
    """Who has enough evidence, or has waited long enough for it, and wasn't updated a moment
    ago."""
    row_U = candidates.row_U
    if settings.cool_down_s:
        row_U = row_U[now_s - candidates.updated[row_U] >= settings.cool_down_s]
    if settings.min_events > 1:
        num_events = candidates.num_events[row_U]
        has_waited = now_s - candidates.since[row_U] >= settings.patience_s
        # Without anything to train on there is only something to settle, which needs no evidence.
        row_U = row_U[(num_events >= settings.min_events) | has_waited | (num_events == 0)]
    return row_U


def _places(
    candidates: Candidates, settings: SchedulerSettings, row_U: NDArray[np.int64]
) -> Floats:
    """When everybody got in line, bonuses counted."""
    place_U = candidates.since[row_U]
    if settings.residency_bonus_s:
        place_U -= settings.residency_bonus_s * candidates.is_hot[row_U]
    if settings.evidence_bonus_s:
        # Twice the evidence of an update is as much as counts.
        most = 2 * settings.events_per_update
        evidence_U = np.minimum(candidates.num_events[row_U], most)
        place_U -= evidence_U * (settings.evidence_bonus_s / most)
    return place_U


def _fronts(place_U: Floats, tenant_U: NDArray[np.uint16], length: int) -> NDArray[np.int64]:
    """The first `length` of every tenant's line, in order, tenant by tenant: no wave can take more
    of one."""
    by_tenant = np.argsort(tenant_U, kind="stable")
    ends = np.cumsum(np.bincount(tenant_U)) if len(tenant_U) else np.zeros(0, np.int64)
    fronts = []
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        own = by_tenant[start:end]
        if len(own) > length:
            own = own[np.argpartition(place_U[own], length)[:length]]
        fronts.append(own[np.argsort(place_U[own], kind="stable")])
    order: NDArray[np.int64] = np.concatenate([np.zeros(0, np.int64), *fronts])
    return order


def _demands(
    candidates: Candidates, settings: SchedulerSettings, front: NDArray[np.int64]
) -> list[tuple[NDArray[Any], float]]:
    """Each user's demand on each limited resource, with that resource's budget. A demand above the
    budget is clamped to it: such a user gets a wave alone instead of blocking its tenant."""
    rank, megabytes = candidates.rank[front], settings.max_load_mb_per_wave
    load_bytes = np.where(candidates.is_hot[front], 0.0, rank * candidates.load_bytes_per_rank)
    budgets = (
        (candidates.tokens[front], settings.max_tokens_per_wave),
        (rank, settings.max_rank_per_wave),
        (load_bytes, None if megabytes is None else megabytes * 1e6),
    )
    return [
        (np.minimum(demand, budget), budget) for demand, budget in budgets if budget is not None
    ]


def _finish_times(
    tenant: NDArray[np.uint16], cost: Floats, weight_G: Floats, time_G: Floats
) -> Floats:
    """Virtual time at which each would be served if its tenant's line moved up to it; `tenant` is
    sorted."""
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
    line: NDArray[np.int64],
    tenant: NDArray[np.uint16],
    demands: list[tuple[NDArray[Any], float]],
    max_adapters: int,
) -> NDArray[np.int64]:
    """Who of `line` fits together, first come, first served."""
    left = [budget for _, budget in demands]
    taken: list[int] = []
    blocked: set[int] = set()
    for start in range(0, len(line), 2 * max_adapters):  # in parts: mostly the first one is enough
        places = line[start : start + 2 * max_adapters]
        columns = [column[places].tolist() for column, _ in demands]
        wanted = zip(*columns, strict=True) if columns else [()] * len(places)
        for place, group, demand in zip(
            places.tolist(), tenant[places].tolist(), wanted, strict=True
        ):
            if len(taken) == max_adapters:
                return np.array(taken, np.int64)
            if group in blocked:
                continue
            room = [have - amount for have, amount in zip(left, demand, strict=True)]
            if min(room, default=0.0) < 0:
                blocked.add(group)
                continue
            left = room
            taken.append(place)
    return np.array(taken, np.int64)


def _settled_up(time_G: Floats, tenant: NDArray[np.uint16], weight_G: Floats) -> Floats:
    """Virtual times without credit or debt that fairness doesn't ask for.

    Tenants with nothing waiting save up nothing: they start again level with those who wait.
    Whoever takes room that the others can't use gets ahead of its share; it pays back one update of
    each side, and not the hours that it had the room for itself."""
    is_waiting = np.zeros(len(time_G), bool)
    is_waiting[np.unique(tenant)] = True
    if not is_waiting.any():
        return time_G
    level = time_G[is_waiting].min()
    # An update costs one wave at most, so times further apart than this don't come from turns.
    most = (time_G + 1.0 / weight_G)[is_waiting].min() + 1.0 / weight_G
    settled: Floats = np.where(is_waiting, np.minimum(time_G, most), np.maximum(time_G, level))
    settled -= level  # only differences count
    return settled
