"""The records of the revision log: what each kind says. How they are sealed and signed:
`manifest.py`; every field of every record as it is stored: docs/format.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from populace.storage.keys.keyring import PublicKey
from populace.storage.log.pack import BlobPlace

NO_PREDECESSOR = "0" * 64

Position = tuple[int, int]
"""Place of an event in its partition's experience log: (segment, row)."""

BEFORE_ALL: Position = (-1, -1)


class Decision(StrEnum):
    """What a verdict does to an adapter: by evaluation the first three, by a command the others."""

    PROMOTE = "promote"
    KEEP = "keep"
    REJECT = "reject"
    ROLLBACK = "rollback"
    REFUSED = "refused"
    PIN = "pin"
    UNPIN = "unpin"


class ReasonKind(StrEnum):
    """Why an event ended without being trained on."""

    PARKED = "parked"
    NO_SIGNAL = "no signal"
    NOT_FINITE = "not finite"
    STALE = "stale"
    REJECTED = "rejected"


NO_SIGNAL, NOT_FINITE = "no signal", "gradient not finite"
"""What stands in the log for these two kinds."""


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
    written_at: float = 0.0
    """Seconds since 1970 by the writer's clock, for people to read: nothing is decided by it. 0 in
    records that were written before there was this field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRef:
    """One consumed event.

    Example: `EventRef(tag="9c…", position=(12, 0), digest="e1…")`, the first row of segment 12."""

    tag: str
    """Keyed hash of user and event id, hex: the same event has the same tag, and nobody else can
    tell whose."""
    position: Position
    digest: str
    """Keyed hash of the event's content: equal for a repetition, no help for a guess."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettledEvent:
    """An event consumed without training on it, and why.

    Example: `SettledEvent(event=ref, reason="parked: failed 3 times: reward m:f raised KeyError")`.
    """

    event: EventRef
    reason: str
    """Never anything that the user or the user's code said: the log stays when they are
    erased."""
    detail: str = ""
    """What was said, sealed with the user's key, in base64."""

    @property
    def kind(self) -> ReasonKind:
        """The kind that the text says: what is parked or stale says so before a colon."""
        if self.reason == NOT_FINITE:
            return ReasonKind.NOT_FINITE
        first = self.reason.partition(":")[0]
        known = (ReasonKind.PARKED, ReasonKind.STALE, ReasonKind.NO_SIGNAL)
        return next((kind for kind in known if first == kind), ReasonKind.REJECTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """From here on `owner` writes this partition."""

    KIND: ClassVar[str] = "claim"
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """`owner` writes this partition no longer."""

    KIND: ClassVar[str] = "release"
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCreated:
    """A new adapter. Its revision 0 is derived from the seed, which is masked in the log.

    Example: `AdapterCreated(pseudonym="3f…", spec={"rank": 8, "expert_rank": 1, …}, seed=71)`."""

    KIND: ClassVar[str] = "adapter"
    pseudonym: str
    spec: dict[str, Any]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The wave about to be trained, in the log before anything of it is tried. What died in it is
    tried again in a small wave, and then alone. An adapter without events: its attempt is taken
    back."""

    KIND: ClassVar[str] = "attempt"
    wave: str
    num_adapters: int
    """Adapters of the whole wave, in all partitions."""
    adapters: dict[str, list[EventRef]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionEntry:
    """One new revision inside a wave record."""

    pseudonym: str
    revision: int
    parent: int
    parent_sha256: str | None
    """Digest of the parent's weights; None for revision 0, which has no bytes."""
    parent_moments_sha256: str | None = None
    """Digest of the parent's moments that the update started from; None: they started at zero."""
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
    """The commit: new revisions and what they consumed. It publishes the one and consumes the other
    in one atomic write."""

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

    def entry(self, pseudonym: str, revision: int) -> RevisionEntry:
        """What this wave says of one revision."""
        return next(
            item
            for item in self.revisions
            if (item.pseudonym, item.revision) == (pseudonym, revision)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """One user's position moved without a revision."""

    KIND: ClassVar[str] = "settled"
    pseudonym: str
    events: list[SettledEvent]
    consumed: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """One try of an event failed in a way that may pass: it stays pending, and is parked when it
    fails too often."""

    KIND: ClassVar[str] = "failed"
    pseudonym: str
    event: EventRef
    reason: str
    """Nothing that anybody said, like `SettledEvent.reason`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Moves tip and serving: by evaluation (`promote`, `keep`, `reject`) or by a command
    (`rollback`, `pin`, `unpin`; `refused` when it can't be obeyed)."""

    KIND: ClassVar[str] = "verdict"
    pseudonym: str
    decision: Decision
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
    """This user is erased: the key that reads everything of theirs is destroyed next."""

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
    """Blobs that moved into one new pack, and blobs that are gone. Packs that nothing names any
    more are garbage."""

    KIND: ClassVar[str] = "repack"
    rule: dict[str, Any]
    pack: str
    moved: list[MovedBlob]
    dropped: list[tuple[str, int, str]]
    """(pseudonym, revision, part)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """The experience log below `floor` is replaced by a snapshot of what is still needed of it."""

    KIND: ClassVar[str] = "compaction"
    previous: int
    """The floor before."""
    floor: int
    """Number of the first segment that is still read."""
    snapshot: str
    """Key of the snapshot."""
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The catalog's state just before this record is in the Parquet file of this record's
    number."""

    KIND: ClassVar[str] = "checkpoint"
    sha256: str
    size_bytes: int
    rotations: list[str]
    """The `rotate` records so far, as stored: they prove who signed this one to who has read
    nothing before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotate:
    """Later records are signed by `key`; this one still by the old one."""

    KIND: ClassVar[str] = "rotate"
    key: dict[str, str]

    @property
    def public_key(self) -> PublicKey:
        return PublicKey(public=self.key["public"])


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordBatch:
    """Several records at once: a wave's new adapters and its attempt, an evaluation's verdicts. All
    or none."""

    KIND: ClassVar[str] = "batch"
    records: list[Any]
    """Records of any kind but `wave`, `checkpoint`, `rotate` and `batch`."""


Record = (
    Claim
    | Release
    | AdapterCreated
    | Attempt
    | WaveManifest
    | Settled
    | Failed
    | Verdict
    | Tombstone
    | Repack
    | Compaction
    | Checkpoint
    | Rotate
    | RecordBatch
)


def batched(records: list[Record]) -> Record:
    """One record that says all of `records`, for one atomic append; the inverse of `parts_of`."""
    return records[0] if len(records) == 1 else RecordBatch(records=records)


def parts_of(record: Record) -> list[Any]:
    """What a record says: itself, or what a batch holds."""
    return record.records if isinstance(record, RecordBatch) else [record]
