"""Packs, records, ownership, commits, and the catalog that follows from them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.checkpoint import dump, load, write_checkpoint
from populace.storage.catalog.repack import RetentionRule, collect_garbage, repack
from populace.storage.errors import AlreadyExists, Damaged, Fenced, InvalidInput, OutcomeUnknown
from populace.storage.log.loading import BlobRequest, load_wave
from populace.storage.log.manifest import open_record, payload_of, seal
from populace.storage.log.owner import Owner
from populace.storage.log.pack import build_pack, read_blob
from populace.storage.log.records import (
    AdapterCreated,
    Attempt,
    Checkpoint,
    Claim,
    Decision,
    MovedBlob,
    RecordBatch,
    RecordHeader,
    Repack,
    Rotate,
    Settled,
    SettledEvent,
    Tombstone,
    Verdict,
    WaveManifest,
)
from populace.storage.objects.cloud import MemoryStore
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.open import open_store
from tests.support.history import FIXED, History, event, name_of

P1 = name_of("p1")


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return (
        open_store(f"file://{tmp_path}/store")
        if request.param == "file"
        else open_store("memory://")
    )


@pytest.fixture
def history(store: ObjectStore, tmp_path: Path) -> History:
    return History(store, tmp_path / "keys")


def test_a_blob_is_read_by_range_and_checked(store: ObjectStore) -> None:
    body, places = build_pack("packs/one", {"weights/b@1": b"bbbb" * 9, "weights/a@1": b"aaa"})
    store.put("packs/one", body)
    assert read_blob(store, places["weights/b@1"]) == b"bbbb" * 9
    assert read_blob(store, places["weights/a@1"]) == b"aaa"
    from safetensors.numpy import load

    assert sorted(load(body)) == ["weights/a@1", "weights/b@1"]


def test_every_record_comes_back_as_it_was_sealed(history: History) -> None:
    header = RecordHeader(
        population="p",
        partition=1,
        seq=4,
        epoch=2,
        attempt_id="a",
        previous="0" * 64,
        written_at=1.5,
    )
    signer = history.keyring.signer(history.root_key)
    moved = MovedBlob(
        pseudonym=P1, revision=3, part="weights", offset=8, size_bytes=4, sha256="a" * 64
    )
    records = [
        Claim(owner="me"),
        AdapterCreated(pseudonym=P1, spec={"rank": 4}, seed=7),
        Attempt(wave="w", num_adapters=1, adapters={P1: [event(1), event(2)]}),
        Settled(
            pseudonym=P1,
            events=[SettledEvent(event=event(1), reason="r", detail="ZA==")],
            consumed=(1, 0),
        ),
        Verdict(
            pseudonym=P1,
            decision=Decision.PROMOTE,
            judged=1,
            tip=1,
            serving=1,
            reason="r",
            numbers={"x": 1.0},
        ),
        Tombstone(pseudonym=P1, command="c"),
        Repack(rule={"last": 2}, pack="k", moved=[moved], dropped=[(P1, 1, "moments")]),
        Checkpoint(sha256="c" * 64, size_bytes=9, rotations=["{}"]),
        Rotate(key=history.root_key.as_json()),
    ]
    records.append(RecordBatch(records=records[1:7]))
    for record in records:
        assert open_record(seal(header, record, signer), history.root_key) == (header, record)
    with pytest.raises(Damaged, match="not signed by"):
        open_record(seal(header, records[0], signer), history.keyring.new_signing_key())


def test_a_wave_is_a_signed_in_toto_statement_with_slsa_provenance(history: History) -> None:
    owner, catalog = history.claim()
    history.create(owner, catalog, "p1")
    history.commit(owner, catalog, "p1", body=b"one")
    before = time.time()
    header, manifest = owner.commit_wave("w1", [history.draft(catalog, "p1", b"two")], **FIXED)
    assert before - 0.001 <= header.written_at <= time.time() + 0.001
    sealed = owner.reader.log.read(header.seq)
    assert sealed is not None
    assert open_record(sealed, history.root_key) == (header, manifest)
    payload = payload_of(sealed)
    assert payload["_type"] == "https://in-toto.io/Statement/v1"
    assert payload["predicateType"] == "https://slsa.dev/provenance/v1"
    assert payload["subject"][0]["name"] == f"{P1}@2"
    definition = payload["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["algorithm"] == "grpo"
    parent = next(
        item for item in definition["resolvedDependencies"] if item["name"] == f"{P1}@2#parent"
    )
    assert parent["digest"]["sha256"] == catalog.revision_of(P1, 1).blobs["weights"].sha256
    assert [signature["keyid"] for signature in json.loads(sealed)["signatures"]] == [
        history.root_key.keyid
    ]
    places = manifest.revisions[0].blobs
    request = BlobRequest(pseudonym=P1, revision=2, part="weights", place=places["weights"])
    assert [bytes(view) for view in load_wave(history.store, history.keys(), [request])] == [b"two"]
    assert read_blob(history.store, places["weights"]) != b"two", (
        "nothing of a user lies in the store in the clear"
    )


def test_an_older_owner_is_fenced_by_a_newer_claim(history: History) -> None:
    first, catalog = history.claim("first")
    history.create(first, catalog, "p1")
    second, _ = history.claim("second")
    with pytest.raises(Fenced, match="another controller"):
        first.append(AdapterCreated(pseudonym=P1, spec={}, seed=1))
    with pytest.raises(Fenced):
        first.commit_wave("w", [history.draft(catalog, "p1")], **FIXED)
    second.append(Settled(pseudonym=P1, events=[], consumed=(1, 0)))


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
        if fault == "conflict":
            raise AlreadyExists("409: another write is under way; nothing is there yet")
        self._inner.create(key, body)
        if fault == "lost":
            raise OutcomeUnknown("503 after the effect")


@pytest.mark.parametrize(
    "faults",
    [
        ["lost"],
        ["dropped"],
        ["dropped", "lost"],
        ["lost", "dropped"],
        ["dropped"] * 3,
        ["conflict"],
        ["conflict", "lost"],
    ],
)
def test_a_lost_answer_never_commits_twice_or_not_at_all(faults: list[str], tmp_path: Path) -> None:
    history = History(MemoryStore(), tmp_path)
    owner, _ = history.claim()
    owner.reader.log.store = Unreliable(history.store, iter(faults))  # type: ignore[assignment]
    owner.append(AdapterCreated(pseudonym=P1, spec={}, seed=1))
    owner.append(Settled(pseudonym=P1, events=[], consumed=(0, 0)))
    records = [record for _, record in history.reader().read_new()]
    assert [type(record).__name__ for record in records] == ["Claim", "AdapterCreated", "Settled"]


def test_a_store_that_never_answers_leaves_the_outcome_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    owner, _ = History(MemoryStore(), tmp_path).claim()
    owner.reader.log.store = Unreliable(owner.reader.log.store, iter(["dropped"] * 99))  # type: ignore[assignment]
    with pytest.raises(OutcomeUnknown, match="start again"):
        owner.append(AdapterCreated(pseudonym=P1, spec={}, seed=1))


def test_a_tampered_swapped_or_resigned_record_is_named(history: History) -> None:
    owner, catalog = history.claim()
    for user in ("p1", "p2", "p3"):
        history.create(owner, catalog, user)
    log, signer = owner.reader.log, history.keyring.signer(history.root_key)
    sealed = log.read(1)
    assert sealed is not None
    header, record = open_record(sealed, history.root_key)
    changed = dataclasses.replace(record, seed=99)  # type: ignore[type-var]
    history.store.put(log.key(1), seal(header, changed, signer))
    with pytest.raises(Damaged, match=r"2\.json does not continue"):
        list(history.reader().read_new())
    stranger = history.keyring.signer(history.keyring.new_signing_key())
    history.store.put(log.key(1), seal(header, changed, stranger))
    with pytest.raises(Damaged, match=r"1\.json: not signed by"):
        list(history.reader().read_new())
    history.store.put(log.key(1), log.read(2) or b"")
    with pytest.raises(Damaged, match="belongs to another place"):
        list(history.reader().read_new())


def test_a_rotated_key_signs_what_follows_and_the_old_one_no_longer_counts(
    history: History,
) -> None:
    owner, catalog = history.claim()
    history.create(owner, catalog, "p1")
    new = history.keyring.new_signing_key()
    owner.append(Rotate(key=new.as_json()))
    history.commit(owner, catalog, "p1")
    reader, again = history.open()
    assert reader.key == new and again.require(P1).tip == 1
    assert isinstance(reader.read_at(1)[1], AdapterCreated)
    assert isinstance(reader.read_at(3)[1], WaveManifest)
    header, record = reader.read_at(3)
    old = history.keyring.signer(history.root_key)
    history.store.put(reader.log.key(3), seal(header, record, old))
    with pytest.raises(Damaged, match="not signed by"):
        history.open()


def test_without_the_private_key_nobody_claims(history: History, tmp_path: Path) -> None:
    history.claim()
    history.keyring.folder = tmp_path / "elsewhere"
    with pytest.raises(InvalidInput, match=r"signing key .* neither in"):
        history.claim()


# The catalog.


def test_the_catalog_follows_waves_verdicts_and_attempts(history: History) -> None:
    owner, catalog = history.claim()
    history.create(owner, catalog, "p1")
    history.create(owner, catalog, "p2")

    def add(record: Attempt | Verdict | Settled) -> None:
        catalog.apply(owner.append(record), record)

    add(Attempt(wave="w1", num_adapters=2, adapters={P1: [event(1)], name_of("p2"): [event(2)]}))
    history.commit(owner, catalog, "p1")
    assert list(catalog.attempts.unfinished[0]) == [name_of("p2")]
    add(
        Settled(
            pseudonym=name_of("p2"),
            events=[SettledEvent(event=event(2), reason="no signal")],
            consumed=(2, 0),
        )
    )
    assert not catalog.attempts.unfinished
    add(Verdict(pseudonym=P1, decision=Decision.PROMOTE, judged=1, tip=1, serving=1, reason="r"))
    catalog.apply(*owner.commit_wave("w2", [history.draft(catalog, "p1", at=60)], **FIXED))
    add(
        Verdict(
            pseudonym=P1,
            decision=Decision.ROLLBACK,
            judged=1,
            tip=1,
            serving=1,
            reason="r",
            command="c1",
        )
    )
    add(Attempt(wave="w3", num_adapters=1, adapters={P1: [event(3)]}))
    for found in (catalog, history.open()[1]):
        adapter = found.require(P1)
        assert (adapter.tip, adapter.serving, adapter.next_revision) == (1, 1, 3)
        assert found.lineage_of(P1, 2) == [2, 1, 0]
        assert adapter.consumed == (60, 0), "positions never move back"
        assert found.revision_of(P1, 1).is_promoted and not found.revision_of(P1, 2).is_promoted
        assert [note.decision for note in found.notes_of(P1)] == ["promote", "rollback"]
        assert adapter.spec == {"rank": 4} and found.revision_of(P1, 1).experts == (0, 2)
        assert found.obeyed == {(P1, "c1")}
        assert list(found.attempts.unfinished[0]) == [P1]
        assert found.owned[0] and found.num_settled[0] == 3
        assert found.pseudonyms(np.flatnonzero(found.adapters["changed"] > 5)) == [P1]
        assert found.uses["segment"].tolist() == [1, 60], "what each revision learned from"
        assert {adapter.pseudonym for adapter in found} == {P1, name_of("p2")}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 2**128 - 1), unique=True, max_size=60),
    st.lists(st.integers(1, 30), max_size=8),
)
def test_the_index_finds_what_is_there_and_nothing_else(
    numbers: list[int], sizes: list[int]
) -> None:
    import numpy as np

    from populace.storage.catalog.columns import Index

    index, names = (
        Index(),
        [f"{number % 2**66:032x}" for number in dict.fromkeys(n % 2**66 for n in numbers)],
    )
    start = 0
    for size in [*sizes, len(names)]:
        part = names[start : start + size]
        halves = np.array(
            [[int(name[:16], 16), int(name[16:], 16)] for name in part], np.uint64
        ).reshape(-1, 2)
        if size % 2:
            index._recent.update(
                {(int(a), int(b)): start + place for place, (a, b) in enumerate(halves)}
            )
        else:
            # Beyond the size of the dictionary, everything goes into the sorted array.
            filler = np.arange(5000, dtype=np.uint64) + np.uint64(2**63 + start * 10_000)
            high = np.concatenate([halves[:, 0], filler])
            low = np.concatenate([halves[:, 1], filler])
            index.add(
                high,
                low,
                np.concatenate([np.arange(start, start + len(part)), np.full(5000, 10**6)]),
            )
        start += len(part)
    for place, name in enumerate(names[:start]):
        key = np.array([int(name[:16], 16)], np.uint64), np.array([int(name[16:], 16)], np.uint64)
        assert index.find(*key)[0] == place
        assert index.find(key[0], key[1] ^ np.uint64(1 << 40))[0] == -1


# Checkpoints.


def state_of(catalog: Catalog) -> object:
    """Everything that a catalog says, to compare two of them."""
    return (
        [
            (
                adapter.pseudonym,
                adapter.spec,
                adapter.seed,
                adapter.tip,
                adapter.serving,
                adapter.next_revision,
                adapter.consumed,
                catalog.revisions_of(adapter.pseudonym),
                catalog.notes_of(adapter.pseudonym),
            )
            for adapter in sorted(catalog, key=lambda adapter: adapter.pseudonym)
        ],
        catalog.forgotten(),
        catalog.obeyed,
        catalog.num_settled,
        catalog.attempts.unfinished,
        catalog.attempts.tries,
        catalog.attempts.failures,
        catalog.compactions,
        catalog.owned,
    )


def build(history: History) -> tuple[Owner, Catalog]:
    """Some adapters with some revisions, verdicts and an unfinished attempt."""
    owner, catalog = history.claim()
    for user in ("p1", "p2", "p3", "p4"):
        history.create(owner, catalog, user)
    history.commit(owner, catalog, "p1", "p3")
    history.commit(owner, catalog, "p3", "p2", body=b"second")
    for record in (
        Verdict(
            pseudonym=name_of("p3"),
            decision=Decision.PROMOTE,
            judged=2,
            tip=2,
            serving=2,
            reason="r",
            command="c",
        ),
        Settled(
            pseudonym=P1, events=[SettledEvent(event=event(7), reason="no signal")], consumed=(7, 0)
        ),
        Tombstone(pseudonym=name_of("p2"), command="c2"),
        Tombstone(pseudonym=name_of("never an adapter"), command="c3"),
        Attempt(wave="w", num_adapters=1, adapters={P1: [event(8)]}),
    ):
        catalog.apply(owner.append(record), record)
    return owner, catalog


def test_a_checkpoint_and_the_tail_are_the_same_as_the_whole_log(history: History) -> None:
    owner, catalog = build(history)
    seq = write_checkpoint(owner, catalog)
    history.commit(owner, catalog, "p1", "p4", body=b"after the checkpoint")
    whole = Catalog()
    for header, record in history.reader().read_new():
        whole.apply(header, record)
    reader, restored = history.open()
    assert state_of(restored) == state_of(whole) == state_of(catalog)
    # Nothing before the checkpoint was read: it could as well be gone.
    assert seq is not None
    for number in range(seq):
        history.store.delete(reader.log.key(number))
    assert state_of(history.open()[1]) == state_of(catalog)
    write_checkpoint(owner, catalog)
    assert state_of(history.open()[1]) == state_of(catalog), (
        "a checkpoint of a restored catalog is as good"
    )


def test_a_damaged_checkpoint_is_named_and_passed_over(
    history: History, caplog: pytest.LogCaptureFixture
) -> None:
    owner, catalog = build(history)
    first = write_checkpoint(owner, catalog)
    history.commit(owner, catalog, "p1")
    second = write_checkpoint(owner, catalog)
    assert first is not None and second is not None
    key = f"pop/checkpoints/0/{second:020d}.parquet"
    body = history.store.get(key)
    history.store.put(key, body[:99] + bytes([body[99] ^ 1]) + body[100:])
    history.store.delete(
        history.reader().log.key(0)
    )  # the older checkpoint must serve: the log alone can't
    assert state_of(history.open()[1]) == state_of(catalog)
    assert key in caplog.text and "passed over" in caplog.text


def test_a_checkpoint_without_its_record_is_nobodys(history: History) -> None:
    owner, catalog = build(history)
    body = dump(catalog, 0)
    history.store.create(f"pop/checkpoints/0/{owner.reader.next_seq:020d}.parquet", body)
    assert write_checkpoint(owner, catalog) is None, "the number is taken; the next try has another"
    history.commit(owner, catalog, "p1")
    assert state_of(history.open()[1]) == state_of(catalog)
    assert write_checkpoint(owner, catalog) is not None
    assert state_of(history.open()[1]) == state_of(catalog)


def test_a_checkpoint_after_rotations_is_trusted_through_the_root_key(history: History) -> None:
    owner, catalog = build(history)
    for _ in range(2):
        key = history.keyring.new_signing_key()
        owner.append(Rotate(key=key.as_json()))
    write_checkpoint(owner, catalog)
    history.commit(owner, catalog, "p1")
    reader, restored = history.open()
    assert reader.key == key and state_of(restored) == state_of(catalog)
    assert len(reader.rotations) == 2


def test_only_the_newest_checkpoints_stay(history: History) -> None:
    owner, catalog = build(history)
    numbers = [write_checkpoint(owner, catalog) for _ in range(4)]
    left = [key.rpartition("/")[2] for key in history.store.list("pop/checkpoints/0")]
    assert left == [f"{number:020d}.parquet" for number in numbers[-2:]]


def test_partitions_are_checkpointed_apart_and_loaded_together(tmp_path: Path) -> None:
    one, two = History(MemoryStore(), tmp_path / "a"), History(MemoryStore(), tmp_path / "b")
    bodies = []
    for history in (one, two):
        _, catalog = build(history)
        bodies.append(dump(catalog, 0))
    both = Catalog()
    load(both, 0, bodies[0])
    load(both, 1, bodies[1])
    is_living = both.adapters["flags"] == 0
    first, rows = (
        np.flatnonzero(is_living & (both.adapters["partition"] == partition))
        for partition in (0, 1)
    )
    assert both.pseudonyms(rows) == both.pseudonyms(first)
    assert [both.state(int(row)).tip for row in rows] == [1, 2, 0]
    assert both.revision_of(both.state(int(rows[1])).pseudonym, 2).is_promoted


# Retention and garbage.


def test_repacking_drops_what_the_rule_lets_go_and_keeps_the_rest_loadable(
    history: History,
) -> None:
    owner, catalog = history.claim()
    for user in ("p1", "p2"):
        history.create(owner, catalog, user)
    for turn in range(6):
        history.commit(owner, catalog, "p1", "p2", body=b"turn %d" % turn)
        decision = {0: ("pin", 1, 0), 1: ("promote", 2, 2)}.get(turn)
        if decision is not None:
            name, judged, serving = decision
            record = Verdict(
                pseudonym=P1, decision=name, judged=judged, tip=judged, serving=serving, reason="r"
            )
            catalog.apply(owner.append(record), record)
    packs = set(history.store.list("pop/packs/0"))
    report = repack(owner, catalog, RetentionRule(last=2))
    # p1 keeps 1 (pinned), 2 (promoted and serving), 5, 6; p2 keeps 5, 6 (serving 0 has no bytes).
    kept = {"p1": [1, 2, 5, 6], "p2": [5, 6]}
    for found in (catalog, history.open()[1]):
        for user, revisions in kept.items():
            assert [
                state.revision for state in found.revisions_of(name_of(user)) if state.is_kept
            ] == revisions
            assert [
                s.revision for s in found.revisions_of(name_of(user)) if "moments" in s.blobs
            ] == ([1, 6] if user == "p1" else [6])
            requests = [
                BlobRequest(
                    pseudonym=name_of(user),
                    revision=n,
                    part="weights",
                    place=found.revision_of(name_of(user), n).blobs["weights"],
                )
                for n in revisions
            ]
            views = load_wave(history.store, history.keys(), requests)
            assert [bytes(view) for view in views] == [b"turn %d" % (n - 1) for n in revisions]
            assert found.lineage_of(name_of(user), 6)[-1] == 0
        with pytest.raises(
            InvalidInput, match="dropped by the retention rule; still there: \\[0, 1, 2, 5, 6\\]"
        ):
            found.loadable(found.require(P1), 3)
    assert report.num_dropped > 0 and report.num_packs_deleted > 0
    left = set(history.store.list("pop/packs/0"))
    assert left == catalog.referenced_packs(0) and len(left & packs) < len(packs)
    again = repack(owner, catalog, RetentionRule(last=2))
    assert (again.num_dropped, again.num_packs_deleted) == (0, 0)


def test_garbage_is_what_older_owners_left_without_a_record(history: History) -> None:
    first, catalog = history.claim("first")
    history.create(first, catalog, "p1")
    history.commit(first, catalog, "p1")
    orphan = first.new_pack("aborted")
    history.store.put(orphan, b"a wave that never got its record")
    assert collect_garbage(first, catalog) == 0, "its record may still be on the way"
    second, catalog = history.claim("second")
    mine = second.new_pack("in-flight")
    history.store.put(mine, b"a wave of this owner")
    assert collect_garbage(second, catalog) == 1
    left = set(history.store.list("pop/packs/0"))
    assert orphan not in left and mine in left and catalog.referenced_packs(0) <= left
