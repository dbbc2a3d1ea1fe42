"""An imaginary CUDA device, so that the placement of tensors is tested on machines without a GPU.

Inside `imaginary_device()` torch says that one GPU is there. A tensor that is sent to it, or made on it, still keeps its
values in main memory, so everything computes real results; what makes it a tensor of the device is a mark on its
storage, which its views, its `detach()`, its `Parameter` and whatever autograd keeps of it share. Three things give
the mark its meaning:

- `_Operations`, a TorchDispatchMode, sees every operation of torch, those of a backward pass as well. It refuses those
  that CUDA refuses, because their tensors (or their generator) are not on one device, and marks what they return.
- `_Calls`, a TorchFunctionMode, knows what the Python call behind an operation asked for. Below it, in C++, "the device
  of this tensor" and an explicit `device="cpu"` look the same, since both are the CPU there.
- attributes of `torch.Tensor` in which C++ would look at the real device (`device`, `to`, `numpy`, ...), functions of
  `torch.cuda`, `torch.load` and `torch.Generator` are replaced, and put back at the end.

An operation that mixes devices raises PlacementError, with CUDA's reason and the line of the repository.

What it cannot see: what C++ decides by the real device (which kernel, autocast, the check that a gradient is on the
device of its tensor); threads that only compute (operations are watched in the thread that entered; attributes in all);
streams, pinned memory and asynchronous copies; kernels that CUDA lacks, its rounding and its random numbers; a second
GPU, and processes started from inside.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "cuda"
DEVICE, CPU = torch.device(NAME, 0), torch.device("cpu")
HERE = str(Path(__file__).resolve())
ROOT = str(Path(HERE).parents[1]) + "/"
aten = torch.ops.aten

# Operations that copy between devices, and those that take indices from the CPU for a tensor of the device.
CROSSING = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_,
            aten._unsafe_index_put}  # fmt: skip
# Operations beside the pointwise ones that take their last tensor from the CPU if it has no dimensions.
LAST_MAY_BE_SCALAR = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_}
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.mv, aten.dot}
# Python calls that read data of any kind, and take `device` for what they return.
READING = {torch.tensor, torch.as_tensor, torch.asarray, torch.frombuffer}
SAME = "Expected all tensors to be on the same device"


class PlacementError(RuntimeError):
    """What a real device would refuse, with the line of the repository that did it."""

    def __init__(self, reason: str):
        super().__init__(f"{reason} ({_where()})")


def _where(form: str = "{file}:{line}") -> str:
    """The innermost line that is not of an installed package, of Python or of this file."""
    for frame, line in traceback.walk_stack(None):
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and path != HERE and "site-packages" not in path:
            return form.format(file=path.removeprefix(ROOT), line=line, function=frame.f_code.co_name)
    return "outside the repository"


def _of_kind(kind: type, value: Any) -> list[Any]:
    """What is of a kind in an argument or a result (torch's own pytree takes several times as long)."""
    if isinstance(value, kind):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [found for part in value for found in _of_kind(kind, part)]


def place_of(tensor: Tensor) -> torch.device:
    """The device a tensor seems to be on."""
    with torch._C.DisableTorchFunction():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap
            tensor = torch._C._functorch.get_unwrapped(tensor)
        real = _REAL["device"].__get__(tensor)
        return DEVICE if real == CPU and hasattr(tensor.untyped_storage(), "imaginary") else real


def _mark(tensor: Tensor, place: torch.device) -> Tensor:
    """Put a tensor with memory of its own on a device."""
    if place == DEVICE:
        with torch._C.DisableTorchFunction():
            tensor.untyped_storage().imaginary = True
    return tensor


def _named(device: Any) -> torch.device:
    """The device that an argument names; the only GPU where it has no number."""
    device = torch.device(NAME, device) if isinstance(device, int) else torch.device(device)
    if device.type != NAME:
        return device
    if (device.index or 0) != 0:
        raise PlacementError(f"CUDA error: invalid device ordinal {device.index}")
    return DEVICE


class _Calls(TorchFunctionMode):
    """Keeps, for `_Operations`, the Python calls that are under way with the device that each asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[tuple[torch.device | None, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = None if kwargs.get("device") is None else _named(kwargs["device"])
        if asked is not None and func in READING:
            del kwargs["device"]
            read = self.call(None, func, args, kwargs)
            return read.detach().to(asked).requires_grad_(read.requires_grad)
        if asked == DEVICE:
            kwargs["device"] = CPU
        return self.call(asked, func, args, kwargs)

    def call(self, asked: torch.device | None, func: Any, args: Any, kwargs: Any) -> Any:
        self.under_way.append((asked, (args, kwargs)))
        try:
            result = func(*args, **kwargs)
        finally:
            self.under_way.pop()
        if func is _REAL["new_tensor"]:
            return _mark(result, asked or place_of(args[0]))
        return result

    def asked(self) -> torch.device | None:
        """The device that the innermost call asked for by name."""
        return self.under_way[-1][0] if self.under_way else None

    def generator_place(self) -> torch.device:
        """That of the innermost call's generator; an operation gets it without its class."""
        generators = _of_kind(torch._C.Generator, self.under_way[-1:])
        return generators[0].device if generators else CPU

    def place(self) -> torch.device:
        """Where an operation without tensors puts its result: where the call asked for, or beside its tensors."""
        if not self.under_way:
            return CPU
        asked, arguments = self.under_way[-1]
        return asked or (DEVICE if any(place_of(t) == DEVICE for t in _of_kind(Tensor, arguments)) else CPU)


class _Operations(TorchDispatchMode):
    """Checks every operation, and marks what it returns.

    `products` counts matrix products by (type of device, file and function of the repository): what should have been
    computed on the device and was not mixes nothing, so nothing else would tell.
    """

    def __init__(self, calls: _Calls):
        super().__init__()
        self.calls = calls
        self.products: Counter[tuple[str, str]] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and to say so would take the import of torch's compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _of_kind(Tensor, (args, kwargs))
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # there is none to pin without a GPU
        named = kwargs.get("device")
        if named is not None and torch.device(named).type == NAME:
            place, kwargs["device"] = _named(named), CPU
        elif not tensors:
            place = self.calls.place() if named in (None, CPU) else named
        else:
            place = (self.calls.asked() if named is not None else None) or _check(func, args, kwargs, tensors)
        if kwargs.get("generator") is not None and (found := self.calls.generator_place()) != place:
            raise PlacementError(f"Expected a '{place.type}' device type for generator but found '{found.type}'")
        if func.overloadpacket in PRODUCTS:
            self.products[place.type, _where("{file}, {function}")] += 1
        result = func(*args, **kwargs)
        if place == DEVICE:
            for tensor in _of_kind(Tensor, result):
                _mark(tensor, place)
        return result


def _check(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> torch.device:
    """The device of the result; raises PlacementError where CUDA would."""
    if func in CROSSING:
        return place_of(tensors[0])
    if func.overloadpacket in INDEXING:
        return _check_indexing(func, *args)
    name = func.overloadpacket.__name__
    if name.startswith("_foreach_"):
        lists = [a for a in args if isinstance(a, (list, tuple)) and all(isinstance(t, Tensor) for t in a)]
        alone = [a for a in args if isinstance(a, Tensor)]
        return [_same([*group, *alone], 1, func) for group in zip(*lists, strict=True)][0]
    if func.overloadpacket in LAST_MAY_BE_SCALAR and tensors[-1].ndim == 0:
        return _same(tensors[:-1], 0, func)
    scalars = 1 if torch.Tag.pointwise in func.tags else 0
    place = _same(tensors, scalars, func)
    written = args[0] if func._schema.is_mutable and isinstance(args[0] if args else None, Tensor) else None
    if written is not None and place_of(written) != place:
        raise PlacementError(f"{SAME}, but {name} writes to {place_of(written)} what it computes on {place}")
    return place


def _same(tensors: Sequence[Tensor], cpu_scalars: int, func: Any) -> torch.device:
    """The one device of the tensors, of which as many as `cpu_scalars` may be single numbers on the CPU."""
    places = [place_of(t) for t in tensors]
    if len(set(places)) == 1:
        return places[0]
    others = [p for p, t in zip(places, tensors, strict=True) if p != CPU or t.ndim]
    if len(set(others)) == 1 and len(places) - len(others) <= cpu_scalars:
        return others[0]
    found = ", ".join(f"{p} {list(t.shape)}" for p, t in zip(places, tensors, strict=True))
    raise PlacementError(f"{SAME}, but {func} got {found}")


def _check_indexing(func: Any, tensor: Tensor, indices: Sequence[Tensor | None], *rest: Any, **_: Any) -> torch.device:
    place = place_of(tensor)
    if place == CPU and any(place_of(index) != CPU for index in indices if index is not None):
        raise PlacementError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if rest and isinstance(rest[0], Tensor) and rest[0].ndim:  # the values of index_put
        return _same([tensor, rest[0]], 0, func)
    return place


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient goes back to where the tensor was."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, place: torch.device, options: dict[str, Any]) -> Tensor:
        ctx.back = place_of(tensor)
        return _moved(tensor, place, options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.to(ctx.back), None, None


def _moved(tensor: Tensor, place: torch.device, options: dict[str, Any]) -> Tensor:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        copy = _REAL["to"](tensor, **{"dtype": tensor.dtype, **options, "copy": True})
    return _mark(copy, place)


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to: to a device, a dtype, both, or those of another tensor."""
    if args and isinstance(args[0], Tensor):
        args = (place_of(args[0]), args[0].dtype, *args[1:])
    names = ("dtype", "non_blocking", "copy") if args and isinstance(args[0], torch.dtype) else (
        "device", "dtype", "non_blocking", "copy")  # fmt: skip
    options = {name: value for name, value in (dict(zip(names, args, strict=False)) | kwargs).items()
               if value is not None}  # fmt: skip
    if (other := options.pop("other", None)) is not None:
        options |= {"device": place_of(other), "dtype": other.dtype}
    now = place_of(self)
    place = _named(options.pop("device", now))
    if {place, now} == {CPU, DEVICE}:
        moves = self.requires_grad and torch.is_grad_enabled()
        return _Move.apply(self, place, options) if moves else _moved(self.detach(), place, options)
    if place not in (CPU, DEVICE):
        options["device"] = place
    with torch._C.DisableTorchFunction():
        return _REAL["to"](self, **{"dtype": self.dtype, **options})


def _refuse_numpy(self: Tensor, *_: Any, **__: Any) -> Any:
    raise TypeError(f"can't convert {place_of(self)} device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
                    f"to host memory first. ({_where()})")  # fmt: skip


def _on_cpu_only(name: str) -> Callable[..., Any]:
    """A method that a tensor of the device does not have."""
    return lambda self, *a, **k: (_REAL[name] if place_of(self) == CPU else _refuse_numpy)(self, *a, **k)


def _pin_memory(self: Tensor, *_: Any, **__: Any) -> Tensor:
    if place_of(self) != CPU:
        raise PlacementError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
    return self.clone()


def _deepcopy(self: Tensor, memo: dict[int, Any]) -> Tensor:
    return _mark(_REAL["__deepcopy__"](self, memo), place_of(self))


def _backward(
    self: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)


METHODS: dict[str, Any] = {
    "device": property(place_of),
    "is_cuda": property(lambda self: place_of(self) == DEVICE),
    "is_cpu": property(lambda self: place_of(self) == CPU),
    "get_device": lambda self: 0 if place_of(self) == DEVICE else -1,
    "to": _to,
    "cpu": lambda self, *_, **__: _to(self, "cpu"),
    "cuda": lambda self, device=None, *_, **__: _to(self, NAME if device is None else device),
    "type_as": _to,
    "numpy": _on_cpu_only("numpy"),
    "__array__": _on_cpu_only("__array__"),
    "pin_memory": _pin_memory,
    "__deepcopy__": _deepcopy,
    "backward": _backward,
}
_REAL: dict[str, Any] = {name: getattr(Tensor, name) for name in (*METHODS, "new_tensor")}


class _Generator(torch.Generator):
    """A generator of either device; the numbers are those of the CPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        generator = super().__new__(cls, "cpu")
        generator.place = _named(device)
        return generator

    device = property(lambda self: self.place)


def _load(real: Callable[..., Any]) -> Callable[..., Any]:
    """torch.load, with `map_location` by name."""

    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == NAME:
            loaded = real(f, "cpu", *args, **kwargs)
            for tensor in _of_kind(Tensor, loaded):
                _mark(tensor, _named(map_location))
            return loaded
        return real(f, map_location, *args, **kwargs)

    return load


def _of_cuda() -> dict[str, Callable[..., Any]]:
    """What functions of torch.cuda say and do when one GPU is there."""
    nothing = dict.fromkeys(("_lazy_init", "set_device", "synchronize", "empty_cache", "set_rng_state",
                             "set_rng_state_all", "reset_peak_memory_stats"), lambda *_, **__: None)  # fmt: skip
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True,
               "get_device_capability": (8, 0), "get_device_name": "imaginary", "memory_allocated": 0,
               "max_memory_allocated": 0, "mem_get_info": (2**33, 2**33)}  # fmt: skip
    states = {"get_rng_state": lambda *_: torch.get_rng_state(), "get_rng_state_all": lambda: [torch.get_rng_state()]}
    return {**nothing, **{name: lambda *_, value=value, **__: value for name, value in answers.items()}, **states}


@contextmanager
def imaginary_device() -> Iterator[_Operations]:
    """Inside, `cuda` is there. Yields what was computed, and where."""
    import torch._dynamo  # optimizers import it, and it does not stand functions that are replaced

    with ExitStack() as stack:
        replaced = [(Tensor, METHODS), (torch.cuda, _of_cuda()),
                    (torch, {"load": _load(torch.load), "Generator": _Generator})]  # fmt: skip
        for owner, attributes in replaced:
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        for name in ("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all"):
            stack.enter_context(mock.patch.object(torch.cuda.random, name, getattr(torch.cuda, name)))
        # A backward pass is no call like the others, below which hooks and autograd functions would not be seen.
        stack.enter_context(mock.patch.object(torch.autograd, "has_torch_function", lambda _: False))
        calls = _Calls()
        operations = stack.enter_context(_Operations(calls))
        stack.enter_context(calls)
        yield operations
