"""Files of experience: every form gives the same events, and bad rows are named and left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from populace.population.cli.app import app
from populace.population.experience.files import COLUMNS, enqueue_file, event_from_row, read_rows
from populace.population.experience.producer import Producer
from populace.storage.errors import InvalidInput
from populace.storage.identity import PopulationMeta
from populace.storage.objects.files import FileStore
from tests.support.loops import ledger_of
from tests.support.streams import make_population

ROOT = Path(__file__).parents[3]
ROWS: list[dict[str, Any]] = [
    {
        "user": "ada",
        "event_id": "1",
        "prompt": "What is rain?",
        "reward": "letters",
        "reward_args": {"letter": "a"},
    },
    {
        "user": "bob",
        "event_id": "1",
        "prompt": "What is rain?",
        "completion": "Water.",
        "reward": 0.5,
    },
    {"user": "ada", "event_id": "2", "prompt": "What is tea?", "completion": "A drink."},
    {
        "user": "cleo",
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    },
    {
        "user": "cleo",
        "event_id": "9",
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": "yes",
        "reward": 1,
        "completion_ids": [5, 6],
        "logprobs": [-0.1, -0.2],
    },
]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    store = FileStore(tmp_path / "store")
    make_population(store)
    return store


def write(folder: Path, form: str) -> Path:
    if form == "jsonl":
        path = folder / "events.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
        return path
    as_text = {name: json.dumps(ROWS[0][name]) for name in ("reward_args",)}
    # Columns of a table have one type: rewards that are names and rewards that are numbers go into
    # two files.
    tables = [
        pa.Table.from_pylist([{**ROWS[0], **as_text}]),
        pa.Table.from_pylist([{**dict.fromkeys(COLUMNS), **row} for row in ROWS[1:4]]),
        pa.Table.from_pylist([ROWS[4]]),
    ]
    if form == "parquet":
        (folder / "parts").mkdir()
        for number, table in enumerate(tables):
            pq.write_table(table, folder / "parts" / f"{number}.parquet")
        return folder / "parts"
    import datasets

    splits = {f"part{number}": datasets.Dataset(table) for number, table in enumerate(tables)}
    datasets.DatasetDict(splits).save_to_disk(folder / "dataset")
    return folder / "dataset"


def events_in(store: FileStore) -> dict[str, list[tuple[str, str, str]]]:
    """User -> (kind, prompt, completion) of its events, in order."""
    ledger = ledger_of(store, PopulationMeta.read(store, "pop"))
    ledger.refresh()
    found: dict[str, list[tuple[str, str, str]]] = {}
    for pseudonym, user in ledger.users().items():
        for partition in range(2):
            positions = [item.position for item in ledger.pending.waiting(pseudonym)]
            row = ledger.pending.row_of(pseudonym)
            if row is None or ledger.pending.users["partition"][row] != partition:
                continue
            found[user] = [
                (
                    type(item.event).__name__,
                    item.event.prompt[-1]["content"],
                    getattr(item.event, "completion", ""),
                )  # type: ignore[union-attr]
                for item in ledger.events(partition, positions)
            ]
    return found


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets"])
def test_every_form_of_file_gives_the_same_events_and_twice_is_once(
    form: str, store: FileStore, tmp_path: Path
) -> None:
    path = write(tmp_path, form)
    for _ in range(2):
        report = enqueue_file(Producer.open(store, "pop"), path, tmp_path / "rejects.jsonl")
        assert (report.num_events, report.num_users, report.num_rejected) == (5, 3, 0)
    assert not (tmp_path / "rejects.jsonl").exists()
    assert events_in(store) == {
        "ada": [("Task", "What is rain?", ""), ("Demonstration", "What is tea?", "A drink.")],
        "bob": [("Trajectory", "What is rain?", "Water.")],
        "cleo": [("Demonstration", "hi", "hello"), ("Trajectory", "hi", "yes")],
    }


BAD = [
    ("{not json", "not JSON"),
    ("[1, 2]", "a list, not an object"),
    ({"prompt": "hi", "completion": "yes"}, "column 'user' is missing"),
    ({"user": "ada", "promt": "hi"}, "did you mean 'prompt'?"),
    ({"user": "ada", "prompt": "hi"}, "column 'completion' is missing; a demonstration needs it"),
    ({"user": "ada", "kind": "wish", "prompt": "hi"}, "kind is 'wish'"),
    ({"user": "ada", "prompt": "hi", "reward": "letters", "completion": "x"}, "a task has none"),
    ({"user": "ada", "prompt": "hi", "reward": "nope"}, "reward 'nope' is not registered"),
    ({"user": "ada", "prompt": "hi", "completion": "yes", "reward": 1e300}, "give a finite number"),
    ({"user": "ada", "prompt": "", "completion": "yes"}, "prompt is empty"),
    ({"user": "", "prompt": "hi", "completion": "yes"}, "non-empty"),
    (
        {"user": "ada", "prompt": "hi", "reward": "letters", "reward_args": "{"},
        "give an object or its JSON",
    ),
    ({"user": "ada", "messages": [{"role": "user", "content": "hi"}]}, "at least two"),
    ({"user": "ada", "messages": [{}, {}], "prompt": "hi"}, "use one or the other"),
    (
        {
            "user": "ada",
            "prompt": "hi",
            "completion": "y",
            "reward": 1,
            "completion_ids": [1],
            "logprobs": [],
        },
        None,
    ),
    ({"user": "ada", "prompt": "hi", "completion": "y", "event_id": -1}, "counts up from 0"),
]


def test_bad_rows_are_reported_by_line_with_the_reason_and_good_ones_go_on(
    store: FileStore, tmp_path: Path
) -> None:
    path, rejects = tmp_path / "events.jsonl", tmp_path / "bad.jsonl"
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row, _ in BAD) + "\n"
    )
    report = enqueue_file(Producer.open(store, "pop", rewards={"letters": "m:f"}), path, rejects)
    assert report.num_events == 1 and report.num_rejected == len(BAD) - 1
    found = {item["line"]: item for item in map(json.loads, rejects.read_text().splitlines())}
    for number, (row, message) in enumerate(BAD, 1):
        if message is not None:
            assert message in found[number]["error"], (row, found[number]["error"])
            assert number == 1 or found[number]["row"] == row or isinstance(row, str)


def test_the_schema_in_the_docs_is_the_one_that_is_read() -> None:
    page = (ROOT / "docs" / "experience.md").read_text()
    for name, meaning in COLUMNS.items():
        assert f"| `{name}` | {meaning} |" in page


def test_a_file_that_is_nothing_of_the_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("a,b\n")
    for path, message in (
        (tmp_path / "events.csv", "neither .jsonl nor .parquet"),
        (tmp_path / "no", "there is no file"),
    ):
        with pytest.raises(InvalidInput, match=message):
            list(read_rows(path))
    with pytest.raises(InvalidInput, match="holds neither"):
        list(read_rows(tmp_path))


def test_a_user_can_be_named_for_all_rows() -> None:
    user, event = event_from_row({"prompt": "hi", "completion": "yes"}, "ada")
    assert (
        user == "ada"
        and event_from_row({"prompt": "hi", "completion": "yes"}, "ada")[1].event_id
        == event.event_id
    )


def test_the_command_enqueues_reports_and_lists(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(json.dumps({**row, "extra": 1}) for row in ROWS) + "\n")
    monkeypatch.setenv("POPULACE_STORE", str(store.root))
    run = CliRunner().invoke
    refused = run(app, ["enqueue", str(path)])
    assert refused.exit_code == 1 and "5 rows were rejected" in refused.output
    assert "column 'extra' is unknown" in (tmp_path / "events.jsonl.rejects.jsonl").read_text()
    done = run(app, ["enqueue", str(path), "--ignore", "extra"])
    assert done.exit_code == 0, done.output
    assert "5 events of 3 users are durable in pop" in done.output
    assert not (tmp_path / "events.jsonl.rejects.jsonl").exists()
    missing = run(app, ["enqueue", str(tmp_path / "nothing.jsonl")])
    assert isinstance(missing.exception, InvalidInput)


def test_the_simulator_prints_waits_fairness_and_throughput(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("scheduler: {tenants: {acme: {weight: 2}}}\n")
    options = ["--users", "200", "--rate", "100", "--hours", "0.02", "--share", "1", "--share", "1"]
    done = CliRunner().invoke(
        app, ["simulate", str(config), "scheduler.cool_down_s=1", *options, "--json"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    default, acme = report["tenants"]
    assert 1.7 < acme["served"] / default["served"] < 2.3 and report["num_waves"] > 50
    table = CliRunner().invoke(app, ["simulate", str(config), *options])
    assert "acme" in table.output and "Jain" in table.output
    wrong = CliRunner().invoke(app, ["simulate", str(config), "--share", "1"])
    assert isinstance(wrong.exception, InvalidInput) and "--share was given 1 times" in str(
        wrong.exception
    )
