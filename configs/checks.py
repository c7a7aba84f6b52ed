"""What is wrong with a configuration, one sentence each: field, value, way out.

Each field's own bound stands beside it in `schema.py`; here it is applied, and here is what holds
between fields. What `problems` lets through is consistent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from populace.configs.schema import BOUND, Bound, Settings


def problems(settings: Settings) -> list[str]:
    """Everything that is wrong with `settings`; empty when it can be used."""
    return [
        *_out_of_bounds(settings, ""),
        *_group_problems(settings),
        *_scheduler_problems(settings),
        *_name_problems(settings),
    ]


def is_follower(controller: str) -> bool:
    """Whether this is the name of a further group's controller: `main.1` is one of the run
    `main`."""
    return re.search(r"\.\d+$", controller) is not None


def _out_of_bounds(section: Any, prefix: str) -> Iterator[str]:
    """The bounds of a section's fields, and of the sections in it."""
    for field in fields(section):
        path, value = f"{prefix}{field.name}", getattr(section, field.name)
        bound: Bound | None = field.metadata.get(BOUND)
        if bound is not None and value is not None and not bound.holds(value):
            yield f"{path} is {value!r}; use {bound.wanted}"
        if is_dataclass(value):
            yield from _out_of_bounds(value, f"{path}.")
        elif isinstance(value, dict):
            for name, item in value.items():
                if is_dataclass(item):
                    yield from _out_of_bounds(item, f"{path}[{name!r}].")


def _group_problems(settings: Settings) -> Iterator[str]:
    shard, scheduler = settings.shard, settings.scheduler
    if shard.dense == "zero3" and shard.count == 1:
        yield "shard.dense is 'zero3' and shard.count is 1; there is nothing to cut, use replicated"
    most = scheduler.max_adapters_per_wave
    if scheduler.slots < 2 * most:
        yield (
            f"scheduler.slots is {scheduler.slots}; use at least twice max_adapters_per_wave "
            f"({most}), so that a tip and its serving revision fit together"
        )


def _scheduler_problems(settings: Settings) -> Iterator[str]:
    """Budgets must have room for any one user, or somebody would wait for ever."""
    scheduler, rollout = settings.scheduler, settings.rollout
    sampled = rollout.samples_per_task * rollout.max_new_tokens
    longest = settings.train.max_sequence_length + sampled
    tokens = longest * scheduler.events_per_update
    if scheduler.max_tokens_per_wave < tokens:
        yield (
            f"scheduler.max_tokens_per_wave is {scheduler.max_tokens_per_wave}; one user's update "
            f"can have {tokens} tokens (events_per_update times the longest sequence and its "
            "samples), use at least that"
        )
    rank = max([settings.adapter.rank, *settings.user_ranks.values()])
    if scheduler.max_rank_per_wave is not None and scheduler.max_rank_per_wave < rank:
        yield (
            f"scheduler.max_rank_per_wave is {scheduler.max_rank_per_wave}; an adapter has rank "
            f"{rank}, use that"
        )
    for name in scheduler.tenants:
        if not name or "/" in name:
            yield (
                f"scheduler.tenants has {name!r}; a tenant's name has no slash, its users' ids "
                "begin with NAME/"
            )


def _name_problems(settings: Settings) -> Iterator[str]:
    controller = settings.run.controller
    if not controller or not all(char.isalnum() or char in "-_." for char in controller):
        yield f"run.controller is {controller!r}; use letters, digits, '-', '_' and '.'"
    if is_follower(controller):
        yield (
            f"run.controller is {controller!r}, as the other groups of a run are called; don't end "
            "it with a point and a number"
        )
    for user, rank in settings.user_ranks.items():
        if rank < 1:
            yield f"user_ranks[{user!r}] is {rank}; use a rank of at least 1"
    for name, target in settings.rewards.functions.items():
        if target.count(":") != 1:
            yield f"rewards.functions[{name!r}] is {target!r}; write it as module:function"
