"""The object-store contract: one suite over every backend, the probe, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from urllib.request import urlopen

import pytest

from populace.storage.errors import (
    AlreadyExists,
    Damaged,
    InvalidInput,
    ObjectNotFound,
    OutcomeUnknown,
    StoreUnavailable,
    UnsafeStore,
)
from populace.storage.log.pack import BlobPlace, read_blob
from populace.storage.objects.bucket import Bucket
from populace.storage.objects.cloud import MemoryStore
from populace.storage.objects.contract import ObjectStore, get_range
from populace.storage.objects.files import FileStore
from populace.storage.objects.log import Log
from populace.storage.objects.open import open_store
from populace.storage.objects.probe import probe, require_safe
from populace.storage.objects.s3 import S3Location
from tests.support.servers import DroppingProxy, moto, seaweedfs


@pytest.fixture(params=["file", "memory", "seaweedfs", "moto"], scope="module")
def location(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of a store of every kind."""
    if request.param == "file":
        yield f"file://{tmp_path_factory.mktemp('store')}"
    elif request.param == "memory":
        yield "memory://"
    else:
        with {"seaweedfs": seaweedfs, "moto": moto}[request.param]() as endpoint:
            url = f"s3://suite?endpoint={endpoint}"
            Bucket(url).ensure()
            yield url


@pytest.fixture
def store(location: str) -> ObjectStore:
    """A store with nothing below it yet."""
    unique = uuid.uuid4().hex
    if location.startswith("s3:"):
        return open_store(location.replace("?", f"/{unique}?"))
    return open_store(location if location == "memory://" else f"{location}/{unique}")


def test_of_racing_creates_exactly_one_wins(store: ObjectStore) -> None:
    for turn in range(2):
        barrier, wins = threading.Barrier(32), []

        def race(
            number: int, turn: int = turn, barrier: threading.Barrier = barrier, wins: list = wins
        ) -> None:
            barrier.wait()
            with contextlib.suppress(AlreadyExists):
                store.create(f"a/{turn}", b"%d" % number)
                wins.append(number)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(32)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(wins) == 1
        assert store.get(f"a/{turn}") == b"%d" % wins[0]


def test_what_was_put_comes_back_whole_by_range_and_by_head(store: ObjectStore) -> None:
    store.put("x/y", b"0123456789")
    store.put("x/y", b"abcdefghij")
    assert store.get("x/y") == b"abcdefghij"
    assert get_range(store, "x/y", 2, 3) == b"cde"
    assert get_range(store, "x/y", 8, 5) == b"ij"
    assert get_range(store, "x/y", 10, 5) == b""
    assert store.head("x/y") == 10


def test_large_objects_come_back(store: ObjectStore) -> None:
    body = os.urandom(1 << 20) * 17  # above the size at which uploads are split
    store.put("large", body)
    assert store.head("large") == len(body)
    assert store.get("large") == body
    assert get_range(store, "large", 7_000_001, 4096) == body[7_000_001 : 7_000_001 + 4096]


def test_missing_objects_are_named(store: ObjectStore) -> None:
    store.put("x/there", b"1")
    for call in (store.get, store.head, lambda key: get_range(store, key, 0, 1)):
        with pytest.raises(ObjectNotFound, match="gone"):
            call("x/gone")
    store.delete("x/gone")


def test_listing_is_ordered_and_starts_after_a_key(store: ObjectStore) -> None:
    assert list(store.list("p")) == []
    for name in ("p/2", "p/1", "p/10", "q/1", "p/sub/3", "p-other/1"):
        store.put(name, b"x")
    assert list(store.list("p")) == ["p/1", "p/10", "p/2", "p/sub/3"]
    assert list(store.list("p", after="p/10")) == ["p/2", "p/sub/3"]
    store.delete("p/10")
    assert list(store.list("p")) == ["p/1", "p/2", "p/sub/3"]


def test_listing_goes_beyond_one_page(store: ObjectStore) -> None:
    names = [f"many/{number:05d}" for number in range(1100)]
    for name in names:
        store.put(name, b"")
    assert list(store.list("many")) == names
    assert list(store.list("many", after=names[1050])) == names[1051:]


def test_a_log_has_no_gaps_and_never_moves_on_by_itself(store: ObjectStore) -> None:
    log = Log(store, "log", ".json")
    for seq in range(3):
        log.append_at(seq, b"%d" % seq)
    with pytest.raises(AlreadyExists):
        log.append_at(1, b"other")
    assert [body for _, body in log.read_from(1)] == [b"1", b"2"]
    assert log.next_after(0) == 3


def test_every_backend_passes_the_probe_which_leaves_nothing(store: ObjectStore) -> None:
    probe(store, "population/probe")
    assert list(store.list("population")) == []


def test_a_lost_answer_is_an_unknown_outcome_and_the_object_is_there(location: str) -> None:
    if not location.startswith("s3:"):
        pytest.skip("no network between us and this store")
    direct = S3Location.parse(location)
    assert direct.endpoint is not None
    proxy = DroppingProxy(direct.endpoint)
    try:
        unique = uuid.uuid4().hex
        store = open_store(f"s3://suite/{unique}?endpoint={proxy.endpoint}")
        store.create("before", b"0")
        proxy.drops_answers = True
        with pytest.raises(OutcomeUnknown, match="did not say whether 'lost'"):
            store.create("lost", b"1")
        assert proxy.num_dropped == 1  # a create is never sent twice
        proxy.drops_answers = False
        with pytest.raises(AlreadyExists):
            store.create("lost", b"2")
        assert store.get("lost") == b"1"
    finally:
        proxy.close()


def test_a_store_that_is_away_is_named_as_such(location: str) -> None:
    if not location.startswith("s3:"):
        pytest.skip("no server to be away")
    store = open_store("s3://suite?endpoint=http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9"):
        store.get("a")
    with pytest.raises(OutcomeUnknown, match=r"127\.0\.0\.1:9"):
        store.create("a", b"")


def test_the_first_parts_of_keys_are_listed(store: ObjectStore) -> None:
    assert list(store.folders()) == []
    for name in ("two/population.json", "one/a/b", "one/c"):
        store.put(name, b"x")
    assert list(store.folders()) == ["one", "two"]


def test_a_folder_with_odd_characters_is_found_again(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "run#1 50%41?")
    store.put("a", b"1")
    assert open_store(store.url).get("a") == b"1"


def test_a_failed_create_leaves_nothing_behind(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.create("a/b", b"1")
    with pytest.raises(AlreadyExists):
        store.create("a/b", b"2")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="'file/x' can't be written"):
        FileStore(tmp_path).put("file/x", b"1")


def test_a_blob_past_the_end_of_its_pack_is_damage(store: ObjectStore) -> None:
    store.put("pack", b"short")
    with pytest.raises(Damaged, match="pack"):
        read_blob(store, BlobPlace(pack="pack", offset=100, size_bytes=4, sha256="0" * 64))


# What the probe refuses: servers that accept a condition and ignore it, and their like.


class _OverwritingCreates(MemoryStore):
    def create(self, key: str, body: bytes) -> None:
        self.put(key, body)


class _TwoWinners(MemoryStore):
    """Tells everyone that they won; the first object stays."""

    def create(self, key: str, body: bytes) -> None:
        with contextlib.suppress(AlreadyExists):
            super().create(key, body)


class _WholeObjectForARange(MemoryStore):
    def read_into(self, key: str, offset: int, into: memoryview) -> int:
        return super().read_into(key, 0, into)


class _StaleReads(MemoryStore):
    def put(self, key: str, body: bytes) -> None:
        with contextlib.suppress(AlreadyExists):
            self.create(key, body)


class _DeletesNothing(MemoryStore):
    def delete(self, key: str) -> None:
        self.head(key)


class _ListsEverything(MemoryStore):
    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        return super().list(prefix)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_OverwritingCreates, "^create: 32 of 32"),
        (_TwoWinners, "^create: 32 of 32"),
        (_WholeObjectForARange, "^range reads"),
        (_StaleReads, "^read after write"),
        (_DeletesNothing, "^delete"),
        (_ListsEverything, "^listing"),
    ],
)
def test_an_unsafe_store_is_refused_by_the_name_of_what_failed(
    make: Callable[[], ObjectStore], reason: str
) -> None:
    with pytest.raises(UnsafeStore, match=reason):
        require_safe(make(), "population")


def test_a_bucket_that_keeps_what_is_deleted_is_refused() -> None:
    with moto() as endpoint:
        for name, status in (
            ("versioned", "Enabled"),
            ("suspended", "Suspended"),
            ("locked", None),
        ):
            bucket = Bucket(f"s3://{name}?endpoint={endpoint}")
            bucket._client.make_bucket(name, object_lock=status is None)
            if status is not None:
                from minio.versioningconfig import VersioningConfig

                bucket._client.set_bucket_versioning(name, VersioningConfig(status))
            with pytest.raises(UnsafeStore, match=r"versioning|object lock"):
                require_safe(open_store(f"s3://{name}?endpoint={endpoint}"), "population")


def test_a_bucket_is_made_with_a_rule_against_unfinished_uploads() -> None:
    with moto() as endpoint:
        url = f"s3://fresh/with/prefix?endpoint={endpoint}"
        bucket = Bucket(url)
        bucket.ensure()
        bucket.ensure()
        (rule,) = bucket._client.get_bucket_lifecycle("fresh").rules
        assert rule.abort_incomplete_multipart_upload.days_after_initiation == 7
        bucket.check()
        open_store(url).put("exports/a.tar", b"content")
        link = bucket.presigned_link("exports/a.tar", timedelta(minutes=5))
        assert urlopen(link, timeout=10).read() == b"content"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:secret@bucket", "must not hold credentials"),
        ("s3://", "s3://BUCKET"),
        ("s3://bucket?endpoint=http://key:secret@host:9000", "endpoint must not hold credentials"),
        ("s3://bucket?endpoint=localhost:9000", "endpoint is 'localhost:9000'"),
        ("s3://bucket?secret=1", "unknown"),
    ],
)
def test_an_impossible_s3_url_says_what_to_write(url: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        open_store(url)
    assert "secret@" not in str(caught.value)


def test_a_url_keeps_what_is_needed_to_open_it_again_and_no_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id-of-mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-mine")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    url = open_store("s3://bucket/a/b?region=eu-west-1").url
    assert url == "s3://bucket/a/b?endpoint=http://127.0.0.1:9000&region=eu-west-1"
    assert open_store(url).url == url
    assert "of-mine" not in url


def test_without_credentials_the_error_says_where_to_put_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "MINIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "populace.storage.objects.s3.credentials_provider", _provider_without_a_role
    )
    with pytest.raises(InvalidInput, match="AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket?endpoint=http://127.0.0.1:9000")


def _provider_without_a_role() -> object:
    from minio.credentials.providers import AWSConfigProvider, ChainedProvider, EnvAWSProvider

    return ChainedProvider([EnvAWSProvider(), AWSConfigProvider()])


def test_the_dev_store_prints_how_to_use_it_and_ends_with_ctrl_c() -> None:
    import signal

    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from populace.population.cli.app import main; main()",
            "store",
            "dev",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    said, deadline = "", time.monotonic() + 60
    while "Ctrl-C" not in said and time.monotonic() < deadline:
        said += process.stdout.readline()
    variables = dict(
        line.split("export ")[1].strip().split("=", 1)
        for line in said.splitlines()
        if "export " in line
    )
    url = next(word for word in said.split() if word.startswith("s3://"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        store = open_store(url)
        store.create("a", b"1")
        assert store.get("a") == b"1"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
