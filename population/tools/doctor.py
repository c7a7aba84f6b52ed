"""What of this machine a population can use, and why not the rest: `populace doctor`.

One function per part; each returns findings and raises nothing for what it finds.
"""

from __future__ import annotations

import os
import platform
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

from populace.configs.schema import Settings
from populace.population.client import check_scratch
from populace.storage.errors import PopulaceError
from populace.storage.objects.cloud import MemoryStore
from populace.storage.objects.open import open_store
from populace.storage.objects.probe import require_safe
from populace.workers.actors.engine import ShardEngine, ShardSettings
from populace.workers.base.families import RANDOM, is_random
from populace.workers.base.footprint import config_of
from populace.workers.base.registry import SMOLLM2, find_prepared
from populace.workers.base.seeded import save_seeded
from populace.workers.batch import (
    AdapterBatch,
    AdapterKey,
    AdapterRef,
    ExperienceKind,
    Sample,
    ScoredSample,
    TrainGroup,
    WaveBatch,
)
from populace.workers.cards import cards_here, compiler, cuda_problem
from populace.workers.device import Device, device_of
from populace.workers.shapes import AdapterSpec
from populace.workers.step.numerics import NUMERICS_REVISION

_CONNECT_S = 3.0


class State(StrEnum):
    GOOD = "good"
    NOTE = "note"
    """It works, and somebody may want to know."""
    BAD = "bad"
    """What the settings ask for can't be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line. Example: `Finding(name="torch", text="2.13.0+cpu, a build for CPUs")`."""

    name: str
    text: str
    state: State = State.GOOD


def examine(settings: Settings, store: str | None) -> Iterator[Finding]:
    """Everything, in the order in which a run would need it. `store`: probed if given."""
    yield from machine()
    yield from packages()
    device, findings = computing(settings)
    yield from findings
    if device is not None:
        yield trial(device)
    yield base(settings, store)
    yield store_at(store, settings.name)
    yield ray_here()


def machine() -> Iterator[Finding]:
    """CPUs, memory, cards and driver, whoever can use them."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    yield Finding(
        name="CPU",
        text=f"{os.cpu_count()} x {_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{pages * size / 1e9:.0f} GB",
    )
    cards = cards_here()
    yield Finding(name="GPU", text=", ".join(cards.names) or "no NVIDIA card is to be seen")
    yield Finding(name="driver", text=cards.driver or "none")


def packages() -> Iterator[Finding]:
    """What computes, and who compiles."""
    built = "for CPUs" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    yield Finding(name="torch", text=f"{torch.__version__}, built {built}")
    for name in ("triton", "transformers", "ray", "deepspeed"):
        yield Finding(name=name, text=_version(name))
    found = compiler()
    yield Finding(
        name="compiler",
        text=found
        or "none on the PATH; a CUDA shard and optimizer.offload need one, other shards don't",
        state=State.GOOD if found else State.NOTE,
    )


def computing(settings: Settings) -> tuple[Device | None, list[Finding]]:
    """What a shard of this machine computes on; None where it can't as the settings say."""
    asked, problem = settings.base.device, cuda_problem()
    findings = []
    if asked == "cpu":
        problem = "base.device is cpu"
    if problem:
        state = State.BAD if asked == "cuda" else State.NOTE
        findings.append(Finding(name="no GPU is used", text=problem, state=state))
    try:
        device = device_of(asked, settings.base.dtype)
    except PopulaceError:
        return None, findings
    dtype = str(device.dtype).removeprefix("torch.")
    findings.append(
        Finding(name="a shard computes", text=f"on {device.kind} in {dtype}, by {device.backend}")
    )
    return device, findings


def trial(device: Device) -> Finding:
    """One update of a tiny random base on that device, and what its numerics promise."""
    dtype = str(device.dtype).removeprefix("torch.")
    key = AdapterKey("doctor", 0)
    spec = AdapterSpec(rank=4, expert_rank=1, alpha=8.0, learning_rate=1e-3)
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_seeded("random:tiny", Path(folder))
            settings = ShardSettings(
                base_folder=folder, dtype=dtype, device=device.kind, store_url="memory://",
                population="doctor", slots=1, threads=0, eos_ids=frozenset(),
            )  # fmt: skip
            engine = ShardEngine(settings, MemoryStore(), device=device)
        engine.page_in([AdapterRef(key=key, spec=spec, seed=0)], True)
        engine.train_wave(_lesson(key))
        broken = engine.why_fast
    except Exception as error:  # a compiler's or a driver's: whatever it is, a run would meet it
        return Finding(name="tried", text=f"one update fails: {error}", state=State.BAD)
    return Finding(
        name="tried",
        text=f"a tiny base and adapter took an update; numerics revision {NUMERICS_REVISION}, "
        + (f"fast: {broken}" if broken else "invariant (a run looks at its own base)"),
        state=State.NOTE if broken else State.GOOD,
    )


def _lesson(key: AdapterKey) -> WaveBatch:
    """A demonstration of five tokens."""
    sample = Sample(
        completion_ids=np.arange(5, dtype=np.int32), logprobs=None, expert_ids=None, finished=True
    )
    group = TrainGroup(
        event_id="doctor",
        kind=ExperienceKind.DEMONSTRATION,
        prompt_ids=np.arange(3, dtype=np.int32),
        prompt_expert_ids=None,
        samples=(ScoredSample(sample=sample, reward=1.0, base_logprobs=None),),
    )
    return WaveBatch(adapters=(AdapterBatch(adapter=key, groups=(group,)),))


def base(settings: Settings, store: str | None) -> Finding:
    """Whether the base is there, without hashing what isn't registered, and may be used. `store`:
    where the population is to be, if that was said."""
    model = settings.base.model
    try:
        found = find_prepared(model)
        if found is None and model != SMOLLM2:
            config_of(model)
        folder = model if found is None else found.folder
        if store and (model.startswith(RANDOM) or is_random(folder)):
            check_scratch(settings.base, store)
    except PopulaceError as error:
        return Finding(name="base", text=str(error), state=State.BAD)
    if found is not None:
        return Finding(name="base", text=f"{model}, in {found.folder}")
    if model != SMOLLM2 and not model.startswith(RANDOM):
        return Finding(name="base", text=f"{model}, a folder")
    text = f"{model} is not prepared: `populace base prepare {model}`, or the run does it"
    return Finding(name="base", text=text, state=State.NOTE)


def store_at(url: str | None, population: str) -> Finding:
    """The probe that a run makes of its store."""
    if url is None:
        return Finding(name="store", text="not asked for; --store URL or a configuration probes it")
    try:
        store = open_store(url)
        require_safe(store, population)
    except PopulaceError as error:
        return Finding(name="store", text=f"{url}: {error}", state=State.BAD)
    return Finding(name="store", text=f"{store.url} keeps what Populace needs of one")


def ray_here() -> Finding:
    """The cluster that a run would join."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address in ("", "local"):
        return Finding(
            name="Ray", text="RAY_ADDRESS names no cluster: a run starts a Ray of its own"
        )
    if address == "auto":
        return Finding(name="Ray", text="RAY_ADDRESS is auto: a run joins this machine's cluster")
    if address.lower().startswith(("http://", "https://")):
        return Finding(
            name="Ray",
            text=f"RAY_ADDRESS is {address!r}, the dashboard's, which only `ray job submit` takes; "
            "a run wants HOST:6379, or none",
            state=State.BAD,
        )
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((place.hostname or "", place.port or 6379), _CONNECT_S):
            return Finding(name="Ray", text=f"somebody listens at RAY_ADDRESS={address}")
    except (OSError, ValueError) as error:
        return Finding(
            name="Ray",
            text=f"nobody answers at RAY_ADDRESS={address} ({error}); start that cluster, or unset "
            "it: a run then starts a Ray of its own",
            state=State.BAD,
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
