"""What the shards of a group tell each other in the middle of a pass: rows to the owners of their
experts and back, and a few numbers. All shards of a group make the same calls in the same order.

Suffixes: N rows sent, M rows received, S shards, D width.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from populace.storage.errors import PopulaceError
from populace.workers.device import Device


class ExchangeBroken(PopulaceError):
    """Another shard of the group is gone, or did not answer in time: the group can only start again
    as one."""


class Exchange(Protocol):
    def counts(self, send_J: list[int]) -> list[int]:
        """How many rows each shard is about to send here."""

    def all_to_all(self, x_QD: Tensor, send_J: list[int], receive_J: list[int]) -> Tensor:
        """[Z, D]: the first `send_J[0]` rows go to shard 0 and so on; received rows lie in the
        order of the senders."""

    def any(self, flag: bool) -> bool:
        """Whether any shard says yes."""

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all shards, on all shards; exact where only one of them has anything but
        zero."""


class _Alone:
    """A group of one."""

    def counts(self, send_J: list[int]) -> list[int]:
        return send_J

    def all_to_all(self, x_QD: Tensor, send_J: list[int], receive_J: list[int]) -> Tensor:
        return x_QD

    def any(self, flag: bool) -> bool:
        return flag

    def all_reduce(self, values: Tensor) -> Tensor:
        return values


ALONE: Exchange = _Alone()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the shards of one group meet. Every start of a group has its own."""

    address: str
    """`host:port` of rank 0."""
    timeout_s: float

    @staticmethod
    def at(host: str, timeout_s: float) -> Rendezvous:
        """A port of this machine that is free now; `host`: its address as other nodes reach it."""
        with socket.socket() as probe:
            probe.bind((host, 0))
            return Rendezvous(address=f"{host}:{probe.getsockname()[1]}", timeout_s=timeout_s)


BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Kind of device -> torch's process groups, each for the tensors that lie on its kind of device.

Between GPUs NCCL moves rows, in the order of the stream that computes and without the host; it adds
nothing up, so bits don't depend on it. What the host has to know, counts and flags, are tensors of
the host and go by gloo."""


class DeepSpeedExchange:
    """`deepspeed.comm` between processes, by `BACKENDS`."""

    def __init__(self, rank: int, num_shards: int, rendezvous: Rendezvous, device: Device) -> None:
        self._comm = _deepspeed_comm()
        os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"] = (
            str(rank),
            str(num_shards),
            "0",
        )
        with _broken_if_it_fails():
            self._comm.init_distributed(
                dist_backend=BACKENDS[device.kind],
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timedelta(seconds=rendezvous.timeout_s),
                init_method=f"tcp://{rendezvous.address}",
                rank=rank,
                world_size=num_shards,
            )

    def counts(self, send_J: list[int]) -> list[int]:
        sent = torch.tensor(send_J)
        received = torch.empty_like(sent)
        with _broken_if_it_fails():
            self._comm.all_to_all_single(received, sent)
        return [int(count) for count in received.tolist()]

    def all_to_all(self, x_QD: Tensor, send_J: list[int], receive_J: list[int]) -> Tensor:
        received_ZD = x_QD.new_empty(sum(receive_J), *x_QD.shape[1:])
        with _broken_if_it_fails():
            self._comm.all_to_all_single(
                received_ZD,
                x_QD.contiguous(),
                output_split_sizes=receive_J,
                input_split_sizes=send_J,
            )
        return received_ZD

    def any(self, flag: bool) -> bool:
        return bool(self.all_reduce(torch.tensor([float(flag)])))

    def all_reduce(self, values: Tensor) -> Tensor:
        total = values.clone()
        with _broken_if_it_fails():
            self._comm.all_reduce(total)
        return total


def partition_dense(module: nn.Module) -> None:
    """Leave of every parameter of `module` this shard's part only (DeepSpeed ZeRO-3,
    https://arxiv.org/abs/1910.02054): a submodule's are gathered for its turn, forward and
    backward. All shards must be there, each with the whole."""
    _deepspeed_comm()
    import deepspeed

    # Parameters are gathered when they are needed, one submodule at a time: none is small enough to
    # stay.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    with _broken_if_it_fails():
        deepspeed.initialize(model=module, config=config)


def _deepspeed_comm() -> Any:
    try:
        import deepspeed.comm
    except ImportError as error:
        raise PopulaceError(
            f"shard.count above 1 needs deepspeed, which can't be loaded ({error}); install it "
            "with "
            "`pip install deepspeed --no-build-isolation`, or set shard.count=1"
        ) from error
    # Its all-reduce through shared memory, which we don't use, takes a compiler and minutes to
    # build, and lets the others spin for ever when one process dies.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed.comm


@contextmanager
def _broken_if_it_fails() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch's process groups raise, whatever happened
        raise ExchangeBroken(f"another shard of the group is gone or late ({error})") from error
