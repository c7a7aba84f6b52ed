"""A pretended CUDA device on a machine without one: real numbers on the CPU, and every storage
tagged as the device's, pinned or pageable.

The CUDA implementations run, kernels in Triton's interpreter. What a device would refuse, wait for
or now and then get wrong is written down with its place: host and device mixed in one operation,
the host made to wait, memory touched too early or freed too early, a copy that is not to block from
memory that isn't pinned, and inside a capture what a CUDA graph can't repeat.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.hazards import HOST, Event, Hazards, Memory, Stream, merge

WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "unique",
    "_unique2", "unique_dim", "repeat_interleave", "allclose", "_assert_async",
}  # fmt: skip
"""Operations that a CUDA device makes the host wait for."""
_ADDING = ("index_add_", "index_add", "scatter_add_", "scatter_add")
CPU_ONLY = (
    "populace.kernels.grouped.add_deltas",
    "populace.kernels.reference.add_deltas",
    "populace.workers.adapters.arenas.Arena.__init__",
    "populace.workers.base.forward.plan_segments",
    "populace.workers.base.moe.order_by_expert",
)
"""Implementations for CPUs."""


@dataclass
class Report:
    """What went wrong, by kind and place."""

    mixes: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    hazards: Counter[str] = field(default_factory=Counter)
    captured: Counter[str] = field(default_factory=Counter)
    cpu_code: Counter[str] = field(default_factory=Counter)
    num_operations: int = 0
    num_kernels: int = 0

    def assert_clean(self, waits: dict[str, str] | None = None) -> None:
        """Nothing went wrong, and nobody waited elsewhere than in `waits`: part of a place ->
        reason."""
        for name in ("mixes", "hazards", "captured", "cpu_code"):
            assert not getattr(self, name), (name, getattr(self, name))
        allowed = tuple(waits or ())
        others = {
            place: n for place, n in self.waits.items() if not any(a in place for a in allowed)
        }
        assert not others, others
        assert self.num_kernels and self.num_operations


class Pretended:
    """The device. Everything inside `here` computes on it."""

    def __init__(self, compute_capability: tuple[int, int] = (9, 0)) -> None:
        self.compute_capability = compute_capability
        self.report = Report()
        self.hazards = Hazards(lambda what: self.note("hazards", what))
        self.host, self.default = Stream(HOST), Stream("default")
        self.current = self.default
        self.is_off = False
        self.depth = 0
        """Of calls of torch's functions with tensors of the device: what they make is there too."""
        self._captures: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        self._capture: list[tuple[str, tuple[int, ...]]] | None = None
        for stream in (self.host, self.default):
            self.hazards.streams[stream.name] = stream

    @contextmanager
    def here(self) -> Iterator[Report]:
        """Fills and returns a new report."""
        self.report = Report()
        with ExitStack() as stack:
            for patch in (*self._cuda(), *self._cpu_only(), self._kernels()):
                stack.enter_context(patch)
            functions, run_backward = _Functions(self), torch.autograd._engine_run_backward

            def backward(*args: Any, **kwargs: Any) -> Any:
                # The mode is off inside of what it sees; backward runs code of ours.
                before, self.depth = self.depth, 0
                try:
                    with functions:
                        return run_backward(*args, **kwargs)
                finally:
                    self.depth = before

            stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
            stack.enter_context(functions)
            stack.enter_context(_Operations(self))
            yield self.report
            self.hazards.sweep()

    @contextmanager
    def capture(self, name: str) -> Iterator[None]:
        """As a CUDA graph records what is asked inside, and repeats it from the second time on."""
        before, self._capture = self._captures.get(name), []
        try:
            yield
            if before is not None and before != self._capture:
                self.note("captured", f"{name}: other operations or addresses than at first")
            self._captures.setdefault(name, self._capture)
        finally:
            self._capture = None

    # What the modes tell.

    def operation(self, name: str, tensors: list[Tensor], written: list[Tensor]) -> None:
        """One operation on tensors of the device, asked of the current stream."""
        self.report.num_operations += 1
        # What the host did, and knows to be over, comes before what it asks for now.
        merge(self.current.knows, self.host.now())
        found = [memory for tensor in tensors if (memory := self.hazards.of(tensor)) is not None]
        changed = [memory for tensor in written if (memory := self.hazards.of(tensor)) is not None]
        self.hazards.touch(self.current, [m for m in found if m not in changed], changed)
        if self._capture is not None:
            addresses = tuple(t.data_ptr() for t in tensors if self.is_here(t))
            self._capture.append((name, addresses))

    def is_here(self, tensor: Tensor) -> bool:
        memory = self.hazards.of(tensor)
        return memory is not None and memory.place == "device"

    def is_pinned(self, tensor: Tensor) -> bool:
        memory = self.hazards.of(tensor)
        return memory is not None and memory.place == "pinned"

    def born(self, tensor: Tensor, place: str = "device") -> Tensor:
        """A new storage."""
        memory = self.hazards.tag(tensor, place, self.current if place == "device" else self.host)
        if place == "device":
            self.current.ticks += 1
            memory.written[self.current.name] = self.current.ticks
            if self._capture is not None:
                self.note("captured", "allocates")
        return tensor

    def waits(self, what: str) -> None:
        """The host waits for everything that the current stream was asked."""
        self.note("waits", what)
        merge(self.host.knows, self.current.now())
        if self._capture is not None:
            self.note("captured", f"the host waits: {what}")

    def host_reads(self, tensor: Tensor) -> None:
        """Python looks into host memory."""
        if (memory := self.hazards.of(tensor)) is not None:
            self.hazards.touch(self.host, [memory], [])

    def host_writes(self, tensor: Tensor) -> None:
        if (memory := self.hazards.of(tensor)) is not None:
            self.hazards.touch(self.host, [], [memory])

    def mixes(self, what: str) -> None:
        self.note("mixes", what)

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        """Host to device or back, before it is done."""
        host = source if self.is_here(target) else target
        if self._capture is not None:
            self.note("captured", "a value comes from the host or goes there")
        if non_blocking and not self.is_pinned(host):
            self.note("hazards", "a copy that is not to block, and host memory that isn't pinned")
        if non_blocking and self.is_pinned(host):
            self.operation("copy_", [source], [target])
            return
        self.operation("copy_", [source], [target])
        self.waits("copy_")

    def note(self, kind: str, what: str) -> None:
        getattr(self.report, kind)[f"{_place()} {what}"] += 1

    # What is replaced.

    def _cuda(self) -> Iterator[Any]:
        Event.host, Event.on_wait = self.host, staticmethod(lambda what: self.note("waits", what))

        def new_stream(*_: Any) -> Stream:
            stream = Stream()
            self.hazards.streams[stream.name] = stream
            return stream

        @contextmanager
        def use(stream: Stream) -> Iterator[None]:
            before, self.current = self.current, stream
            try:
                yield
            finally:
                self.current = before

        major, minor = self.compute_capability
        card = SimpleNamespace(name="pretended", major=major, minor=minor)
        yield mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            get_device_capability=lambda *_: self.compute_capability,
            get_device_name=lambda *_: card.name,
            synchronize=lambda *_: self.waits("synchronize"),
            max_memory_allocated=lambda *_: 0,
            memory_allocated=lambda *_: 0,
            reset_peak_memory_stats=lambda *_: None,
            empty_cache=lambda: None,
            is_current_stream_capturing=lambda: False,
            Stream=new_stream,
            Event=Event,
            stream=use,
            current_stream=lambda *_: self.current,
            get_device_properties=lambda *_: card,
            mem_get_info=lambda *_: (8 << 30, 8 << 30),
        )
        # The one of the device draws what a CPU's does.
        yield mock.patch.object(torch, "Generator", _Generator)

        def record_stream(tensor: Tensor, stream: Stream) -> None:
            memory = self.hazards.of(tensor)
            assert memory is not None
            memory.kept_for.add(stream.name)

        yield mock.patch.object(Tensor, "record_stream", record_stream)
        yield mock.patch.object(torch.version, "cuda", "13.0")
        driver = mock.Mock(return_value=13000)
        yield mock.patch.object(torch._C, "_cuda_getDriverVersion", driver, create=True)

    def _cpu_only(self) -> Iterator[Any]:
        for name in CPU_ONLY:
            path, _, own = name.rpartition(".")

            def refuse(*_: Any, name: str = name, **__: Any) -> Any:
                self.report.cpu_code[name] += 1
                raise AssertionError(f"{name} ran on the device")

            yield mock.patch(f"{path}.{own}", refuse)

    def _kernels(self) -> Any:
        """Kernels run in the interpreter, unseen by the modes; what they are given is checked."""
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def call(executor: Any, *args: Any, **kwargs: Any) -> None:
            tensors = [value for value in args if isinstance(value, Tensor)]
            for tensor in tensors:
                if not self.is_here(tensor):
                    self.mixes(f"{executor.fn.__name__} is given a tensor of the host")
            self.operation(executor.fn.__name__, tensors, tensors)
            with self.off():
                named = dict(zip(executor.arg_names, args, strict=False))
                if "addresses_S" in named:
                    self._slots(executor.fn.__name__, named["addresses_S"], named["rank_S"])
                self.report.num_kernels += 1
                run(executor, *args, **kwargs)

        return mock.patch.object(GridExecutor, "__call__", call)

    def _slots(self, kernel: str, addresses_S: Tensor, rank_S: Tensor) -> None:
        """What a kernel finds behind a table of addresses."""
        found: list[Memory] = []
        for address, rank in zip(addresses_S.tolist(), rank_S.tolist(), strict=True):
            if not rank or not address:
                continue
            if (memory := self.hazards.at(address)) is None:
                self.note("hazards", f"{kernel}: a slot's address is of no memory of the device")
            else:
                found.append(memory)
        is_gradient = kernel == "outer_kernel"
        self.hazards.touch(self.current, [] if is_gradient else found, found if is_gradient else [])

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.is_off = self.is_off, True
        try:
            yield
        finally:
            self.is_off = before


class _Generator(torch.Generator):
    """Draws on the CPU for any device."""

    def __new__(cls, *_: object) -> _Generator:
        return super().__new__(cls)


class _Operations(TorchDispatchMode):
    """Sees every operation, backward included."""

    def __init__(self, device: Pretended) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        device, kwargs = self.device, kwargs or {}
        if device.is_off:
            return function(*args, **kwargs)
        inputs = [*_tensors(args), *_tensors(kwargs)]
        written = _written(function, args, kwargs)
        name = function.__name__.split(".")[0]
        here = [tensor for tensor in inputs if device.is_here(tensor)]
        # A number of the host may go along.
        there = [t for t in inputs if not device.is_here(t) and (t.ndim or not here)]
        if name == "copy_" and here and there:
            device.copy(args[0], args[1], bool((args[2:] or (kwargs.get("non_blocking"),))[0]))
            return function(*args, **kwargs)
        if here and there:
            device.mixes(name)
        for tensor in there:
            (device.host_writes if any(tensor is w for w in written) else device.host_reads)(tensor)
        if here and name in _ADDING and _adds_twice(name, *args[:3]):
            device.note("hazards", f"{name} adds to one place in any order")
        if here and (name in WAITS or _asks_the_host(name, args)):
            device.waits(name)
        out = function(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [t for t in _tensors(out) if t.untyped_storage()._cdata not in known]
        if here or (device.depth and not inputs):
            for tensor in new:
                device.born(tensor)
            if new or written or not any(True for _ in _tensors(out)):
                device.operation(name, here, [*written, *new])
        return out


class _Functions(TorchFunctionMode):
    """Sees what never becomes an operation: which device a tensor says it is on, moves, and Python
    looking into memory."""

    def __init__(self, device: Pretended) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        device, kwargs = self.device, dict(kwargs or {})
        if device.is_off:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if function == Tensor.device.__get__:
            return torch.device("cuda", 0) if device.is_here(args[0]) else torch.device("cpu")
        if function == Tensor.is_cuda.__get__:
            return device.is_here(args[0])
        if name in ("numpy", "__array__", "tolist"):
            if device.is_here(args[0]):
                (device.waits if name == "tolist" else device.mixes)(name)
            device.host_reads(args[0])
        if name == "pin_memory" and isinstance(args[0], Tensor):
            device.host_reads(args[0])
            return device.born(args[0].clone(), "pinned")
        if name in ("to", "cpu", "cuda"):
            return self._move(name, args, kwargs)
        is_pinned = kwargs.pop("pin_memory", False)
        is_cuda = kwargs.get("device") is not None and "cuda" in str(kwargs["device"])
        if name in ("tensor", "as_tensor", "asarray") and is_cuda:
            device.waits(f"{name} of values of the host")
        where = kwargs.get("device")
        if where is not None and torch.device(where).type == "cuda":
            kwargs["device"] = "cpu"
            with device.off():
                out = function(*args, **kwargs)
            device.report.num_operations += 1
            return device.born(out) if isinstance(out, Tensor) else out
        is_deeper = any(device.is_here(tensor) for tensor in _tensors((args, kwargs)))
        device.depth += is_deeper
        try:
            out = function(*args, **kwargs)
        finally:
            device.depth -= is_deeper
        return device.born(out, "pinned") if is_pinned else out

    def _move(self, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        device, tensor = self.device, args[0]
        where = {"cpu": "cpu", "cuda": "cuda"}.get(name)
        rest: list[Any] = []
        for value in args[1:]:
            if isinstance(value, bool):
                kwargs["non_blocking"] = value
            elif value is None:
                pass  # a dtype that stays
            elif isinstance(value, (str, torch.device)):
                where = torch.device(value).type
            elif isinstance(value, Tensor):
                where = "cuda" if device.is_here(value) else "cpu"
                rest.append(value.dtype)
            else:
                rest.append(value)
        if kwargs.get("device") is not None:
            where = torch.device(kwargs.pop("device")).type
        kwargs.pop("device", None)
        non_blocking = bool(kwargs.pop("non_blocking", False))
        is_here = device.is_here(tensor)
        if where is None or (where == "cuda") == is_here:
            moved: Tensor = Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
            return moved
        if not is_here:
            device.host_reads(tensor)
        with device.off():
            moved = Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
            if moved.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                moved = moved.clone()
        if where == "cuda":
            device.born(moved)
        device.copy(moved, tensor, non_blocking)
        return moved


def _written(function: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors that the operation's schema says it writes."""
    found: list[Tensor] = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found


def _asks_the_host(name: str, args: Any) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        # One value for all places of a mask needs no places.
        is_fill = name != "index" and isinstance(args[2], Tensor) and args[2].numel() == 1
        masks = any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
        return masks and not is_fill
    # Torch's grouped product has a kernel for bf16 on sm_90 and sm_100; else it asks for the ends.
    has_kernel = torch.cuda.get_device_properties().major in (9, 10)
    return name == "_grouped_mm" and not (has_kernel and args[0].dtype == torch.bfloat16)


def _adds_twice(name: str, target: Tensor, dim: int, index: Tensor) -> bool:
    """Whether one place is added to more than once."""
    if name.startswith("scatter"):
        places = torch.zeros_like(index)
        for axis, size in enumerate(target.shape):
            shape = [-1 if axis == other else 1 for other in range(index.ndim)]
            own = index if axis == dim % index.ndim else torch.arange(index.shape[axis]).view(shape)
            places = places * size + own
        index = places
    return index.unique().numel() < index.numel()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


_UNSEEN = ("support/pretend.py", "support/hazards.py", "workers/device.py")


def _place() -> str:
    """The innermost line of ours on the stack, but the device's own."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        is_ours = any(f"/{room}/" in path for room in ("workers", "kernels", "tests"))
        if is_ours and not path.endswith(_UNSEEN):
            return f"{'/'.join(path.split('/')[-2:])}:{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
