"""The grouped LoRA kernels on a GPU. `make bench-kernels`; needs torch, Triton, NumPy and rich, no
more.

Shapes are those of one layer of Qwen3-30B-A3B (hidden 2048, queries 4096, 128 experts of 768,
top-8), bf16 rows over fp32 adapters, 4,096 rows unless a figure says otherwise. What a ratio
compares is timed in turn; its spread is over repetitions.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from populace.kernels.lora import FrozenProduct, LoraWeights, lora_product
from populace.kernels.route import RoutePlan, plan_routes
from tests.benchmarks.figures import Figure, figure, publish
from tests.support.products import SlotsOf

HIDDEN, QUERIES, INNER, EXPERTS, TOP_K = 2048, 4096, 768, 128, 8
ROWS = 4096
REPETITIONS, PASSES = 7, 10
DEVICE = "cuda"


@dataclass(frozen=True)
class Product:
    """One product of a layer with everything that it needs, forward and backward."""

    base: FrozenProduct
    slots: SlotsOf
    plan: RoutePlan
    x: Tensor
    dy: Tensor

    def run(self) -> None:
        self._run(self.plan)

    def run_base(self) -> None:
        self._run(replace(self.plan, is_empty=True))

    def _run(self, plan: RoutePlan) -> None:
        x = self.x.detach().requires_grad_()
        lora_product(x, self.base, self.slots.pointers, plan, "triton").backward(self.dy)

    def least_bytes(self) -> int:
        """Of deltas and gradients alone: each input read once, each output written once. Forward
        reads x and adds into y; backward reads dy and x and adds into dx; adapters (fp32) are read
        twice and their gradients written."""
        rows = 4 * self.x.numel() + 3 * self.dy.numel()
        slot_G = self.plan.whole_G4[self.plan.whole_G4[:, 1] > 0, 2].long()
        outer = self.dy.shape[1] // len(self.slots.pointers)
        touched = sum(
            int(own.rank_S[slot_G].sum()) * (own.inner + outer) for own in self.slots.pointers
        )
        return 2 * rows + 4 * 3 * touched


def weights(
    ranks: Sequence[int], slots: int, num_experts: int, inner: int, out: int
) -> list[LoraWeights]:
    lead = (slots, num_experts) if num_experts else (slots,)
    made = []
    for rank in ranks:
        a, b = (
            torch.randn(*lead, *shape, device=DEVICE) / 32 for shape in ((rank, inner), (out, rank))
        )
        scale_S = torch.rand(slots, device=DEVICE) + 0.5
        made.append(
            LoraWeights(
                a=a, b=b, grad_a=torch.empty_like(a), grad_b=torch.empty_like(b), scale_S=scale_S
            )
        )
    return made


def dense(users: int, ranks: Sequence[int] = (16,), rows: int = ROWS) -> Product:
    """Queries of `users` with as many rows each; as many users of each rank, one rank after
    another."""
    user_T = torch.arange(rows, device=DEVICE) * users // rows
    slot_T = (user_T * len(ranks)) // users * users + user_T
    base = FrozenProduct(w=random(QUERIES, HIDDEN) / 45)
    plan = plan_routes(slot_T, None, 1, len(ranks) * users, is_empty=False)
    slots = SlotsOf([weights(ranks, users, 0, HIDDEN, QUERIES)])
    return Product(base, slots, plan, random(rows, HIDDEN), random(rows, QUERIES))


def experts(users: int, rank: int = 4, rows: int = ROWS) -> Product:
    """Gate and up of all experts for rows routed at random, sorted by (expert, user)."""
    user_T = torch.arange(rows, device=DEVICE) * users // rows
    expert_TK = torch.rand(rows, EXPERTS, device=DEVICE).topk(TOP_K).indices
    plan = plan_routes(user_T, expert_TK, EXPERTS, users, is_empty=False)
    base = FrozenProduct(w=random(EXPERTS, 2 * INNER, HIDDEN) / 45, ends_E=plan.ends_E)
    slots = SlotsOf([weights((rank,), users, EXPERTS, HIDDEN, INNER) for _ in range(2)])
    return Product(base, slots, plan, random(rows * TOP_K, HIDDEN), random(rows * TOP_K, 2 * INNER))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(torch.bfloat16)


def milliseconds(run: Callable[[], object]) -> float:
    """Of one pass, many in a row: what the device or the host takes, whichever takes longer."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(PASSES):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / PASSES


def in_turn(runs: Sequence[Callable[[], object]]) -> list[list[float]]:
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(REPETITIONS):
        for own, run in zip(times, runs, strict=True):
            own.append(milliseconds(run))
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(over, under, strict=True)]


def copy_bytes_per_second() -> float:
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    (times,) = in_turn([lambda: target.copy_(source)])
    return 2 * source.numel() / (statistics.median(times) / 1000)


def device_milliseconds(run: Callable[[], None]) -> float:
    """Of one pass: what the LoRA kernels themselves take on the device. Slows down every launch
    after it."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(PASSES):
            run()
        torch.cuda.synchronize()
    kernels = ("reduce_kernel", "spread_kernel", "outer_kernel")
    return (
        sum(e.self_device_time_total for e in trace.key_averages() if e.key in kernels)
        / PASSES
        / 1000
    )


def planning() -> list[Figure]:
    """A layer's routing plan, made where the routing is."""
    figures = []
    for users, rows in ((64, 64 * 64), (256, 256 * 16), (64, 64), (256, 256)):
        user_T = torch.arange(rows, device=DEVICE) * users // rows
        expert_TK = torch.rand(rows, EXPERTS, device=DEVICE).topk(TOP_K).indices

        def plan(slot_T: Tensor = user_T, ids_TK: Tensor = expert_TK, users: int = users) -> None:
            plan_routes(slot_T, ids_TK, EXPERTS, users, is_empty=False)

        (times,) = in_turn([plan])
        figures.append(figure(f"routing plan, {users} users, {rows} rows x 8", times, "ms"))
    return figures


def measure() -> list[Figure]:
    bandwidth = copy_bytes_per_second()
    figures = [figure("copy", [bandwidth / 1e12], "TB/s")]
    products = {
        "queries, 64 users x 64 rows, rank 16": dense(64),
        "queries, 256 users x 16 rows, rank 16": dense(256),
        "queries, 64 users x 64 rows, ranks 4 to 64": dense(64, (4, 8, 16, 32, 64)),
        "gate and up, 64 users x 64 rows x 8 of 128 experts, rank 4": experts(64),
        "gate and up, 8 users x 512 rows x 8 of 128 experts, rank 16": experts(8, 16),
        "queries, 256 users x 1 row, rank 16": dense(256, rows=256),
    }
    for name, product in products.items():
        base, triton = in_turn([product.run_base, product.run])
        figures += [
            figure(f"{name}: base alone", base, "ms"),
            figure(f"{name}: with Triton", triton, "ms"),
            figure(f"{name}: with Triton over base", ratio(triton, base), "x"),
        ]
    lone, together = dense(1), dense(64)
    one, many = in_turn([lone.run, together.run])
    figures.append(figure("queries, 4,096 rows of 64 adapters over one", ratio(many, one), "x"))
    single = dense(1, rows=ROWS // 64)
    slow = in_turn([lambda: [single.run() for _ in range(64)], together.run])
    figures.append(
        figure("queries, 64 adapters one after another over together", ratio(*slow), "x")
    )
    figures += planning()
    for name, product in products.items():
        floor = product.least_bytes() / bandwidth * 1000
        times = [device_milliseconds(product.run) for _ in range(3)]
        figures += [
            figure(f"{name}: Triton's kernels on the device", times, "ms"),
            figure(f"{name}: the same over its bytes' time", [time / floor for time in times], "x"),
        ]
    return figures


def main() -> int:
    if not torch.cuda.is_available():
        print("needs a CUDA GPU")
        return 2
    torch.manual_seed(0)
    figures = measure()
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    publish(title, figures, Path("build/bench/kernels.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
