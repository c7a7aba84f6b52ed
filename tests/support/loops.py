"""A controller that keeps its own pipeline, as a run does, and what one is started from."""

from __future__ import annotations

from collections.abc import Sequence

from populace.population.client import Population
from populace.population.controller import EMPTY, Controller
from populace.population.experience.sealing import Seals
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.ownership import Ownership
from populace.population.sampler import base_of, shard_settings
from populace.population.waves.chat import Chat
from populace.population.waves.report import WaveReport
from populace.population.waves.rewards import RewardOutcome, RewardRequest, score_replies
from populace.population.waves.rollouts import Score
from populace.storage.identity import PopulationMeta
from populace.storage.keys.keyring import Keyring
from populace.storage.objects.contract import ObjectStore
from populace.workers.actors.engine import ShardEngine, ShardSettings
from populace.workers.interface import Workers


class Loop(Controller):
    """A controller of `population` with the pipeline in it: `wave` is one turn of a run."""

    def __init__(
        self, population: Population, workers: Workers, chat: Chat, score: Score | None = None
    ) -> None:
        super().__init__(population.settings, population.ledger, workers, chat, score or score_here)
        self.ownership = population.ownership
        self.pipeline = EMPTY

    def wave(self) -> WaveReport | None:
        """`run_once` with the pipeline that the turn before left."""
        pipeline, self.pipeline = self.pipeline, EMPTY
        report, self.pipeline = self.run_once(pipeline)
        return report

    def take_back(self) -> None:
        """An orderly end."""
        self.pipeline = self.take_back_attempts(self.pipeline)

    def busy(self) -> list[str]:
        """Users in an uncommitted wave."""
        return self.ledger.pending.busy()


def score_here(requests: Sequence[RewardRequest], timeout_s: float) -> list[RewardOutcome]:
    """Rewards in this process; the Ray way has its own test."""
    return [score_replies(request) for request in requests]


def run_to_the_end(loop: Loop) -> list[WaveReport]:
    """Waves until nobody has anything."""
    waves = []
    while (report := loop.wave()) is not None:
        waves.append(report)
        assert len(waves) < 200
    return waves


def chat_of(population: Population) -> Chat:
    return Chat(base_of(population.meta, population.settings).folder)


def settings_of(population: Population) -> ShardSettings:
    """How the population's workers start."""
    base = base_of(population.meta, population.settings)
    chat = Chat(base.folder)
    return shard_settings(population.settings, population.meta, population.store.url, base, chat)


def engine_of(population: Population) -> ShardEngine:
    """Workers in this process."""
    return ShardEngine(settings_of(population), population.store)


def ledger_of(store: ObjectStore, meta: PopulationMeta, keyring: Keyring | None = None) -> Ledger:
    """Another process's view of a population."""
    return Ledger(store, meta, Seals.of(store, meta.name, keyring))


def owned_ledger(
    store: ObjectStore, meta: PopulationMeta, takeover_s: float = 0.05
) -> tuple[Ledger, Ownership]:
    """Another process that owns all of a population."""
    ledger = ledger_of(store, meta)
    ownership = Ownership(ledger)
    ownership.claim(takeover_s)
    return ledger, ownership
