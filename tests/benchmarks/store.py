"""`make bench-store`: the store at a million adapters, with real adapters, against peft, and on an
S3.

Every part checks what it read before it counts. Ratios come from one run; the machine's own copy
speed stands beside them. Needs about 45 GB of disk and a quarter of an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from populace.storage.catalog.catalog import Catalog
from populace.storage.catalog.checkpoint import restore, write_checkpoint
from populace.storage.keys.keyring import Keyring, PublicKey
from populace.storage.keys.sealing import seal
from populace.storage.keys.user_keys import UserKey, UserKeys
from populace.storage.log.loading import BlobRequest, blob_context, load_wave
from populace.storage.log.owner import NewRevision, Owner
from populace.storage.log.reader import RevisionLogReader
from populace.storage.log.records import AdapterCreated, EventRef, RecordBatch, RevisionEntry
from populace.storage.objects.contract import ObjectStore
from populace.storage.objects.open import open_store
from tests.benchmarks.figures import Figure, figure, publish

WAVE = 1024
PARTITIONS = 4
SPEC = {"rank": 4, "expert_rank": 1}
FIXED = {
    "parameters": {"algorithm": "grpo"},
    "materials": {"base": "b" * 64},
    "numerics": {"dtype": "float32"},
}


class DerivedKeys(UserKeys):
    """User keys without their objects, where creating a million of them is not what is measured."""

    def fetch(self, pseudonym: str) -> UserKey:
        return UserKey(user=pseudonym, key=hashlib.sha256(pseudonym.encode()).digest())

    def get(self, pseudonym: str) -> UserKey:
        return self.fetch(pseudonym)


def pseudonym(number: int) -> str:
    return hashlib.blake2b(b"%d" % number, digest_size=16).hexdigest()


class Population:
    """Partitions with their owners; adapters are numbers."""

    def __init__(
        self, store: ObjectStore, folder: Path, keys: type[UserKeys] = DerivedKeys
    ) -> None:
        self.store, self.keyring = store, Keyring(folder)
        self.root_key = self.keyring.new_signing_key()
        self.keys = keys(store, "bench", self.keyring)
        self.catalog = Catalog()
        self.owners = []
        for partition in range(PARTITIONS):
            reader = RevisionLogReader(store, "bench", partition, self.root_key)
            self.owners.append(Owner(reader, "bench", self.keyring))
            self.catalog.owned[partition] = True

    def create(self, partition: int, numbers: list[int]) -> None:
        created = [
            AdapterCreated(pseudonym=pseudonym(number), spec=SPEC, seed=number)
            for number in numbers
        ]
        record = RecordBatch(records=created)
        self.catalog.apply(self.owners[partition].append(record), record)

    def commit(
        self, partition: int, numbers: list[int], bodies: Callable[[int], bytes], segment: int
    ) -> None:
        """One wave of one partition: seal, pack, manifest, catalog."""
        names = [pseudonym(number) for number in numbers]
        rows = self.catalog.rows_of(names)
        revisions = self.catalog.adapters["next_revision"][rows].tolist()
        drafts = []
        for number, name, revision in zip(numbers, names, revisions, strict=True):
            parent = revision - 1
            parent_sha256 = None
            if parent:
                parent_sha256 = self.catalog.revision_of(name, parent).blobs["weights"].sha256
            sealed = self.keys.seal(name, bodies(number), blob_context("weights", revision))
            entry = RevisionEntry(
                pseudonym=name,
                revision=revision,
                parent=parent,
                parent_sha256=parent_sha256,
                blobs={},
                experts=[0, 1, 2, 3],
                trained=[EventRef(tag=name, position=(segment, 0), digest="d" * 64)],
                settled=[],
                consumed=(segment, 0),
                metrics={"reward": 0.5, "tokens": 128.0},
            )
            drafts.append(NewRevision(entry=entry, blobs={"weights": sealed}))
        self.catalog.apply(*self.owners[partition].commit_wave(f"w{segment}", drafts, **FIXED))

    def requests(self, numbers: list[int]) -> list[BlobRequest]:
        states = [self.catalog.require(pseudonym(number)) for number in numbers]
        return [
            BlobRequest(
                pseudonym=state.pseudonym, revision=state.tip, part="weights",
                place=self.catalog.revision_of(state.pseudonym, state.tip).blobs["weights"],
            )
            for state in states
        ]  # fmt: skip


def bodies_of(size_bytes: int) -> Callable[[int], bytes]:
    """Different random bytes for every adapter, cheap enough not to be what is measured."""
    noise = os.urandom(size_bytes + (1 << 22))

    def body(number: int) -> bytes:
        start = (number * 7919) % (1 << 22)
        return number.to_bytes(8, "little") + noise[start : start + size_bytes - 8]

    return body


def drop_page_cache(folder: Path) -> None:
    """Make files cold: the kernel forgets their pages."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def scratch(where: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="populace-bench-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bench_scale(
    folder: Path, num_adapters: int, size_bytes: int, label: str, *, aims: bool
) -> list[Figure]:
    """`num_adapters` adapters of `size_bytes`, then four waves of churn on a tenth of them."""
    store = open_store(f"file://{folder}/store")
    population, body = Population(store, folder / "keys"), bodies_of(size_bytes)
    rates: list[float] = []
    segment = 0
    chance = random.Random(0)

    def commit_all(numbers: list[int], fresh: bool) -> None:
        nonlocal segment
        for partition in range(PARTITIONS):
            own = [number for number in numbers if number % PARTITIONS == partition]
            for start in range(0, len(own), WAVE):
                part = own[start : start + WAVE]
                began = time.perf_counter()
                if fresh:
                    population.create(partition, part)
                population.commit(partition, part, body, segment)
                rates.append(len(part) / (time.perf_counter() - began))
                segment += 1

    commit_all(list(range(num_adapters)), fresh=True)
    for _ in range(4):
        commit_all(
            sorted(chance.sample(range(num_adapters), max(num_adapters // 10, PARTITIONS))),
            fresh=False,
        )
    tenth = max(1, len(rates) // 10)
    raw = (num_adapters + 4 * max(num_adapters // 10, PARTITIONS)) * size_bytes
    on_disk = disk_bytes(folder / "store")

    checkpoints = []
    for owner in population.owners:
        began = time.perf_counter()
        write_checkpoint(owner, population.catalog)
        checkpoints.append(time.perf_counter() - began)

    names = [pseudonym(number) for number in range(num_adapters)]
    asked = [chance.choices(names, k=WAVE) for _ in range(200)]
    lookups = []
    for batch in asked:
        began = time.perf_counter()
        rows = population.catalog.rows_of(batch)
        lookups.append(WAVE / (time.perf_counter() - began))
        assert (rows >= 0).all()
    states = []
    for batch in asked[:20]:
        began = time.perf_counter()
        for name in batch[:100]:
            population.catalog.require(name)
        states.append(100 / (time.perf_counter() - began))

    loads, shares = [], []
    whole = b"".join(body(number) for number in range(64))
    for turn in range(5):
        store.put(f"plain/{turn}", whole)
        numbers = chance.sample(range(num_adapters), 64)
        requests = population.requests(numbers)
        drop_page_cache(folder / "store")
        began = time.perf_counter()
        views = load_wave(store, population.keys, requests)
        loads.append(time.perf_counter() - began)
        shares.append(timed(lambda turn=turn: store.get(f"plain/{turn}")) / loads[-1])
        assert all(bytes(view) == body(number) for view, number in zip(views, numbers, strict=True))

    puts = []
    for turn in range(3):
        wave = b"".join(body(number) for number in range(min(WAVE, num_adapters // PARTITIONS)))
        seconds = timed(lambda turn=turn, wave=wave: store.put(f"plain/wave-{turn}", wave))
        puts.append(seconds / (len(wave) / size_bytes / statistics.median(rates)))
    opened = [open_in_fresh_process(folder, population.root_key, num_adapters) for _ in range(3)]
    show = f"{label}: "
    return [
        figure(show + "commit rate, whole run", rates, "adapters/s"),
        figure(
            show + "commit rate, last tenth of waves over first",
            ratio_of(rates[-tenth:], rates[:tenth]),
            "ratio",
        ),
        figure(show + "size on disk over raw bytes", [on_disk / raw], "ratio"),
        figure(show + "checkpoint, one of 4 partitions", checkpoints, "s"),
        figure(
            show + "open", [item["seconds"] for item in opened], "s", at_most=5 if aims else None
        ),
        figure(
            show + "memory per adapter, catalog's arrays",
            [item["arrays"] / num_adapters for item in opened],
            "bytes",
            at_most=250 if aims else None,
        ),
        figure(
            show + "memory per adapter, growth of the process",
            [i["rss"] / num_adapters for i in opened],
            "bytes",
        ),
        figure(
            show + "look-ups in batches of 1,024",
            lookups,
            "1/s",
            at_least=500_000 if aims else None,
        ),
        figure(show + "look-ups one by one, whole state", states, "1/s"),
        figure(show + "64 random cold loads", [1000 * value for value in loads], "ms"),
        figure(show + "64 random cold loads, copy speed reached", shares, "of one plain get"),
        figure(show + "commits, copy speed reached", puts, "of plain put"),
    ]


def ratio_of(above: list[float], below: list[float]) -> list[float]:
    middle = statistics.median(below)
    return [value / middle for value in above]


def open_in_fresh_process(folder: Path, root_key: PublicKey, num_adapters: int) -> dict[str, float]:
    """Time and memory of opening: newest checkpoints plus tails of all partitions."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.store",
        "--open",
        str(folder),
        root_key.public,
    ]
    answer: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    assert answer["adapters"] == num_adapters
    return answer


def open_here(folder: str, public: str) -> None:
    store, key = open_store(f"file://{folder}/store"), PublicKey(public=public)
    import pyarrow.parquet as pq

    assert pq  # its import is not opening
    gc.collect()
    before, began = rss_bytes(), time.perf_counter()
    catalog = Catalog()
    for partition in range(PARTITIONS):
        reader = RevisionLogReader(store, "bench", partition, key)
        restore(reader, catalog)
        for header, record in reader.read_new():
            catalog.apply(header, record)
    seconds = time.perf_counter() - began
    gc.collect()
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    answer = {
        "seconds": seconds, "rss": rss_bytes() - before, "arrays": catalog.size_bytes,
        "adapters": len(catalog)
    }  # fmt: skip
    print(json.dumps(answer))


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bench_against_peft(folder: Path) -> list[Figure]:
    """The same adapters of a small Mixtral: a wave of 1,024 against `save_pretrained` and upload
    one by one; 64 cold loads against `load_adapter`. Encryption, signing and verification are on
    for us."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.support import tiny

    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(tiny.build("mixtral", folder / "base"))
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(base, config)
    store = open_store(f"file://{folder}/store")
    tensors = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    size_bytes = sum(value.numel() * value.element_size() for value in tensors.values())
    body = bodies_of(size_bytes)
    population = Population(store, folder / "keys", UserKeys)
    master = population.keyring.new_master_key()
    numbers = [number * PARTITIONS for number in range(WAVE)]
    for number in numbers:
        population.keys.ensure(pseudonym(number), f"user {number}", lambda: master)
    population.create(0, numbers)

    def upload_one(number: int) -> None:
        target = folder / "peft" / str(number)
        model.save_pretrained(target)
        for path in target.iterdir():
            store.put(f"peft/{number}/{path.name}", path.read_bytes())

    commits, copies = [], []
    for turn in range(4):
        theirs = (
            timed(lambda turn=turn: [upload_one(turn * 256 + number) for number in range(256)])
            * WAVE
            / 256
        )
        ours = timed(lambda turn=turn: population.commit(0, numbers, body, turn))
        whole = b"".join(body(number) for number in numbers)
        plain = timed(lambda turn=turn, whole=whole: store.put(f"plain/{turn}", whole))
        commits.append(theirs / ours)
        copies.append(plain / ours)

    loads, reads = [], []
    chance = random.Random(0)
    for turn in range(5):
        chosen = chance.sample(range(WAVE), 64)
        drop_page_cache(folder)
        fresh = PeftModel.from_pretrained(base, folder / "peft" / "0", adapter_name=f"first{turn}")
        drop_page_cache(folder)
        theirs = timed(
            lambda fresh=fresh, chosen=chosen, turn=turn: [
                fresh.load_adapter(folder / "peft" / str(number), adapter_name=f"{turn}-{number}")
                for number in chosen
            ]
        )
        base = fresh.unload()
        population.keys.drop([pseudonym(number) for number in numbers])
        requests = population.requests([numbers[number] for number in chosen])
        drop_page_cache(folder)
        began = time.perf_counter()
        views = load_wave(store, population.keys, requests)
        ours = time.perf_counter() - began
        assert all(
            bytes(view) == body(numbers[number]) for view, number in zip(views, chosen, strict=True)
        )
        drop_page_cache(folder)
        plain = timed(lambda turn=turn: store.get(f"plain/{turn % 4}")) * 64 / WAVE
        loads.append(theirs / ours)
        reads.append(plain / ours)
    return [
        figure("committing 1,024 adapters, peft and upload over us", commits, "x", at_least=30),
        figure("committing 1,024 adapters, copy speed reached", copies, "of plain put"),
        figure("cold-loading 64 adapters, peft over us", loads, "x", at_least=20),
        figure("cold-loading 64 adapters, copy speed reached", reads, "of plain get"),
        figure("size of such an adapter", [size_bytes / 1024], "KB"),
    ]


def bench_s3(folder: Path) -> list[Figure]:
    """On SeaweedFS: packs against one object per adapter, 16 KB each."""
    from populace.storage.objects.bucket import Bucket
    from tests.support.servers import seaweedfs

    with seaweedfs() as endpoint:
        url = f"s3://bench?endpoint={endpoint}"
        Bucket(url).ensure()
        store, body = open_store(url), bodies_of(16 << 10)
        population = Population(store, folder / "keys-s3")
        numbers = [number * PARTITIONS for number in range(WAVE)]
        population.create(0, numbers)
        commits, singles, loads, gets = [], [], [], []
        chance = random.Random(0)
        for turn in range(4):
            commits.append(
                WAVE / timed(lambda turn=turn: population.commit(0, numbers, body, turn))
            )
            names = [f"single/{turn}/{number}" for number in numbers]
            sealed = [
                seal(b"k" * 32, body(number), name)
                for number, name in zip(numbers, names, strict=True)
            ]
            singles.append(
                WAVE
                / timed(
                    lambda n=names, s=sealed: [
                        store.create(k, v) for k, v in zip(n, s, strict=True)
                    ]
                )
            )
            chosen = chance.sample(range(WAVE), 256)
            requests = population.requests([numbers[number] for number in chosen])
            began = time.perf_counter()
            views = load_wave(store, population.keys, requests)
            loads.append(256 / (time.perf_counter() - began))
            assert all(
                bytes(view) == body(numbers[number])
                for view, number in zip(views, chosen, strict=True)
            )
            gets.append(
                256 / timed(lambda n=names, c=chosen: [store.get(n[number]) for number in c])
            )
    return [
        figure("SeaweedFS: commits in packs", commits, "adapters/s"),
        figure(
            "SeaweedFS: commits, packs over one object each", ratio_pairs(commits, singles), "x"
        ),
        figure("SeaweedFS: loads from packs", loads, "adapters/s"),
        figure("SeaweedFS: loads, packs over one object each", ratio_pairs(loads, gets), "x"),
    ]


def real_adapter_bytes() -> int:
    """Bytes of a `smollm2-moe` adapter of rank 4, expert rank 1, in fp32."""
    from populace.workers.base.families import dims_of
    from populace.workers.base.registry import prepare_base
    from populace.workers.layout import layout_of

    base = prepare_base("smollm2-moe", print)
    return 4 * layout_of(dims_of(Path(base.folder)), 4, 1).size


def ratio_pairs(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=int, default=1_000_000, help="the largest population")
    parser.add_argument(
        "--folder", type=Path, help="where there is room; default: the system's temporary folder"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/store.json"))
    arguments = parser.parse_args()
    if arguments.open:
        open_here(*arguments.open)
        return
    figures: list[Figure] = []
    with scratch(arguments.folder) as folder:
        figures += bench_against_peft(folder)
    with scratch(arguments.folder) as folder:
        figures += bench_s3(folder)
    with scratch(arguments.folder) as folder:
        size = real_adapter_bytes()
        figures += bench_scale(
            folder, 1000, size, f"1,000 of smollm2-moe, {size / 1e6:.1f} MB", aims=False
        )
    for number in (n for n in (10_000, 100_000, 1_000_000) if n <= arguments.adapters):
        with scratch(arguments.folder) as folder:
            figures += bench_scale(
                folder, number, 16 << 10, f"{number:,} of 16 KB", aims=number == 1_000_000
            )
    publish("the store", figures, arguments.out)


if __name__ == "__main__":
    main()
