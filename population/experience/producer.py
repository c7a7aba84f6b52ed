"""The writing end of a population: users' events in, durable when the call returns. Loads no model
and no catalog.

    check -> user's key -> seal -> group commit -> a segment per partition -> was the user erased?

Calls from several threads share segments: while one segment is being written, what comes in waits
for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from populace.configs.schema import StreamSettings
from populace.population.experience.contract import Checked, Enqueues
from populace.population.experience.group_commit import GroupCommit
from populace.population.experience.log import ExperienceLog
from populace.population.experience.sealing import Seals
from populace.population.experience.segments import Row, partition_of
from populace.storage.errors import InvalidInput
from populace.storage.identity import PopulationMeta, check_name
from populace.storage.keys.keyring import Keyring
from populace.storage.keys.secrets import Secrets
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.open import open_store


class Producer(Enqueues):
    """Makes events durable. Any number of producers work at once, in any processes, without knowing
    of each other."""

    def __init__(
        self,
        store: ObjectStore,
        meta: PopulationMeta,
        keyring: Keyring | None = None,
        *,
        rewards: Mapping[str, str] | None = None,
        settings: StreamSettings | None = None,
    ) -> None:
        """`rewards`: see `Enqueues.rewards`."""
        self.store, self.meta, self.rewards = store, meta, rewards
        self.seals = Seals.of(store, meta.name, keyring)
        self.keys = self.seals.keys
        logs = {p: ExperienceLog(store, meta.name, p) for p in range(meta.partitions)}
        settings = settings or StreamSettings()
        self._commit = GroupCommit(
            logs, settings.linger_ms / 1000, int(settings.max_waiting_mb * 1e6)
        )
        self._pool = ThreadPoolExecutor(16, thread_name_prefix="populace-keys")
        # One thread, so that calls that were made one after another are written in that order.
        self._turns = ThreadPoolExecutor(1, thread_name_prefix="populace-enqueue")

    @staticmethod
    def open(
        store: str | ObjectStore,
        name: str,
        *,
        rewards: Mapping[str, str] | None = None,
        settings: StreamSettings | None = None,
        keyring: Keyring | None = None,
    ) -> Producer:
        """A producer for the population `name` in a store; `InvalidInput` if there is none."""
        opened = open_store(store) if isinstance(store, str) else store
        meta = PopulationMeta.find(opened, check_name(name))
        if meta is None:
            raise InvalidInput(
                f"no population {name!r} in {opened.url}; create it with `populace run CONFIG`"
            )
        return Producer(opened, meta, keyring, rewards=rewards, settings=settings)

    def send(self, events: Checked) -> int:
        return self._finish(self._start(events))

    async def send_async(self, events: Checked) -> int:
        import asyncio  # whoever awaits this has it already

        started = await asyncio.wrap_future(self._turns.submit(self._start, events))
        await asyncio.gather(*(asyncio.wrap_future(future) for future in started.written))
        return await asyncio.get_running_loop().run_in_executor(None, self._finish, started)

    def close(self) -> None:
        """End this producer's threads; what was acknowledged is durable anyway."""
        self._commit.close()
        self._turns.shutdown()
        self._pool.shutdown()

    def _start(self, events: Checked) -> _Started:
        """Everything up to handing rows to the group commit. `Forgotten` if one of the users was
        erased."""
        pseudonyms = {user: self.seals.pseudonym(user) for user in events}
        self._for_all(
            lambda user: self.keys.ensure(pseudonyms[user], user, self._master), list(pseudonyms)
        )
        rows: dict[int, list[Row]] = {}
        for user, own in events.items():
            rows.setdefault(partition_of(user, self.meta.partitions), []).extend(
                self.seals.seal(pseudonyms[user], event.event_id, event.plain) for event in own
            )
        return _Started(
            written=tuple(self._commit.submit(rows)),
            pseudonyms=tuple(pseudonyms.values()),
            num_events=sum(map(len, events.values())),
        )

    def _finish(self, started: _Started) -> int:
        """Wait until all is durable. `Forgotten` to who raced with an erasure: what was written
        can't be read by anybody then."""
        for future in started.written:
            future.result()
        self._for_all(self.keys.fetch, self.keys.outdated(started.pseudonyms))
        return started.num_events

    def _master(self) -> str:
        """The master key that wraps new keys, as the store has it now: another process may have
        rotated it."""
        return Secrets.read(self.store, self.meta.name, self.keys.keyring).master

    def _for_all(self, call: Callable[[str], object], names: Sequence[str]) -> None:
        """Ask about many users' keys: side by side where an answer takes its time, and in few
        threads where not."""

        def some(part: Sequence[str]) -> None:
            for name in part:
                call(name)

        size = 64 if self.store.url.startswith(("file:", "memory:")) else 4
        if len(names) <= size:
            some(names)
            return
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        for _ in self._pool.map(some, parts):
            pass


@dataclass(frozen=True, slots=True, kw_only=True)
class _Started:
    """A call on its way."""

    written: tuple[Future[None], ...]
    pseudonyms: tuple[str, ...]
    num_events: int
