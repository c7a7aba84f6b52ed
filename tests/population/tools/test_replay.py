"""Revisions made in waves of many come out bit for bit when they are made again alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from populace.configs.schema import (
    EvaluationSettings,
    RetentionSettings,
    SchedulerSettings,
    Settings,
    TrainSettings,
)
from populace.population.cli.app import app
from populace.population.client import Population
from populace.population.experience.checks import CheckedEvent
from populace.population.experience.events import Pin, Rollback, Trajectory
from populace.population.tools import replay as replay_module
from populace.population.tools.replay import (
    ReplayOutcome,
    Route,
    replay,
    route_to,
)
from populace.storage.log.records import WaveManifest
from tests.support.loops import Loop
from tests.support.streams import WORDS, experience

Start = Callable[..., Loop]
NUM_USERS = 6
NUM_WAVES = 50


def settings_for(settings: Settings, **fields: object) -> Settings:
    return dataclasses.replace(
        settings,
        user_ranks={"user-1": 1, "user-2": 5, "user-3": 8},
        # Without bonuses: by wave 20 everybody has an adapter, however fast the waves are.
        scheduler=SchedulerSettings(
            max_adapters_per_wave=4,
            events_per_update=2,
            slots=9,
            residency_bonus_s=0.0,
            evidence_bonus_s=0.0,
        ),
        evaluation=EvaluationSettings(
            every_waves=5, heldout_share=0.25, samples_per_task=2, confidence=0.3
        ),
        retention=RetentionSettings(last=3, every_waves=10),
        **fields,
    )


def long_experience(settings: Settings, num_tasks: int) -> list:
    """Tasks, and between them trajectories, whose baseline travels with the moments."""
    pairs = []
    for user, tasks in experience(settings, num_users=NUM_USERS, num_tasks=num_tasks):
        events: list = []
        for index, task in enumerate(tasks):
            events.append(task)
            if index % 5 == 4:
                events.append(
                    Trajectory(
                        event_id=f"log-{index:03d}",
                        prompt=WORDS[index % 12],
                        completion=WORDS[index % 7],
                        reward=index % 3,
                    )
                )
        pairs.append((user, events))
    return pairs


def test_every_kept_revision_of_fifty_waves_replays_byte_for_byte(
    settings: Settings, start: Start, tmp_path: Path
) -> None:
    settings = settings_for(settings, name="replayed")
    population = Population.create(f"file://{tmp_path}/store", settings)
    population.enqueue_many(long_experience(settings, 80))
    catalog = population.ledger.catalog
    controller = start(population)
    num_pins = 0
    for wave in range(NUM_WAVES):
        # The history has pinned tips, early and just after an evaluation, a fork, and a revision
        # that is returned to.
        if wave in (20, 46):
            tips = {
                f"user-{n}": population.ledger.adapter(f"user-{n}").tip for n in range(NUM_USERS)
            }
            pins = {user: Pin(revision=tip, pinned=True) for user, tip in tips.items() if tip}
            population.send({user: [CheckedEvent.of(pin)] for user, pin in pins.items()})
            num_pins += len(pins)
        if wave == 30:
            forked, back = next(
                (f"user-{n}", state.revision)
                for n in range(NUM_USERS)
                for adapter in [population.ledger.adapter(f"user-{n}")]
                for state in catalog.revisions_of(adapter.pseudonym)
                if state.is_kept and state.revision != adapter.tip
            )
            population.send({forked: [CheckedEvent.of(Rollback(to=back))]})
        assert controller.wave() is not None
    population.ownership.release()

    decisions = population.ledger.catalog.count_decisions()
    assert decisions["rollback"] == 1 and decisions["pin"] == num_pins
    num_same = 0
    for number in range(NUM_USERS):
        adapter = population.ledger.adapter(f"user-{number}")
        kept = [
            state.revision for state in catalog.revisions_of(adapter.pseudonym) if state.is_kept
        ]
        found = replay(population, f"user-{number}")
        assert [item.revision for item in found] == kept
        assert {item.outcome for item in found} == {ReplayOutcome.SAME}, found
        num_same += len(found)
        dropped = [
            state.revision for state in catalog.revisions_of(adapter.pseudonym) if not state.is_kept
        ]
        if dropped:
            (gone,) = replay(population, f"user-{number}", dropped[0])
            assert gone.outcome == ReplayOutcome.NOT_KEPT
    routes = [
        (
            adapter,
            route_to(
                catalog, adapter, state.revision, lambda r, a=adapter: population.ledger.entry(a, r)
            ),
        )
        for adapter in (population.ledger.adapter(f"user-{n}") for n in range(NUM_USERS))
        for state in catalog.revisions_of(adapter.pseudonym)
        if state.is_kept
    ]
    assert all(isinstance(route, Route) for _, route in routes)
    # Among them are routes from a pinned tip with its moments, and updates that restarted with
    # moments at zero.
    assert any(route.start.moments is not None for _, route in routes)
    assert any(
        entry.parent and entry.parent_moments_sha256 is None
        for _, route in routes
        for entry in route.updates
    )
    status = population.status()
    assert status.revisions > num_same >= 3 * NUM_USERS  # the rule let some go

    one = CliRunner(env={"COLUMNS": "160"}).invoke(
        app, ["verify", "--replay", "user-0", "--store", f"file://{tmp_path}/store"]
    )
    assert one.exit_code == 0 and "same bytes" in one.output, one.output
    whole = CliRunner(env={"COLUMNS": "160"}).invoke(
        app, ["verify", "--all", "--store", f"file://{tmp_path}/store"]
    )
    assert (
        whole.exit_code == 0 and f"{status.revisions - num_same} of them not kept" in whole.output
    ), whole.output


def test_a_replay_that_differs_or_cannot_be_is_told(
    settings: Settings, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(settings)
    population = Population.create(f"file://{tmp_path}/store", settings)
    population.enqueue_many(experience(settings, num_users=2, num_tasks=6))
    controller = start(population)
    while controller.wave() is not None:
        pass
    population.ownership.release()
    assert {item.outcome for item in replay(population, "user-0")} == {ReplayOutcome.SAME}

    read = replay_module.decode_evidence
    monkeypatch.setattr(replay_module, "decode_evidence", lambda body: read(body)[::-1])
    assert ReplayOutcome.DIFFERENT in {item.outcome for item in replay(population, "user-0")}
    monkeypatch.setattr(replay_module, "decode_evidence", read)

    monkeypatch.setattr(replay_module, "decode_evidence", lambda body: ())
    unlearned = replay(population, "user-0")
    assert {item.outcome for item in unlearned} == {
        ReplayOutcome.DIFFERENT
    } and "no_signal" in unlearned[-1].detail
    monkeypatch.setattr(replay_module, "decode_evidence", read)

    describe = replay_module.ShardEngine.describe
    other = lambda engine: (describe(engine)[0], {**describe(engine)[1], "torch": "1.0"})  # noqa: E731
    monkeypatch.setattr(replay_module.ShardEngine, "describe", other)
    (refused, *_) = replay(population, "user-0")
    assert (refused.outcome, refused.detail.split(",")[1]) == (
        ReplayOutcome.REFUSED,
        " this machine has 1.0",
    )
    monkeypatch.setattr(replay_module.ShardEngine, "describe", describe)

    # Made on a GPU: this machine has none, or not that one.
    wave_of = replay_module._Player._wave
    for there, detail in (
        ({"device": "cuda", "backend": "triton"}, "made with device cuda: base.device is 'cuda'"),
        ({"gpu": "H100"}, "made with gpu H100, this machine has None"),
    ):

        def made_there(player: object, revision: int, there: dict = there) -> WaveManifest:
            wave = wave_of(player, revision)
            return dataclasses.replace(wave, numerics={**wave.numerics, **there})

        monkeypatch.setattr(replay_module._Player, "_wave", made_there)
        (refused, *_) = replay(population, "user-0")
        assert refused.outcome is ReplayOutcome.REFUSED and refused.detail.startswith(detail)


def test_fast_numerics_refuse_replay(settings: Settings, start: Start, tmp_path: Path) -> None:
    settings = settings_for(settings, train=TrainSettings(numerics="fast"))
    population = Population.create(f"file://{tmp_path}/store", settings)
    population.enqueue_many(experience(settings, num_users=1, num_tasks=4))
    assert start(population).wave() is not None
    population.ownership.release()
    (refused,) = replay(population, "user-0")
    assert refused.outcome == ReplayOutcome.REFUSED and "fast" in refused.detail
