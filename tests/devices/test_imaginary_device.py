"""The imaginary device allows and refuses what CUDA does; values, gradients and what is put back afterwards."""

from __future__ import annotations

import copy
import io
import threading

import numpy as np
import pytest
import torch
from device_rules import CPU, DEVICE, PlacementError
from imaginary_device import imaginary_device
from safetensors.torch import load_file, safe_open, save_file
from torch.nn import functional as F


@pytest.fixture
def device():
    with imaginary_device() as operations:
        yield operations


def a(*shape: int, device: str = "cuda", **options) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel(), **options).reshape(shape).to(device)


def index(*numbers: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(numbers, device=device)


def assign(tensor: torch.Tensor, where, value) -> torch.Tensor:
    tensor[where] = value
    return tensor


ON_DEVICE = {
    "factories": lambda: torch.ones(3, device="cuda") + torch.full((3,), 2.0, device="cuda:0"),
    "by number": lambda: torch.zeros(3, device=0),
    "from numbers": lambda: torch.tensor([[1.0, 2.0]], device="cuda"),
    "from numpy": lambda: torch.as_tensor(np.ones(3), device=torch.device("cuda")),
    "a context": lambda: _in_context(lambda: torch.empty(3)),
    "like another": lambda: torch.zeros_like(a(3)) + a(3).new_zeros(3) + a(3).new_tensor([1, 2, 3]),
    "to a device": lambda: torch.ones(3).to("cuda", torch.float64),
    "to what another has": lambda: torch.ones(3).to(a(2)),
    "cuda()": lambda: torch.ones(3).cuda(),
    "to a dtype": lambda: a(3).to(torch.float16).double(),
    "views": lambda: a(4, 2)[1:].T.reshape(-1).detach().view(3, 2),
    "a deep copy": lambda: copy.deepcopy(a(3)),
    "a deep copy of a module": lambda: copy.deepcopy(torch.nn.Linear(2, 2).to("cuda")).weight,
    "a parameter": lambda: torch.nn.Parameter(a(3)),
    "its own generator": lambda: torch.randperm(4, generator=torch.Generator("cuda").manual_seed(0), device="cuda"),
    "arithmetic with a number from the CPU": lambda: a(3) * torch.tensor(2.0) + torch.tensor(1.0),
    "a number of the device and one of the CPU": lambda: a(3).sum() + torch.tensor(1.0),
    "where with numbers from the CPU": lambda: torch.where(a(3) > 1, torch.tensor(1.0), torch.tensor(0.0)),
    "filling with a number from the CPU": lambda: a(3).fill_(torch.tensor(1.0)),
    "filling where a mask is": lambda: a(3).masked_fill_(a(3) > 1, torch.tensor(0.0)),
    "indexing by the CPU": lambda: a(4, 2)[index(0, 2)],
    "indexing by a mask of the CPU": lambda: a(4)[torch.tensor([True, False, True, False])],
    "indexing by lists": lambda: a(4, 2)[[0, 2], [1, 1]],
    "assigning at an index of the CPU": lambda: assign(a(4), index(0, 2), a(2)),
    "assigning a number from the CPU": lambda: assign(a(4), index(0, 2), torch.tensor(1.0)),
    "assigning a slice from the CPU": lambda: assign(a(4), slice(0, 2), torch.ones(2)),
    "copy_ from the CPU": lambda: a(3).copy_(torch.ones(3)),
    "one_hot": lambda: F.one_hot(index(1, 2, device="cuda")),
    "attention": lambda: F.scaled_dot_product_attention(*[a(1, 2, 4, 8)] * 3, is_causal=True),
    "lists of an optimizer": lambda: torch._foreach_add([a(2), a(3)], [a(2), a(3)])[1],
    "vmap": lambda: torch.vmap(lambda x: x.to(x.device) * 2)(a(3, 2)),
}
ON_CPU = {
    "cpu()": lambda: a(3).cpu(),
    "to the CPU": lambda: a(3).to("cpu", torch.float64),
    "made there": lambda: torch.zeros_like(a(3), device="cpu") + a(3).new_zeros(3, device="cpu"),
    "copy_ from the device": lambda: torch.ones(3).copy_(a(3)),
    "numbers": lambda: torch.tensor([a(3).sum().item(), float(a(1)), int(a(1)), a(2).tolist()[0], bool(a(1))]),
    "a slice by a number of the device": lambda: torch.ones(4)[: int(index(2, device="cuda")[0])],
    "one row by a number of the device": lambda: torch.ones(4)[index(2, device="cuda")[0]],
    "pinned": lambda: torch.ones(3).pin_memory(),
}
MIXED = {
    "arithmetic": lambda: a(3) + torch.ones(3),
    "in place": lambda: a(3).add_(torch.ones(3)),
    "a number of the device with a tensor of the CPU": lambda: torch.ones(3) * a(1)[0],
    "a number of the CPU in place": lambda: torch.tensor(1.0).add_(a(1)[0]),
    "two numbers of the CPU": lambda: torch.addcmul(a(3), torch.tensor(1.0), torch.tensor(2.0)),
    "matmul": lambda: a(3, 3) @ torch.ones(3, 3),
    "a linear layer": lambda: F.linear(a(3, 3), torch.ones(3, 3)),
    "a number where a matrix product has none": lambda: torch.dot(a(1), torch.ones(1)),
    "out=": lambda: torch.mm(a(3, 3), a(3, 3), out=torch.empty(3, 3)),
    "cat": lambda: torch.cat([a(3), torch.ones(3)]),
    "stack": lambda: torch.stack([torch.ones(3), a(3)]),
    "cat with nothing": lambda: torch.cat([torch.empty(0), a(3)]),
    "comparison": lambda: torch.equal(a(3), torch.ones(3)),
    "a mask": lambda: a(3).masked_fill(torch.ones(3, dtype=torch.bool), 0.0),
    "masked_select": lambda: a(3).masked_select(torch.ones(3, dtype=torch.bool)),
    "index_select": lambda: a(4).index_select(0, index(0)),
    "index_select by a number": lambda: a(4).index_select(0, index(0)[0]),
    "gather": lambda: a(4).gather(0, index(0)),
    "scatter": lambda: a(4).scatter_(0, index(0), 1.0),
    "index_copy_": lambda: a(4).index_copy_(0, index(0, device="cuda"), torch.ones(1)),
    "index_add_": lambda: a(4).index_add_(0, index(0), a(1)),
    "index_fill": lambda: torch.ones(4).index_fill(0, index(0, device="cuda"), 2.0),
    "assigning values of the CPU at an index": lambda: assign(a(4), index(0, 2, device="cuda"), torch.ones(2)),
    "embedding": lambda: F.embedding(index(0), a(4, 2)),
    "cross entropy": lambda: F.cross_entropy(a(2, 4), index(0, 1)),
    "attention with a mask of the CPU": lambda: F.scaled_dot_product_attention(
        *[a(1, 2, 4, 8)] * 3, attn_mask=torch.ones(4, 4, dtype=torch.bool)
    ),
    "lists of an optimizer": lambda: torch._foreach_add_([a(2), a(3)], [a(2), torch.ones(3)]),
}


def _in_context(make):
    with torch.device("cuda"):
        return make()


@pytest.mark.parametrize("name", ON_DEVICE)
def test_what_is_on_the_device(device, name):
    found = ON_DEVICE[name]()
    assert found.device == DEVICE and found.is_cuda and not found.is_cpu and found.get_device() == 0


@pytest.mark.parametrize("name", ON_CPU)
def test_what_is_on_the_cpu(device, name):
    found = ON_CPU[name]()
    assert found.device == CPU and found.is_cpu and not found.is_cuda and found.get_device() == -1
    found.numpy()


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_devices_is_refused(device, name):
    with pytest.raises(PlacementError, match=r"same device.*tests/devices/test_imaginary_device\.py:\d+"):
        MIXED[name]()


def test_other_refusals(device):
    for where in (index(0, device="cuda"), torch.tensor([True, False, True, False], device="cuda")):
        with pytest.raises(PlacementError, match="indices should be either on cpu or on the same device"):
            torch.ones(4)[where]
        with pytest.raises(PlacementError, match="indices should be either on cpu"):
            assign(torch.ones(4), where, 2.0)
    for read in (lambda x: x.numpy(), np.asarray, lambda x: np.exp(x)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            read(a(3))
    for generator, place in (("cpu", "cuda"), ("cuda", "cpu")):
        with pytest.raises(PlacementError, match=f"Expected a '{place}' device type for generator"):
            torch.randperm(4, generator=torch.Generator(generator), device=place)
    with pytest.raises(PlacementError, match="Expected a 'cuda' device type for generator"):
        a(3).normal_(generator=torch.Generator())
    with pytest.raises(PlacementError, match="invalid device ordinal 1"):
        torch.ones(3, device="cuda:1")
    with pytest.raises(PlacementError, match="cannot pin"):
        a(3).pin_memory()


def test_gradients_follow_their_tensors(device):
    layer = torch.nn.Linear(3, 2).to("cuda")
    x = torch.ones(4, 3, requires_grad=True)
    layer(x.to("cuda"))[index(0, 2)].square().sum().backward()
    assert layer.weight.grad.device == DEVICE and x.grad.device == CPU
    weight, bias = layer.weight.detach().cpu(), layer.bias.detach().cpu()
    expected = torch.ones(4, 3, requires_grad=True)
    F.linear(expected, weight, bias)[index(0, 2)].square().sum().backward()
    assert torch.equal(x.grad, expected.grad)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    optimizer.step()
    assert {v.device for state in optimizer.state.values() for v in state.values()} == {DEVICE}


class Careless(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.ones(len(gradient))


def test_a_backward_pass_is_watched(device):
    x = a(3).requires_grad_()
    with pytest.raises(PlacementError, match="same device"):
        Careless.apply(x).sum().backward()


def test_files(device, tmp_path):
    save_file({"x": a(2, 3)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt", device="cuda") as file:
        assert file.get_tensor("x").device == DEVICE
    assert load_file(tmp_path / "x.safetensors")["x"].device == CPU
    assert load_file(tmp_path / "x.safetensors", device="cuda")["x"].device == DEVICE
    buffer = io.BytesIO()
    torch.save({"x": [a(3)]}, buffer)
    for place, expected in (("cuda", DEVICE), ("cpu", CPU)):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=place)["x"][0]
        assert loaded.device == expected and loaded.tolist() == [1, 2, 3]


def test_products_are_counted_by_place(device):
    def product(place: str) -> torch.Tensor:
        return a(2, 2, device=place) @ a(2, 2, device=place)

    assert product("cuda").tolist() == product("cpu").tolist() == [[7, 10], [15, 22]]
    where = "tests/devices/test_imaginary_device.py, product"
    assert device.products == {("cuda", where): 1, ("cpu", where): 1}


def test_attributes_hold_in_other_threads(device):
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(3).to("cuda").device))
    thread.start()
    thread.join()
    assert found == [DEVICE]


def test_everything_is_put_back():
    before = [getattr(torch.Tensor, name) for name in ("device", "to", "numpy", "backward")]
    with imaginary_device():
        kept = torch.ones(3, device="cuda")
        assert torch.cuda.is_available() and torch.get_device_module("cuda").device_count() == 1
    assert [getattr(torch.Tensor, name) for name in ("device", "to", "numpy", "backward")] == before
    assert kept.device == CPU and kept.numpy().sum() == 3 and not torch.cuda.is_available()
    assert (kept + torch.ones(3)).tolist() == [2, 2, 2]
    assert type(torch.Generator()) is not type(_device_generator())


def _device_generator():
    with imaginary_device():
        return torch.Generator("cuda")


def test_the_device_exists_only_inside():
    """No hook in the product: it asks torch, which answers yes inside alone."""
    from core.errors import UserError
    from core.runs.settings import Experiment

    with imaginary_device():
        Experiment.of(device="cuda").check()
    with pytest.raises(UserError, match="device 'cuda' is not available here"):
        Experiment.of(device="cuda").check()
