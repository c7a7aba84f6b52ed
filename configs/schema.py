"""Every setting of Populace, its default and its unit. `load.py` turns YAML into these.

`problems` says what is wrong with a value; what it lets through is consistent.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BaseSettings:
    """The frozen model that all adapters share."""

    model: str = "smollm2-moe"
    """A prepared base's name, or a folder with a Hugging Face MoE checkpoint."""
    dtype: str = "auto"
    """`bfloat16`, `float32`, or `auto`: bfloat16 where the processor multiplies it natively."""


@dataclass(frozen=True)
class GroupSettings:
    """The shard group: the Ray actors that together hold the base."""

    count: int = 1
    """Shards that the experts are split over; above 1 needs DeepSpeed (`pip install
    populace[deepspeed]`)."""
    cpus: float = 1.0
    """Processors that Ray reserves for a shard. How many it uses is `run.threads`."""
    dense: str = "replicated"
    """What is no expert's: `replicated` on every shard, or `zero3`: cut over the shards by
    DeepSpeed ZeRO-3 and gathered layer by layer, which saves memory and costs time. Embeddings and
    head stay whole."""
    max_restarts: int = 5
    """How often in a row a group that died is started again before the run gives up."""
    timeout_s: float = 300.0
    """A shard that lets the others wait this long in the middle of a pass is taken to be dead."""
    place_timeout_s: float = 60.0
    """How long to wait for room in the cluster."""


@dataclass(frozen=True)
class AdapterSettings:
    """What a new adapter gets; fixed once it is created. `user_ranks` names users who get another
    rank."""

    rank: int = 8
    """Of the LoRA on attention."""
    expert_rank: int = 1
    """Of the LoRA on every expert."""
    alpha: float = 32.0
    """Scale of the update is alpha / rank (LoRA Without Regret: early curves independent of
    rank)."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    b_learning_rate_ratio: float = 1.0
    """Learning rate of B over that of A."""


@dataclass(frozen=True)
class TrainSettings:
    backend: str = "grouped"
    """`grouped` (torch's batched products), `reference` (plain loops, the truth for tests) or
    `triton` (for CUDA devices, on which shards can't compute yet)."""
    numerics: str = "invariant"
    """`invariant`: a user's bits don't depend on who shares the batch, so that revisions can be
    replayed; `fast`: rows are not filled up to what that needs."""
    max_rows_per_pass: int = 4096
    """Rows that one forward and backward pass holds at most; a wave runs in as many passes as it
    needs."""
    max_sequence_length: int = 1024
    """Prompt and completion, in tokens."""
    over_long: str = "cut"
    """What becomes of a logged event that is longer: `cut` its completion, or `reject` it."""
    kl_coefficient: float = 0.05
    """Weight of the term that keeps a user's model near the base; 0 switches it off."""
    kl_in: str = "loss"
    """`loss`: the k2 term per token; `reward`: subtracted from a rollout's reward before groups
    compare."""
    importance_cap: float = 2.0
    """C of truncated importance sampling, w = min(pi_trainer / pi_rollout, C)."""
    baseline_decay: float = 0.9
    """Of a user's running mean reward, the baseline for logged trajectories."""
    max_staleness: int = 8
    """A logged trajectory of a revision that is more than this many behind the tip is settled as
    stale."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, each adapter by its own step and gradient norm."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled from the gradient."""
    max_grad_norm: float = 1.0
    """Of a whole adapter; longer gradients are scaled down to it."""
    offload: bool = False
    """Moments stay in host memory and are updated there by DeepSpeed's CPUAdam (`pip install
    populace[deepspeed]`)."""


@dataclass(frozen=True)
class RolloutSettings:
    samples_per_task: int = 6
    """Answers that are tried for each task; they are compared with one another."""
    max_new_tokens: int = 24
    """An answer's length at most."""
    temperature: float = 1.0
    """At which answers are sampled."""


@dataclass(frozen=True)
class TenantSettings:
    """A group of users. Users whose id begins with `NAME/` belong to the tenant of that name."""

    weight: float = 1.0
    """Its share of the waves, against the other tenants that have something waiting."""


@dataclass(frozen=True)
class SchedulerSettings:
    """Who is updated next, and what one wave may take; try values out with `populace simulate`."""

    max_adapters_per_wave: int = 16
    """Users that one fused step updates at most."""
    events_per_update: int = 2
    """Events of one user that one update learns from at most."""
    slots: int = 64
    """Adapters that a shard holds in device memory at most."""
    max_tokens_per_wave: int = 1 << 20
    """Prompt and completion tokens of one wave, estimated at three bytes of text each."""
    max_rank_per_wave: int | None = None
    """Sum of the ranks of a wave's adapters."""
    max_load_mb_per_wave: float | None = None
    """Adapters that one wave may page in, in megabytes."""
    min_events: int = 1
    """Fewer events than this wait for more, until they have waited for `patience_s`."""
    patience_s: float = 60.0
    """See `scheduler.min_events`."""
    cool_down_s: float = 0.0
    """Least time between two updates of a user."""
    residency_bonus_s: float = 2.0
    """A user whose adapter is hot counts as having waited this much longer."""
    evidence_bonus_s: float = 2.0
    """So does a user with twice the events of an update, and others in proportion."""
    weight: float = 1.0
    """Of the users that belong to no tenant."""
    tenants: dict[str, TenantSettings] = field(default_factory=dict)


@dataclass(frozen=True)
class ResidencySettings:
    """Where adapters are kept besides the slots: in a shard's memory (warm), on its local disk
    (near), and in the store (cold)."""

    warm_mb: float = 512.0
    """Memory of a shard for adapters that are not in a slot."""
    near_mb: float = 0.0
    """0: nothing is kept on the local disk."""
    near_folder: str = "/tmp/populace-near"
    """Sealed blobs by digest; safe to delete at any time."""


@dataclass(frozen=True)
class StreamSettings:
    """How experience gets in."""

    linger_ms: float = 0.0
    """How long a segment waits for more events before it is written. Events that come while the one
    before is being written share the next one anyway."""
    max_waiting_mb: float = 64.0
    """More than this waiting to be written is refused with `Overloaded`, which says when to try
    again."""
    cache_mb: float = 64.0
    """Segments that a controller keeps in memory."""
    compact_every_segments: int = 2000
    """How far a partition's experience log grows before what is consumed is cut off."""
    gateway: bool = False
    """Whether a run starts the gateway actor, which gathers many small producers inside the Ray
    cluster."""


@dataclass(frozen=True)
class EvaluationSettings:
    every_waves: int = 4
    """How often tips that changed are judged."""
    heldout_share: float = 0.2
    """Share of each user's tasks that is never trained on; fixed when the population is created."""
    samples_per_task: int = 1
    """Answers per held-out task, of the tip and of serving."""
    max_tasks: int = 8
    """Held-out tasks of a user that one evaluation uses at most."""
    min_tasks: int = 2
    """Held-out tasks without which there is no comparison."""
    too_few: str = "promote"
    """A user with fewer held-out tasks than `min_tasks`: `promote` provisionally or `keep`."""
    confidence: float = 0.9
    """Of the two-sided interval of the tip's reward minus serving's."""
    tolerance: float = 0.0
    """The tip is rejected when the whole interval lies below minus this."""


@dataclass(frozen=True)
class RewardSettings:
    timeout_s: float = 20.0
    """What a reward may take for all answers to one task."""
    functions: dict[str, str] = field(default_factory=dict)
    """Reward name -> `module:function`."""


@dataclass(frozen=True)
class RetentionSettings:
    """Which old revisions stay in the store."""

    last: int = 8
    """Every adapter's newest revisions; tip, serving, promoted and pinned ones stay anyway."""
    every_waves: int = 50
    """How often packs are rewritten without what may go."""


@dataclass(frozen=True)
class RunSettings:
    max_waves: int | None = None
    """Stop after this many waves of this run; without it, run until `until_drained` or Ctrl-C."""
    until_drained: bool = True
    """End when no user has experience left. False: wait for more."""
    takeover_s: float = 5.0
    """A partition's owner that shows no life for this long is taken to be dead."""
    checkpoint_every_records: int = 1000
    """Opening a population replays at most about this many records per partition."""
    threads: int = 0
    """Threads of a shard's tensor operations; 0 means all processors."""
    pipelined: bool = True
    """Plan, page and roll out the next waves while this one trains, and publish behind it. False:
    one after another."""
    controller: str = "main"
    """Controllers of different names share a population's partitions, and take over from those that
    die."""
    store_retry_s: float = 5.0
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
    port: int = 8270
    """Port that it listens on."""
    hosts: tuple[str, ...] = ()
    """Names besides `host` and localhost that browsers may call it by."""


@dataclass(frozen=True)
class Settings:
    """One population and one run of it."""

    name: str = "population"
    """Of the population: the folder in the store that everything of it lies in."""
    store: str = "build/store"
    """Where the population lives: `file://PATH`, a plain path,
    `s3://BUCKET[/PREFIX][?endpoint=URL]` or `memory://`."""
    seed: int = 0
    """What initialisations, sampling noise and the choice of held-out tasks derive from; fixed when
    the population is created."""
    partitions: int = 4
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


_CHOICES = {
    "base.dtype": ("auto", "bfloat16", "float32"),
    "shard.dense": ("replicated", "zero3"),
    "train.backend": ("grouped", "triton", "reference"),
    "train.numerics": ("invariant", "fast"),
    "train.over_long": ("cut", "reject"),
    "train.kl_in": ("loss", "reward"),
    "evaluation.too_few": ("promote", "keep"),
}
_POSITIVE = [
    "partitions",
    "shard.count",
    "shard.cpus",
    "shard.timeout_s",
    "shard.place_timeout_s",
    "adapter.rank",
    "adapter.expert_rank",
    "adapter.alpha",
    "adapter.learning_rate",
    "train.max_rows_per_pass",
    "train.max_sequence_length",
    "optimizer.max_grad_norm",
    "train.importance_cap",
    "optimizer.epsilon",
    "rollout.samples_per_task",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "scheduler.max_adapters_per_wave",
    "scheduler.events_per_update",
    "scheduler.slots",
    "scheduler.max_tokens_per_wave",
    "scheduler.min_events",
    "scheduler.weight",
    "stream.max_waiting_mb",
    "stream.cache_mb",
    "stream.compact_every_segments",
    "run.store_retry_s",
    "evaluation.every_waves",
    "evaluation.samples_per_task",
    "evaluation.max_tasks",
    "rewards.timeout_s",
    "retention.last",
    "retention.every_waves",
    "run.takeover_s",
    "run.checkpoint_every_records",
    "page.port",
]
_NOT_NEGATIVE = [
    "train.kl_coefficient",
    "optimizer.weight_decay",
    "run.threads",
    "evaluation.tolerance",
    "scheduler.patience_s",
    "scheduler.cool_down_s",
    "scheduler.residency_bonus_s",
    "scheduler.evidence_bonus_s",
    "residency.warm_mb",
    "residency.near_mb",
    "stream.linger_ms",
    "shard.max_restarts",
]
_FRACTIONS = [
    "optimizer.beta1",
    "optimizer.beta2",
    "train.baseline_decay",
    "evaluation.heldout_share",
    "evaluation.confidence",
]


def _scheduler_problems(settings: Settings) -> list[str]:
    """Budgets must have room for any one user, or somebody would wait for ever."""
    scheduler, found = settings.scheduler, []
    most = settings.train.max_sequence_length * scheduler.events_per_update
    most += (
        settings.rollout.samples_per_task
        * settings.rollout.max_new_tokens
        * scheduler.events_per_update
    )
    if scheduler.max_tokens_per_wave < most:
        found.append(
            f"scheduler.max_tokens_per_wave is {scheduler.max_tokens_per_wave}; one user's update "
            f"can have {most} "
            "tokens (events_per_update times the longest sequence and its samples), use at least "
            "that"
        )
    rank = max([settings.adapter.rank, *settings.user_ranks.values()])
    if scheduler.max_rank_per_wave is not None and scheduler.max_rank_per_wave < rank:
        found.append(
            f"scheduler.max_rank_per_wave is {scheduler.max_rank_per_wave}; an adapter has rank "
            f"{rank}, use that"
        )
    if scheduler.max_load_mb_per_wave is not None and not scheduler.max_load_mb_per_wave > 0:
        found.append(
            f"scheduler.max_load_mb_per_wave is {scheduler.max_load_mb_per_wave}; use a number "
            "above zero"
        )
    for name, tenant in scheduler.tenants.items():
        if not tenant.weight > 0:
            found.append(
                f"scheduler.tenants[{name!r}].weight is {tenant.weight}; use a number above zero"
            )
        if not name or "/" in name:
            found.append(
                f"scheduler.tenants has {name!r}; a tenant's name has no slash, its users' ids "
                "begin with NAME/"
            )
    if not settings.run.controller or not all(
        char.isalnum() or char in "-_." for char in settings.run.controller
    ):
        found.append(
            f"run.controller is {settings.run.controller!r}; use letters, digits, '-', '_' and '.'"
        )
    return found


def setting(settings: Settings, path: str) -> object:
    """The value at a dotted path such as `optimizer.beta1`."""
    value: object = settings
    for part in path.split("."):
        value = getattr(value, part)
    return value


def problems(settings: Settings) -> list[str]:
    """What is wrong with `settings`, one sentence each: field, value, way out."""
    found = []
    for path, allowed in _CHOICES.items():
        if setting(settings, path) not in allowed:
            found.append(f"{path} is {setting(settings, path)!r}; use one of {', '.join(allowed)}")
    for path in _POSITIVE:
        if not setting(settings, path) > 0:  # type: ignore[operator]
            found.append(f"{path} is {setting(settings, path)}; use a number above zero")
    for path in _FRACTIONS:
        if not 0 <= setting(settings, path) < 1:  # type: ignore[operator]
            found.append(f"{path} is {setting(settings, path)}; use a number in [0, 1)")
    for path in _NOT_NEGATIVE:
        if not setting(settings, path) >= 0:  # type: ignore[operator]
            found.append(f"{path} is {setting(settings, path)}; use zero or more")
    if settings.shard.dense == "zero3" and settings.shard.count == 1:
        found.append(
            "shard.dense is 'zero3' and shard.count is 1; there is nothing to cut, use replicated"
        )
    if settings.scheduler.slots < 2 * settings.scheduler.max_adapters_per_wave:
        found.append(
            f"scheduler.slots is {settings.scheduler.slots}; use at least twice "
            "max_adapters_per_wave "
            f"({settings.scheduler.max_adapters_per_wave}), so that a tip and its serving revision "
            "fit together"
        )
    if settings.page.port > 65535:
        found.append(f"page.port is {settings.page.port}; use a port up to 65535")
    found += _scheduler_problems(settings)
    for user, rank in settings.user_ranks.items():
        if rank < 1:
            found.append(f"user_ranks[{user!r}] is {rank}; use a rank of at least 1")
    for name, target in settings.rewards.functions.items():
        if target.count(":") != 1:
            found.append(f"rewards.functions[{name!r}] is {target!r}; write it as module:function")
    return found
