"""Which partitions this process owns: claim, join, rebalance, release.

A controller joins under its name and takes its share with `rebalance`; whoever needs partitions for
one short act claims them. Either way the claim in the revision log is what counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from populace.population.ledger.commands import finish_erasures
from populace.population.ledger.heartbeat import HEARTBEAT_S, Heartbeat, read_life
from populace.population.ledger.ledger import Ledger
from populace.population.ledger.sharing import share_out
from populace.storage import paths
from populace.storage.errors import Fenced, OutcomeUnknown, OwnerAlive, PopulaceError
from populace.storage.log.owner import Owner


class Ownership:
    """The partitions of `ledger` that this process writes."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._heartbeat: Heartbeat | None = None
        self._controller: str | None = None

    def claim(self, takeover_s: float, partitions: Iterable[int] | None = None) -> None:
        """Own these partitions, or all. Raises `OwnerAlive` when another process's heartbeat
        changes within `takeover_s`."""
        ledger = self.ledger
        wanted = sorted(ledger.readers if partitions is None else partitions)
        held = [partition for partition in wanted if ledger.catalog.owned.get(partition)]
        before = {partition: self._life(partition) for partition in held}
        if held:
            time.sleep(takeover_s)
        for partition in held:
            if self._life(partition) != before[partition]:
                raise OwnerAlive(
                    f"population {ledger.meta.name!r} is being run by another process "
                    f"({before[partition]}); stop that one first, or wait for it"
                )
        seen = {partition: ledger.readers[partition].next_seq for partition in wanted}
        ledger.follow()
        if any(ledger.readers[partition].next_seq != seen[partition] for partition in wanted):
            raise OwnerAlive(
                f"population {ledger.meta.name!r} was written by another process just now; start "
                "again"
            )
        try:
            heartbeat = self._beat(takeover_s)
            for partition in wanted:
                self._own(partition, heartbeat)
            for partition, consumer in ledger.consumers.items():
                if partition not in ledger.owners:
                    consumer.let_go()
            finish_erasures(ledger, wanted, bool(held))
        except BaseException:
            self.release()
            raise

    def join(
        self, controller: str, takeover_s: float, on_stop: Callable[[], None] = lambda: None
    ) -> None:
        """Become the controller of that name, owning nothing yet; see `rebalance`. `OwnerAlive` if
        there is one. `on_stop` is called, in a thread, when somebody asks this controller to
        stop."""
        ledger, heartbeat = self.ledger, self._beat(takeover_s)
        key = paths.controller(ledger.meta.name, controller)
        if before := read_life(ledger.store, key):
            time.sleep(takeover_s)
            if read_life(ledger.store, key) != before:
                self.release()
                raise OwnerAlive(
                    f"population {ledger.meta.name!r} is being run by another process ({before}); "
                    "stop that one first, or let this one share its partitions under another name: "
                    "run.controller=NAME"
                )
        self._controller = controller
        heartbeat.announce(controller, on_stop)
        for consumer in ledger.consumers.values():
            consumer.let_go()

    def show(self, figures: Mapping[str, Any]) -> None:
        """Let others see these with this controller's heartbeat."""
        if self._heartbeat is not None:
            # What can't be written fails here, not in the heartbeat's thread.
            self._heartbeat.figures = json.loads(json.dumps(figures))

    def rebalance(
        self,
        takeover_s: float,
        before_release: Callable[[], None],
        gone: Collection[str] = (),
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Claim and release partitions so that every controller whose heartbeat is seen has its
        share; returns what was claimed and what was released. `before_release` is called before
        anything is released: nothing may be under way then. `gone`: processes that are known to
        have ended, whatever their last heartbeats say."""
        ledger, heartbeat = self.ledger, self._heartbeat
        assert heartbeat is not None
        holders = self.holders(takeover_s)
        living = heartbeat.living(takeover_s).difference(gone)
        claims, releases = share_out(heartbeat.owner, holders, living)
        if releases:
            before_release()
        claimed, has_died = [], any(ledger.catalog.owned.get(partition) for partition in claims)
        for partition in claims:
            with contextlib.suppress(Fenced):  # somebody else was faster
                self._own(partition, heartbeat)
                claimed.append(partition)
        if claimed:
            finish_erasures(ledger, claimed, has_died)
        for partition in releases:
            self._release(partition)
        return tuple(claimed), releases

    def holders(self, takeover_s: float) -> dict[int, str | None]:
        """Partition -> the process that holds it by its heartbeat; None where nobody who lives
        does, "somebody" where that isn't known yet."""
        ledger, heartbeat = self.ledger, self._heartbeat
        assert heartbeat is not None
        ledger.follow()
        holders: dict[int, str | None] = {}
        for partition in ledger.readers:
            holders[partition] = heartbeat.owner if partition in ledger.owners else None
            if partition not in ledger.owners and ledger.catalog.owned.get(partition):
                claim = ledger.claims.get(partition)
                holders[partition] = heartbeat.holder(partition, claim, takeover_s)
        return holders

    @property
    def owner(self) -> str:
        """The name that this process has among holders; empty before it joins."""
        return "" if self._heartbeat is None else self._heartbeat.owner

    def release(self) -> None:
        """Give every partition back; a no-op without a claim. Whatever can't be given back is taken
        over later: no heartbeat comes after this, also when it raises."""
        ledger = self.ledger
        try:
            while ledger.owners:
                self._release(next(iter(ledger.owners)))
        except BaseException:
            self.give_up()
            raise
        if self._heartbeat is not None:
            self._heartbeat.stop()
            if self._controller is not None:
                with contextlib.suppress(PopulaceError):
                    name = ledger.meta.name
                    ledger.store.delete(paths.stop_request(name, self._controller))
                    ledger.store.delete(paths.controller(name, self._controller))
            self._heartbeat = self._controller = None
            ledger.is_selective = False

    def give_up(self) -> None:
        """Stop owning without a word: the store is away, or what is in the logs isn't known any
        more. Whatever landed is read again by the next claim."""
        ledger = self.ledger
        for partition, owner in ledger.owners.items():
            owner.lost_by = owner.lost_by or OutcomeUnknown("given up")
            ledger.catalog.owned[partition] = False
        ledger.owners.clear()
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = self._controller = None
            ledger.is_selective = False
        for consumer in ledger.consumers.values():
            consumer.let_go()

    def _own(self, partition: int, heartbeat: Heartbeat) -> None:
        ledger = self.ledger
        reader, keyring = ledger.readers[partition], ledger.keys.keyring
        ledger.owners[partition] = Owner(reader, heartbeat.owner, keyring)
        ledger.catalog.owned[partition] = True
        heartbeat.own(partition)
        if (done := ledger.catalog.compactions.get(partition)) is not None:
            ledger.consumers[partition].finish_compaction(done)

    def _release(self, partition: int) -> None:
        owner, heartbeat = self.ledger.owners.pop(partition), self._heartbeat
        self.ledger.catalog.owned[partition] = False
        if not owner.is_lost:
            with contextlib.suppress(Fenced):  # then it isn't ours to release; the others are
                owner.release()
                if heartbeat is not None:
                    heartbeat.disown(partition)
        if heartbeat is not None:
            heartbeat.drop(partition)
        if self._controller is not None:
            self.ledger.consumers[partition].let_go()

    def _beat(self, takeover_s: float) -> Heartbeat:
        """The heartbeat of this process; started if it isn't yet."""
        if self._heartbeat is None:
            ledger = self.ledger
            name = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
            interval_s = min(HEARTBEAT_S, takeover_s / 4)
            self._heartbeat = Heartbeat(
                ledger.store, ledger.meta.name, ledger.meta.partitions, name, interval_s
            )
            self._heartbeat.start()
            ledger.is_selective = True
        return self._heartbeat

    def _life(self, partition: int) -> str:
        return read_life(self.ledger.store, paths.owner(self.ledger.meta.name, partition))
