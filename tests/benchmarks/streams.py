"""`make bench-streams`: enqueueing against SQLite, the scheduler at a million users, residency
against Belady's optimum, and what pipelining hides. Every part checks its outcome before it counts.
About twelve minutes.

    python -m tests.benchmarks.streams [enqueue] [scheduler] [residency] [overlap]
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import multiprocessing
import os
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from populace.configs.schema import (
    AdapterSettings,
    BaseSettings,
    EvaluationSettings,
    ResidencySettings,
    RewardSettings,
    RolloutSettings,
    RunSettings,
    SchedulerSettings,
    Settings,
    StreamSettings,
    TenantSettings,
)
from populace.population.client import Population
from populace.population.controller import WaveReport
from populace.population.experience.events import LogEvent, Task, Trajectory
from populace.population.experience.gateway import Gateway
from populace.population.experience.log import ExperienceLog
from populace.population.experience.pending import PendingIndex
from populace.population.experience.producer import Producer
from populace.population.tools.simulate import Load, simulate
from populace.population.waves.chat import Chat
from populace.population.waves.reward_tasks import score_on_ray
from populace.population.waves.scheduler import Served, form_wave
from populace.storage.keys.keyring import Keyring
from populace.storage.lru import Lru
from populace.storage.objects.bucket import Bucket
from populace.storage.objects.dev import DevStore
from populace.storage.objects.open import open_store
from populace.workers.actors.group import ShardGroup
from tests.benchmarks.figures import Figure, figure, publish
from tests.support.loops import Loop, ledger_of, settings_of
from tests.support.streams import WORDS, make_population
from tests.support.tiny import tokenizer

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("POPULACE_BENCH_SECONDS", 4.0))
"""Of every race of producers."""
TEXT = "x" * 850
"""With prompt and ids an event has about 1 KB."""
USERS = 100
PRODUCERS = [
    int(count) for count in os.environ.get("POPULACE_BENCH_PRODUCERS", "1,16,64").split(",")
]


def event(number: int, sender: int) -> LogEvent:
    return Trajectory(prompt="p" * 60, completion=TEXT, reward=0.5, event_id=f"{sender}-{number}")


# Enqueueing.


def produce(url: str, sender: int, batch: int, barrier: Barrier, results: Any) -> None:
    """One producer: calls of `batch` events of as many users, as fast as they become durable."""
    producer = Producer.open(url, "bench")
    chance = random.Random(sender)
    producer.enqueue_many(
        [(f"user-{number}", [event(-1 - number, sender)]) for number in range(USERS)]
    )

    def call(number: int) -> int:
        users = chance.sample(range(USERS), batch)
        return producer.enqueue_many(
            [
                (f"user-{user}", [event(number * batch + place, sender)])
                for place, user in enumerate(users)
            ]
        )

    results.put(repeat(call, barrier))


def insert(path: str, sender: int, batch: int, barrier: Barrier, results: Any) -> None:
    """The same with SQLite: a transaction of `batch` rows, an index that makes ids unique."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    connection.execute("pragma journal_mode=wal")
    connection.execute("pragma synchronous=full")
    body = os.urandom(1000)

    def call(number: int) -> int:
        connection.execute("begin immediate")
        connection.executemany(
            "insert or ignore into events(user, event, body) values (?, ?, ?)",
            [
                (f"user-{place}", f"{sender}-{number * batch + place}", body)
                for place in range(batch)
            ],
        )
        connection.execute("commit")
        return batch

    results.put(repeat(call, barrier))


def repeat(call: Callable[[int], int], barrier: Barrier) -> tuple[int, list[float], float]:
    """(events, seconds of every call, seconds in all) from when everybody is ready on."""
    barrier.wait(300)
    began, count, taken = time.perf_counter(), 0, []
    while (started := time.perf_counter()) - began < SECONDS:
        count += call(len(taken))
        taken.append(time.perf_counter() - started)
    return count, taken, time.perf_counter() - began


def race(
    target: Callable[..., None], where: str, num_processes: int, batch: int
) -> list[tuple[int, list[float], float]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["populace.population.experience.producer", "tests.benchmarks.streams"]
    )
    barrier, results = context.Barrier(num_processes), context.Queue()
    processes = [
        context.Process(target=target, args=(where, sender, batch, barrier, results))
        for sender in range(num_processes)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return found


def describe(
    name: str, found: Sequence[tuple[int, list[float], float]]
) -> tuple[float, list[Figure]]:
    """Events per second, and everything worth a line."""
    rates = [count / seconds for count, _, seconds in found]
    taken = sorted(1000 * value for _, calls, _ in found for value in calls)
    quantile = {q: taken[min(len(taken) - 1, int(q * len(taken)))] for q in (0.5, 0.99)}
    figures = [
        figure(f"{name}: events/s", [sum(rates)], "1/s"),
        figure(f"{name}: time to durable, p50", [quantile[0.5]], "ms"),
        figure(f"{name}: time to durable, p99", [quantile[0.99]], "ms"),
    ]
    if len(rates) > 1:
        fair = sum(rates) / len(rates)
        figures.append(
            figure(
                f"{name}: slowest and fastest producer's share of a fair one",
                [rate / fair for rate in rates],
                "x",
            )
        )
    return sum(rates), figures


def count_events(url: str) -> int:
    return sum(
        len(t) for p in range(4) for _, t in ExperienceLog(open_store(url), "bench", p).read_from(0)
    )


def enqueue_figures(folder: Path) -> Iterator[Figure]:
    with DevStore(folder / "weed") as server:
        os.environ.update(server.environment)
        Bucket(server.url).ensure()
        stores = {"file": f"file://{folder}/store", "SeaweedFS": server.url}
        for url in stores.values():
            make_population(open_store(url), name="bench", partitions=4)
        for num_processes in PRODUCERS:
            sqlite = {batch: sqlite_rate(folder, num_processes, batch) for batch in (1, 100)}
            for batch, (_, figures) in sqlite.items():
                yield from figures
                for name, url in stores.items():
                    before = count_events(url)
                    found = race(produce, url, num_processes, batch)
                    title = f"{name}, {num_processes} producers, {batch} events a call"
                    rate, figures = describe(title, found)
                    there = count_events(url) - before - num_processes * USERS
                    assert there == sum(count for count, _, _ in found), (
                        "acknowledged and durable differ"
                    )
                    yield from figures
                    aim = 1.0 if name == "file" and batch == 100 else None
                    yield figure(
                        f"{title}: over SQLite with as many",
                        [rate / sqlite[batch][0]],
                        "x",
                        at_least=aim,
                    )
        yield from gateway_figures(stores["file"])


def partition_figures(folder: Path) -> Iterator[Figure]:
    """What 16 partitions cost over 4: one producer's calls, in turn, and opening the ledger."""
    with DevStore(folder / "weed-partitions") as server:
        os.environ.update(server.environment)
        Bucket(server.url).ensure()
        for name, url in {"file": f"file://{folder}/partitions", "SeaweedFS": server.url}.items():
            store = open_store(url)
            metas = {n: make_population(store, name=f"of-{n}", partitions=n) for n in (4, 16)}
            producers = {n: Producer.open(url, f"of-{n}") for n in metas}
            for batch in (1, 100):
                taken: dict[int, list[float]] = {4: [], 16: []}
                for number in range(1 + (60 if batch == 1 else 20)):
                    for n, producer in producers.items():
                        began = time.perf_counter()
                        producer.enqueue_many(
                            (f"user-{place}", [event(number, 100 * batch + place)])
                            for place in range(batch)
                        )
                        if number:  # the first makes the users' keys
                            taken[n].append(1000 * (time.perf_counter() - began))
                title = f"{name}, {batch} users' events a call"
                yield figure(f"{title}, 4 partitions", taken[4], "ms")
                ratios = [many / few for few, many in zip(taken[4], taken[16], strict=True)]
                yield figure(f"{title}, 16 partitions over 4", ratios, "x")
            opened: dict[int, list[float]] = {4: [], 16: []}
            for _ in range(10):
                for n, meta in metas.items():
                    began = time.perf_counter()
                    ledger_of(store, meta).refresh()
                    opened[n].append(time.perf_counter() - began)
            ratios = [many / few for few, many in zip(opened[4], opened[16], strict=True)]
            yield figure(f"{name}, a ledger opened, 16 partitions over 4", ratios, "x")


def sqlite_rate(folder: Path, num_processes: int, batch: int) -> tuple[float, list[Figure]]:
    path = folder / f"events-{num_processes}-{batch}.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma journal_mode=wal")
        connection.execute(
            "create table events(user text, event text, body blob, primary key (user, event))"
        )
    found = race(insert, str(path), num_processes, batch)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (count,) = connection.execute("select count(*) from events").fetchone()
    assert count == sum(done for done, _, _ in found)
    return describe(f"SQLite WAL FULL, {num_processes} writers, {batch} rows a transaction", found)


CLIENTS, CLIENT_PROCESSES = 256, 4


def gateway_client(url: str, sender: int, address: str, barrier: Barrier, results: Any) -> None:
    """64 of the 256 clients: each sends one event after the other."""
    ray.init(address=address, log_to_driver=False, logging_level="error")
    gateway = Gateway.connect(url, "bench")

    async def client(number: int) -> tuple[int, list[float], float]:
        began, taken = time.perf_counter(), []
        while (started := time.perf_counter()) - began < SECONDS:
            sent = event(len(taken), 1000 + sender * 100 + number)
            assert await gateway.enqueue_async(f"user-{sender * 64 + number}", [sent]) == 1
            taken.append(time.perf_counter() - started)
        return len(taken), taken, time.perf_counter() - began

    async def everybody() -> list[tuple[int, list[float], float]]:
        own = range(CLIENTS // CLIENT_PROCESSES)
        await asyncio.gather(
            *(
                gateway.enqueue_async(f"user-{sender * 64 + n}", [event(-1, sender * 64 + n)])
                for n in own
            )
        )
        barrier.wait(300)
        return list(await asyncio.gather(*(client(number) for number in own)))

    results.put(asyncio.run(everybody()))


def gateway_figures(url: str) -> Iterator[Figure]:
    with local_ray() as address:
        gateway = Gateway.start(url, "bench", stream=StreamSettings(linger_ms=2.0))
        context = multiprocessing.get_context("spawn")
        barrier, results = context.Barrier(CLIENT_PROCESSES), context.Queue()
        arguments = [(url, sender, address, barrier, results) for sender in range(CLIENT_PROCESSES)]
        processes = [context.Process(target=gateway_client, args=own) for own in arguments]
        for process in processes:
            process.start()
        found = [one for _ in processes for one in results.get(timeout=300)]
        for process in processes:
            process.join()
        gateway.stop()
        assert len(found) == CLIENTS
        yield from describe(f"gateway, {CLIENTS} clients, 1 event a call", found)[1]


@contextlib.contextmanager
def local_ray() -> Iterator[str]:
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "POPULACE_KEYS": str(Keyring().folder),
    }
    context = ray.init(
        "local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error",
        object_store_memory=300_000_000, runtime_env={"env_vars": variables},
    )  # fmt: skip
    try:
        yield str(context.address_info["address"])
    finally:
        ray.shutdown()


# Scheduling.


def scheduler_figures() -> Iterator[Figure]:
    """A wave out of an index that holds so many users, a tenth of them with something pending, in
    fifty tenants."""
    medians = {}
    for num_users in (10_000, 100_000, 1_000_000):
        index, scheduler = index_of(num_users)
        served, taken = Served.nothing(50), []
        for _ in range(30):
            started = time.perf_counter()
            candidates = index.candidates(1e4)
            choice = form_wave(candidates, scheduler, served, index.now())
            taken.append(1000 * (time.perf_counter() - started))
            served = choice.served
            assert (
                len(candidates.row_U) == num_users // 10
                and 0 < len(set(choice.chosen.tolist())) <= 256
            )
        medians[num_users] = statistics.median(taken)
        aim = 10.0 if num_users == 1_000_000 else None
        yield figure(f"a wave, {num_users:,} users, a tenth pending", taken, "ms", at_most=aim)
    yield figure(
        "a wave's time, a million users over ten thousand",
        [medians[1_000_000] / medians[10_000]],
        "x",
    )


def index_of(num_users: int) -> tuple[PendingIndex, SchedulerSettings]:
    """Filled column by column: it is the scheduler that is measured."""
    chance, index = np.random.default_rng(0), PendingIndex(events_per_update=4)
    keys = chance.integers(0, 2**63, (2, num_users)).astype(np.uint64)
    is_pending = chance.permutation(num_users) < num_users // 10
    num_events = np.where(is_pending, chance.integers(1, 12, num_users), 0)
    index.users.append(
        num_users,
        high=keys[0],
        low=keys[1],
        partition=0,
        tenant=chance.integers(0, 50, num_users),
        rank=8,
        head=-1,
        tail=-1,
        held=-1,
        held_tail=-1,
        num_waiting=num_events,
        num_pending=num_events,
        num_held=0,
        tokens=chance.integers(50, 800, num_users),
        since=-chance.random(num_users) * 600,
        updated=-np.inf,
        is_hot=chance.random(num_users) < 0.001,
        is_busy=False,
        is_candidate=is_pending,
    )
    index.index.add(keys[0], keys[1], np.arange(num_users))
    index._joined = np.flatnonzero(is_pending).tolist()
    index.candidates()
    weights = 0.5 + chance.random(50)
    return index, SchedulerSettings(
        max_adapters_per_wave=256,
        events_per_update=4,
        max_tokens_per_wave=1 << 17,
        max_rank_per_wave=4096,
        weight=weights[0],
        tenants={f"t{n}": TenantSettings(weight=own) for n, own in enumerate(weights[1:])},
    )


def fairness_figures() -> Iterator[Figure]:
    """Two equal tenants, one of which sends a hundred times as much, both more than their share."""
    scheduler = SchedulerSettings(
        tenants={"small": TenantSettings()}, max_adapters_per_wave=64, slots=256
    )
    settings = Settings(scheduler=scheduler)
    for name, shares, rate in (
        ("both want more than their share", (100.0, 1.0), 20_000.0),
        ("one wants less than its share", (100.0, 1.0), 2_000.0),
    ):
        load = Load(users=4000, events_per_s=rate, hours=0.1, shares=shares, zipf=0.5)
        report = simulate(load, settings)
        flood, small = report.tenants
        if "more" in name:
            yield figure(f"flood 100:1, {name}: Jain's index", [report.fairness], "", at_least=0.99)
        for tenant, who in ((flood, "flooding"), (small, "other")):
            waits = [tenant.wait_median_s, tenant.wait_99_s, tenant.wait_longest_s]
            yield figure(
                f"flood 100:1, {name}: {who} tenant's wait (p99; median to longest)",
                sorted(waits),
                "s",
            )


# Residency.


def residency_figures() -> Iterator[Figure]:
    """100,000 users of unequal activity, served by the real scheduler; which adapters are still
    there when they are needed again, and how many could be if the future were known."""
    for zipf in (0.8, 1.0, 1.2):
        scheduler = SchedulerSettings(max_adapters_per_wave=16, events_per_update=4, slots=64)
        settings = Settings(scheduler=scheduler)
        load = Load(users=100_000, events_per_s=12.0, hours=5.0, zipf=zipf)
        report = simulate(load, settings)
        wanted = [int(user) for wave in report.waves for user in wave]
        for name, capacity in (("64 hot", 64), ("64 hot and 2,000 warm", 2064)):
            ours, best = lru_hits(wanted, capacity), belady_hits(wanted, capacity)
            possible = len(wanted) - len(set(wanted))
            title = f"Zipf {zipf}, {name}"
            yield figure(f"{title}: hit rate", [ours / len(wanted)], "share")
            yield figure(f"{title}: hit rate of Belady's optimum", [best / len(wanted)], "share")
            yield figure(f"{title}: over the optimum", [ours / best], "x")
            assert ours <= best <= possible


def lru_hits(wanted: Sequence[int], capacity: int) -> int:
    tier, hits = Lru[int](capacity), 0
    for user in wanted:
        hits += user in tier
        tier.put(user, 1)
    return hits


def belady_hits(wanted: Sequence[int], capacity: int) -> int:
    """Evict what is needed again last (Belady 1966)."""
    later: dict[int, list[int]] = defaultdict(list)
    for place in range(len(wanted) - 1, -1, -1):
        later[wanted[place]].append(place)
    there: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    hits = 0
    for user in wanted:
        later[user].pop()
        following = later[user][-1] if later[user] else len(wanted)
        hits += user in there
        if user not in there and len(there) >= capacity:
            while True:
                negative, victim = heapq.heappop(farthest)
                if there.get(victim) == -negative:
                    del there[victim]
                    break
        there[user] = following
        heapq.heappush(farthest, (-following, user))
    return hits


# Overlap.

WAVES = 24
REWARD_S = 0.01


def slow_letters(reply: Any, *, letter: str = "e") -> float:
    """A reward that takes its time, as a sandbox or a judge would."""
    time.sleep(REWARD_S)
    return reply.text.count(letter) / max(1, len(reply.text))


def build_base(folder: Path) -> Path:
    """Eight experts, top-2, 128 wide: a wave takes about a second."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
        intermediate_size=256, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.1, eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def overlap_settings(base: Path, pipelined: bool) -> Settings:
    return Settings(
        name=f"overlap-{'on' if pipelined else 'off'}",
        base=BaseSettings(model=str(base), dtype="float32"),
        adapter=AdapterSettings(rank=4, expert_rank=1, learning_rate=1e-3),
        rollout=RolloutSettings(samples_per_task=2, max_new_tokens=8),
        scheduler=SchedulerSettings(max_adapters_per_wave=32, events_per_update=2, slots=128),
        evaluation=EvaluationSettings(every_waves=10_000, heldout_share=0.0),
        residency=ResidencySettings(warm_mb=64),
        rewards=RewardSettings(functions={"slow": "tests.benchmarks.streams:slow_letters"}),
        run=RunSettings(takeover_s=1.0, threads=1, pipelined=pipelined),
    )


def overlap_events(num_users: int = 400, per_user: int = 8) -> Iterator[tuple[str, list[LogEvent]]]:
    chance = random.Random(0)
    for user in range(num_users):
        events: list[LogEvent] = []
        for number in range(per_user):
            prompt = " ".join(chance.choices(WORDS, k=6))
            if number % 4 == 0:
                events.append(Task(prompt=prompt, reward="slow", event_id=f"t{number}"))
            else:
                answer = " ".join(chance.choices(WORDS, k=12))
                events.append(
                    Trajectory(
                        prompt=prompt,
                        completion=answer,
                        reward=chance.random(),
                        event_id=f"t{number}",
                    )
                )
        yield f"user-{user:04d}", events


def overlap_figures(folder: Path) -> Iterator[Figure]:
    """The same experience with and without pipelining, on SeaweedFS, in turns of a few waves each:
    adapters come cold from the store after the first round."""
    base = build_base(folder / "base")
    with DevStore(folder / "weed2") as server:
        os.environ.update(server.environment)
        Bucket(server.url).ensure()
        with local_ray():
            sides = {is_on: start_side(server.url, base, is_on) for is_on in (True, False)}
            reports: dict[bool, list[tuple[float, list[WaveReport]]]] = {True: [], False: []}
            for _ in range(3):
                for is_on, (controller, _) in sides.items():
                    reports[is_on].append(run_waves(controller, WAVES // 3))
            for _, (controller, group) in sides.items():
                controller.take_back()
                controller.ownership.release()
                group.stop()
    rates = {
        is_on: [60 * len(waves) / seconds for seconds, waves in own]
        for is_on, own in reports.items()
    }
    yield figure("waves a minute, pipelined", rates[True], "1/min")
    yield figure("waves a minute, one after another", rates[False], "1/min")
    yield figure(
        "pipelined over one after another",
        [a / b for a, b in zip(rates[True], rates[False], strict=True)],
        "x",
    )
    for is_on, aim in ((True, 0.05), (False, None)):
        name = "pipelined" if is_on else "one after another"
        waits, pages = [], []
        for seconds, waves in reports[is_on]:
            waits.append(sum(report.seconds["publish"] for report in waves) / seconds)
            pages.append(sum(report.paging.waited_s for report in waves) / seconds)
        yield figure(
            f"{name}: share of the time that waits for publication", waits, "share", at_most=aim
        )
        yield figure(
            f"{name}: share of the time that waits for adapters", pages, "share", at_most=aim
        )
    found = [sum(report.paging.found.get(tier, 0) for _, waves in reports[True] for report in waves)
             for tier in ("hot", "new", "warm", "prefetched", "near", "cold")]  # fmt: skip
    print("pipelined, adapters found: hot, new, warm, prefetched, near, cold =", found)


def start_side(url: str, base: Path, pipelined: bool) -> tuple[Loop, ShardGroup]:
    settings = overlap_settings(base, pipelined)
    population = Population.create(url, settings)
    population.enqueue_many(overlap_events())
    chat = Chat(str(base))
    population.ownership.claim(settings.run.takeover_s)
    group = ShardGroup(settings_of(population), settings.shard)
    group.wait_until_ready()
    controller = Loop(population, group, chat, score_on_ray)
    run_waves(controller, 14)  # everybody has a revision in the store; reward workers have started
    return controller, group


def run_waves(controller: Loop, count: int) -> tuple[float, list[WaveReport]]:
    began, reports = time.perf_counter(), []
    for _ in range(count):
        report = controller.wave()
        assert report is not None and report.num_adapters == 32
        reports.append(report)
    return time.perf_counter() - began, reports


def main() -> None:
    wanted = set(sys.argv[1:]) or {"enqueue", "partitions", "scheduler", "residency", "overlap"}
    folder = Path(
        tempfile.mkdtemp(prefix="populace-streams-", dir=os.environ.get("POPULACE_BENCH_FOLDER"))
    )
    os.environ["POPULACE_KEYS"] = str(folder / "keys")
    figures: list[Figure] = []
    try:
        if "scheduler" in wanted:
            figures += [*scheduler_figures(), *fairness_figures()]
        if "residency" in wanted:
            figures += residency_figures()
        if "overlap" in wanted:
            figures += overlap_figures(folder)
        if "partitions" in wanted:
            figures += partition_figures(folder)
        if "enqueue" in wanted:
            for item in enqueue_figures(folder):
                print(
                    f"{item.name}: {item.median:,.4g} ({item.min:,.4g} to {item.max:,.4g}) "
                    f"{item.unit}",
                    flush=True,
                )
                figures.append(item)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    publish("streams", figures, Path("build/bench/streams.json"))


if __name__ == "__main__":
    main()
