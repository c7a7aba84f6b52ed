"""A whole population on an S3: training, resuming, links, and what DuckDB reads of its catalog."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import duckdb
import pytest

from populace.configs.schema import Settings
from populace.population.client import Population
from populace.population.experience.events import Demonstration
from populace.population.tools.peft import export_peft, share_export
from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.parquet import export_catalog
from populace.storage.errors import Forgotten, InvalidInput
from populace.storage.log.records import Verdict
from populace.storage.objects.cloud import MemoryStore
from tests.support.accounting import account
from tests.support.history import History, name_of
from tests.support.loops import Loop, run_to_the_end
from tests.support.servers import seaweedfs
from tests.support.streams import experience

Start = Callable[..., Loop]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with seaweedfs() as found:
        yield found


def test_a_population_lives_on_an_s3(
    settings: Settings, start: Start, endpoint: str, tmp_path: Path
) -> None:
    url = f"s3://people/of/the/test?endpoint={endpoint}"
    settings = dataclasses.replace(settings, store=url)
    population = Population.create(url, settings)  # makes the bucket
    population.enqueue_many(experience(settings, num_users=3))
    controller = start(population)
    for _ in range(2):
        controller.wave()
    controller.upkeep.checkpoint(1)
    population.ownership.release()
    again = Population.open(url, settings)
    run_to_the_end(start(again))
    again.ownership.release()
    assert account(again).is_exact()
    user = again.users()[0]
    assert not again.verify(user).problems and len(again.revisions(user)) > 2

    number = export_peft(again, user, tmp_path / "peft")
    link = share_export(again, user, number, tmp_path / "peft", timedelta(minutes=5))
    with tarfile.open(fileobj=io.BytesIO(urlopen(link, timeout=20).read())) as archive:
        assert f"revision-{number}/adapter_model.safetensors" in archive.getnames()
    assert again.forget(user)
    with pytest.raises(HTTPError):
        urlopen(link, timeout=20)
    with pytest.raises(Forgotten):
        again.sample(user, "hello")


def test_a_link_needs_an_s3(settings: Settings, start: Start, tmp_path: Path) -> None:
    population = Population.create(MemoryStore(), settings)
    population.enqueue("ada", [Demonstration(prompt="a", completion="the sea")])
    start(population).wave()
    population.ownership.release()
    number = export_peft(population, "ada", tmp_path / "peft", "tip")
    with pytest.raises(InvalidInput, match="links need s3://"):
        share_export(population, "ada", number, tmp_path / "peft", timedelta(hours=1))


def test_duckdb_answers_what_operators_ask(tmp_path: Path) -> None:
    history = History(MemoryStore(), tmp_path / "keys")
    owner, catalog = history.claim()
    for user in ("ada", "bob", "cleo"):
        history.create(owner, catalog, user)

    def wave(segment: int, *users: str) -> None:
        drafts = [history.draft(catalog, user, at=segment) for user in users]
        parameters = {"algorithm": "grpo"}
        catalog.apply(
            *owner.commit_wave("w", drafts, parameters=parameters, materials={}, numerics={})
        )

    def judge(user: str, decision: str) -> None:
        adapter = catalog.require(name_of(user))
        back = adapter.serving if decision == "reject" else adapter.tip
        record = Verdict(
            pseudonym=adapter.pseudonym,
            decision=decision,
            judged=adapter.tip,
            tip=back,
            serving=back,
            reason="r",
        )
        catalog.apply(owner.append(record), record)

    wave(7, "ada", "bob")
    judge("ada", "promote")
    judge("bob", "reject")
    wave(8, "bob", "cleo")
    judge("bob", "reject")
    wave(9, "ada")
    counts = export_catalog(catalog, tmp_path / "catalog")
    assert counts == {"adapters": 3, "revisions": 5, "uses": 5, "verdicts": 3}
    database = duckdb.connect()

    def ask(question: str) -> list[tuple[object, ...]]:
        return database.sql(question.replace("$", f"{tmp_path}/catalog/")).fetchall()

    learned_from_7 = ask(
        "SELECT DISTINCT pseudonym FROM '$uses.parquet' WHERE partition = 0 AND segment = 7 ORDER "
        "BY pseudonym"
    )
    assert [name for (name,) in learned_from_7] == sorted([name_of("ada"), name_of("bob")])
    regressed_twice = ask(
        "SELECT pseudonym FROM '$verdicts.parquet' WHERE decision = 'reject' GROUP BY 1 HAVING "
        "count(*) >= 2"
    )
    assert regressed_twice == [(name_of("bob"),)]
    behind = ask(
        "SELECT a.pseudonym, max(r.revision) FROM '$adapters.parquet' a JOIN '$revisions.parquet' "
        "r USING (pseudonym) "
        "WHERE a.tip <> a.serving GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    assert behind == [(name_of("ada"), 2), (name_of("cleo"), 1)]
    with pytest.raises(InvalidInput, match="not empty"):
        export_catalog(catalog, tmp_path / "catalog")


def test_an_empty_catalog_is_exported_too(tmp_path: Path) -> None:
    assert set(export_catalog(Catalog(), tmp_path / "catalog").values()) == {0}
    assert duckdb.sql(f"SELECT count(*) FROM '{tmp_path}/catalog/adapters.parquet'").fetchall() == [
        (0,)
    ]
