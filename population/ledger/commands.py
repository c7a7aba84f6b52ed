"""Commands that users' logs hold: roll back, pin, erase. Each is obeyed once, in order, by the
owner of the user's partition.

Erasure goes tombstone first, then exports, then the key: a crash in between is finished by the next
owner, who sees a tombstone whose key is still there.
"""

from __future__ import annotations

from collections.abc import Collection

from populace.population.experience.events import Forget, Pin, Rollback
from populace.population.experience.sealing import LoggedEvent
from populace.population.experience.segments import partition_of
from populace.population.ledger.ledger import Ledger
from populace.storage import paths
from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.states import AdapterState
from populace.storage.errors import InvalidInput
from populace.storage.log.records import Decision, Tombstone, Verdict


def obey_commands(ledger: Ledger, busy: Collection[str] = ()) -> list[Verdict | Tombstone]:
    """Execute the commands of owned partitions; those of `busy` users wait."""
    done: list[Verdict | Tombstone] = []
    for partition in ledger.owned():
        consumer, waiting = ledger.consumers[partition], []
        for logged in list(consumer.commands):
            if logged.pseudonym in busy:
                waiting.append(logged)
            elif isinstance(logged.event, Forget):
                done.append(_forget(ledger, logged))
            elif (adapter := ledger.catalog.get(logged.pseudonym)) is not None:
                verdict = _answer(ledger.catalog, adapter, logged)
                ledger.append(adapter.partition, verdict)
                done.append(verdict)
            elif not ledger.catalog.is_forgotten(logged.pseudonym):
                waiting.append(logged)  # until there is an adapter
        gone = {record.pseudonym for record in done if isinstance(record, Tombstone)}
        consumer.commands = [logged for logged in waiting if logged.pseudonym not in gone]
    return done


def finish_erasures(ledger: Ledger, partitions: Collection[int], has_died: bool) -> None:
    """What an owner that died may have left: a tombstone whose key is still there, or producers who
    haven't been told."""
    forgotten = ledger.catalog.forgotten(partitions)
    for pseudonym in forgotten:
        if not ledger.keys.is_forgotten(pseudonym):
            _erase(ledger, pseudonym)
    if forgotten and has_died:
        ledger.keys.begin_era()


def _forget(ledger: Ledger, logged: LoggedEvent) -> Tombstone:
    tombstone = Tombstone(pseudonym=logged.pseudonym, command=logged.ref.tag)
    ledger.append(partition_of(logged.user, ledger.meta.partitions), tombstone)
    _erase(ledger, logged.pseudonym)
    return tombstone


def _erase(ledger: Ledger, pseudonym: str) -> None:
    """Exports first: the marker over the key says that all of it is done."""
    for key in list(ledger.store.list(paths.export_folder(ledger.meta.name, pseudonym))):
        ledger.store.delete(key)
    ledger.keys.forget(pseudonym)


def _answer(catalog: Catalog, adapter: AdapterState, logged: LoggedEvent) -> Verdict:
    """The record that answers a command about a revision; what can't be done changes nothing and
    says why."""
    event, reason, tip, serving = logged.event, "", adapter.tip, adapter.serving
    assert isinstance(event, (Rollback, Pin))
    target = event.to if isinstance(event, Rollback) else event.revision
    try:
        catalog.loadable(adapter, target)
    except InvalidInput as error:
        decision, reason = Decision.REFUSED, str(error)
    else:
        match event:
            case Rollback():
                decision, reason = Decision.ROLLBACK, f"asked for revision {target}"
                tip = serving = target
            case Pin(pinned=True):
                decision, reason = Decision.PIN, "to be kept whatever the retention rule says"
            case _:
                decision, reason = Decision.UNPIN, "under the retention rule again"
    return Verdict(
        pseudonym=adapter.pseudonym,
        decision=decision,
        judged=target,
        tip=tip,
        serving=serving,
        reason=reason,
        command=logged.ref.tag,
    )
