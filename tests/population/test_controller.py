"""The loop in one process: from enqueue to a committed revision, and every way in which an event
can end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from populace.configs.schema import EvaluationSettings, Settings
from populace.population.cli.app import app
from populace.population.client import Population
from populace.population.experience.checks import CheckedEvent
from populace.population.experience.events import Demonstration, Rollback, Task, Trajectory
from populace.storage.errors import Fenced, InvalidInput, OwnerAlive
from populace.storage.objects.cloud import MemoryStore
from populace.storage.objects.open import open_store
from populace.workers.batch import StepResult, WaveBatch
from tests.support.accounting import account
from tests.support.loops import Loop, run_to_the_end
from tests.support.streams import experience

Start = Callable[..., Loop]


def test_every_event_is_trained_held_out_or_settled_exactly_once(
    settings: Settings, start: Start
) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings))
    population.enqueue("user-0", [Task(prompt="rain", reward="raising", event_id="broken")])
    population.enqueue("user-1", [Task(prompt="rain", reward="not_a_number", event_id="nan")])
    population.enqueue("user-2", [Task(prompt="rain", reward="constant", event_id="flat")])
    controller = start(population)
    run_to_the_end(controller)
    outcome = account(population)
    assert sum(len(events) for events in outcome.acknowledged.values()) == 53
    assert outcome.is_exact(), outcome
    reasons = outcome.reasons
    assert "this reward is broken" in reasons["user-0", "broken"]
    assert "finite" in reasons["user-1", "nan"]
    assert reasons["user-2", "flat"] == "no signal"
    assert population.status().pending_events == 0
    assert population.status().revisions > 5
    population.ownership.release()


def test_a_failing_event_gets_three_tries_is_parked_and_its_user_goes_on(
    settings: Settings, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(
        settings, evaluation=dataclasses.replace(settings.evaluation, heldout_share=0.0)
    )
    population = Population.create(f"file://{tmp_path}", settings)
    good = [
        Demonstration(prompt="yes", completion="the sea", event_id=f"good-{number}")
        for number in range(3)
    ]
    population.enqueue(
        "ada", [good[0], Task(prompt="rain", reward="raising", event_id="bad"), *good[1:]]
    )
    controller = start(population)
    controller.wave()
    (failure,) = controller.ledger.catalog.attempts.failures.values()
    assert failure.count == 1 and account(population).trained == {("ada", "good-0"): 1}
    population.ownership.release()
    again = Population.open(f"file://{tmp_path}", settings)  # the count is in the log
    run_to_the_end(start(again))
    outcome = account(again)
    assert outcome.trained == {("ada", f"good-{number}"): 1 for number in range(3)}
    again.ownership.release()
    (parked,) = again.parked("ada")
    assert parked.user == "ada" and parked.position == (0, 1)
    assert (
        parked.reason
        == "parked: failed 3 times: reward tests.support.rewards:raising raised RuntimeError"
    )
    assert parked.detail == "this reward is broken"
    assert again.parked() == [parked] and again.parked("bob") == []
    table = CliRunner().invoke(app, ["parked", "--store", str(tmp_path), "--json"])
    assert json.loads(table.output)[0]["detail"] == "this reward is broken"
    monkeypatch.setenv("COLUMNS", "200")
    assert (
        "failed 3 times"
        in CliRunner().invoke(app, ["parked", "ada", "--store", str(tmp_path)]).output
    )


def test_enqueueing_twice_trains_once_and_another_content_is_settled(
    settings: Settings, start: Start
) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=2))
    population.enqueue_many(experience(settings, num_users=2))
    clash = next(
        task
        for user, tasks in experience(settings, num_users=1)
        for task in tasks
        if task.event_id == "task-03"
    )
    population.enqueue("user-0", [dataclasses.replace(clash, prompt="something else")])
    run_to_the_end(start(population))
    outcome = account(population)
    assert outcome.is_exact(), outcome
    assert outcome.clashes == {("user-0", "task-03"): "event id reused with other content"}
    population.ownership.release()


def test_a_clash_in_the_same_wave_leaves_the_first_event_trained(
    settings: Settings, start: Start
) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue("ada", [Demonstration(prompt="yes", completion="the sea", event_id="x")])
    population.enqueue("ada", [Demonstration(prompt="yes", completion="the rain", event_id="x")])
    run_to_the_end(start(population))
    outcome = account(population)
    assert outcome.trained == {("ada", "x"): 1}
    assert outcome.clashes == {("ada", "x"): "event id reused with other content"}
    population.ownership.release()


def test_a_users_backlog_does_not_keep_others_waiting(settings: Settings, start: Start) -> None:
    scheduler = dataclasses.replace(settings.scheduler, max_adapters_per_wave=1)
    settings = dataclasses.replace(settings, scheduler=scheduler, partitions=1)
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=1, num_tasks=30))
    population.enqueue("late", [Demonstration(prompt="yes", completion="the sea")])
    controller = start(population)
    controller.wave()
    controller.wave()
    assert population.ledger.adapter("late").tip == 1
    population.ownership.release()


def test_a_command_of_one_user_does_not_answer_anothers(settings: Settings, start: Start) -> None:
    population = Population.create(MemoryStore(), settings)
    for user in ("ada", "bob"):
        population.enqueue(user, [Demonstration(prompt="yes", completion="the sea")])
    run_to_the_end(start(population))
    population.ownership.release()
    for user in ("ada", "bob"):
        population.send({user: [CheckedEvent.of(Rollback(to=0, event_id="same"))]})
    start(population).wave()
    assert [population.ledger.adapter(user).tip for user in ("ada", "bob")] == [0, 0]
    population.ownership.release()


def test_held_out_tasks_are_never_trained_on(settings: Settings, start: Start) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=3, num_tasks=12))
    run_to_the_end(start(population))
    outcome = account(population)
    assert outcome.heldout and not (set(outcome.heldout) & set(outcome.trained))
    assert {event for user, event in outcome.heldout if user == "user-0"} == {
        event for user, event in outcome.heldout if user == "user-1"
    }, "the same ids are held out for everybody"
    population.ownership.release()


def test_all_kinds_of_experience_make_revisions_and_the_baseline_travels(
    settings: Settings, start: Start
) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue(
        "t", [Trajectory(prompt="yes", completion="no rain", reward=0.25, event_id="1")]
    )
    population.enqueue("d", [Demonstration(prompt="yes", completion="the sea", event_id="1")])
    controller = start(population)
    controller.wave()
    first = {user: population.revisions(user)[1] for user in "td"}
    assert all(revision.is_tip for revision in first.values())
    # A first reward has nothing to be compared with: it sets the baseline and moves no weight.
    assert "grad_norm" not in first["t"].metrics
    assert first["d"].metrics["grad_norm"] > 0
    population.ownership.release()
    again = Population.open(population.store, settings)
    again.enqueue(
        "t", [Trajectory(prompt="yes", completion="no", reward=0.75, revision=1, event_id="2")]
    )
    controller = start(again)  # a new engine: everything comes from the store
    controller.wave()
    slot = next(s for key, s in controller.workers.slab.slots.items() if key.revision == 2)  # type: ignore[attr-defined]
    assert slot.state.num_rewards == 2 and slot.state.baseline == pytest.approx(0.5)
    assert again.revisions("t")[2].metrics["grad_norm"] > 0
    again.ownership.release()


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (
            Trajectory(prompt="a", completion="b", reward=1.0, revision=3, event_id="x"),
            "does not exist",
        ),
        (Demonstration(prompt="rain " * 2000, completion="b", event_id="x"), "prompt has"),
        (Task(prompt="rain " * 2000, reward="letters", event_id="t-1"), "tokens, more than"),
        (
            Trajectory(
                prompt="a",
                completion="b",
                reward=1.0,
                completion_ids=[5],
                expert_ids=[[[0]]],
                event_id="x",
            ),
            "this base has",
        ),
        (
            Trajectory(
                prompt="a", completion="b", reward=1.0, completion_ids=[99999], event_id="x"
            ),
            "this base has 300 tokens",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_settled_with_its_reason(
    settings: Settings, start: Start, event: Task, reason: str
) -> None:
    settings = dataclasses.replace(
        settings, evaluation=dataclasses.replace(settings.evaluation, heldout_share=0.0)
    )
    population = Population.create(MemoryStore(), settings)
    population.enqueue("ada", [event])
    run_to_the_end(start(population))
    ((_, text),) = account(population).reasons.items()
    assert reason in text
    population.ownership.release()


def test_over_long_completions_are_cut_or_rejected_as_the_policy_says(
    settings: Settings, start: Start
) -> None:
    for policy in ("cut", "reject"):
        train = dataclasses.replace(settings.train, over_long=policy, max_sequence_length=40)
        population = Population.create(MemoryStore(), dataclasses.replace(settings, train=train))
        population.enqueue(
            "ada", [Demonstration(prompt="yes", completion="rain " * 100, event_id="x")]
        )
        run_to_the_end(start(population))
        assert population.status().revisions == (1 if policy == "cut" else 0)
        population.ownership.release()


def test_opening_again_continues_where_it_stopped(
    settings: Settings, start: Start, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}"
    population = Population.create(url, settings)
    population.enqueue_many(experience(settings))
    controller = start(population)
    controller.wave()
    controller.wave()
    trained = set(account(population).trained)
    population.ownership.release()
    again = Population.create(url, settings)
    run_to_the_end(start(again))
    outcome = account(again)
    assert trained < set(outcome.trained)
    assert outcome.is_exact()
    again.ownership.release()
    for user in again.users():
        findings = again.verify(user)
        assert not findings.problems
        assert findings.num_blobs == 3 * (len(again.revisions(user)) - 1)


def test_two_controllers_cannot_run_at_once(settings: Settings, start: Start) -> None:
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, takeover_s=1.5))
    store = MemoryStore()
    population = Population.create(store, settings)
    population.enqueue_many(experience(settings, num_users=1))
    start(population)
    with pytest.raises(OwnerAlive, match="being run by another process"):
        start(Population.open(store, settings))
    population.ownership.release()
    second = Population.open(store, settings)
    start(second).wave()
    second.ownership.release()


def test_a_controller_that_lost_its_claim_is_fenced_and_commits_nothing(
    settings: Settings, start: Start
) -> None:
    store = MemoryStore()
    population = Population.create(store, settings)
    population.enqueue_many(experience(settings))
    first = start(population)
    first.wave()
    population.ownership._heartbeat.stop()  # type: ignore[union-attr]  # it looks dead, but is not
    second = Population.open(store, settings)
    controller = start(second)
    before = second.status().revisions
    with pytest.raises(Fenced):
        first.wave()
    assert Population.open(store, settings).status().revisions == before
    run_to_the_end(controller)
    assert account(second).is_exact()
    second.ownership.release()


def test_what_was_tried_when_a_controller_died_is_tried_in_small_waves_and_then_alone(
    settings: Settings, start: Start
) -> None:
    scheduler = dataclasses.replace(settings.scheduler, max_adapters_per_wave=16, slots=32)
    settings = dataclasses.replace(settings, scheduler=scheduler)
    store = MemoryStore()
    population = Population.create(store, settings)
    population.enqueue_many(experience(settings, num_users=6))
    tried: list[list[tuple[str, int]]] = []

    def die(batch: WaveBatch) -> StepResult:
        tried.append([(item.adapter.pseudonym, len(item.groups)) for item in batch.adapters])
        raise MemoryError

    for _ in range(2):
        controller = start(Population.open(store, settings))
        controller.workers.train_wave = die  # type: ignore[method-assign]
        with pytest.raises(MemoryError):
            controller.wave()
        controller.ownership._heartbeat.stop()  # type: ignore[union-attr]
    again = Population.open(store, settings)
    controller = start(again)
    waves = [controller.wave() for _ in range(7)]
    assert [len(wave) for wave in tried] == [6, 2], "an eighth of a wave after the first death"
    # Those two users one event at a time, then what they had beside it and the other four in pairs.
    assert [wave.num_adapters for wave in waves][:6] == [1, 1, 2, 2, 2, 6], waves  # type: ignore[union-attr]
    run_to_the_end(controller)
    assert account(again).is_exact()
    again.ownership.release()


def test_an_event_that_kills_every_controller_is_parked_and_its_user_goes_on(
    settings: Settings, start: Start
) -> None:
    store = MemoryStore()
    population = Population.create(store, settings)
    population.enqueue(
        "ada",
        [Demonstration(prompt="yes", completion=word, event_id=word) for word in ("bad", "good")],
    )
    for _ in range(3):  # twice with its neighbour, once alone
        population = Population.open(store, settings)
        controller = start(population)
        real = controller.workers.train_wave

        def train(batch: WaveBatch, real: Callable[[WaveBatch], StepResult] = real) -> StepResult:
            if any(group.event_id == "bad" for item in batch.adapters for group in item.groups):
                raise MemoryError
            return real(batch)

        controller.workers.train_wave = train  # type: ignore[method-assign]
        with pytest.raises(MemoryError):
            controller.wave()
        population.ownership._heartbeat.stop()  # type: ignore[union-attr]
    population = Population.open(store, settings)
    run_to_the_end(start(population))
    outcome = account(population)
    assert outcome.trained == {("ada", "good"): 1}
    assert "parked: 3 attempts" in outcome.reasons["ada", "bad"]
    population.ownership.release()


def test_rollback_moves_tip_and_serving_and_the_next_update_starts_there(
    settings: Settings, start: Start
) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=1, num_tasks=12))
    controller = start(population)
    for _ in range(3):
        controller.wave()
    population.ownership.release()
    consumed = population.ledger.adapter("user-0").consumed
    with pytest.raises(InvalidInput, match="revision 99 does not exist"):
        population.rollback("user-0", 99)
    population.rollback("user-0", 1)
    infos = {info.revision: info for info in population.revisions("user-0")}
    assert infos[1].is_tip and infos[1].is_serving
    assert population.ledger.adapter("user-0").consumed == consumed
    run_to_the_end(start(population))
    newest = population.revisions("user-0")
    parents = {info.revision: info.parent for info in newest}
    assert parents[4] == 1
    assert account(population).is_exact()
    population.ownership.release()


def test_a_running_controller_obeys_a_rollback_between_waves(
    settings: Settings, start: Start
) -> None:
    settings = dataclasses.replace(
        settings,
        run=dataclasses.replace(settings.run, takeover_s=1.5),
        evaluation=EvaluationSettings(every_waves=99, heldout_share=0.0),
    )
    store = MemoryStore()
    population = Population.create(store, settings)
    population.enqueue_many(experience(settings, num_users=1, num_tasks=8))
    controller = start(population)
    controller.wave()
    controller.wave()
    Population.open(store, settings).rollback("user-0", 1)
    controller.wave()
    assert (
        population.ledger.catalog.revision_of(population.ledger.pseudonym("user-0"), 3).parent == 1
    )
    population.ownership.release()


def test_serving_moves_only_by_a_verdict_that_carries_its_numbers(
    settings: Settings, start: Start
) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=2, num_tasks=16))
    controller = start(population)
    first = controller.wave()
    assert first is not None and not first.verdicts
    assert {adapter.serving for adapter in population.ledger.catalog} == {0}
    second = controller.wave()
    assert second is not None and second.verdicts
    for record in second.verdicts:
        assert {"tip_reward", "serving_reward", "difference", "interval_low", "num_tasks"} <= set(
            record.numbers
        )
        adapter = population.ledger.catalog.require(record.pseudonym)
        assert (adapter.tip, adapter.serving) == (record.tip, record.serving)
    population.ownership.release()


def test_sampling_names_a_revision_and_differs_between_them(
    settings: Settings, start: Start
) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=1, num_tasks=16))
    run_to_the_end(start(population))
    population.ownership.release()
    tip = population.ledger.adapter("user-0").tip
    answers = {n: population.sample("user-0", "what is rain", n) for n in (0, tip)}
    assert answers[0] != answers[tip]
    assert population.sample("user-0", "what is rain", "tip") == answers[tip]
    assert population.sample("stranger", "what is rain")
    with pytest.raises(InvalidInput, match="use serving, tip or a number"):
        population.sample("user-0", "what is rain", "newest")
    with pytest.raises(InvalidInput, match="has no adapter"):
        population.revisions("stranger")


def test_the_revision_log_holds_no_user_id(
    settings: Settings, start: Start, tmp_path: Path
) -> None:
    population = Population.create(f"file://{tmp_path}", settings)
    population.enqueue_many(
        (f"secret-{user}", events) for user, events in experience(settings, num_users=2)
    )
    run_to_the_end(start(population))
    population.ownership.release()
    for path in (tmp_path / "test").rglob("*"):
        if path.is_file() and "experience" not in path.parts:
            assert b"secret-" not in path.read_bytes(), path


def test_a_slab_smaller_than_the_population_pages(settings: Settings, start: Start) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue_many(experience(settings, num_users=20, num_tasks=6))
    controller = start(population)
    run_to_the_end(controller)
    assert len(controller.workers.slab.slots) <= settings.scheduler.slots
    assert account(population).is_exact()
    assert open_store("memory://").url == population.store.url
    population.ownership.release()
