"""An imaginary CUDA device, so that the placement of tensors is tested on machines without a GPU.

Inside `imaginary_device()` torch says that one GPU is there. A tensor that is sent to it, or made on it, still keeps
its values in main memory, so everything computes real results; what makes it a tensor of the device is a mark on its
storage, which its views, its `detach()`, its `Parameter` and whatever autograd keeps of it share. Three things give
the mark its meaning:

- `_Operations`, a TorchDispatchMode, sees every operation of torch, those of a backward pass as well. It refuses those
  that CUDA refuses, because their tensors (or their generator) are not on one device, and marks what they return.
- `_Calls`, a TorchFunctionMode, knows what the Python call behind an operation asked for. Below it, in C++, "the device
  of this tensor" and an explicit `device="cpu"` look the same, since both are the CPU there.
- attributes of `torch.Tensor` in which C++ would look at the real device (`device`, `to`, `numpy`, ...), functions of
  `torch.cuda`, `torch.load` and `torch.Generator` are replaced, and put back at the end.

An operation that mixes devices raises PlacementError, with CUDA's reason and the line of the repository.

What it cannot see: what C++ decides by the real device (which kernel, autocast, torch.accelerator and with it a device
map of `auto`, the check that a gradient is on the device of its tensor); threads that only compute (operations are
watched in the thread that entered, attributes in all); streams, pinned memory and asynchronous copies; kernels that
CUDA lacks, its rounding and its random numbers; a second GPU, and processes started from inside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from device_rules import CPU, DEVICE, NAME, PlacementError, aten, check, device_of, mark, named_device, of_kind, where
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.mv, aten.dot}
# Python calls that read data of any kind, and take `device` for what they return.
READING = {torch.tensor, torch.as_tensor, torch.asarray, torch.frombuffer}


class _Calls(TorchFunctionMode):
    """Keeps, for `_Operations`, the Python calls that have not returned yet, with the device that each asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[tuple[torch.device | None, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = None if kwargs.get("device") is None else named_device(kwargs["device"])
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
            return mark(result, asked or device_of(args[0]))
        return result

    def asked(self) -> torch.device | None:
        """The device that the innermost call asked for by name."""
        return self.under_way[-1][0] if self.under_way else None

    def generator_device(self) -> torch.device:
        """The device of the innermost call's generator, which an operation receives without its Python class."""
        generators = of_kind(torch._C.Generator, self.under_way[-1:])
        return generators[0].device if generators else CPU

    def result_device(self) -> torch.device:
        """The device of the result of an operation without tensors: what the call asked for, or that of its tensors."""
        if not self.under_way:
            return CPU
        asked, arguments = self.under_way[-1]
        return asked or (DEVICE if any(device_of(t) == DEVICE for t in of_kind(Tensor, arguments)) else CPU)


class _Operations(TorchDispatchMode):
    """Checks every operation, and marks the tensors that it returns.

    `products` counts matrix products by (type of device, file and function of the repository). Where all tensors of a
    computation have stayed on the CPU by mistake, no operation mixes devices, and only these counts show it.
    """

    def __init__(self, calls: _Calls):
        super().__init__()
        self.calls = calls
        self.products: Counter[tuple[str, str]] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and torch's own answer would import its compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = of_kind(Tensor, (args, kwargs))
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # without a GPU torch has no pinned memory
        named = kwargs.get("device")
        if named is not None and torch.device(named).type == NAME:
            device, kwargs["device"] = named_device(named), CPU
        elif not tensors:
            device = self.calls.result_device() if named in (None, CPU) else named
        else:
            device = (self.calls.asked() if named is not None else None) or check(func, args, kwargs, tensors)
        if kwargs.get("generator") is not None and (found := self.calls.generator_device()) != device:
            raise PlacementError(f"Expected a '{device.type}' device type for generator but found '{found.type}'")
        if func.overloadpacket in PRODUCTS:
            self.products[device.type, where("{file}, {function}")] += 1
        result = func(*args, **kwargs)
        if device == DEVICE:
            for tensor in of_kind(Tensor, result):
                mark(tensor, device)
        return result


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient goes back to the device of the tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, options: dict[str, Any]) -> Tensor:
        ctx.back = device_of(tensor)
        return _moved(tensor, device, options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.to(ctx.back), None, None


def _moved(tensor: Tensor, device: torch.device, options: dict[str, Any]) -> Tensor:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        copy = _REAL["to"](tensor, **{"dtype": tensor.dtype, **options, "copy": True})
    return mark(copy, device)


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to: to a device, a dtype, both, or those of another tensor."""
    if args and isinstance(args[0], Tensor):
        args = (device_of(args[0]), args[0].dtype, *args[1:])
    names = ("device", "dtype", "non_blocking", "copy")
    by_name = dict(zip(names[1:] if args and isinstance(args[0], torch.dtype) else names, args, strict=False)) | kwargs
    options = {name: value for name, value in by_name.items() if value is not None}
    if (other := options.pop("other", None)) is not None:
        options |= {"device": device_of(other), "dtype": other.dtype}
    now = device_of(self)
    device = named_device(options.pop("device", now))
    if {device, now} == {CPU, DEVICE}:
        moves = self.requires_grad and torch.is_grad_enabled()
        return _Move.apply(self, device, options) if moves else _moved(self.detach(), device, options)
    if device not in (CPU, DEVICE):
        options["device"] = device
    with torch._C.DisableTorchFunction():
        return _REAL["to"](self, **{"dtype": self.dtype, **options})


def _refuse_numpy(self: Tensor, *_: Any, **__: Any) -> Any:
    reason = f"can't convert {device_of(self)} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host"
    raise TypeError(f"{reason} memory first. ({where()})")


def _on_cpu_only(name: str) -> Callable[..., Any]:
    """A method that only tensors of the CPU have."""
    return lambda self, *a, **k: (_REAL[name] if device_of(self) == CPU else _refuse_numpy)(self, *a, **k)


def _pin_memory(self: Tensor, *_: Any, **__: Any) -> Tensor:
    if device_of(self) != CPU:
        raise PlacementError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
    return self.clone()


def _deepcopy(self: Tensor, memo: dict[int, Any]) -> Tensor:
    return mark(_REAL["__deepcopy__"](self, memo), device_of(self))


def _backward(
    self: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)


METHODS: dict[str, Any] = {
    "device": property(device_of),
    "is_cuda": property(lambda self: device_of(self) == DEVICE),
    "is_cpu": property(lambda self: device_of(self) == CPU),
    "get_device": lambda self: 0 if device_of(self) == DEVICE else -1,
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
    """A generator of either device. Its numbers are those of the CPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        generator = super().__new__(cls, "cpu")
        generator.placed_on = named_device(device)
        return generator

    device = property(lambda self: self.placed_on)


def _load(real: Callable[..., Any]) -> Callable[..., Any]:
    """torch.load, with `map_location` by name."""

    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == NAME:
            loaded = real(f, "cpu", *args, **kwargs)
            for tensor in of_kind(Tensor, loaded):
                mark(tensor, named_device(map_location))
            return loaded
        return real(f, map_location, *args, **kwargs)

    return load


def _of_cuda() -> dict[str, Callable[..., Any]]:
    """Replacements of functions of torch.cuda, which answer as if there were one GPU."""
    silent = ["_lazy_init", "set_device", "synchronize", "empty_cache", "set_rng_state", "set_rng_state_all"]
    answers: dict[str, Any] = dict.fromkeys(silent)
    answers |= {"is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True}
    answers |= {"get_device_capability": (8, 0), "mem_get_info": (2**33, 2**33)}
    states = {"get_rng_state": lambda *_: torch.get_rng_state(), "get_rng_state_all": lambda: [torch.get_rng_state()]}
    return {name: lambda *_, value=value, **__: value for name, value in answers.items()} | states


@contextmanager
def imaginary_device() -> Iterator[_Operations]:
    """Inside the block the device `cuda` exists. Yields the counts of matrix products by device and function."""
    import torch._dynamo  # optimizers import it, and its import fails while functions of torch are replaced

    with ExitStack() as stack:
        of_cuda = _of_cuda()
        for owner, attributes in (
            (Tensor, METHODS),
            (torch, {"load": _load(torch.load), "Generator": _Generator}),
            (torch.cuda, of_cuda),
            (torch.cuda.random, {name: value for name, value in of_cuda.items() if "rng_state" in name}),
            # torch must not take a backward pass for one call: the hooks and functions inside would not be seen.
            (torch.autograd, {"has_torch_function": lambda _: False}),
        ):
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        calls = _Calls()
        operations = stack.enter_context(_Operations(calls))
        stack.enter_context(calls)
        yield operations
