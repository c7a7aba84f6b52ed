"""Every setting of Populace, its default, its bound and its unit.

`load.py` turns YAML into these; `checks.py` says what is wrong with a value. To add a setting,
write its field with its bound here: the command line, the checks and the reference page follow.
One file because it is where anybody looks a setting up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

AUTO = "auto"
"""Of a setting that is decided by what is there."""
BOUND = "bound"
"""Key of a field's `Bound` in its metadata. A field that may be None is bounded when it isn't."""


class Bound(NamedTuple):
    """What a value must be.

    Example: `Bound("a number above zero", lambda value: value > 0)`."""

    wanted: str
    """Completes "use …"."""
    holds: Callable[[Any], bool]


def _bounded(default: Any, bound: Bound) -> Any:
    return field(default=default, metadata={BOUND: bound})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def positive(default: float | None) -> Any:
    """A field whose value is above zero."""
    return _bounded(default, Bound("a number above zero", lambda value: value > 0))


def not_negative(default: float | None) -> Any:
    """A field whose value is zero or more."""
    return _bounded(default, Bound("zero or more", lambda value: value >= 0))


def fraction(default: float) -> Any:
    """A field whose value is in [0, 1)."""
    return _bounded(default, Bound("a number in [0, 1)", lambda value: 0 <= value < 1))


def within(default: int, least: int, most: int) -> Any:
    """A field whose value is in [least, most]."""
    return _bounded(default, Bound(f"{least} to {most}", lambda value: least <= value <= most))


def one_of(default: str, *others: str) -> Any:
    """A field whose value is one of these words."""
    words = (default, *others)
    return _bounded(default, Bound(f"one of {', '.join(words)}", lambda value: value in words))


TARGETS = ("both", "attention", "experts")
"""What an adapter may carry LoRA on."""


@dataclass(frozen=True)
class BaseSettings:
    """The frozen model that all adapters share."""

    model: str = "smollm2-moe"
    """A prepared base's name, or a folder with a Hugging Face MoE checkpoint, or, to measure speed
    and memory without one, `random:PRESET[:LAYERS]`: a well-known base's dimensions, its weights
    drawn on the device."""
    scratch: bool = False
    """Allow a population that isn't kept, on a `random:` base: its weights differ from one kind of
    device to another."""
    dtype: str = one_of("auto", "bfloat16", "float32")
    """`bfloat16`, `float32`, or `auto`: bfloat16 on a CUDA device, and on a CPU that multiplies it
    natively."""
    device: str = one_of("auto", "cpu", "cuda")
    """What a shard computes on: `cpu`; `cuda`, for which a run asks Ray for a GPU per shard; or
    `auto`: a CUDA device where its process sees one. A run then asks Ray for GPUs if the cluster
    has enough."""


@dataclass(frozen=True)
class GroupSettings:
    """The shard group: the Ray actors that together hold the base."""

    count: int = positive(1)
    """Shards that the experts are split over; above 1 needs DeepSpeed (`pip install
    populace[deepspeed]`). For a base that one GPU has no room for."""
    replicas: int | str = _bounded(
        AUTO, Bound("auto or a number above zero", lambda value: value == AUTO or _is_count(value))
    )
    """Groups that each hold the whole base under one run, every one with a controller of its own
    that has its share of the partitions. `auto`: as many as the cluster has GPUs for; one on
    CPUs."""
    cpus: float = positive(1.0)
    """CPUs that Ray reserves for a shard. How many it uses is `run.threads`."""
    dense: str = one_of("replicated", "zero3")
    """What is no expert's: `replicated` on every shard, or `zero3`: cut over the shards by
    DeepSpeed ZeRO-3 and gathered layer by layer, which saves memory and costs time. Embeddings and
    head stay whole."""
    max_restarts: int = not_negative(5)
    """How often in a row a group that died is started again before the run gives up."""
    timeout_s: float = positive(300.0)
    """A shard that lets the others wait this long in the middle of a pass is taken to be dead."""
    place_timeout_s: float = positive(60.0)
    """How long to wait for room in the cluster."""


@dataclass(frozen=True)
class AdapterSettings:
    """What a new adapter gets; fixed once it is created. `user_ranks` names users who get another
    rank."""

    rank: int = positive(8)
    """Rank of the LoRA on attention."""
    expert_rank: int = positive(1)
    """Rank of the LoRA on every expert."""
    targets: str = one_of(*TARGETS)
    """Which modules carry LoRA. An adapter of `attention` alone is a fraction of the size."""
    alpha: float = positive(32.0)
    """Scale of the update is alpha / rank (LoRA Without Regret: early curves independent of
    rank)."""
    learning_rate: float = positive(1e-3)
    """Learning rate of AdamW."""
    b_learning_rate_ratio: float = positive(1.0)
    """Learning rate of B over that of A."""


@dataclass(frozen=True)
class TrainSettings:
    backend: str = one_of("auto", "grouped", "triton", "reference")
    """`auto`: what is fastest on the shard's device. That is `grouped` (torch's batched products)
    on CPUs and `triton` on CUDA devices; `reference` (plain loops, the truth for tests) runs on
    CPUs."""
    numerics: str = one_of("invariant", "fast")
    """`invariant`: a user's bits don't depend on who shares the batch, so that revisions can be
    replayed; `fast`: rows are not padded to what that needs."""
    max_rows_per_pass: int = positive(4096)
    """Rows that one forward and backward pass holds at most; a wave runs in as many passes as it
    needs."""
    max_sequence_length: int = positive(1024)
    """Prompt and completion, in tokens."""
    over_long: str = one_of("cut", "reject")
    """What becomes of a logged event that is longer: `cut` its completion, or `reject` it."""
    kl_coefficient: float = not_negative(0.05)
    """Weight of the term that keeps a user's model near the base; 0 switches it off."""
    kl_in: str = one_of("loss", "reward")
    """`loss`: the k2 term per token; `reward`: subtracted from a rollout's reward before groups
    compare."""
    importance_cap: float = positive(2.0)
    """C of truncated importance sampling, w = min(pi_trainer / pi_rollout, C)."""
    baseline_decay: float = fraction(0.9)
    """Decay of a user's running mean reward, the baseline for logged trajectories."""
    max_staleness: int = not_negative(8)
    """A logged trajectory of a revision that is more than this many behind the tip is settled as
    stale."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, each adapter by its own step and gradient norm."""

    beta1: float = fraction(0.9)
    """Decay of the first moment."""
    beta2: float = fraction(0.99)
    """Decay of the second moment."""
    epsilon: float = positive(1e-8)
    """Added to the square root of the second moment."""
    weight_decay: float = not_negative(0.0)
    """Decoupled from the gradient."""
    max_grad_norm: float = positive(1.0)
    """Norm of a whole adapter's gradient; longer ones are scaled down to it."""
    offload: bool = False
    """Moments stay in host memory and are updated there by DeepSpeed's CPUAdam (`pip install
    populace[deepspeed]`)."""


@dataclass(frozen=True)
class RolloutSettings:
    samples_per_task: int = positive(6)
    """Answers that are tried for each task; they are compared with one another."""
    max_new_tokens: int = positive(24)
    """An answer's length at most."""
    temperature: float = positive(1.0)
    """At which answers are sampled."""


@dataclass(frozen=True)
class TenantSettings:
    """A group of users. Users whose id begins with `NAME/` belong to the tenant of that name."""

    weight: float = positive(1.0)
    """The tenant's share of the waves, against the other tenants that have something waiting."""


@dataclass(frozen=True)
class SchedulerSettings:
    """Who is updated next, and what one wave may take; try values out with `populace simulate`."""

    max_adapters_per_wave: int = positive(16)
    """Users that one fused step updates at most."""
    events_per_update: int = positive(2)
    """Events of one user that one update learns from at most."""
    slots: int = positive(64)
    """Adapters that a shard holds in device memory at most."""
    max_tokens_per_wave: int = positive(1 << 20)
    """Prompt and completion tokens of one wave, estimated at three bytes of text each."""
    max_rank_per_wave: int | None = positive(None)
    """Sum of the ranks of a wave's adapters."""
    max_load_mb_per_wave: float | None = positive(None)
    """Adapters that one wave may page in, in megabytes."""
    min_events: int = positive(1)
    """Fewer events than this wait for more, until they have waited for `patience_s`."""
    patience_s: float = not_negative(60.0)
    """See `scheduler.min_events`."""
    cool_down_s: float = not_negative(0.0)
    """Least time between two updates of a user."""
    residency_bonus_s: float = not_negative(2.0)
    """Head start of a user whose adapter is hot."""
    evidence_bonus_s: float = not_negative(2.0)
    """Head start of a user with twice `events_per_update` pending events; proportional below."""
    weight: float = positive(1.0)
    """Weight of the users that belong to no tenant."""
    tenants: dict[str, TenantSettings] = field(default_factory=dict)


@dataclass(frozen=True)
class ResidencySettings:
    """Where adapters are kept besides the slots: in a shard's memory (warm), on its local disk
    (near), and in the store (cold)."""

    warm_mb: float = not_negative(512.0)
    """Memory of a shard for adapters that are not in a slot."""
    near_mb: float = not_negative(0.0)
    """0: nothing is kept on the local disk."""
    near_folder: str = "/tmp/populace-near"
    """Sealed blobs by digest; safe to delete at any time."""


@dataclass(frozen=True)
class StreamSettings:
    """How experience gets in."""

    linger_ms: float = not_negative(0.0)
    """How long a segment waits for more events before it is written. Events that come while the one
    before is being written share the next one anyway."""
    max_waiting_mb: float = positive(64.0)
    """More than this waiting to be written is refused with `Overloaded`, which says when to try
    again."""
    cache_mb: float = positive(64.0)
    """Segments that a controller keeps in memory."""
    compact_every_segments: int = positive(2000)
    """How far a partition's experience log grows before what is consumed is cut off."""
    gateway: bool = False
    """Whether a run starts the gateway actor, which gathers many small producers inside the Ray
    cluster."""


@dataclass(frozen=True)
class EvaluationSettings:
    every_waves: int = positive(4)
    """How often tips that changed are judged."""
    heldout_share: float = fraction(0.2)
    """Share of each user's tasks that is never trained on; fixed when the population is created."""
    samples_per_task: int = positive(1)
    """Answers per held-out task, of the tip and of serving."""
    max_tasks: int = positive(8)
    """Held-out tasks of a user that one evaluation uses at most."""
    min_tasks: int = positive(2)
    """Held-out tasks without which there is no comparison."""
    too_few: str = one_of("promote", "keep")
    """A user with fewer held-out tasks than `min_tasks`: `promote` provisionally or `keep`."""
    confidence: float = fraction(0.9)
    """Level of the two-sided interval of the tip's reward minus serving's."""
    tolerance: float = not_negative(0.0)
    """The tip is rejected when the whole interval lies below minus this."""


@dataclass(frozen=True)
class RewardSettings:
    timeout_s: float = positive(20.0)
    """What a reward may take for all answers to one task."""
    functions: dict[str, str] = field(default_factory=dict)
    """Reward name -> `module:function`."""


@dataclass(frozen=True)
class RetentionSettings:
    """Which old revisions stay in the store."""

    last: int = positive(8)
    """Every adapter's newest revisions; tip, serving, promoted and pinned ones stay anyway."""
    every_waves: int = positive(50)
    """How often packs are rewritten without what may go."""


@dataclass(frozen=True)
class RunSettings:
    max_waves: int | None = not_negative(None)
    """Stop after this many waves of this run; without it, run until `until_drained` or Ctrl-C."""
    until_drained: bool = True
    """End when no user has experience left. False: wait for more."""
    takeover_s: float = positive(5.0)
    """A partition's owner without a heartbeat for this long is taken to be dead."""
    checkpoint_every_records: int = positive(1000)
    """Opening a population replays at most about this many records per partition."""
    threads: int = not_negative(0)
    """Threads of a shard's tensor operations; 0 means all CPUs."""
    pipelined: bool = True
    """Plan, page and roll out the next waves while this one trains, and publish behind it. False:
    one after another."""
    controller: str = "main"
    """Controllers of different names share a population's partitions, and take over from those that
    die."""
    store_retry_s: float = positive(5.0)
    """How often a run whose store is away looks whether it is back."""
    metrics: bool = True
    """Export to Ray's metrics, and through them to Prometheus: docs/reference/metrics.md."""


@dataclass(frozen=True)
class PageSettings:
    """The population page. `populace page` serves the same of a population that doesn't run."""

    enabled: bool = False
    """Whether a run serves it, through Ray Serve."""
    host: str = "127.0.0.1"
    """Address that it listens on."""
    port: int = within(8270, 1, 65535)
    """Port that it listens on."""
    hosts: tuple[str, ...] = ()
    """Names besides `host` and localhost that browsers may call it by."""


@dataclass(frozen=True)
class Settings:
    """One population and one run of it."""

    name: str = "population"
    """The population's name, and the folder in the store that everything of it lies in."""
    store: str = "build/store"
    """Where the population lives: `file://PATH`, a plain path,
    `s3://BUCKET[/PREFIX][?endpoint=URL]` or `memory://`."""
    seed: int = 0
    """What initialisations, sampling noise and the choice of held-out tasks derive from; fixed when
    the population is created."""
    partitions: int = positive(16)
    """Buckets of users, and so the most controllers that can ever share the population; fixed when
    it is created."""
    experience: str | None = None
    """`module:function` that returns (user, events) pairs; enqueued at the start, twice is once."""
    report: str | None = None
    """A folder for report.html and report.json, written when the run ends by itself."""
    base: BaseSettings = field(default_factory=BaseSettings)
    shard: GroupSettings = field(default_factory=GroupSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    user_ranks: dict[str, int] = field(default_factory=dict)
    """Users whose rank differs from `adapter.rank`."""
    train: TrainSettings = field(default_factory=TrainSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    residency: ResidencySettings = field(default_factory=ResidencySettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    run: RunSettings = field(default_factory=RunSettings)
    page: PageSettings = field(default_factory=PageSettings)
