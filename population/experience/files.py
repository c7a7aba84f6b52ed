"""Files of experience: JSON lines, Parquet, and folders that Hugging Face `datasets` wrote.

One row is one event; docs/experience.md has the columns. A row that can't be an event is reported
with its number and goes into a file of its own; the others go on.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from populace.population.experience.checks import CheckedEvent, check_events, check_user
from populace.population.experience.events import EXPERIENCE_KINDS, Experience
from populace.population.experience.producer import Producer
from populace.storage.canonical import canonical_json
from populace.storage.errors import InvalidInput

ROWS_PER_CALL = 2048

COLUMNS = {
    "user": "whose event it is",
    "kind": "task, trajectory or demonstration; follows from `reward` when it is left out",
    "event_id": (
        "text, or an integer that increases per user; a digest of the row when it is left out"
    ),
    "prompt": "text, or a list of messages with `role` and `content`",
    "messages": (
        "a conversation instead of `prompt` and `completion`: the last message is the completion"
    ),
    "completion": "text of the answer",
    "reward": (
        "of a task the name of a registered reward, of a trajectory a number, by convention 0 to 1"
    ),
    "reward_args": (
        "of a task: what the reward gets besides the answer; an object, or JSON text of one"
    ),
    "revision": "of a trajectory: the adapter's revision that produced it; 0 when it is left out",
    "completion_ids": "of a trajectory: token ids of the completion",
    "logprobs": "of a trajectory: log-probability of every completion token when it was sampled",
    "expert_ids": (
        "of a trajectory: experts of every completion token, [token][layer][k]; -1 where unknown"
    ),
}
"""Column -> what it holds. Columns with nothing in them count as left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadReport:
    """What became of a file's rows."""

    num_events: int
    num_users: int
    num_rejected: int


def num_rows(path: Path) -> int | None:
    """How many rows a file has, where it says so."""
    return pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None


def read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Rows with their numbers, from 1; a line that is no JSON object comes as the reason."""
    if not path.exists():
        raise InvalidInput(f"there is no file {str(path)!r}")
    if path.is_dir():
        yield from enumerate(_folder_rows(path), 1)
    elif path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), 1)
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _json_row(line)
    else:
        raise InvalidInput(
            f"{path} is neither .jsonl nor .parquet nor a folder that `datasets` wrote; convert it "
            "to one"
        )


def event_from_row(row: Mapping[str, Any], user: str | None = None) -> tuple[str, Experience]:
    """User and event of a row; `InvalidInput` names the column, its value and the way out. `user`:
    of rows without."""
    given = {name: value for name, value in row.items() if value is not None}
    if unknown := sorted(set(given) - set(COLUMNS)):
        close = difflib.get_close_matches(unknown[0], COLUMNS, n=1)
        hint = (
            f"did you mean {close[0]!r}?"
            if close
            else f"known: {', '.join(COLUMNS)}; leave it out with --ignore"
        )
        raise InvalidInput(f"column {unknown[0]!r} is unknown; {hint}")
    name = given.get("user", user)
    if name is None:
        raise InvalidInput(
            "column 'user' is missing; add it, or name one user for all rows with --user"
        )
    if "messages" in given:
        given = _split_conversation(given)
    kind = given.get("kind", _kind_of(given))
    if kind not in EXPERIENCE_KINDS:
        *most, last = EXPERIENCE_KINDS
        raise InvalidInput(f"kind is {kind!r}; use {', '.join(most)} or {last}")
    columns = {field.name: field for field in fields(EXPERIENCE_KINDS[kind])}
    for column, field in columns.items():
        is_needed = field.default is MISSING and field.default_factory is MISSING
        if is_needed and column not in given:
            raise InvalidInput(f"column {column!r} is missing; a {kind} needs it")
    if beside := sorted(set(given) - {"user", "kind", *columns}):
        raise InvalidInput(
            f"column {beside[0]!r} is {given[beside[0]]!r}; a {kind} has none, leave it empty"
        )
    values = {column: given[column] for column in columns if column in given}
    if isinstance(values["prompt"], list):
        values["prompt"] = tuple(values["prompt"])
    if "reward_args" in values:
        values["reward_args"] = _object(values["reward_args"])
    values.setdefault("event_id", _digest(row))
    return check_user(name), EXPERIENCE_KINDS[kind](**values)


def enqueue_file(
    producer: Producer,
    path: Path,
    rejects: Path,
    *,
    user: str | None = None,
    ignore: Collection[str] = (),
    tick: Callable[[int], None] = lambda rows: None,
) -> ReadReport:
    """Make a file's events durable, in order; calls `tick` with the number of rows done. Rows that
    can't be events go into `rejects` as JSON lines of `line`, `error` and `row`; the file is only
    made if there are any."""
    users: set[str] = set()
    num_events = num_rejected = num_waiting = 0
    waiting: dict[str, list[CheckedEvent]] = {}
    rejects.unlink(missing_ok=True)
    for number, row in read_rows(path):
        try:
            if isinstance(row, str):
                raise InvalidInput(row)
            name, event = event_from_row({key: row[key] for key in row if key not in ignore}, user)
            checked = check_events([(name, [event])], producer.rewards)
        except (InvalidInput, TypeError, ValueError) as error:
            num_rejected += 1
            with open(rejects, "a") as file:
                file.write(
                    json.dumps({"line": number, "error": str(error), "row": row}, default=str)
                    + "\n"
                )
        else:
            users.add(name)
            waiting.setdefault(name, []).extend(checked[name])
            num_waiting += 1
        if num_waiting == ROWS_PER_CALL:
            num_events += producer.send(waiting)
            waiting, num_waiting = {}, 0
        if number % 256 == 0:
            tick(number)
    num_events += producer.send(waiting)
    return ReadReport(num_events=num_events, num_users=len(users), num_rejected=num_rejected)


def _json_row(line: bytes) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}; write one object a line"
    return (
        row
        if isinstance(row, dict)
        else f"a {type(row).__name__}, not an object; write one object a line"
    )


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    for batch in pq.ParquetFile(path).iter_batches(ROWS_PER_CALL):
        yield from batch.to_pylist()


def _folder_rows(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, or of a folder of
    Parquet files."""
    if (splits := folder / "dataset_dict.json").exists():
        for split in json.loads(splits.read_text())["splits"]:
            yield from _folder_rows(folder / split)
    elif (state := folder / "state.json").exists():
        for item in json.loads(state.read_text())["_data_files"]:
            with pa.memory_map(str(folder / item["filename"])) as source:
                for batch in pa.ipc.open_stream(source):
                    yield from batch.to_pylist()
    elif files := sorted(folder.rglob("*.parquet")):
        for file in files:
            yield from _parquet_rows(file)
    else:
        raise InvalidInput(
            f"{folder} holds neither what `Dataset.save_to_disk` writes nor Parquet files"
        )


def _split_conversation(given: Mapping[str, Any]) -> dict[str, Any]:
    messages = given["messages"]
    if "prompt" in given or "completion" in given:
        raise InvalidInput(
            "column 'messages' stands beside 'prompt' or 'completion'; use one or the other"
        )
    if not isinstance(messages, list) or len(messages) < 2 or not isinstance(messages[-1], Mapping):
        raise InvalidInput(
            f"messages is {messages!r}; give a list of at least two, the last one the completion"
        )
    rest = {name: value for name, value in given.items() if name != "messages"}
    return {**rest, "prompt": messages[:-1], "completion": messages[-1].get("content")}


def _kind_of(given: Mapping[str, Any]) -> str:
    match given.get("reward"):
        case str():
            return "task"
        case None:
            return "demonstration"
    return "trajectory"


def _object(value: Any) -> Any:
    if not isinstance(value, str):
        # Parquet gives every row all fields of a struct.
        return (
            {k: v for k, v in value.items() if v is not None}
            if isinstance(value, Mapping)
            else dict(value)
        )
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise InvalidInput(
            f"reward_args is {value!r}: {error}; give an object or its JSON"
        ) from None
    if not isinstance(parsed, dict):
        raise InvalidInput(f"reward_args is {value!r}; give an object or its JSON")
    return parsed


def _digest(row: Mapping[str, Any]) -> str:
    """An id from a row's content: a file that is read again gives the same events."""
    try:
        return hashlib.blake2b(canonical_json(dict(row)), digest_size=16).hexdigest()
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"the row holds values that are not JSON ({error}); give it an event_id"
        ) from None
