"""Commands that users' logs hold: roll back, pin, erase. Each is obeyed once, in order."""

from __future__ import annotations

from populace.population.experience.events import Pin, Rollback
from populace.population.experience.sealing import LoggedEvent
from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.states import AdapterState
from populace.storage.errors import InvalidInput
from populace.storage.log.records import Verdict


def _answer(catalog: Catalog, adapter: AdapterState, logged: LoggedEvent) -> Verdict:
    """The record that answers a command about a revision; what can't be done changes nothing and
    says why."""
    event, reason, tip, serving = logged.event, "", adapter.tip, adapter.serving
    assert isinstance(event, (Rollback, Pin))
    target = event.to if isinstance(event, Rollback) else event.revision
    try:
        catalog.loadable(adapter, target)
    except InvalidInput as error:
        decision, reason = "refused", str(error)
    else:
        match event:
            case Rollback():
                decision, reason, tip, serving = (
                    "rollback",
                    f"asked for revision {target}",
                    target,
                    target,
                )
            case Pin(pinned=True):
                decision, reason = "pin", "to be kept whatever the retention rule says"
            case _:
                decision, reason = "unpin", "under the retention rule again"
    return Verdict(
        pseudonym=adapter.pseudonym,
        decision=decision,
        judged=target,
        tip=tip,
        serving=serving,
        reason=reason,
        command=logged.ref.tag,
    )


def exports_folder(population: str, pseudonym: str) -> str:
    """Where a user's shared exports lie."""
    return f"{population}/exports/{pseudonym}"
