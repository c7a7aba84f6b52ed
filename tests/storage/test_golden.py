"""Stores that earlier versions wrote must open."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from populace.storage.errors import Forgotten
from populace.storage.identity import PopulationMeta
from populace.storage.keys.keyring import Keyring
from populace.storage.log.loading import BlobRequest, load_wave
from populace.storage.log.manifest import open_record
from populace.storage.log.records import Record, parts_of
from populace.storage.log.verify import Findings, verify_partition
from populace.storage.objects.files import FileStore
from tests.support.golden_store import make
from tests.support.loops import ledger_of

ALL_KINDS = {kind.KIND for kind in Record.__args__}
GOLDEN = sorted((Path(__file__).parents[1] / "golden").iterdir())


@pytest.mark.parametrize("source", GOLDEN, ids=lambda path: path.name)
def test_a_store_of_an_earlier_version_opens(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(source, folder)
    missing = {"failed", "compaction"} if source.name == "format-1" else set()
    check(folder, ALL_KINDS - missing, says_when=source.name != "format-1")


def test_a_store_of_this_version_opens_the_same(tmp_path: Path) -> None:
    make(tmp_path)
    check(tmp_path, ALL_KINDS, says_when=True)


def check(folder: Path, expected: set[str], says_when: bool) -> None:
    store = FileStore(folder / "store")
    meta = PopulationMeta.read(store, "golden")
    ledger = ledger_of(store, meta, Keyring(folder / "keys"))
    ada, bob = ledger.adapter("ada"), ledger.adapter("bob")
    assert (ada.tip, ada.serving, ada.next_revision, ada.seed) == (0, 0, 6, 7)
    assert (bob.tip, bob.serving, bob.next_revision) == (1, 1, 2)
    assert ada.spec["rank"] == 4 and ledger.catalog.revision_of(ada.pseudonym, 5).experts == (0, 3)
    assert [
        state.revision for state in ledger.catalog.revisions_of(ada.pseudonym) if state.is_kept
    ] == [4, 5]
    assert [note.decision for note in ledger.catalog.notes_of(bob.pseudonym)] == [
        "settled",
        "promote",
    ]
    request = BlobRequest(
        pseudonym=ada.pseudonym,
        revision=5,
        part="weights",
        place=ledger.catalog.revision_of(ada.pseudonym, 5).blobs["weights"],
    )
    assert bytes(load_wave(store, ledger.keys, [request])[0]) == b"weights ada 5"
    assert sorted(ledger.users().values()) == ["ada", "bob"]
    with pytest.raises(Forgotten):
        ledger.adapter("cleo")
    findings = Findings()
    verify_partition(store, "golden", 0, meta.root_key, findings)
    assert findings.problems == []
    _, note = ledger.readers[0].read_at(ledger.catalog.notes_of(bob.pseudonym)[0].seq)
    assert ledger.seals.detail(bob.pseudonym, note.events[0]) == "something that bob said"  # type: ignore[union-attr]
    kinds = set()
    reader = ledger.readers[0]
    for seq in range(reader.next_seq):
        _, record = reader.read_at(seq)
        kinds |= {part.KIND for part in parts_of(record)} | {record.KIND}
    assert kinds == expected, "a record of every kind that this version has is in it"
    header, _ = open_record(reader.log.read(0) or b"", meta.root_key)
    assert (header.written_at > 0) == says_when
