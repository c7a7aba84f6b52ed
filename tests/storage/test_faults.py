"""The store under faults: a state machine of writers, zombies, crashes and failing calls against a
small model, and every single flipped byte."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from populace.population.experience.log import ExperienceLog
from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.checkpoint import restore, write_checkpoint
from populace.storage.catalog.repack import RetentionRule, collect_garbage, repack
from populace.storage.catalog.states import AdapterState
from populace.storage.errors import (
    Damaged,
    Fenced,
    Forgotten,
    InvalidInput,
    OutcomeUnknown,
    PopulaceError,
)
from populace.storage.keys.keyring import Keyring
from populace.storage.log.loading import BlobRequest, load_wave
from populace.storage.log.owner import Owner
from populace.storage.log.pack import read_blob
from populace.storage.log.records import Decision, Tombstone, Verdict, WaveManifest
from populace.storage.log.verify import Findings, verify_partition
from populace.storage.objects.cloud import MemoryStore
from tests.storage.test_log_and_catalog import build, state_of
from tests.support.faults import Crash, FaultyStore
from tests.support.history import FIXED, History, name_of

USERS = ("ada", "bob", "cleo")
planned = st.tuples(st.sampled_from(FaultyStore.KINDS), st.integers(0, 3) | st.integers(4, 30))
fault = st.one_of(st.none(), st.none(), planned)
process = st.integers(0, 2)
user = st.sampled_from(USERS)


class StoreMachine(RuleBasedStateMachine):
    """Up to three processes believe that they own the partition; the log decides. The model is what
    each call was told: an acknowledged body is in the log once, a refused one never, an unknown one
    at most once."""

    num_steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="populace-faults-"))
        self.inner = MemoryStore()
        self.history = History(self.inner, self.folder)
        self.store = FaultyStore(self.inner)
        self.processes: dict[int, tuple[Owner, Catalog]] = {}
        self.bodies = itertools.count()
        self.acknowledged: set[str] = set()
        self.refused: set[str] = set()
        self.forgotten: set[str] = set()
        self.asked_to_forget: set[str] = set()
        self.sent: set[str] = set()
        self.not_sent_twice: set[str] = set()
        owner, catalog = self.history.claim("first")
        for name in USERS:
            self.history.create(owner, catalog, name)
        self.processes[0] = (owner, catalog)
        owner.reader.log.store = self.store  # type: ignore[assignment]

    def teardown(self) -> None:
        self.store.plan(None, 0)
        self.store.deliver()
        self.check()
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule(who=process, plan=fault)
    def claim(self, who: int, plan: tuple[str, int] | None) -> None:
        def call() -> None:
            self.processes[who] = self.history.claim(f"process {who}", through=self.store)  # type: ignore[arg-type]

        self.processes.pop(who, None)
        self._run(who, plan, call)

    @rule(who=process, names=st.sets(user, min_size=1), plan=fault)
    def commit(self, who: int, names: set[str], plan: tuple[str, int] | None) -> None:
        owner, catalog = self.processes[who := self._alive(who)]
        names = {name for name in names if catalog.get(name_of(name)) is not None}
        wave = f"wave-{next(self.bodies)}"
        try:
            drafts = [self.history.draft(catalog, name, wave.encode()) for name in sorted(names)]
        except Forgotten:
            return  # somebody else obeyed; this process is a zombie that learns it from the key
        if drafts:
            told = self._run(
                who, plan, lambda: catalog.apply(*owner.commit_wave(wave, drafts, **FIXED))
            )
            {"done": self.acknowledged, "fenced": self.refused}.get(told, set()).add(wave)

    @rule(
        who=process, name=user, decision=st.sampled_from(("promote", "rollback", "pin")), plan=fault
    )
    def judge(self, who: int, name: str, decision: str, plan: tuple[str, int] | None) -> None:
        owner, catalog = self.processes[who := self._alive(who)]
        if (adapter := catalog.get(name_of(name))) is None or not adapter.tip:
            return
        target = adapter.tip
        if decision == "rollback":
            kept = [
                state.revision for state in catalog.revisions_of(adapter.pseudonym) if state.is_kept
            ]
            target = kept[0]
        moved = target if decision != "pin" else adapter.tip
        serving = adapter.serving if decision == "pin" else moved
        record = Verdict(
            pseudonym=adapter.pseudonym,
            decision=decision,
            judged=target,
            tip=moved,
            serving=serving,
            reason="r",
        )
        self._run(who, plan, lambda: catalog.apply(owner.append(record), record))

    @rule(who=process, plan=fault)
    def checkpoint(self, who: int, plan: tuple[str, int] | None) -> None:
        self._with(who, plan, lambda owner, catalog: write_checkpoint(owner, catalog))

    @rule(who=process, last=st.integers(1, 3), plan=fault)
    def repack(self, who: int, last: int, plan: tuple[str, int] | None) -> None:
        self._with(
            who, plan, lambda owner, catalog: repack(owner, catalog, RetentionRule(last=last))
        )

    @rule(who=process, plan=fault)
    def collect_garbage(self, who: int, plan: tuple[str, int] | None) -> None:
        self._with(who, plan, collect_garbage)

    @rule(
        who=process,
        action=st.sampled_from(("commit", "collect_garbage", "repack", "checkpoint")),
        plan=fault,
    )
    def a_zombie_acts_after_a_takeover(
        self, who: int, action: str, plan: tuple[str, int] | None
    ) -> None:
        zombie = self._alive(who)
        heir = (zombie + 1) % 3
        self.claim(heir, None)
        self.commit(heir, set(USERS), None)
        match action:
            case "commit":
                self.commit(zombie, set(USERS), plan)
            case "repack":
                self.repack(zombie, 1, plan)
            case _:
                getattr(self, action)(zombie, plan)

    @precondition(lambda self: not self.asked_to_forget)
    @rule(who=process, name=user, plan=fault)
    def forget(self, who: int, name: str, plan: tuple[str, int] | None) -> None:
        owner, catalog = self.processes[who := self._alive(who)]
        record = Tombstone(pseudonym=name_of(name), command="c")

        def call() -> None:
            catalog.apply(owner.append(record), record)
            self.history.keys().forget(name_of(name))

        self.asked_to_forget.add(name)
        if self._run(who, plan, call) == "done":
            self.forgotten.add(name)

    @rule(plan=fault)
    def enqueue(self, plan: tuple[str, int] | None) -> None:
        tag = f"event-{next(self.bodies)}"
        row = {"pseudonym": name_of("ada"), "tag": tag, "sealed": b"sealed"}
        log = ExperienceLog(self.store, "pop", 0)  # type: ignore[arg-type]
        told = self._run(9, plan, lambda: log.append([row]))
        (self.sent if told == "done" else self.not_sent_twice).add(tag)

    @rule()
    def deliver(self) -> None:
        self.store.deliver()

    @rule(who=process)
    def crash(self, who: int) -> None:
        self.processes.pop(who, None)

    def _alive(self, who: int) -> int:
        """One of the processes that believe they own; makes a new one if all are dead."""
        if not self.processes:
            self.processes[who] = self.history.claim(f"process {who}", through=self.store)  # type: ignore[arg-type]
        return who if who in self.processes else min(self.processes)

    @invariant()
    def check(self) -> None:
        """What everybody sees who opens the store now."""
        whole, waves = Catalog(), Counter[str]()
        for header, record in self.history.reader().read_new():
            whole.apply(header, record)
            if isinstance(record, WaveManifest):
                waves[record.wave] += 1
        assert set(waves.values()) <= {1}, "a wave was committed twice"
        assert self.acknowledged <= waves.keys(), "an acknowledged wave is lost"
        assert not waves.keys() & self.refused, "a refused wave is there"
        for adapter in whole:
            self._check_adapter(whole, adapter)
        findings = Findings()
        verify_partition(self.inner, "pop", 0, self.history.root_key, findings)
        assert not findings.problems
        assert set(whole.forgotten()) <= {name_of(name) for name in self.asked_to_forget}
        assert {name_of(name) for name in self.forgotten} <= set(whole.forgotten())
        restored_reader = self.history.reader()
        restored = Catalog()
        restore(restored_reader, restored)
        for header, record in restored_reader.read_new():
            restored.apply(header, record)
        assert state_of(restored) == state_of(whole), (
            "checkpoint and tail differ from the whole log"
        )
        tags = Counter(
            row["tag"]
            for _, rows in ExperienceLog(self.inner, "pop", 0).read_from(0)
            for row in rows.to_pylist()
        )
        assert set(tags.values()) <= {1}, "an event is in the log twice"
        assert self.sent <= tags.keys() <= self.sent | self.not_sent_twice

    def _check_adapter(self, catalog: Catalog, adapter: AdapterState) -> None:
        states = catalog.revisions_of(adapter.pseudonym)
        assert [state.revision for state in states] == list(range(1, adapter.next_revision)), (
            "a gap"
        )
        requests = [
            BlobRequest(
                pseudonym=adapter.pseudonym, revision=state.revision, part=part, place=place
            )
            for state in states
            for part, place in state.blobs.items()
        ]
        views = load_wave(self.inner, self.history.keys(), requests)
        whole = [request.revision for request in requests if request.part == "weights"]
        assert {adapter.tip, adapter.serving} <= {0, *whole}, "tip or serving can't be loaded"
        prefixes = {"weights": b"", "moments": b"m", "evidence": b"e"}
        for request, view in zip(requests, views, strict=True):
            assert bytes(view).startswith(prefixes[request.part] + b"wave-"), (
                "not the bytes that were committed"
            )

    def _with(
        self, who: int, plan: tuple[str, int] | None, call: Callable[[Owner, Catalog], object]
    ) -> None:
        owner, catalog = self.processes[who := self._alive(who)]
        self._run(who, plan, lambda: call(owner, catalog))

    def _run(self, who: int, plan: tuple[str, int] | None, call: Callable[[], object]) -> str:
        """What the process was told. One that is told anything but "done" ends, as a run does; a
        claim that another one beat stays a zombie that still tries to write."""
        StoreMachine.num_steps += 1
        self.store.plan(*(plan or (None, 0)))
        try:
            with mock.patch("time.sleep"):
                call()
            return "done"
        except Fenced:
            self.processes.pop(who, None)
            return "fenced"
        except (PopulaceError, Crash):
            self.processes.pop(who, None)
            return "unknown"
        finally:
            self.store.plan(None, 0)


def test_no_fault_loses_repeats_or_tears_a_commit() -> None:
    number = int(os.environ.get("POPULACE_TEST_SEED", time.time_ns() % 10**6))
    print(f"state machine seed {number} (set POPULACE_TEST_SEED to repeat)")
    examples = int(os.environ.get("POPULACE_TEST_EXAMPLES", 40))
    run_state_machine_as_test(
        hypothesis.seed(number)(StoreMachine),
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
    print(f"{StoreMachine.num_steps} calls, with faults in about a third of them")


# Every flipped byte.


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(MemoryStore(), tmp_path)


def flip(body: bytes, position: int) -> bytes:
    return body[:position] + bytes([body[position] ^ (1 << position % 8)]) + body[position + 1 :]


def test_every_flipped_byte_of_a_record_is_detected(history: History) -> None:
    owner, catalog = history.claim()
    history.create(owner, catalog, "ada")
    history.commit(owner, catalog, "ada")
    log = owner.reader.log
    for seq in range(3):
        sealed = log.read(seq) or b""
        for position in range(len(sealed)):
            history.store.put(log.key(seq), flip(sealed, position))
            with pytest.raises(Damaged):
                list(history.reader().read_new())
        history.store.put(log.key(seq), sealed)
    assert len(list(history.reader().read_new())) == 3


def test_every_flipped_byte_of_a_blob_is_detected_and_none_outside_matters(
    history: History,
) -> None:
    owner, catalog = history.claim()
    for name in ("ada", "bob"):
        history.create(owner, catalog, name)
    history.commit(owner, catalog, "ada", "bob")
    states = {name: catalog.revision_of(name_of(name), 1) for name in ("ada", "bob")}
    requests = [
        BlobRequest(pseudonym=name_of(name), revision=1, part=part, place=place)
        for name, state in states.items()
        for part, place in state.blobs.items()
    ]
    pack = requests[0].place.pack
    body, keys = history.store.get(pack), history.keys()
    covered = 0
    for position in range(len(body)):
        history.store.put(pack, flip(body, position))
        hit = [
            r for r in requests if r.place.offset <= position < r.place.offset + r.place.size_bytes
        ]
        covered += len(hit)
        for request in requests:
            if request in hit:
                with pytest.raises(Damaged, match="does not match the digest"):
                    load_wave(history.store, keys, [request])
                with pytest.raises(Damaged):
                    read_blob(history.store, request.place)
            elif hit:
                load_wave(history.store, keys, [request])
    assert covered == sum(request.place.size_bytes for request in requests)
    history.store.put(pack, body[: requests[-1].place.offset + 3])
    with pytest.raises(Damaged):
        load_wave(history.store, keys, requests)


def test_blobs_that_changed_places_are_detected(history: History) -> None:
    """The digest says that these bytes were committed, the seal for whom and as what."""
    owner, catalog = history.claim()
    for name in ("ada", "bob"):
        history.create(owner, catalog, name)
    history.commit(owner, catalog, "ada", "bob")
    place = catalog.revision_of(name_of("ada"), 1).blobs["weights"]
    for wrong in (
        BlobRequest(pseudonym=name_of("bob"), revision=1, part="weights", place=place),
        BlobRequest(pseudonym=name_of("ada"), revision=2, part="weights", place=place),
        BlobRequest(pseudonym=name_of("ada"), revision=1, part="moments", place=place),
    ):
        with pytest.raises(Damaged, match="does not decrypt"):
            load_wave(history.store, history.keys(), [wrong])


def test_every_flipped_byte_of_a_checkpoint_is_detected(
    history: History, caplog: pytest.LogCaptureFixture
) -> None:
    owner, catalog = build(history)
    seq = write_checkpoint(owner, catalog)
    key = f"pop/checkpoints/0/{seq:020d}.parquet"
    body = history.store.get(key)
    for position in range(len(body)):
        history.store.put(key, flip(body, position))
        caplog.clear()
        reader, restored = history.reader(), Catalog()
        assert restore(reader, restored) is None and reader.next_seq == 0
        assert key in caplog.text
        assert len(restored) == 0, "nothing of it was taken"
    history.store.put(key, body)
    assert restore(history.reader(), Catalog()) == seq


def test_every_flipped_byte_of_a_users_key_is_detected(history: History) -> None:
    keys = history.keys()
    keys.ensure(name_of("ada"), "ada", lambda: history.master)
    path = f"pop/keys/{name_of('ada')[:2]}/{name_of('ada')}"
    body = history.store.get(path)
    expected = history.keys().fetch(name_of("ada"))
    for position in range(len(body)):
        history.store.put(path, flip(body, position))
        try:
            # A flip in the JSON's own spelling may leave the same key; it must never give another.
            assert history.keys().fetch(name_of("ada")) == expected
        except (Damaged, InvalidInput):
            continue


def test_every_flipped_byte_of_an_experience_segment_is_detected(tmp_path: Path) -> None:
    from populace.population.experience.events import Demonstration, event_bytes
    from populace.population.experience.sealing import Seals

    history = History(MemoryStore(), tmp_path)
    keys = history.keys()
    keys.ensure(name_of("ada"), "ada", lambda: history.master)
    seals, log = Seals(keys, b"k" * 32), ExperienceLog(history.store, "pop", 0)
    event = Demonstration(prompt="rain", completion="sea", event_id="e")
    log.append([seals.seal(name_of("ada"), event.event_id, event_bytes(event))])
    original = seals.open(next(log.read_from(0))[1].to_pylist()[0], (0, 0))
    assert original.event == Demonstration(
        prompt=({"role": "user", "content": "rain"},), completion="sea", event_id="e"
    )
    body = history.store.get(log.log.key(0))
    for position in range(len(body)):
        history.store.put(log.log.key(0), flip(body, position))
        try:
            rows = next(log.read_from(0))[1].to_pylist()
            opened = [seals.open(row, (0, index)) for index, row in enumerate(rows)]
        except (Damaged, Forgotten, PopulaceError):
            continue
        assert opened == [original], position


def test_moments_depend_on_the_log_alone(tmp_path: Path) -> None:
    """Whether a pack was rewritten depends on the neighbours in it; what an update starts from must
    not."""
    found = []
    for neighbours in ((), ("n1", "n2", "n3", "n4", "n5")):
        history = History(MemoryStore(), tmp_path / str(len(neighbours)))
        owner, catalog = history.claim()
        for name in ("ada", *neighbours):
            history.create(owner, catalog, name)
        history.commit(owner, catalog, "ada", *neighbours)
        history.commit(owner, catalog, "ada")
        repack(owner, catalog, RetentionRule(last=1))
        back = Verdict(
            pseudonym=name_of("ada"),
            decision=Decision.ROLLBACK,
            judged=1,
            tip=1,
            serving=1,
            reason="r",
        )
        catalog.apply(owner.append(back), back)
        states = [c.revision_of(name_of("ada"), 2) for c in (catalog, history.open()[1])]
        found += [sorted(state.blobs) for state in states]
    assert all(parts == found[0] for parts in found) and "moments" not in found[0]


def test_an_unknown_append_is_never_called_a_definite_failure(history: History) -> None:
    """The answer to the create gets lost, and then the store does not answer at all for a while."""
    history.store.put("pop/other", b"")
    store = FaultyStore(history.store)
    log = ExperienceLog(store, "pop", 0)  # type: ignore[arg-type]
    row = {"pseudonym": name_of("ada"), "tag": "t", "sealed": b"s"}
    faults = mock.patch.object(
        FaultyStore, "_due", side_effect=[None, None, "lost", *["dropped"] * 99]
    )
    with (
        mock.patch("time.sleep"),
        faults,
        pytest.raises(OutcomeUnknown, match="send them again with the same"),
    ):
        log.append([row])
    assert len(list(ExperienceLog(history.store, "pop", 0).read_from(0))) == 1


@pytest.mark.parametrize("num_before", range(12))
def test_whatever_request_of_an_append_fails_its_events_are_in_the_log_once(
    history: History, num_before: int
) -> None:
    row = {"pseudonym": name_of("ada"), "tag": "t", "sealed": b"s"}
    for _ in range(13):
        ExperienceLog(history.store, "pop", 0).append([{**row, "tag": "before"}])
    store = FaultyStore(history.store)
    store.plan("dropped", num_before)
    with mock.patch("time.sleep"):
        ExperienceLog(store, "pop", 0).append([row])  # type: ignore[arg-type]
    store.plan(None, 0)
    rows = [
        row
        for _, table in ExperienceLog(history.store, "pop", 0).read_from(13)
        for row in table.to_pylist()
    ]
    assert [row["tag"] for row in rows] == ["t"]


def test_of_racing_producers_of_one_user_all_use_one_key(history: History) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def make(_: int) -> bytes:
        return history.keys().ensure(name_of("ada"), "ada", lambda: history.master).key

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(make, range(16)))) == 1


def test_a_keyring_never_overwrites_a_key(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    first = keyring.new_signing_key()
    same = mock.patch(
        "securesystemslib.signer.CryptoSigner.generate_ed25519", return_value=keyring.signer(first)
    )
    with same, pytest.raises(FileExistsError):
        keyring.new_signing_key()
    assert keyring.signer(first)
