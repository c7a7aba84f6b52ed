"""A revision answers here: the engine that `Population.sample` and replays start in this
process."""

from __future__ import annotations

from dataclasses import replace

from populace.configs.schema import RolloutSettings, Settings
from populace.population.experience.events import Messages, UserId
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.queries import revision_number
from populace.population.waves.chat import Chat
from populace.population.waves.planner import adapter_spec
from populace.storage.errors import InvalidInput, ObjectNotFound
from populace.storage.identity import PopulationMeta, verify_digest
from populace.storage.objects.contract import ObjectStore
from populace.workers.actors.engine import ShardEngine, ShardSettings
from populace.workers.base.registry import PreparedBase, find_base
from populace.workers.batch import AdapterKey, AdapterRef, RolloutRequest
from populace.workers.memory import WaveLimits


def base_of(meta: PopulationMeta, settings: Settings) -> PreparedBase:
    """The base of a population, checked against its digest."""
    base = find_base(settings.base.model)
    verify_digest(meta, base.digest)
    return base


def shard_settings(
    settings: Settings, meta: PopulationMeta, store_url: str, base: PreparedBase, chat: Chat
) -> ShardSettings:
    """How the workers of a population start."""
    return ShardSettings(
        base_folder=base.folder,
        dtype=settings.base.dtype,
        device=settings.base.device,
        store_url=store_url,
        population=meta.name,
        slots=settings.scheduler.slots,
        residency=settings.residency,
        threads=settings.run.threads,
        eos_ids=chat.eos_ids,
        train=settings.train,
        optimizer=settings.optimizer,
        limits=limits_of(settings),
    )


def limits_of(settings: Settings) -> WaveLimits:
    """What waves of these settings ask of a shard's memory at most."""
    scheduler, rollout = settings.scheduler, settings.rollout
    most = max([settings.adapter.rank, *settings.user_ranks.values()])
    spec = adapter_spec(settings, UserId(""))
    rank, expert_rank = replace(spec, rank=most).ranks
    tries = scheduler.max_adapters_per_wave * scheduler.events_per_update
    return WaveLimits(
        ranks=(rank, expert_rank),
        slots=scheduler.slots,
        adapters=scheduler.max_adapters_per_wave,
        rows=settings.train.max_rows_per_pass,
        prompts=tries,
        sequences=tries * rollout.samples_per_task,
        length=settings.train.max_sequence_length + rollout.max_new_tokens,
    )


class Sampler:
    """One engine of a population in this process, started when it is first asked."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings, self.ledger = settings, ledger
        self._engine: ShardEngine | None = None

    def sample(
        self, user: str, messages: str | Messages, revision: int | str, rollout: RolloutSettings
    ) -> str:
        """An answer of a user's revision: `serving`, `tip` or a number. A user without an adapter
        gets the base's answer."""
        engine, chat = self._start()
        ref = self._ref(user, revision)
        try:
            engine.page_in([ref], False)
        except ObjectNotFound:  # its pack was just rewritten
            self.ledger.follow()
            engine.page_in([ref := self._ref(user, revision)], False)
        request = RolloutRequest(
            adapter=ref.key,
            event_id="sample",
            prompt_ids=chat.prompt_ids(messages),
            num_samples=1,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
        )
        (group,) = engine.roll_out([request])
        return chat.text(group.samples[0].completion_ids)

    def _ref(self, user: str, revision: int | str) -> AdapterRef:
        ledger = self.ledger
        pseudonym = ledger.pseudonym(user)
        if pseudonym in ledger.catalog:
            adapter = ledger.adapter(user)
            return ledger.ref(adapter, revision_number(ledger.catalog, adapter, revision))
        if revision not in (0, "0", "serving", "tip"):
            raise InvalidInput(
                f"revision is {revision!r}; user {user!r} has no adapter yet, only revision 0"
            )
        spec = adapter_spec(self.settings, UserId(user))
        seed = ledger.meta.adapter_seed(user)
        return AdapterRef(key=AdapterKey(pseudonym, 0), spec=spec, seed=seed)

    def _start(self) -> tuple[ShardEngine, Chat]:
        """The engine and its base's tokenizer; the base's files are checked every time."""
        meta, store = self.ledger.meta, self.ledger.store
        base = base_of(meta, self.settings)
        chat = Chat(base.folder)
        if self._engine is None:
            own = shard_settings(self.settings, meta, store.url, base, chat)
            self._engine = ShardEngine(own, store)
        return self._engine, chat


def replaying_engine(
    settings: Settings,
    meta: PopulationMeta,
    store: ObjectStore,
    *,
    device: str,
    dtype: str,
    backend: str,
) -> ShardEngine:
    """An engine of a few slots that computes on `device` in `dtype` by `backend`, with invariant
    numerics. `InvalidInput` where that can't be had."""
    base = base_of(meta, settings)
    own = shard_settings(settings, meta, store.url, base, Chat(base.folder))
    train = replace(settings.train, backend=backend, numerics="invariant")
    return ShardEngine(replace(own, device=device, dtype=dtype, slots=2, train=train), store)
