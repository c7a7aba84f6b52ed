"""What has to be right, on tiny bases: numbers, bits, and the whole way of an event."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from populace.configs.schema import (
    AdapterSettings,
    BaseSettings,
    OptimizerSettings,
    RewardSettings,
    RolloutSettings,
    RunSettings,
    SchedulerSettings,
    Settings,
    TrainSettings,
)
from populace.population.client import Population
from populace.population.tools.replay import replay
from populace.storage.objects.cloud import MemoryStore
from populace.workers.actors.engine import ShardEngine, ShardSettings
from populace.workers.batch import AdapterKey, AdapterRef, AdapterUpdate, RolloutRequest
from populace.workers.shapes import AdapterSpec
from tests.gpu_check.check import Check
from tests.support import tiny
from tests.support.accounting import account
from tests.support.loops import Loop, chat_of, engine_of, run_to_the_end
from tests.support.parity import SPECS, Told, admit, assert_same, two_steps
from tests.support.streams import experience
from tests.support.waves import likelihood_wave


def engine(
    folder: Path, device: str, dtype: str = "float32", slots: int = 64, max_rows: int = 4096
) -> ShardEngine:
    settings = ShardSettings(
        base_folder=str(folder),
        dtype=dtype,
        device=device,
        store_url="memory://",
        population="check",
        slots=slots,
        threads=1 if device == "cpu" else 0,
        eos_ids=frozenset({1}),
        train=TrainSettings(max_rows_per_pass=max_rows),
        optimizer=OptimizerSettings(),
    )
    return ShardEngine(settings, MemoryStore())


def parity(check: Check) -> None:
    """Two steps on four families, in fp32: log-probabilities within 1e-4, weights and moments
    within 1e-5 of their norm; and what is loaded comes back as it was."""
    families = ("qwen3_moe",) if check.dry else tiny.FAMILIES
    with tempfile.TemporaryDirectory() as name:
        for family in families:
            with check.trying(family):
                folder = tiny.build(family, Path(name) / family)
                *_, here = told(check, engine(folder, "cpu", slots=4))
                with check.device():
                    there_engine = engine(folder, "cuda", slots=4)
                    *_, there = told(check, there_engine)
                    assert_same(there_engine, there, here)
                    check.require(comes_back(there_engine), f"{family}: loaded bytes changed")
                check.say(f"{family}: two steps as on a CPU")


def told(check: Check, own: ShardEngine) -> Iterator[Told]:
    """What two steps say; dry, one."""
    return islice(two_steps(own), 4) if check.dry else two_steps(own)


def comes_back(there: ShardEngine) -> bool:
    """Whether weights and moments that are loaded are dumped as the same bytes."""
    there.reset()
    same = []
    for number, (key, spec) in enumerate(zip(admit(there), SPECS, strict=True)):
        size = there.slab.exact_layout(spec).size
        values = np.random.default_rng(number).normal(size=3 * size).astype(np.float32)
        weights = values[:size].tobytes()
        moments = np.array([3, 0.5, 2], np.float64).tobytes() + values[size:].tobytes()
        experts = tuple(range(there.base.dims.num_experts)) if spec.ranks[1] else ()
        there.slab.load(key, weights, moments, experts)
        same.append(there.slab.blobs(key, with_moments=True) == (weights, moments))
    return all(same)


SPEC = AdapterSpec(rank=8, expert_rank=2, alpha=16, learning_rate=1e-3)


def keys_of(count: int) -> list[AdapterKey]:
    return [AdapterKey(f"user-{number}", 0) for number in range(count)]


def train(
    there: ShardEngine, keys: list[AdapterKey], tokens: int, spec: AdapterSpec = SPEC
) -> dict[str, AdapterUpdate]:
    """Everybody's update from revision 0, with nothing hot before."""
    there.reset()
    number = {key: int(key.pseudonym.removeprefix("user-")) for key in keys}
    there.page_in([AdapterRef(key=k, spec=spec, seed=number[k]) for k in keys], True)
    updates = there.train_wave(likelihood_wave(keys, tokens, 256, numbers=number)).updates
    return {update.adapter.pseudonym: update for update in updates}


def bits(check: Check) -> None:
    """One user's bytes: twice alone must be equal; beside others they are compared, and it is said
    whether numerics promised it."""
    mates, repeats, tokens = ((1,), 1, 2) if check.dry else ((1, 15, 63), 100, 48)
    with tempfile.TemporaryDirectory() as name, check.device():
        folder = tiny.build("qwen3_moe", Path(name) / "base")
        for dtype in ("float32",) if check.dry else ("float32", "bfloat16"):
            there, few = engine(folder, "cuda", dtype), engine(folder, "cuda", dtype, max_rows=16)
            check.say(f"{dtype}: numerics {there.numerics}: {there.why_fast or 'by the probe'}")
            alone = train(there, keys_of(1), tokens)["user-0"]
            again = sum(train(there, keys_of(1), tokens)["user-0"] != alone for _ in range(repeats))
            check.require(not again, f"{dtype}: alone, {again} of {repeats} repeats differ")
            check.say(f"{dtype}: alone, {again} of {repeats} repeats differ")
            promised, told = there.numerics == "invariant", []
            for count in mates:
                keys = keys_of(count + 1)
                shuffled = random.Random(count).sample(keys, len(keys))
                for how, own, order in (
                    ("", there, keys),
                    (", shuffled", there, shuffled),
                    (", in passes", few, keys),
                ):
                    got = train(own, order, tokens)["user-0"]
                    same = got == alone
                    told.append(f"{count} mates{how} {'same' if same else difference(got, alone)}")
                    check.require(same or not promised, f"{dtype}: differs beside {count}{how}")
            check.say(f"{dtype}: {'; '.join(told)}")
            rollouts(check, there, mates[-1])


def difference(got: AdapterUpdate, expected: AdapterUpdate) -> str:
    """How many of the weights differ, and by how much at most."""
    one, other = (np.frombuffer(update.weights or b"", np.float32) for update in (got, expected))
    if one.shape != other.shape:
        return "DIFFERS in size"
    return f"DIFFERS in {np.mean(one != other):.1%}, by {np.abs(one - other).max():.1e}"


def request_of(key: AdapterKey, new: int) -> RolloutRequest:
    """Two answers of `new` tokens at most."""
    return RolloutRequest(
        adapter=key,
        event_id="task",
        prompt_ids=np.arange(2, 9, dtype=np.int32),
        num_samples=2,
        max_new_tokens=new,
        temperature=1.0,
    )


def rollouts(check: Check, there: ShardEngine, mates: int) -> None:
    """Answers alone and beside others, and the trainer's log-probabilities of the same tokens."""

    def ask(keys: list[AdapterKey]) -> list[RolloutRequest]:
        return [request_of(key, 3 if check.dry else 24) for key in keys]

    keys = keys_of(mates + 1)
    there.reset()
    there.page_in([AdapterRef(key=k, spec=SPEC, seed=n) for n, k in enumerate(keys)], False)
    beside, alone = there.roll_out(ask(keys))[0], there.roll_out(ask(keys[:1]))[0]
    same = all(
        np.array_equal(a.completion_ids, b.completion_ids)
        and np.array_equal(a.logprobs, b.logprobs)
        for a, b in zip(alone.samples, beside.samples, strict=True)
    )
    check.require(same or there.numerics == "fast", "rollouts differ beside others")
    (scores,) = there.score_base([alone])
    # Revision 0 has B = 0: the base's own scores, from training's rows.
    gap = max(
        float(np.abs(score - sample.logprobs).max())
        for score, sample in zip(scores, alone.samples, strict=True)
        if sample.logprobs is not None
    )
    check.say(
        f"rollouts beside {mates} others: {'same' if same else 'others'}; decode and training "
        f"differ by {gap:.1e} in log-probability at most"
    )


def path(check: Check) -> None:
    """From enqueue to verified revisions, in this process: what was learned once, what is signed,
    and what a replay says. The lane of a controller is a thread, which no pretended device knows:
    dry, this computes on the CPU."""
    device = "cpu" if check.dry else "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = tiny.build("qwen3_moe", Path(name) / "base")
        settings = Settings(
            name="check",
            partitions=2,
            base=BaseSettings(model=str(folder), dtype="float32", device=device),
            adapter=AdapterSettings(rank=4, expert_rank=1, learning_rate=1e-2),
            rollout=RolloutSettings(samples_per_task=4, max_new_tokens=6),
            scheduler=SchedulerSettings(max_adapters_per_wave=4, slots=12),
            rewards=RewardSettings(functions={"letters": "tests.support.rewards:letters"}),
            run=RunSettings(takeover_s=0.5),
        )
        population = Population.create(f"file://{name}/store", settings)
        events = population.enqueue_many(experience(settings, num_users=6, num_tasks=4))
        population.ledger.refresh()
        population.ownership.claim(0.5)
        loop = Loop(population, engine_of(population), chat_of(population))
        waves = run_to_the_end(loop)
        loop.take_back()
        population.ownership.release()
        loop.close()
        outcome = account(population)
        check.require(outcome.is_exact(), f"not exactly once: {outcome}")
        findings = [population.verify(user) for user in population.users()]
        problems = [problem for found in findings for problem in found.problems]
        check.require(not problems, f"verify: {problems[:2]}")
        check.say(f"{events} events, {len(waves)} waves, verified; each learned from once")
        user = max(population.users(), key=lambda user: len(population.revisions(user)))
        replayed = replay(population, user)[-1]
        numerics = loop.numerics["numerics"]
        check.require(
            replayed.outcome == ("same bytes" if numerics == "invariant" else "refused"),
            f"replay under {numerics}: {replayed}",
        )
        told = f"{replayed.outcome} {replayed.detail}"
        check.say(f"replay of {user}@{replayed.revision} ({numerics}): {told}")
