"""Records as bytes: how they are sealed, signed and read back.

Every record is a JSON payload in a DSSE envelope, signed with Ed25519, that binds it to its
population, partition, number, epoch, writer and predecessor. A `wave` record is an in-toto
Statement with the SLSA provenance predicate; the others are plain statements of their kind.
docs/format.md has every field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from securesystemslib.exceptions import VerificationError

from populace.storage.canonical import canonical_json, fields_of
from populace.storage.errors import Damaged
from populace.storage.keys.keyring import PublicKey
from populace.storage.log.pack import BlobPlace
from populace.storage.log.records import (
    Attempt,
    Decision,
    EventRef,
    Failed,
    MovedBlob,
    Position,
    Record,
    RecordBatch,
    RecordHeader,
    Repack,
    RevisionEntry,
    Settled,
    SettledEvent,
    Verdict,
    WaveManifest,
)

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import Signer

RECORD_TYPE = "application/vnd.populace.record+json"

WAVE_TYPE = "application/vnd.in-toto+json"

STATEMENT = "https://in-toto.io/Statement/v1"

PROVENANCE = "https://slsa.dev/provenance/v1"

BUILD_TYPE = "https://populace.dev/wave/v1"

_KINDS: dict[str, type[Any]] = {kind.KIND: kind for kind in Record.__args__}


def seal(header: RecordHeader, record: Record, signer: Signer) -> bytes:
    """The bytes that are appended to the log."""
    if isinstance(record, WaveManifest):
        payload_type, payload = WAVE_TYPE, _statement(header, record)
    else:
        payload_type, payload = RECORD_TYPE, {**fields_of(header), **_body(record)}
    envelope = _envelope_class()(canonical_json(payload), payload_type, {})
    envelope.sign(signer)
    return canonical_json(envelope.to_dict())


def open_record(sealed: bytes, key: PublicKey) -> tuple[RecordHeader, Record]:
    """Header and record from stored bytes; raises `Damaged` when they are not a record that `key`
    signed."""
    try:
        envelope = _envelope_class().from_dict(json.loads(sealed))
        envelope.verify([key.as_key()], 1)
        # Base64 can spell one payload in several ways; a record has one spelling.
        if canonical_json(envelope.to_dict()) != sealed:
            raise ValueError("not the bytes that were written")
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
    """The rotations in a stored `checkpoint` record; nothing is verified. `Damaged` if it isn't
    one."""
    try:
        payload = payload_of(sealed)
        return [rotation.encode() for rotation in payload["body"]["rotations"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"not a checkpoint record: {type(error).__name__}: {error}") from error


def attempt_of(sealed: bytes) -> str:
    """The attempt id of stored bytes, unverified: whether a record is one's own."""
    return _parse(_envelope_class().from_dict(json.loads(sealed)))[0].attempt_id


def _envelope_class() -> type[Envelope]:
    """Imported when a record is first sealed or opened: securesystemslib loads the SDK of every
    cloud that is installed."""
    from securesystemslib.dsse import Envelope

    found: type[Envelope] = Envelope
    return found


def _parse(envelope: Envelope) -> tuple[RecordHeader, Record]:
    try:
        payload = json.loads(envelope.payload)
        if envelope.payload_type == WAVE_TYPE:
            return _from_statement(payload)
        return _header(payload), _record(payload["kind"], payload["body"])
    except Exception as error:  # whatever a flipped byte makes of it
        raise Damaged(f"not a record of a revision log: {type(error).__name__}: {error}") from error


def payload_of(sealed: bytes) -> dict[str, Any]:
    """The payload as it was sealed, for people to read."""
    payload: dict[str, Any] = json.loads(_envelope_class().from_dict(json.loads(sealed)).payload)
    return payload


def digest_of(sealed: bytes) -> str:
    return hashlib.sha256(sealed).hexdigest()


def _statement(header: RecordHeader, wave: WaveManifest) -> dict[str, Any]:
    """Where each fact stands: https://slsa.dev/spec/v1.0/provenance."""
    subjects = [
        {
            "name": f"{entry.pseudonym}@{entry.revision}",
            "digest": {"sha256": entry.blobs["weights"].sha256},
            "annotations": {
                "blobs": {
                    part: [place.offset, place.size_bytes, place.sha256]
                    for part, place in entry.blobs.items()
                },
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
            "annotations": {"revision": entry.parent, "moments": entry.parent_moments_sha256},
            **({} if entry.parent_sha256 is None else {"digest": {"sha256": entry.parent_sha256}}),
        }
        for entry in wave.revisions
    ]
    materials = [
        {"name": name, "digest": {"sha256": digest}} for name, digest in wave.materials.items()
    ]
    return {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {**wave.parameters, "experience": consumed},
                "internalParameters": {
                    **fields_of(header),
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
    if isinstance(record, RecordBatch):
        return {"kind": record.KIND, "body": {"records": [_body(part) for part in record.records]}}
    return {"kind": record.KIND, "body": record}


def _from_statement(payload: Mapping[str, Any]) -> tuple[RecordHeader, WaveManifest]:
    definition = payload["predicate"]["buildDefinition"]
    internal, external = definition["internalParameters"], dict(definition["externalParameters"])
    experience = external.pop("experience")
    dependencies = definition["resolvedDependencies"]
    parents = {
        item["name"].removesuffix("#parent"): {
            "parent": item["annotations"]["revision"],
            "parent_sha256": item.get("digest", {}).get("sha256"),
            "parent_moments_sha256": item["annotations"].get("moments"),
        }
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
                **parents[name],
                blobs=blobs,
                experts=notes["experts"],
                trained=[event_from_json(event) for event in experience[name]["trained"]],
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
        materials={
            item["name"]: item["digest"]["sha256"]
            for item in dependencies
            if "annotations" not in item
        },
        numerics=internal["numerics"],
    )
    return _header(internal), wave


def _header(values: Mapping[str, Any]) -> RecordHeader:
    return RecordHeader(
        **{name: values[name] for name in RecordHeader.__dataclass_fields__ if name in values}
    )


def _record(kind: str, body: dict[str, Any]) -> Record:
    if kind == Attempt.KIND:
        body["adapters"] = {
            user: [event_from_json(e) for e in events] for user, events in body["adapters"].items()
        }
    if kind == Settled.KIND:
        body["events"] = [_settled(event) for event in body["events"]]
        body["consumed"] = _position(body["consumed"])
    if kind == Failed.KIND:
        body["event"] = event_from_json(body["event"])
    if kind == Verdict.KIND:
        body["decision"] = Decision(body["decision"])
    if kind == RecordBatch.KIND:
        body["records"] = [_record(part["kind"], part["body"]) for part in body["records"]]
    if kind == Repack.KIND:
        body["moved"] = [MovedBlob(**moved) for moved in body["moved"]]
        body["dropped"] = [
            (pseudonym, revision, part) for pseudonym, revision, part in body["dropped"]
        ]
    record: Record = _KINDS[kind](**body)
    return record


def event_from_json(body: Mapping[str, Any]) -> EventRef:
    return EventRef(**{**body, "position": _position(body["position"])})


def _settled(body: Mapping[str, Any]) -> SettledEvent:
    return SettledEvent(
        event=event_from_json(body["event"]), reason=body["reason"], detail=body["detail"]
    )


def _position(value: Any) -> Position:
    segment, row = value
    return int(segment), int(row)
