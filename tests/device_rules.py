"""What CUDA allows and refuses of an operation, by the devices of its tensors (tests/imaginary_device.py)."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "cuda"
DEVICE, CPU = torch.device(NAME, 0), torch.device("cpu")
FOLDER = Path(__file__).resolve().parent
ROOT = str(FOLDER.parent) + "/"
OURS = {str(FOLDER / name) for name in ("device_rules.py", "imaginary_device.py", "removed_placements.py")}
REAL_DEVICE = torch._C.TensorBase.device
aten = torch.ops.aten

# Operations that copy between devices, and those that take indices from the CPU for a tensor of the device.
CROSSING = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
PUTTING = {aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}
INDEXING = {aten.index, aten._unsafe_index, *PUTTING}
# A pointwise operation accepts one number (a tensor without dimensions) from the CPU, `where` accepts two, and these
# operations accept one as the last argument.
LAST_MAY_BE_NUMBER = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_}
SAME = "Expected all tensors to be on the same device"


class PlacementError(RuntimeError):
    """The error that a real device would raise, with the line of the repository that caused it."""

    def __init__(self, reason: str):
        super().__init__(f"{reason} ({where()})")


def where(form: str = "{file}:{line}") -> str:
    """The innermost line of the call stack that is in the repository and not in the imaginary device."""
    for frame, line in traceback.walk_stack(None):
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and path not in OURS and "site-packages" not in path:
            return form.format(file=path.removeprefix(ROOT), line=line, function=frame.f_code.co_name)
    return "outside the repository"


def of_kind(kind: type, value: Any) -> list[Any]:
    """The objects of a kind in an argument or a result (torch's own pytree takes several times as long)."""
    if isinstance(value, kind):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [found for part in value for found in of_kind(kind, part)]


def device_of(tensor: Tensor) -> torch.device:
    """The device that a tensor seems to be on."""
    with torch._C.DisableTorchFunction():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap
            tensor = torch._C._functorch.get_unwrapped(tensor)
        real = REAL_DEVICE.__get__(tensor)
        return DEVICE if real == CPU and hasattr(tensor.untyped_storage(), "imaginary") else real


def mark(tensor: Tensor, device: torch.device) -> Tensor:
    """Make a tensor that has memory of its own one of the device, if the device is the imaginary one."""
    if device == DEVICE:
        with torch._C.DisableTorchFunction():
            tensor.untyped_storage().imaginary = True
    return tensor


def named_device(device: Any) -> torch.device:
    """The device that an argument names. There is one GPU, which is meant where the argument has no number."""
    device = torch.device(NAME, device) if isinstance(device, int) else torch.device(device)
    if device.type != NAME:
        return device
    if (device.index or 0) != 0:
        raise PlacementError(f"CUDA error: invalid device ordinal {device.index}")
    return DEVICE


def check(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> torch.device:
    """The device of an operation's result. Raises PlacementError where CUDA would raise an error."""
    if func in CROSSING:
        return device_of(tensors[0])
    if func.overloadpacket in INDEXING:
        return _check_indexing(func, *args)
    name = func.overloadpacket.__name__
    if name.startswith("_foreach_"):
        lists = [a for a in args if isinstance(a, (list, tuple)) and all(isinstance(t, Tensor) for t in a)]
        alone = [a for a in args if isinstance(a, Tensor)]
        devices = [_same([*group, *alone], 1, func) for group in zip(*lists, strict=True)]
        return devices[0]
    if func.overloadpacket in LAST_MAY_BE_NUMBER and tensors[-1].ndim == 0:
        return _same(tensors[:-1], 0, func)
    numbers = 2 if func.overloadpacket == aten.where else 1 if torch.Tag.pointwise in func.tags else 0
    device = _same(tensors, numbers, func)
    written = args[0] if func._schema.is_mutable and isinstance(args[0] if args else None, Tensor) else None
    if written is not None and device_of(written) != device:
        raise PlacementError(f"{SAME}, but {name} writes to {device_of(written)} what it computes on {device}")
    return device


def _same(tensors: Sequence[Tensor], cpu_numbers: int, func: Any) -> torch.device:
    """The device that all tensors are on, but for at most `cpu_numbers` single numbers on the CPU."""
    devices = [device_of(t) for t in tensors]
    if len(set(devices)) == 1:
        return devices[0]
    others = [p for p, t in zip(devices, tensors, strict=True) if p != CPU or t.ndim]
    if len(set(others)) == 1 and len(devices) - len(others) <= cpu_numbers:
        return others[0]
    found = ", ".join(f"{p} {list(t.shape)}" for p, t in zip(devices, tensors, strict=True))
    raise PlacementError(f"{SAME}, but {func} got {found}")


def _check_indexing(func: Any, tensor: Tensor, indices: Sequence[Tensor | None], *rest: Any, **_: Any) -> torch.device:
    device = device_of(tensor)
    if device == CPU and any(device_of(index) != CPU for index in indices if index is not None):
        raise PlacementError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if rest and isinstance(rest[0], Tensor) and rest[0].ndim:  # the values of index_put
        return _same([tensor, rest[0]], 0, func)
    return device
