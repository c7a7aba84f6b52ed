"""The storage contract, one suite over every backend; logs, packs, manifests and commits on top of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from populace.storage.catalog import Catalog
from populace.storage.commit import Owner, RevisionDraft, RevisionLogReader
from populace.storage.errors import Damaged, Fenced, OutcomeUnknown
from populace.storage.manifest import (
    AdapterCreated,
    Attempt,
    Claim,
    EventRef,
    RecordHeader,
    Settled,
    SettledEvent,
    Verdict,
    WaveManifest,
    open_record,
    payload_of,
    seal,
)
from populace.storage.objects import MemoryStore, ObjectStore, open_store
from populace.storage.pack import build_pack, read_blob


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return open_store(f"file://{tmp_path}/store") if request.param == "file" else open_store("memory://")


def test_a_blob_is_read_by_range_and_checked(store: ObjectStore) -> None:
    body, places = build_pack("packs/one", {"weights/b@1": b"bbbb" * 9, "weights/a@1": b"aaa"})
    store.put("packs/one", body)
    assert read_blob(store, places["weights/b@1"]) == b"bbbb" * 9
    assert read_blob(store, places["weights/a@1"]) == b"aaa"
    from safetensors.numpy import load

    assert sorted(load(body)) == ["weights/a@1", "weights/b@1"]


def test_every_flipped_byte_of_a_blob_is_detected(store: ObjectStore) -> None:
    body, places = build_pack("packs/one", {"weights/a@1": bytes(range(40))})
    place = places["weights/a@1"]
    for position in range(place.offset, place.offset + place.size_bytes):
        store.put("packs/one", body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :])
        with pytest.raises(Damaged, match="does not match the digest"):
            read_blob(store, place)


def event(number: int) -> EventRef:
    return EventRef(event_id=f"e{number}", position=(number, 0), digest="d" * 64)


def draft(revision: int = 1, parent: int = 0) -> RevisionDraft:
    return RevisionDraft(
        pseudonym="p1",
        revision=revision,
        parent=parent,
        blobs={"weights": b"w%d" % revision, "moments": b"m", "evidence": b"e"},
        experts=[0, 2],
        trained=[event(revision)],
        settled=[SettledEvent(event=event(90 + revision), reason="too long")],
        consumed=(90 + revision, 0),
        metrics={"reward": 0.5},
    )


FIXED = {
    "parameters": {"algorithm": "grpo"},
    "materials": {"base": "b" * 64},
    "numerics": {"dtype": "float32"},
}


def test_every_record_comes_back_as_it_was_sealed() -> None:
    header = RecordHeader(population="p", partition=1, seq=4, epoch=2, attempt_id="a", previous="0" * 64)
    records = [
        Claim(owner="me"),
        AdapterCreated(pseudonym="p1", spec={"rank": 4}, seed=7),
        Attempt(wave="w", adapters={"p1": [event(1), event(2)]}),
        Settled(pseudonym="p1", events=[SettledEvent(event=event(1), reason="no signal")], consumed=(1, 0)),
        Verdict(pseudonym="p1", decision="promote", judged=1, tip=1, serving=1, reason="r", numbers={"x": 1.0}),
    ]
    for record in records:
        assert open_record(seal(header, record)) == (header, record)
    with pytest.raises(Damaged):
        open_record(seal(header, records[0])[:-20])


def test_a_wave_is_an_in_toto_statement_with_slsa_provenance(store: ObjectStore) -> None:
    reader = RevisionLogReader(store, "pop", 0)
    owner = Owner(reader, "me")
    header, manifest = owner.commit_wave("w1", [draft()], **FIXED)
    sealed = reader.log.read(header.seq)
    assert open_record(sealed) == (header, manifest)
    payload = payload_of(sealed)
    assert payload["_type"] == "https://in-toto.io/Statement/v1"
    assert payload["predicateType"] == "https://slsa.dev/provenance/v1"
    assert payload["subject"][0]["name"] == "p1@1"
    assert payload["predicate"]["buildDefinition"]["externalParameters"]["algorithm"] == "grpo"
    assert json.loads(sealed)["signatures"] == []
    assert read_blob(store, manifest.revisions[0].blobs["weights"]) == b"w1"


def test_an_older_owner_is_fenced_by_a_newer_claim(store: ObjectStore) -> None:
    first = Owner(RevisionLogReader(store, "pop", 0), "first")
    reader = RevisionLogReader(store, "pop", 0)
    list(reader.read_new())
    second = Owner(reader, "second")
    with pytest.raises(Fenced, match="another controller"):
        first.append(AdapterCreated(pseudonym="p1", spec={}, seed=1))
    with pytest.raises(Fenced):
        first.commit_wave("w", [draft()], **FIXED)
    second.append(AdapterCreated(pseudonym="p1", spec={}, seed=1))


class Unreliable:
    """A store whose creates of log records may lose the answer, before or after the effect."""

    def __init__(self, inner: ObjectStore, faults: Iterator[str]) -> None:
        self._inner, self._faults = inner, faults

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def create(self, key: str, body: bytes) -> None:
        fault = next(self._faults, "none")
        if fault == "dropped":
            raise OutcomeUnknown("503 before the effect")
        self._inner.create(key, body)
        if fault == "lost":
            raise OutcomeUnknown("503 after the effect")


@pytest.mark.parametrize("faults", [["lost"], ["dropped"], ["dropped", "lost"], ["lost", "dropped"], ["dropped"] * 3])
def test_a_lost_answer_never_commits_twice_or_not_at_all(faults: list[str]) -> None:
    store = MemoryStore()
    reader = RevisionLogReader(store, "pop", 0)
    owner = Owner(reader, "me")
    reader.log.store = Unreliable(store, iter(faults))  # type: ignore[assignment]
    owner.append(AdapterCreated(pseudonym="p1", spec={}, seed=1))
    owner.append(Settled(pseudonym="p1", events=[], consumed=(0, 0)))
    records = [record for _, record in RevisionLogReader(store, "pop", 0).read_new()]
    assert [type(record).__name__ for record in records] == ["Claim", "AdapterCreated", "Settled"]


def test_a_store_that_never_answers_leaves_the_outcome_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    reader = RevisionLogReader(MemoryStore(), "pop", 0)
    owner = Owner(reader, "me")
    reader.log.store = Unreliable(reader.log.store, iter(["dropped"] * 99))  # type: ignore[assignment]
    with pytest.raises(OutcomeUnknown, match="start again"):
        owner.append(AdapterCreated(pseudonym="p1", spec={}, seed=1))


def test_a_tampered_or_swapped_record_breaks_the_chain(store: ObjectStore) -> None:
    reader = RevisionLogReader(store, "pop", 0)
    owner = Owner(reader, "me")
    owner.append(AdapterCreated(pseudonym="p1", spec={"rank": 4}, seed=1))
    owner.append(AdapterCreated(pseudonym="p2", spec={"rank": 4}, seed=2))
    header, record = open_record(reader.log.read(1))
    store.put(reader.log.key(1), seal(header, dataclasses.replace(record, seed=99)))
    with pytest.raises(Damaged, match="does not continue"):
        list(RevisionLogReader(store, "pop", 0).read_new())
    store.put(reader.log.key(1), reader.log.read(2))
    with pytest.raises(Damaged, match="belongs to another place"):
        list(RevisionLogReader(store, "pop", 0).read_new())


def test_the_catalog_follows_waves_verdicts_and_attempts() -> None:
    reader = RevisionLogReader(MemoryStore(), "pop", 0)
    owner, catalog = Owner(reader, "me"), Catalog()
    owner.append(AdapterCreated(pseudonym="p1", spec={"rank": 4}, seed=1))
    owner.append(Attempt(wave="w1", adapters={"p1": [event(1)]}))
    owner.commit_wave("w1", [draft(1, 0)], **FIXED)
    owner.commit_wave("w2", [draft(2, 1)], **FIXED)
    owner.append(Verdict(pseudonym="p1", decision="rollback", judged=1, tip=1, serving=1, reason="r", command="c1"))
    owner.append(Attempt(wave="w3", adapters={"p1": [event(3)]}))
    for header, record in RevisionLogReader(reader.log.store, "pop", 0).read_new():
        catalog.apply(header, record)
    adapter = catalog.adapters["p1"]
    assert (adapter.tip, adapter.serving, adapter.next_revision) == (1, 1, 3)
    assert adapter.lineage(2) == [2, 1, 0]
    assert adapter.consumed == (92, 0), "positions never move back"
    assert catalog.obeyed == {("p1", "c1")}
    assert list(catalog.unfinished[0].adapters) == ["p1"]
    assert catalog.owned[0]
    assert isinstance(open_record(reader.log.read(3))[1], WaveManifest)
