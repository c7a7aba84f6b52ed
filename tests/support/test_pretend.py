"""The pretended device catches what it is there to catch: one planted mistake each."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from populace.workers.actors.engine import ShardEngine
from populace.workers.device import Cuda
from tests.support.pretend import Pretended, Report
from tests.support.products import CASES, SlotsOf, make_case

Tensors = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def device() -> Pretended:
    return Pretended()


def there(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cuda")


def test_nothing_is_said_of_what_is_right(device: Pretended) -> None:
    with device.here() as report:
        cuda = Cuda(torch.float32)
        (x,) = cuda.upload(torch.arange(6.0))
        y = (x * 2).view(2, 3) @ there(3, 2)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            z = y + 1
            z.record_stream(torch.cuda.current_stream())
        torch.cuda.current_stream().wait_stream(side)
        del y
        download = cuda.download(z)
    assert not report.mixes and not report.waits and not report.hazards
    with device.here() as report:
        assert download.arrays()[0].tolist() == [[7.0, 7.0], [25.0, 25.0]]
    assert list(report.waits) and not report.hazards


def add_a_host_tensor(device: Pretended) -> None:
    there(3) + torch.ones(3)


def index_with_a_host_tensor(device: Pretended) -> None:
    there(3)[torch.tensor([1])]


def give_a_kernel_a_host_tensor(device: Pretended) -> None:
    case = make_case(**CASES["one row"], dtype=torch.float32)
    case.run("triton")


def numpy_of_a_device_tensor(device: Pretended) -> None:
    there(3).numpy()


@pytest.mark.parametrize(
    "mistake",
    [
        add_a_host_tensor,
        index_with_a_host_tensor,
        give_a_kernel_a_host_tensor,
        numpy_of_a_device_tensor,
    ],
)
def test_host_and_device_in_one_operation_are_a_mix(
    device: Pretended, mistake: Callable[[Pretended], None]
) -> None:
    with device.here() as report:
        mistake(device)
    assert report.mixes
    with pytest.raises(AssertionError, match="mixes"):
        report.assert_clean()


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.ones(3).copy_(x),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.nn.functional.grouped_mm(
            there(4, 4), there(1, 4, 4), offs=torch.full((1,), 4, dtype=torch.int32, device="cuda")
        ),
    ],
)  # fmt: skip
def test_asking_the_device_is_a_wait(
    device: Pretended, ask: Callable[[torch.Tensor], object]
) -> None:
    with device.here() as report:
        ask(there(3))
    assert report.waits and not report.mixes


def hazards_of(device: Pretended, run: Callable[[], object]) -> Report:
    with device.here() as report:
        run()
        gc.collect()
    return report


def test_reading_what_another_stream_writes_needs_an_event(device: Pretended) -> None:
    def without(event: bool) -> None:
        x = there(4)
        side = torch.cuda.Stream()
        if event:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            (x + 1).record_stream(torch.cuda.current_stream())
        torch.cuda.current_stream().wait_stream(side)

    assert hazards_of(device, lambda: without(False)).hazards
    assert not hazards_of(device, lambda: without(True)).hazards


def test_memory_that_another_stream_reads_is_freed_too_early(device: Pretended) -> None:
    def read_beside(keep: bool) -> None:
        x = there(4)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        host = torch.empty(4, pin_memory=True)
        with torch.cuda.stream(side):
            host.copy_(x, non_blocking=True)
            if keep:
                x.record_stream(side)
        del x
        there(1)

    assert any("freed" in what for what in hazards_of(device, lambda: read_beside(False)).hazards)
    assert not hazards_of(device, lambda: read_beside(True)).hazards


def test_a_copy_that_is_not_to_block_needs_pinned_memory(device: Pretended) -> None:
    def copy(pinned: bool) -> None:
        host = torch.ones(4, pin_memory=True) if pinned else torch.ones(4)
        there(4).copy_(host, non_blocking=True)

    assert hazards_of(device, lambda: copy(False)).hazards
    assert not hazards_of(device, lambda: copy(True)).hazards


def test_pinned_memory_is_not_the_hosts_while_a_copy_is_on_its_way(device: Pretended) -> None:
    def overwrite() -> None:
        host = torch.ones(4, pin_memory=True)
        there(4).copy_(host, non_blocking=True)
        host.zero_()

    def read(wait: bool) -> None:
        host = torch.empty(4, pin_memory=True)
        host.copy_(there(4), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream())
        if wait:
            arrived.synchronize()
        host.numpy()

    assert any("writes" in what for what in hazards_of(device, overwrite).hazards)
    assert any("reads" in what for what in hazards_of(device, lambda: read(False)).hazards)
    assert not hazards_of(device, lambda: read(True)).hazards


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda x, y: torch.add(x, 1), "allocates"),
        (lambda x, y: x.copy_(torch.ones(4).pin_memory(), non_blocking=True), "host"),
        (lambda x, y: x.sum().item(), "waits"),
    ],
)
def test_a_capture_has_no_allocation_no_value_of_the_host_and_no_wait(
    device: Pretended, step: Callable[..., object], said: str
) -> None:
    with device.here() as report:
        x, y = there(4), there(4)
        with device.capture("step"):
            torch.add(x, y, out=y)
        assert not report.captured
        with device.capture("other"):
            step(x, y)
    assert any(said in what for what in report.captured)


def test_a_capture_is_repeated_with_the_same_addresses(device: Pretended) -> None:
    with device.here() as report:
        x, y, z = there(4), there(4), there(4)
        for _ in range(2):
            with device.capture("step"):
                torch.add(x, y, out=y)
        assert not report.captured
        with device.capture("step"):
            torch.add(x, z, out=z)
    assert any("addresses" in what for what in report.captured)


def test_a_table_may_not_lead_into_freed_memory(device: Pretended) -> None:
    case = make_case(**CASES["one row"], dtype=torch.float32)

    def run(free: bool) -> None:
        own = case.to("cuda")
        slots = SlotsOf(own.modules)
        x, y, plan = own.x, own.dy.clone(), own.routes()
        if free:
            slots.flats.clear()
        from populace.kernels import triton_lora

        triton_lora.add_deltas(y, x, slots.pointers, plan)

    assert not hazards_of(device, lambda: run(False)).hazards
    assert any("slot's address" in what for what in hazards_of(device, lambda: run(True)).hazards)


def test_sums_in_any_order_are_noticed(device: Pretended) -> None:
    def add(*rows: int) -> None:
        index = torch.tensor(rows).pin_memory()
        there(4, 2).index_add_(0, index.to("cuda", non_blocking=True), there(len(rows), 2))

    assert any("any order" in what for what in hazards_of(device, lambda: add(1, 1)).hazards)
    assert not hazards_of(device, lambda: add(1, 3)).hazards


class _Peek(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        assert grads[0].is_cuda and grads[0].device.type == "cuda"
        return grads[0] * torch.ones(3)


def test_backward_is_seen_too(device: Pretended) -> None:
    with device.here() as report:
        x = there(3).requires_grad_()
        _Peek.apply(x).sum().backward()
    assert any("backward" in place for place in report.mixes)


def test_code_for_cpus_is_noticed(
    device: Pretended, make_engine: Callable[..., ShardEngine]
) -> None:
    with device.here() as report, pytest.raises(AssertionError, match="ran on the device"):
        make_engine(device="cpu").describe()
    assert report.cpu_code
