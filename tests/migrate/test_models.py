# SPDX-License-Identifier: Apache-2.0
"""A model's memory in another process: the same bytes, strict checks, and its lifetime."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import torch
from support.hostile_bytes import lied, mutated
from support.peer_process import Peer

from portakv.errors import InvalidTerms, LayoutError, PeerError, Unsupported
from portakv.weights import open_model, share_model

MODEL = '''
import torch
from torch import nn


class Model(nn.Module):
    """Tied weights, a transposed parameter, buffers of which one is not saved, and an empty one."""

    def __init__(self, rows=12, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(rows, 8, dtype=dtype)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, rows, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.randn(5, 8).t())
        self.register_buffer("scale", torch.full((), 3, dtype=torch.int16), persistent=False)
        self.register_buffer("nothing", torch.zeros(0, 4))

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)) @ self.turned @ self.turned.t()) * self.scale
'''
names: dict[str, Any] = {}
exec(MODEL, names)
Model = names["Model"]
OWNER = (
    MODEL
    + """
from portakv.migrate import share_model

torch.manual_seed(0)
model = Model().eval()
model.share_memory()
shared = share_model(model)
answer = shared.data
"""
)
IDS = torch.arange(6)


@pytest.fixture(scope="module")
def peer() -> Iterator[tuple[Peer, bytes]]:
    with Peer() as process:
        yield process, process.do(OWNER)


def descriptors() -> set[tuple[str, str]]:
    """Return the descriptors of this process, each with its target. Others may close meanwhile."""
    result = set[tuple[str, str]]()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the list itself
            result.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return result


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_model_computes_with_another_process_s_memory(
    peer: tuple[Peer, bytes], place: str
) -> None:
    """Parameters, tied and transposed ones, and buffers; changes are visible without a copy."""
    owner, data = peer
    with torch.device(place):
        model = Model().eval()
    before = descriptors()
    assert open_model(model, data) is model
    assert not descriptors() - before
    expected = owner.do("answer = model(ids).tolist()", ids=IDS)
    assert model(IDS).tolist() == expected
    assert model.head.weight is model.embed.weight
    assert model.turned.stride() == (1, 8)
    assert not any(x.requires_grad for x in model.parameters())
    assert model.nothing.shape == (0, 4)
    owner.do("with torch.no_grad(): model.embed.weight += 1; model.scale.fill_(2)")
    changed = owner.do("answer = model(ids).tolist()", ids=IDS)
    assert changed != expected
    assert model(IDS).tolist() == changed
    owner.do("with torch.no_grad(): model.embed.weight -= 1; model.scale.fill_(3)")


def other(**changes: Any) -> Any:
    model = Model(**{k: v for k, v in changes.items() if k in ("rows", "dtype")})
    for name, value in changes.items():
        if name not in ("rows", "dtype"):
            setattr(model, name, value)
    return model


class Special(torch.nn.Parameter):
    """A parameter of an engine, with a loader of its own."""


def untied() -> Any:
    model = Model()
    model.head.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    return model


def as_buffer() -> Any:
    model = Model()
    del model.turned
    model.register_buffer("turned", torch.zeros(8, 5))
    return model


DIFFERENT: dict[str, tuple[Callable[[], Any], str]] = {
    "shape": (lambda: other(rows=13), "head.weight: its shape is .13, 8. here and .12, 8. there"),
    "dtype": (lambda: other(dtype=torch.float16), "embed.weight: its dtype is float16 here"),
    "more": (lambda: other(more=torch.nn.Parameter(torch.zeros(1))), "more: it is only here"),
    "fewer": (lambda: other(turned=None), "turned: it is only there"),
    "untied": (untied, r"head.weight: \['head.weight'\] are one tensor here, and \['embed"),
    "kind": (as_buffer, "turned: its kind is buffer here and parameter there"),
    "special": (lambda: other(turned=Special(torch.zeros(8, 5))), "turned: it is a Special here"),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_a_model_that_differs_is_refused_and_not_changed(
    peer: tuple[Peer, bytes], difference: str
) -> None:
    make, sentence = DIFFERENT[difference]
    model = make()
    before = {name: x.clone() for name, x in model.named_parameters()}
    with pytest.raises(LayoutError, match=sentence):
        open_model(model, peer[1])
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name]), name
        assert x.requires_grad


def test_one_error_lists_all_differences(peer: tuple[Peer, bytes]) -> None:
    model = other(rows=13, turned=None, more=torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(LayoutError) as error:
        open_model(model, peer[1])
    assert len(str(error.value).splitlines()) == 5


def test_memory_outlives_its_owner_while_it_is_open() -> None:
    """On the host. A model that is opened later has no owner, and is not changed."""
    with Peer() as owner:
        data = owner.do(OWNER)
        model = open_model(Model().eval(), data)
        expected = owner.do("answer = model(ids).tolist()", ids=IDS)
        owner.kill()
    assert model(IDS).tolist() == expected
    late = Model()
    before = late.embed.weight
    with pytest.raises(PeerError, match="a process that has ended"):
        open_model(late, data)
    assert late.embed.weight is before


def test_memory_is_released_with_the_model(peer: tuple[Peer, bytes]) -> None:
    def mappings() -> int:
        with open("/proc/self/maps") as lines:
            return sum("/dev/shm" in line or "memfd" in line for line in lines)

    gc.collect()
    before = mappings()
    model = open_model(Model(), peer[1])
    assert mappings() > before
    del model
    gc.collect()
    assert mappings() == before


def test_what_cannot_be_shared_is_named() -> None:
    model = Model()
    with pytest.raises(Unsupported, match=r"^Sharing module\['turned'\].*shared memory"):
        share_model(model)
    with pytest.raises(InvalidTerms, match="parameters or buffers"):
        share_model(torch.nn.ReLU())
    model.turned = torch.nn.Parameter(torch.zeros(8, 5).to_sparse())
    with pytest.raises(LayoutError, match="turned to be a plain tensor"):
        share_model(model)


def test_a_closed_model_is_not_retained() -> None:
    model = Model()
    model.share_memory()
    shared = share_model(model)
    address = model.turned.data_ptr()
    del model
    with open("/proc/self/maps") as lines:
        assert any(int(line.split("-")[0], 16) == address for line in lines)
    for _ in range(2):
        shared.close()
    gc.collect()
    with open("/proc/self/maps") as lines:
        assert not any(int(line.split("-")[0], 16) == address for line in lines)


def test_edited_data_is_refused(peer: tuple[Peer, bytes]) -> None:
    model = Model()
    before = model.embed.weight
    edited = [mutated(random.Random(seed), peer[1]) for seed in range(40)]
    for wrong in (b"", bytes(40), b"model", *(x for x in edited if x != peer[1])):
        with pytest.raises(PeerError, match="Expected data to be the bytes"):
            open_model(model, wrong)
    assert model.embed.weight is before


LIES: dict[str, tuple[str, Any]] = {
    "past the region": ("place", [0, 1 << 40]),
    "not aligned": ("place", [0, 1]),
    "no such region": ("place", [1 << 15, 0]),
    "strides": ("strides", [1 << 40, 1 << 40]),
    "few strides": ("strides", [1]),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_owner_that_lies_about_its_memory_is_refused(peer: tuple[Peer, bytes], lie: str) -> None:
    (field, value) = LIES[lie]
    items = msgspec.msgpack.decode(peer[1][16:])["items"]
    number = [name for name, _ in items].index("turned")
    items[number][1][field] = value
    model = Model()
    before = model.embed.weight
    with pytest.raises(PeerError, match="tensors in the memory that was shared"):
        open_model(model, lied(peer[1], items=items))
    assert model.embed.weight is before


@pytest.mark.gpu
def test_a_model_on_a_device_is_opened_by_another_process() -> None:
    """Parameters of a few allocations, which the caching allocator cut; changes are visible."""
    with Peer() as owner:
        data = owner.do(OWNER.replace(".eval()\nmodel.share_memory()", ".eval().to('cuda:0')"))
        with torch.device("meta"):
            model = Model().eval()
        open_model(model, data, "cuda:0")
        ids = IDS.to("cuda:0")
        for step in (1, -1):
            owner.do(
                "with torch.no_grad(): model.embed.weight += step\n"
                "torch.cuda.synchronize()\n"
                "answer = model(ids.to('cuda:0')).tolist()",
                step=step,
                ids=IDS,
            )
            expected = owner.do("answer = model(ids.to('cuda:0')).tolist()", ids=IDS)
            assert model(ids).tolist() == expected
        del model
        gc.collect()
        torch.cuda.synchronize()


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_example_computes_in_two_processes(place: str) -> None:
    from portakv_examples import share_model as example

    lines = list[str]()
    assert example.main(place, lines.append)
    assert [line.split()[0] for line in lines] == ["opened", "answer", "changed"]
