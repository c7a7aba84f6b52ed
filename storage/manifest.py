"""The records of the revision log: what they say, and how they are sealed.

Every record is a JSON payload in a DSSE envelope, signed with Ed25519, that binds it to its population, partition,
number, epoch, writer and predecessor. A `wave` record is an in-toto Statement with the SLSA provenance predicate;
the others are plain statements of their kind. docs/format.md has every field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Signer

from populace.storage.errors import Damaged
from populace.storage.keys import PublicKey
from populace.storage.pack import BlobPlace

RECORD_TYPE = "application/vnd.populace.record+json"
WAVE_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://populace.dev/wave/v1"
NO_PREDECESSOR = "0" * 64

Position = tuple[int, int]
"""Place of an event in its partition's experience log: (segment, row)."""

BEFORE_ALL: Position = (-1, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHeader:
    """What every record binds."""

    population: str
    partition: int
    seq: int
    epoch: int
    """Number of the claim under which this was written; a claim's own number."""
    attempt_id: str
    """Random per append, so that a writer recognises its own record after a lost answer."""
    previous: str
    """sha256 of the record before, as stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRef:
    """One consumed event."""

    tag: str
    """Keyed hash of user and event id, hex: the same event has the same tag, and nobody else can tell whose."""
    position: Position
    digest: str
    """sha256 of the event's bytes as stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettledEvent:
    """An event consumed without training on it, and why."""

    event: EventRef
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    KIND: ClassVar[str] = "claim"
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    KIND: ClassVar[str] = "release"
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCreated:
    KIND: ClassVar[str] = "adapter"
    pseudonym: str
    spec: dict[str, Any]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The wave about to be trained. What an attempt without a later outcome named is tried alone next."""

    KIND: ClassVar[str] = "attempt"
    wave: str
    adapters: dict[str, list[EventRef]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionEntry:
    """One new revision inside a wave record."""

    pseudonym: str
    revision: int
    parent: int
    parent_sha256: str | None
    """Digest of the parent's weights; None for revision 0, which has no bytes."""
    blobs: dict[str, BlobPlace]
    """`weights`, `moments`, `evidence`."""
    experts: list[int]
    """Experts whose tensors the blobs hold; the others are as initialised."""
    trained: list[EventRef]
    settled: list[SettledEvent]
    consumed: Position
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveManifest:
    """The commit: new revisions and what they consumed."""

    KIND: ClassVar[str] = "wave"
    wave: str
    pack: str
    """Key of the pack that holds every blob of this wave."""
    revisions: list[RevisionEntry]
    parameters: dict[str, Any]
    """Algorithm and hyperparameters."""
    materials: dict[str, str]
    """Name -> digest of what went in besides parents and experience: base, tokenizer, code."""
    numerics: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """One user's position moved without a revision."""

    KIND: ClassVar[str] = "settled"
    pseudonym: str
    events: list[SettledEvent]
    consumed: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Moves tip and serving: by evaluation (`promote`, `keep`, `reject`) or by a command (`rollback`, `pin`, `unpin`;
    `refused` when it can't be obeyed)."""

    KIND: ClassVar[str] = "verdict"
    pseudonym: str
    decision: str
    judged: int
    """The revision that the decision is about."""
    tip: int
    """Where tip and serving are afterwards."""
    serving: int
    reason: str
    numbers: dict[str, float] = field(default_factory=dict)
    command: str | None = None
    """Tag of the command that asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """This user is forgotten: the key that reads everything of theirs is destroyed next."""

    KIND: ClassVar[str] = "tombstone"
    pseudonym: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedBlob:
    """A blob's place after a repack; its bytes are the same."""

    pseudonym: str
    revision: int
    part: str
    offset: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Repack:
    """Blobs that moved into one new pack, and blobs that are gone. Packs that nothing names any more are garbage."""

    KIND: ClassVar[str] = "repack"
    rule: dict[str, Any]
    pack: str
    moved: list[MovedBlob]
    dropped: list[tuple[str, int, str]]
    """(pseudonym, revision, part)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The catalog's state just before this record is in the Parquet file of this record's number."""

    KIND: ClassVar[str] = "checkpoint"
    sha256: str
    size_bytes: int
    rotations: list[str]
    """The `rotate` records so far, as stored: they prove who signed this one to who has read nothing before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotate:
    """Later records are signed by `key`; this one still by the old one."""

    KIND: ClassVar[str] = "rotate"
    key: dict[str, str]

    @property
    def public_key(self) -> PublicKey:
        return PublicKey(**self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Several records at once: a wave's new adapters and its attempt, an evaluation's verdicts. All or none."""

    KIND: ClassVar[str] = "batch"
    records: list[Any]
    """Of any kind but `wave`, `checkpoint`, `rotate` and `batch`."""


Record = (
    Claim
    | Release
    | AdapterCreated
    | Attempt
    | WaveManifest
    | Settled
    | Verdict
    | Tombstone
    | Repack
    | Checkpoint
    | Rotate
    | Batch
)
_KINDS: dict[str, type[Any]] = {kind.KIND: kind for kind in Record.__args__}


def seal(header: RecordHeader, record: Record, signer: Signer) -> bytes:
    """The bytes that are appended to the log."""
    if isinstance(record, WaveManifest):
        payload_type, payload = WAVE_TYPE, _statement(header, record)
    else:
        payload_type, payload = RECORD_TYPE, {**_fields(header), **_body(record)}
    envelope = Envelope(canonical_json(payload), payload_type, {})
    envelope.sign(signer)
    return canonical_json(envelope.to_dict())


def open_record(sealed: bytes, key: PublicKey) -> tuple[RecordHeader, Record]:
    """Header and record from stored bytes; raises `Damaged` when they are not a record that `key` signed."""
    try:
        envelope = Envelope.from_dict(json.loads(sealed))
        envelope.verify([key.as_key()], 1)
    except VerificationError as error:
        raise Damaged(f"not signed by the population's key {key.keyid[:16]}: {error}") from error
    except Exception as error:  # whatever a flipped byte makes of it
        raise Damaged(f"not a record of a revision log: {type(error).__name__}: {error}") from error
    return _parse(envelope)


def signer_of(sealed: bytes) -> str:
    """The id of the key that stored bytes say they are signed with; nothing is verified."""
    try:
        return str(json.loads(sealed)["signatures"][0]["keyid"])
    except (ValueError, KeyError, IndexError, TypeError):
        return ""


def rotations_of(sealed: bytes) -> list[bytes]:
    """The rotations in a stored `checkpoint` record; nothing is verified. `Damaged` if it isn't one."""
    try:
        payload = payload_of(sealed)
        return [rotation.encode() for rotation in payload["body"]["rotations"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"not a checkpoint record: {type(error).__name__}: {error}") from error


def attempt_of(sealed: bytes) -> str:
    """The attempt id of stored bytes, unverified: whether a record is one's own."""
    return _parse(Envelope.from_dict(json.loads(sealed)))[0].attempt_id


def _parse(envelope: Envelope) -> tuple[RecordHeader, Record]:
    try:
        payload = json.loads(envelope.payload)
        if envelope.payload_type == WAVE_TYPE:
            return _from_statement(payload)
        header = RecordHeader(**{name: payload[name] for name in RecordHeader.__dataclass_fields__})
        return header, _record(payload["kind"], payload["body"])
    except Exception as error:  # whatever a flipped byte makes of it
        raise Damaged(f"not a record of a revision log: {type(error).__name__}: {error}") from error


def payload_of(sealed: bytes) -> dict[str, Any]:
    """The payload as it was sealed, for people to read."""
    payload: dict[str, Any] = json.loads(Envelope.from_dict(json.loads(sealed)).payload)
    return payload


def digest_of(sealed: bytes) -> str:
    return hashlib.sha256(sealed).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value; dataclasses are their fields."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_fields
    ).encode()


def _statement(header: RecordHeader, wave: WaveManifest) -> dict[str, Any]:
    """Where each fact stands: https://slsa.dev/spec/v1.0/provenance."""
    subjects = [
        {
            "name": f"{entry.pseudonym}@{entry.revision}",
            "digest": {"sha256": entry.blobs["weights"].sha256},
            "annotations": {
                "blobs": {part: [place.offset, place.size_bytes, place.sha256] for part, place in entry.blobs.items()},
                "experts": entry.experts,
                "metrics": entry.metrics,
            },
        }
        for entry in wave.revisions
    ]
    consumed = {
        f"{entry.pseudonym}@{entry.revision}": {
            "trained": entry.trained,
            "settled": entry.settled,
            "consumed": entry.consumed,
        }
        for entry in wave.revisions
    }
    parents = [
        {
            "name": f"{entry.pseudonym}@{entry.revision}#parent",
            "annotations": {"revision": entry.parent},
            **({} if entry.parent_sha256 is None else {"digest": {"sha256": entry.parent_sha256}}),
        }
        for entry in wave.revisions
    ]
    materials = [{"name": name, "digest": {"sha256": digest}} for name, digest in wave.materials.items()]
    return {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {**wave.parameters, "experience": consumed},
                "internalParameters": {
                    **_fields(header),
                    "wave": wave.wave,
                    "pack": wave.pack,
                    "numerics": wave.numerics,
                },
                "resolvedDependencies": [*materials, *parents],
            },
            "runDetails": {"builder": {"id": "https://populace.dev/controller"}},
        },
    }


def _body(record: Record) -> dict[str, Any]:
    if isinstance(record, Batch):
        return {"kind": record.KIND, "body": {"records": [_body(part) for part in record.records]}}
    return {"kind": record.KIND, "body": record}


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass for JSON; `asdict` copies deeply and takes ten times as long."""
    return {item.name: getattr(value, item.name) for item in fields(value)}


def _from_statement(payload: Mapping[str, Any]) -> tuple[RecordHeader, WaveManifest]:
    definition = payload["predicate"]["buildDefinition"]
    internal, external = definition["internalParameters"], dict(definition["externalParameters"])
    experience = external.pop("experience")
    dependencies = definition["resolvedDependencies"]
    parents = {
        item["name"].removesuffix("#parent"): (item["annotations"]["revision"], item.get("digest", {}).get("sha256"))
        for item in dependencies
        if item["name"].endswith("#parent")
    }
    entries = []
    for subject in payload["subject"]:
        name, notes = subject["name"], subject["annotations"]
        pseudonym, _, revision = name.rpartition("@")
        blobs = {
            part: BlobPlace(pack=internal["pack"], offset=offset, size_bytes=size, sha256=sha256)
            for part, (offset, size, sha256) in notes["blobs"].items()
        }
        if blobs["weights"].sha256 != subject["digest"]["sha256"]:
            raise ValueError(f"subject {name} names two digests for one blob")
        entries.append(
            RevisionEntry(
                pseudonym=pseudonym,
                revision=int(revision),
                parent=parents[name][0],
                parent_sha256=parents[name][1],
                blobs=blobs,
                experts=notes["experts"],
                trained=[_event(event) for event in experience[name]["trained"]],
                settled=[_settled(event) for event in experience[name]["settled"]],
                consumed=_position(experience[name]["consumed"]),
                metrics=notes["metrics"],
            )
        )
    wave = WaveManifest(
        wave=internal["wave"],
        pack=internal["pack"],
        revisions=entries,
        parameters=external,
        materials={item["name"]: item["digest"]["sha256"] for item in dependencies if "annotations" not in item},
        numerics=internal["numerics"],
    )
    return RecordHeader(**{name: internal[name] for name in RecordHeader.__dataclass_fields__}), wave


def _record(kind: str, body: dict[str, Any]) -> Record:
    if kind == Attempt.KIND:
        body["adapters"] = {user: [_event(e) for e in events] for user, events in body["adapters"].items()}
    if kind == Settled.KIND:
        body["events"] = [_settled(event) for event in body["events"]]
        body["consumed"] = _position(body["consumed"])
    if kind == Batch.KIND:
        body["records"] = [_record(part["kind"], part["body"]) for part in body["records"]]
    if kind == Repack.KIND:
        body["moved"] = [MovedBlob(**moved) for moved in body["moved"]]
        body["dropped"] = [(pseudonym, revision, part) for pseudonym, revision, part in body["dropped"]]
    record: Record = _KINDS[kind](**body)
    return record


def _event(body: Mapping[str, Any]) -> EventRef:
    return EventRef(**{**body, "position": _position(body["position"])})


def _settled(body: Mapping[str, Any]) -> SettledEvent:
    return SettledEvent(event=_event(body["event"]), reason=body["reason"])


def _position(value: Any) -> Position:
    segment, row = value
    return int(segment), int(row)
