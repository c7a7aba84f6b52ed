"""Forgetting a user, rotating keys, and verifying a population from outside."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from populace.configs.schema import Settings
from populace.population.cli.app import app
from populace.population.client import Population
from populace.population.experience.checks import CheckedEvent
from populace.population.experience.events import Demonstration, Forget, Task
from populace.population.ledger.upkeep import Upkeep
from populace.storage.catalog.repack import RetentionRule
from populace.storage.errors import Forgotten, InvalidInput
from populace.storage.keys.keyring import Keyring
from populace.storage.log.manifest import seal
from populace.storage.log.records import Tombstone
from populace.storage.log.verify import Findings, positions_from_json, verify_partition
from populace.storage.objects.cloud import MemoryStore
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.files import FileStore
from tests.support.accounting import account
from tests.support.loops import Loop, owned_ledger

Start = Callable[..., Loop]
USER = "ada.lovelace@example.org"
SECRET = "zebra crossing at midnight"


def trained(
    settings: Settings, start: Start, store: ObjectStore, *, users: tuple[str, ...] = (USER, "bob")
) -> Population:
    """A population whose users have two revisions each; nobody owns it."""
    population = Population.create(store, settings)
    for turn in range(2):
        for user in users:
            population.enqueue(
                user,
                [Demonstration(prompt=SECRET, completion=f"the sea {turn}", event_id=f"e{turn}")],
            )
        controller = start(population)
        controller.wave()
        population.ownership.release()
    return population


def bytes_of(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list("")}


def forms(text: str) -> list[bytes]:
    """How a text could stand in a file: as it is, in hexadecimal, in base64 at any offset."""
    raw = text.encode()
    encoded = [base64.b64encode(b"x" * pad + raw)[4:-4] for pad in range(3)]
    return [raw, raw.hex().encode(), *encoded]


def test_a_user_stands_nowhere_in_the_store_and_is_unreadable_once_forgotten(
    settings: Settings, start: Start, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "store")
    population = trained(settings, start, store)
    producer = Population.open(store, settings)  # another process, with her key in its memory
    producer.enqueue(USER, [Task(prompt=SECRET, reward="letters", event_id="late")])
    for key, body in bytes_of(store).items():
        for text in (USER, SECRET, "the sea"):
            assert not any(form in body or form in key.encode() for form in forms(text)), (
                key,
                text,
            )
    pseudonym = population.ledger.pseudonym(USER)
    places = [
        place
        for state in population.ledger.catalog.revisions_of(pseudonym)
        for place in state.blobs.values()
    ]
    ciphertext = [store.get(place.pack)[place.offset :][: place.size_bytes] for place in places]
    assert population.sample("bob", "hello", rollout=settings.rollout)

    assert population.forget(USER)
    for call in (
        lambda: population.revisions(USER),
        lambda: population.sample(USER, "hello"),
        lambda: population.rollback(USER, 1),
        lambda: population.verify(USER),
        lambda: population.enqueue(USER, [Demonstration(prompt="a", completion="b")]),
        lambda: producer.enqueue(USER, [Demonstration(prompt="a", completion="b")]),
        lambda: Population.open(store, settings).enqueue(
            USER, [Demonstration(prompt="a", completion="b")]
        ),
        lambda: Population.open(store, settings).revisions(USER),
    ):
        with pytest.raises(Forgotten):
            call()
    assert population.forget(USER), "forgetting again is harmless"
    assert json.loads(store.get(f"test/keys/{pseudonym[:2]}/{pseudonym}"))["forgotten"]
    assert population.status().forgotten == 1
    assert population.users() == ["bob"] == Population.open(store, settings).users()

    population.repack(RetentionRule(last=8))
    everything = bytes_of(store)
    assert not any(sealed[:64] in body for sealed in ciphertext for body in everything.values())
    assert len(population.revisions("bob")) == 3 and not population.verify("bob").problems
    assert population.sample("bob", "hello", rollout=settings.rollout)
    controller = start(Population.open(store, settings))
    assert controller.wave() is None, "what she sent is nothing to learn from"
    controller.ownership.release()
    findings = verify_everything(store, population)
    assert not findings.problems


class Interrupting:
    """Runs something just before the next write into an experience log."""

    def __init__(self, inner: ObjectStore, before: Callable[[], object]) -> None:
        self._inner, self._before = inner, before

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def create(self, key: str, body: bytes) -> None:
        if "/experience/" in key:
            self._before()
        self._inner.create(key, body)


def test_a_producer_that_races_with_the_forgetting_is_told(
    settings: Settings, start: Start
) -> None:
    store = MemoryStore()
    population = trained(settings, start, store)
    producer = Population.open(store, settings)
    for log in producer.producer._commit._logs.values():
        log.log.store = Interrupting(store, lambda: population.forget(USER))  # type: ignore[assignment]
    with pytest.raises(Forgotten):
        producer.enqueue(USER, [Demonstration(prompt="a", completion="b")])
    assert Population.open(store, settings).users() == ["bob"]


def test_a_crash_between_the_tombstone_and_the_key_is_finished_by_the_next_owner(
    settings: Settings, start: Start
) -> None:
    store = MemoryStore()
    population = trained(settings, start, store)
    ledger, ownership = owned_ledger(store, population.meta, 0.05)
    adapter = ledger.adapter(USER)
    ledger.append(adapter.partition, Tombstone(pseudonym=adapter.pseudonym, command="c"))
    assert not ledger.keys.is_forgotten(adapter.pseudonym)
    producer = Population.open(store, settings)
    producer.enqueue(USER, [Demonstration(prompt="a", completion="b")])
    with pytest.raises(Forgotten):
        Population.open(store, settings).revisions(USER)
    ownership._heartbeat.stop()  # type: ignore[union-attr]  # as dead as a killed process
    again, owning = owned_ledger(store, population.meta, 0.05)
    assert again.keys.is_forgotten(adapter.pseudonym)
    owning.release()
    with pytest.raises(Forgotten):
        producer.enqueue(USER, [Demonstration(prompt="a", completion="b")])


def test_a_running_controller_forgets_between_two_waves(settings: Settings, start: Start) -> None:
    store = MemoryStore()
    population = trained(settings, start, store)
    running = Population.open(store, settings)
    controller = start(running)
    controller.ledger.refresh()
    population.enqueue(USER, [Demonstration(prompt="a", completion="rain", event_id="e3")])
    population.enqueue("bob", [Demonstration(prompt="a", completion="rain", event_id="e3")])
    heldout = [Task(prompt=SECRET, reward="letters", event_id=f"t{number}") for number in range(20)]
    population.enqueue(USER, heldout)
    controller.wave()
    controller.evaluate()
    pseudonym = running.ledger.pseudonym(USER)
    slab = controller.workers.slab  # type: ignore[attr-defined]
    assert any(key.pseudonym == pseudonym for key in slab.slots)
    assert SECRET in str(vars(controller.examiner)["_tasks"])
    population.send({USER: [CheckedEvent.of(Forget())]})
    population.enqueue("bob", [Demonstration(prompt="a", completion="sea", event_id="e4")])
    report = controller.wave()
    assert report is not None and report.num_revisions == 1
    assert not any(key.pseudonym == pseudonym for key in slab.slots)
    assert pseudonym not in str(vars(controller.examiner)), "neither their tasks nor their rewards"
    with pytest.raises(Forgotten):
        population.revisions(USER)
    running.ownership.release()


def test_a_user_who_only_sent_experience_can_be_forgotten(settings: Settings) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue(USER, [Demonstration(prompt="a", completion="b")])
    assert population.forget(USER)
    with pytest.raises(Forgotten):
        population.enqueue(USER, [Demonstration(prompt="a", completion="b")])
    with pytest.raises(Forgotten):
        population.sample(USER, "hello")
    with pytest.raises(InvalidInput, match="has never sent anything"):
        population.forget("nobody")


def test_a_rotated_master_key_makes_the_old_one_useless_and_unneeded(
    settings: Settings, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POPULACE_KEYS", str(tmp_path / "keys"))
    store = MemoryStore()
    population = trained(settings, start, store, users=(USER, "bob", "cleo"))
    population.forget("cleo")
    (old,) = (tmp_path / "keys").glob("master-*.key")
    new = population.rotate_master_key()
    old.unlink()
    assert new not in old.name
    opened = Population.open(store, settings)
    opened.enqueue("dora", [Demonstration(prompt="a", completion="b")])
    assert opened.users() == sorted([USER, "bob", "dora"])
    assert opened.sample(USER, "hello", rollout=settings.rollout)
    with pytest.raises(Forgotten):
        opened.revisions("cleo")
    (tmp_path / "keys" / f"master-{new}.key").unlink()
    with pytest.raises(InvalidInput, match=r"master key .* neither in"):
        Population.open(store, settings)


def test_a_rotated_signing_key_continues_the_history(
    settings: Settings, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POPULACE_KEYS", str(tmp_path / "keys"))
    store = MemoryStore()
    population = trained(settings, start, store)
    key = population.rotate_signing_key()
    (old,) = [
        path
        for path in (tmp_path / "keys").glob("signing-*.pem")
        if key.keyid[:16] not in path.name
    ]
    old.unlink()
    again = Population.open(store, settings)
    again.enqueue("bob", [Demonstration(prompt="a", completion="rain", event_id="e3")])
    controller = start(again)
    controller.wave()
    again.ownership.release()
    assert len(again.revisions("bob")) == 4
    assert not verify_everything(store, again).problems


def test_keys_can_come_from_the_environment_alone(
    settings: Settings, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POPULACE_KEYS", str(tmp_path / "keys"))
    store = MemoryStore()
    trained(settings, start, store)
    (signing,) = (tmp_path / "keys").glob("signing-*.pem")
    (master,) = (tmp_path / "keys").glob("master-*.key")
    assert {path.stat().st_mode & 0o777 for path in (signing, master)} == {0o600}
    monkeypatch.setenv("POPULACE_SIGNING_KEY", signing.read_text())
    monkeypatch.setenv(
        "POPULACE_MASTER_KEY", f"{master.stem.removeprefix('master-')}:{master.read_text()}"
    )
    monkeypatch.setenv("POPULACE_KEYS", str(tmp_path / "empty"))
    population = Population.open(store, settings)
    population.enqueue("bob", [Demonstration(prompt="a", completion="rain", event_id="e3")])
    controller = start(population)
    assert controller.wave() is not None
    population.ownership.release()


def test_who_reads_the_store_cannot_test_a_guess_at_a_user(
    settings: Settings, start: Start
) -> None:
    """Seeds follow from user ids and the configuration, which is public: the log holds them
    masked."""
    population = trained(settings, start, MemoryStore())
    adapter = population.ledger.adapter(USER)
    assert adapter.seed == population.meta.adapter_seed(USER), (
        "the seed itself is the one that the configuration gives"
    )
    guesses = [
        str(adapter.seed).encode(),
        adapter.seed.to_bytes(8, "little"),
        adapter.seed.to_bytes(8, "big"),
    ]
    population.ownership.claim(0.05)
    Upkeep(population.ledger).checkpoint(1)
    population.ownership.release()
    from securesystemslib.dsse import Envelope

    for key, body in bytes_of(population.store).items():
        if "/revisions/" in key:
            body += Envelope.from_dict(json.loads(body)).payload
        assert not any(guess in body for guess in guesses), key


def test_what_a_failing_reward_says_of_a_user_goes_with_the_user(
    settings: Settings, start: Start
) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue(
        USER, [Task(prompt="rain", reward="raising", event_id=f"t{n}") for n in range(4)]
    )
    controller = start(population)
    for _ in range(3):  # a reward that fails gets three tries
        controller.wave()
    population.ownership.release()
    assert "this reward is broken" in "".join(account(population).reasons.values())
    for body in bytes_of(population.store).values():
        assert not any(form in body for form in forms("this reward is broken"))


def test_a_forgetting_that_was_interrupted_also_removes_exports(
    settings: Settings, start: Start
) -> None:
    store = MemoryStore()
    population = trained(settings, start, store)
    pseudonym = population.ledger.pseudonym(USER)
    store.put(f"test/exports/{pseudonym}/1.tar", b"weights in the clear")
    ledger, ownership = owned_ledger(store, population.meta, 0.05)
    ledger.append(ledger.adapter(USER).partition, Tombstone(pseudonym=pseudonym, command="c"))
    ownership.release()
    _, owning = owned_ledger(store, population.meta, 0.05)
    owning.release()
    assert list(store.list("test/exports")) == []


def test_a_key_that_a_rotation_missed_is_wrapped_anew(settings: Settings, tmp_path: Path) -> None:
    """A producer read the old master's name; the rotation went by before its key landed."""
    population = Population.create(MemoryStore(), settings)
    ledger = population.ledger
    old, pseudonym = population.producer._master(), ledger.pseudonym("late")
    new = population.rotate_master_key()
    answers = iter([old, new])
    ledger.keys.ensure(pseudonym, "late", lambda: next(answers))
    body = json.loads(population.store.get(f"test/keys/{pseudonym[:2]}/{pseudonym}"))
    assert body["master"] == new


def test_a_killed_writer_leaves_no_copy_of_a_key_behind(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.create("keys/aa/user", b"wrapped key")
    left = tmp_path / "keys" / "aa" / ".tmp-user-died"
    left.write_bytes(b"wrapped key")
    store.put("keys/aa/user", b"marker")
    assert not left.exists() and list(store.list("keys")) == ["keys/aa/user"]


# Verification from outside.


def verify_everything(
    store: ObjectStore, population: Population, known: dict | None = None
) -> Findings:
    findings, meta = Findings(), population.meta
    for partition in range(meta.partitions):
        position = (known or {}).get(partition)
        verify_partition(store, meta.name, partition, meta.root_key, findings, known=position)
    return findings


def test_verification_needs_no_secret_and_names_what_is_wrong(
    settings: Settings, start: Start, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "store")
    population = trained(settings, start, store)
    findings = verify_everything(store, population)
    assert not findings.problems and findings.num_revisions == 4 and findings.num_blobs == 12
    positions = positions_from_json(json.loads(json.dumps(dataclasses.asdict(findings))))
    assert positions == findings.positions

    adapter = population.ledger.adapter(USER)
    place = population.ledger.catalog.revision_of(adapter.pseudonym, 1).blobs["weights"]
    pack = store.get(place.pack)
    broken = bytearray(pack)
    broken[place.offset + 5] ^= 1
    store.put(place.pack, bytes(broken))
    (problem,) = verify_everything(store, population).problems
    assert f"weights of {adapter.pseudonym}@1" in problem and place.pack in problem
    store.delete(place.pack)
    assert any("no object" in problem for problem in verify_everything(store, population).problems)
    store.put(place.pack, pack)

    # A hole in the log, which to a reader looks like its end.
    log = population.ledger.readers[adapter.partition].log
    gone = store.get(log.key(1))
    store.delete(log.key(1))
    assert any("is missing" in problem for problem in verify_everything(store, population).problems)
    store.put(log.key(1), gone)

    # A pack that moved while it was being verified is no problem.
    population.ownership.claim(0.05)
    Upkeep(population.ledger).checkpoint(1)
    population.ownership.release()
    findings = verify_everything(store, population)
    assert not findings.problems
    key = next(store.list("test/checkpoints"))
    checkpoint = store.get(key)
    store.put(key, checkpoint[:-9] + b"?" + checkpoint[-8:])
    assert any(key in problem for problem in verify_everything(store, population).problems)
    store.put(key, checkpoint)

    # A log that was cut off is seen by who kept the position.
    positions = findings.positions
    last = findings.positions[adapter.partition].seq
    sealed = store.get(log.key(last))
    store.delete(log.key(last))
    assert not verify_everything(store, population).problems
    assert any(
        "cut off" in problem for problem in verify_everything(store, population, positions).problems
    )
    store.put(log.key(last), sealed)

    # A record that a stranger signed.
    header, record = population.ledger.readers[adapter.partition].read_at(1)
    keyring = Keyring(tmp_path / "stranger")
    original = store.get(log.key(1))
    store.put(log.key(1), seal(header, record, keyring.signer(keyring.new_signing_key())))
    assert any(
        "not signed by" in problem for problem in verify_everything(store, population).problems
    )
    store.put(log.key(1), original)
    assert not verify_everything(store, population).problems


def test_a_swapped_key_cannot_borrow_the_id_of_the_pinned_one(
    settings: Settings, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "store")
    population = Population.create(store, settings)
    stranger = Keyring(tmp_path / "stranger").new_signing_key()
    body = json.loads(store.get("test/population.json"))
    body["root_key"]["public"] = stranger.public
    store.put("test/population.json", json.dumps(body).encode())
    words = ["verify", "--all", "--root-key", population.meta.root_key.keyid, "--store", store.url]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "names the root key" in result.output


def test_blobs_that_a_repack_moves_meanwhile_are_no_problem(tmp_path: Path) -> None:
    from populace.storage.catalog.repack import repack
    from populace.storage.log.reader import RevisionLogReader
    from populace.storage.log.verify import _Walk
    from tests.support.history import History

    history = History(MemoryStore(), tmp_path / "keys")
    owner, catalog = history.claim()
    history.create(owner, catalog, "ada")
    for turn in range(6):
        history.commit(owner, catalog, "ada", body=b"turn %d" % turn)
    findings = Findings()
    walk = _Walk(RevisionLogReader(history.store, "pop", 0, history.root_key), findings, None)
    walk.follow()
    assert repack(owner, catalog, RetentionRule(last=2)).num_packs_deleted > 0
    (name,) = walk.chains
    walk.read_blobs(name, lambda count: None)
    assert findings.problems == [] and findings.num_revisions == 6


def test_an_unexplained_fork_a_gap_and_a_wrong_parent_are_found(
    settings: Settings, start: Start
) -> None:
    from populace.storage.log.pack import BlobPlace
    from populace.storage.log.records import AdapterCreated, RevisionEntry, Verdict, WaveManifest
    from populace.storage.log.verify import _follow

    def wave(revision: int, parent: int, parent_sha256: str | None) -> WaveManifest:
        place = BlobPlace(pack="k", offset=0, size_bytes=1, sha256=f"{revision:064x}")
        entry = RevisionEntry(
            pseudonym="p", revision=revision, parent=parent, parent_sha256=parent_sha256,
            blobs={"weights": place},
            experts=[], trained=[], settled=[], consumed=(0, 0), metrics={},
        )  # fmt: skip
        return WaveManifest(
            wave="w", pack="k", revisions=[entry], parameters={}, materials={}, numerics={}
        )

    def problems(*records: object) -> str:
        chains: dict = {}
        created = AdapterCreated(pseudonym="p", spec={}, seed=0)
        return " | ".join(
            problem for record in (created, *records) for problem in _follow(chains, record)
        )

    back = Verdict(pseudonym="p", decision="rollback", judged=1, tip=1, serving=1, reason="r")
    one, two = f"{1:064x}", f"{2:064x}"
    assert problems(wave(1, 0, None), wave(2, 1, one), back, wave(3, 1, one)) == ""
    assert "unexplained fork" in problems(wave(1, 0, None), wave(2, 1, one), wave(3, 1, one))
    assert "gap or a repetition" in problems(wave(1, 0, None), wave(3, 1, one))
    assert "another digest for its parent" in problems(wave(1, 0, None), wave(2, 1, two))
    assert "never created" in problems(Verdict(**{**dataclasses.asdict(back), "pseudonym": "q"}))
    assert "created a second time" in problems(AdapterCreated(pseudonym="p", spec={}, seed=0))


def test_the_command_line_forgets_verifies_and_rotates(
    settings: Settings, start: Start, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "store")
    population = trained(settings, start, store)
    where = ["--store", store.url]

    def run(*words: str, code: int = 0, **kwargs: str) -> str:
        result = CliRunner().invoke(app, [*words, *where], **kwargs)  # type: ignore[arg-type]
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    whole = json.loads(run("verify", "--all", "--json"))
    assert whole["problems"] == [] and whole["root_key"] == population.meta.root_key.keyid
    (tmp_path / "before.json").write_text(json.dumps(whole))
    assert "match their manifests" in run("verify", USER)
    assert "names the root key" in run("verify", "--all", "--root-key", "abcd" * 16, code=1)
    for words in (
        ["--all", "--root-key", ""],
        [USER, "--since", "x"],
        ["--all", "--since", str(tmp_path)],
        [],
    ):
        assert isinstance(
            CliRunner().invoke(app, ["verify", *words, *where]).exception, InvalidInput
        ), words
    assert "pinned" in run("pin", USER, "1")
    assert "signed by" in run("keys", "rotate-signing")
    assert "wrapped by master key" in run("keys", "rotate-master")
    run(
        "verify", "--all", "--since", str(tmp_path / "before.json"), "--root-key", whole["root_key"]
    )
    run("forget", USER, code=1, input="n\n")
    assert "revision" in run("revisions", USER)
    assert "forgotten" in run("forget", USER, "--yes")
    assert isinstance(CliRunner().invoke(app, ["revisions", USER, *where]).exception, Forgotten)
    assert "deleted" in run("repack", "--last", "1")
    run("verify", "--all")
    assert os.environ["POPULACE_KEYS"] in run("keys", "rotate-signing").replace("\n", "")
