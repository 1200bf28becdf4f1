# SPDX-License-Identifier: Apache-2.0
"""Rows of a peer: what claims to read them and how its launches are cut, whether another device's
memory may be read at all, and what carries a copy out by the caller's terms."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import simdev_cases
from support.cuda_cases import COPIES, Copy
from support.cuda_on_cpu import HostDriver
from support.direct_on_cpu import CPU, Loads, installed, why_not
from support.guarded_memory import filled, refused
from support.launches import launches
from support.peer_cases import ReadsPeers, ReadsWrong, Two, answering, judge, reading, two_of

from portakv import CopyPlan, DeviceMismatch, KVView, Unsupported
from portakv.backends import rows_kernel
from portakv.backends.base import PEERS, Decision
from portakv.backends.hip import Hip
from portakv.backends.rows_kernel import RowsKernel, Tuning
from portakv.backends.rows_launch import RowsBackend
from portakv.backends.triton import Triton
from portakv.interconnect import costs, peer, zero_copy
from portakv.interconnect.strategy import Terms
from portakv.interconnect.zero_copy import PEER_BLOCKS, PEER_CUT, ZeroCopy, ZeroCopyKernel
from portakv.registry.registry import Choice, choose
from portakv_conformance.simdev import device_module

CUDA = torch.device("cuda", 0)
HERE = simdev_cases.DEVICE
THERE = simdev_cases.OTHER


class OnDevice(RowsBackend):
    """The backend of the rows kernel on a device that need not be here."""

    name = "rows"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, True, "for tests")


def between(copied: Copy, src: str = "peer", dst: str = "device") -> CopyPlan:
    forms = copied.src.view().form, copied.dst.view().form
    steps = copied.src.index().plan_step, copied.dst.index().plan_step
    return CopyPlan(replace(forms[0], place=src), replace(forms[1], place=dst), *steps)


# What claims to read a peer


@pytest.mark.parametrize(
    "backend", [OnDevice(CUDA, HostDriver()), Triton(CUDA), ZeroCopy(CUDA)], ids=lambda x: x.name
)
def test_peers_are_read_and_never_written(backend: Any) -> None:
    plan = COPIES["gather"]
    read = backend.check(between(plan()))
    assert read.accepted
    assert "reads the peer's rows" in read.reason
    written = backend.check(between(plan(), "device", "peer"))
    assert not written.accepted
    assert written.reason == "it does not copy from device to peer memory"
    assert not backend.check(between(plan(), "peer", "pinned")).accepted
    assert issubclass(Hip, RowsBackend)


def test_on_the_host_there_are_no_peers() -> None:
    assert PEERS.isdisjoint(Triton(CPU).capabilities().places)
    assert PEERS.isdisjoint(choose("cpu").can.places)


@pytest.mark.parametrize("own", [None, (Tuning(0, 1, 48),)])
def test_no_launch_prefetches_a_peers_rows(
    own: tuple[Tuning, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_kernel, "TUNING", (Tuning(0, 2, 1 << 20),))
    plan = between(COPIES["gather"]())
    kernel = RowsKernel(plan, tunings=own)
    for units in (1, 1 << 10, 1 << 30):
        assert {(x.each, x.ahead) for x in launches(plan, kernel, units)} == {(1, 0)}
    local = between(COPIES["gather"](), "device")
    (single,) = launches(local, RowsKernel(local, tunings=own), 1)
    assert single.ahead > 0


# The kernel with few thread blocks


@pytest.mark.parametrize(
    ("terms", "most"),
    [
        (Terms(), PEER_BLOCKS["compute"]),
        (Terms("idle"), PEER_BLOCKS["idle"]),
        (Terms(max_thread_blocks=5), 5),
        (Terms("idle", 7), 7),
        (Terms(max_gbps=3.0), PEER_BLOCKS["compute"]),
    ],
    ids=str,
)
def test_thread_blocks_of_a_peers_rows(terms: Terms, most: int) -> None:
    """Small copies have as many as large ones, and the strategy reports the number."""
    plan = between(COPIES["gather"]())
    kernel = ZeroCopyKernel(plan, terms=terms)
    assert kernel.threads == PEER_CUT.threads
    assert [x.blocks for x in launches(plan, kernel, 1 << 20)] == [most]
    assert [x.blocks for x in launches(plan, kernel, 1)] == [1]
    reason = ZeroCopy(CUDA, terms=terms).check(plan).reason
    assert reason == f"reads the peer's rows by {most} thread blocks at most"


class ReadsOnHost(Loads):
    """The strategy on the host; the source counts as a peer's."""

    name = "direct-on-cpu-reads"
    sides = ("peer", "device")


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("planes", [1, 4, 8])
@pytest.mark.parametrize("name", ["gather", "scatter", "memory objects, blocks", "two nests"])
def test_the_kernel_reads_a_peers_rows_and_asks_nothing_of_pinned_memory(
    name: str, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed() as driver:
        monkeypatch.setattr(zero_copy, "PEER_CUT", zero_copy.CUT._replace(planes=planes))  # small
        monkeypatch.setattr(zero_copy, "device_address", lambda address, device: 0)
        copied = COPIES[name]()
        launch = ReadsOnHost(CPU).prepare(copied.plan())
        ends = copied.src.view(), copied.dst.view(), copied.src.index(), copied.dst.index()
        copied.check(lambda: launch(*ends, copied.count, None, None))
    assert driver.launches
    assert not driver.retained, "the transfer holds a peer's memory"


# Views


@pytest.mark.simdev
def test_a_view_as_another_device_sees_it() -> None:
    tensors = [filled((2, 3, 4, 2, 8), device=HERE) for _ in range(3)]
    own = KVView(tensors, "layer | kv block token head dim")
    peer = own.as_peer(THERE)
    assert (peer.device, peer.memory_device, peer.form.place) == (THERE, HERE, "peer")
    assert peer is own.as_peer(str(THERE).replace("privateuseone", simdev_cases.NAME))
    assert peer.origins == own.origins
    assert [x.data_ptr() for x in peer.owners] == [x.data_ptr() for x in own.owners]
    assert (peer.slots, peer.form.alignment) == (own.slots, own.form.alignment)
    assert peer.form != own.form
    assert replace(peer.form, place="device") == own.form
    assert pickle.loads(pickle.dumps(peer.form)) == peer.form
    assert peer.table.device == THERE
    cut = peer.slice(layers=1, heads=0)
    assert (cut.device, cut.memory_device, cut.form.place) == (THERE, HERE, "peer")
    assert cut.origins == own.slice(layers=1, heads=0).origins
    assert peer.as_own().form is own.form
    assert peer.as_own().device == HERE
    assert own.as_own() is own
    assert "(peer)" in repr(peer)
    assert own.memory_device == HERE
    mapped = own.as_peer(HERE)  # another process's memory, which counts as this device's
    assert (mapped.device, mapped.memory_device, mapped.form.place) == (HERE, HERE, "peer")


@pytest.mark.simdev
def test_a_view_by_addresses_as_another_device_sees_it() -> None:
    memory = filled((6, 4, 32), torch.uint8, device=HERE)
    table = torch.tensor([memory.data_ptr()]).to(HERE)
    view = KVView.at(
        table, "layer | block token dim", shape=(6, 4, 32), dtype=torch.uint8, device=HERE
    )
    peer = view.as_peer(THERE)
    assert view.form.table_on_device
    assert not peer.form.table_on_device
    assert peer.origins == (memory.data_ptr(),)
    assert peer.table.device == THERE


@pytest.mark.simdev
def test_rows_of_the_host_and_of_other_types_are_no_peers() -> None:
    host = KVView(torch.zeros(4, 8), "token dim")
    with refused(DeviceMismatch, "cpu", str(HERE), "same device type"):
        host.as_peer(HERE)
    there = KVView(torch.zeros(4, 8).to(HERE), "token dim")
    with refused(DeviceMismatch, "cpu", "pinned host memory"):
        there.as_peer("cpu")
    with refused(DeviceMismatch, "nope"):
        there.as_peer("nope")


# Whether another device's memory may be read


@pytest.fixture
def unasked() -> Iterator[None]:
    """Forget answers about two devices, before a test and after it."""
    costs.forget()
    yield
    costs.forget()


@pytest.fixture
def access(unasked: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Set the driver's answer about access, and forget earlier answers."""
    says = [True]
    monkeypatch.setattr(
        device_module, "can_device_access_peer", lambda reader, owner: says[0], raising=False
    )
    return says


@pytest.mark.simdev
def test_a_driver_that_gives_no_access(access: list[bool]) -> None:
    access[0] = False
    with reading(ReadsPeers):
        why = f"the driver says that {THERE} does not reach memory of {HERE}"
        assert peer.unmapped(HERE, THERE) == why
        access[0] = True
        assert peer.unmapped(HERE, THERE) == why, "the driver answers once"


@pytest.mark.simdev
@pytest.mark.usefixtures("unasked")
def test_a_device_whose_torch_tells_nothing() -> None:
    assert peer.unmapped(HERE, THERE).startswith("torch does not report whether")


@pytest.mark.simdev
def test_a_device_that_is_full_is_asked_again(
    access: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all later copies go through the host because one came at a bad moment."""

    def full(*_: object) -> bool:
        raise torch.OutOfMemoryError("no room")

    with reading(ReadsPeers):
        with monkeypatch.context() as busy:
            busy.setattr(device_module, "can_device_access_peer", full)
            assert peer.unmapped(HERE, THERE).endswith(f"could not be tested on {THERE}: no room")
            assert judge(COPIES["gather"](), (HERE, THERE)).statistics.strategy == "bounce"
        assert peer.unmapped(HERE, THERE) == ""


@pytest.mark.simdev
@pytest.mark.usefixtures("access")
def test_a_pattern_that_is_read_right() -> None:
    with reading(ReadsPeers):
        assert peer.unmapped(HERE, THERE) == ""
        assert peer.unmapped(THERE, HERE) == "", "the other direction has a separate answer"


@pytest.mark.simdev
@pytest.mark.usefixtures("access")
def test_a_mapping_that_reads_wrong_bytes_is_not_used() -> None:
    """Fault 22. An IOMMU that breaks peer access gives wrong bytes without an error."""
    with reading(ReadsWrong):
        assert "elements of a pattern on" in peer.unmapped(HERE, THERE)
        done = judge(COPIES["pool to pool"](), (HERE, THERE))
        assert done.statistics.strategy == "bounce"
        assert "elements of a pattern on" in done.statistics.why


@pytest.mark.simdev
@pytest.mark.usefixtures("access")
def test_a_device_without_a_kernel_that_reads_peers() -> None:
    """Fault 23. Two devices are connected through the host alone."""
    why = peer.unmapped(HERE, THERE)
    assert why.startswith(f"reading a pattern of {HERE} on {THERE} raised Unsupported")
    assert judge(COPIES["gather"](), (HERE, THERE)).statistics.strategy == "bounce"


# What carries a copy out


def chosen(terms: Terms = Terms(), backend: str | None = None) -> Choice:  # noqa: B008
    view = KVView([torch.zeros(3, 4, 32, dtype=torch.uint8).to(HERE)], "layer | block token dim")
    return peer.reached(view.as_peer(THERE), choose(THERE, backend), terms)


@pytest.mark.simdev
def test_ways_by_what_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    with reading(ReadsPeers):
        monkeypatch.setattr(peer, "unmapped", answering(""))
        assert chosen().name == chosen(Terms("idle")).name == ReadsPeers.name
        with refused(Unsupported, "max_thread_blocks=3", "only 'zero_copy'"):
            chosen(Terms(max_thread_blocks=3))
        assert chosen(backend="reference").name == "bounce"
        monkeypatch.setattr(peer, "unmapped", answering("it is not"))
        assert chosen().name == "bounce"
        assert chosen() is chosen(), "else each copy would be prepared anew"
        assert chosen(Terms(max_gbps=1.0)) is chosen(Terms(max_gbps=2.0))


# On CUDA devices


@pytest.fixture
def two() -> Two:
    return two_of(CUDA)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("how", "strategy"),
    [
        ({}, "zero_copy"),
        ({"overlap": "idle"}, "cuda"),
        ({"max_thread_blocks": 3}, "zero_copy"),
        ({"overlap": "idle", "max_thread_blocks": 3}, "zero_copy"),
        ({"backend": "cuda"}, "cuda"),
        ({"backend": "triton"}, "triton"),
        ({"backend": "zero_copy"}, "zero_copy"),
        ({"backend": "reference"}, "bounce"),
    ],
    ids=str,
)
def test_what_reads_on_two_devices(two: Two, how: dict[str, Any], strategy: str) -> None:
    if why := peer.unmapped(*two):
        pytest.skip(why)
    for name in ("pool to pool", "memory objects, gathered", "blocks of heads", "NZ"):
        assert judge(COPIES[name](), two, **how).statistics.strategy == strategy


@pytest.mark.gpu
def test_an_address_of_a_peer_is_told_once_access_is_open(two: Two) -> None:
    if why := peer.unmapped(*two):
        pytest.skip(why)
    memory = torch.zeros(4096, device=two[0])
    assert zero_copy.device_address(memory.data_ptr() + 64, two[1]) == memory.data_ptr() + 64
