# SPDX-License-Identifier: Apache-2.0
"""Memory of devices and events that processes share: by vendors' words, and on CUDA devices."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.hostile_bytes import lied
from support.peer_process import Peer, Refused
from support.pool_processes import Child

from portakv.errors import PeerError, PortaKVError, Unsupported
from portakv.migrate import shared_memory

SHARE = "import os, torch\nfrom portakv.migrate import shared_memory as ipc\n"
SIMDEV = torch.device("privateuseone", 0)
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two CUDA devices")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.mark.simdev
def test_a_device_without_a_way_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 21: by torch, or by the system below it."""
    tensor = torch.zeros(8, device=SIMDEV)
    assert "_share_simdev_" in str(shared_memory.why_not(tensor))

    def refuses(_: object) -> None:
        raise RuntimeError("pidfd_getfd: Operation not permitted\nException raised from ...")

    monkeypatch.setattr(torch.UntypedStorage, "_share_simdev_", refuses, raising=False)
    why = "torch rejects it for simdev:0 (pidfd_getfd: Operation not permitted); use a transport"
    assert shared_memory.why_not(tensor) == why
    with pytest.raises(Unsupported, match="pidfd_getfd"):
        shared_memory.export(tensor.untyped_storage())


@pytest.mark.simdev
def test_a_vendors_words_cross_unchanged_but_for_the_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = torch.arange(12, dtype=torch.int32, device=SIMDEV).view(3, 4)
    storage = tensor.untyped_storage()
    opened = list[Any]()
    released = list[Any]()
    words = b"h" * 234, storage.nbytes(), 512, b"/counter", 3, b"e" * 64, True

    def open_(*arguments: Any) -> torch.UntypedStorage:
        opened.append(arguments)
        return tensor.to(torch.device(SIMDEV.type, arguments[0])).untyped_storage()

    for end, fake in {
        "share_simdev_": lambda _: (0, *words),
        "new_shared_simdev": staticmethod(open_),
        "release_ipc_counter_simdev": staticmethod(lambda *arguments: released.append(arguments)),
    }.items():
        monkeypatch.setattr(torch.UntypedStorage, f"_{end}", fake, raising=False)
    data = shared_memory.share(tensor[1:])
    with pytest.raises(Unsupported, match="this process's own, and torch opens only other"):
        shared_memory.open_shared(data)
    foreign = lied(data, process={0: 0})
    result = shared_memory.open_shared(foreign, torch.device(SIMDEV.type, 1))
    assert opened == [(1, *words)]
    assert result.cpu().tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    exported = shared_memory.export(storage)
    assert released == []
    exported.close()
    exported.close()
    assert released == [(b"/counter", 3)]
    shared_memory.Held(foreign, result).close()  # another process's is not this one's to release
    assert len(released) == 1
    with pytest.raises(Unsupported, match="of type simdev, and device=cpu is not"):
        shared_memory.open_shared(foreign, "cpu")


@pytest.mark.simdev
def test_events_that_cannot_be_shared_say_so() -> None:
    with pytest.raises(Unsupported, match="interprocess=True"):
        shared_memory.export_event(torch.Event(SIMDEV))
    event: Any = SimpleNamespace(ipc_handle=lambda: b"e" * 64, device=torch.device("cuda", 0))
    data = shared_memory.export_event(event)
    with pytest.raises(PortaKVError):
        shared_memory.open_event(data, SIMDEV)
    with pytest.raises(PeerError, match="got other bytes"):
        shared_memory.open_shared(lied(data, process={0: 0}, device="cpu"))


@pytest.mark.simdev
def test_a_device_without_a_uuid_is_like_none_of_another_process() -> None:
    """Fault 33: devices that look alike count as two."""
    one, two = (shared_memory.identity(torch.device(SIMDEV.type, i)) for i in range(2))
    assert one == shared_memory.identity(SIMDEV)
    assert len({one, two, shared_memory.host_id()}) == 3


# --- two processes and a CUDA device

EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
OWNER = f"{SHARE}device = torch.device('cuda', 0)\n"
#: Tensors one after the other in the allocator's blocks, small and large.
MANY = """
xs = [torch.full((n,), i, dtype=torch.int32, device=device)
      for i, n in enumerate([3, 700, 5, 1 << 19, 9, 1 << 22, 100])]
torch.cuda.synchronize()
"""


def on_device(owner: Peer, code: str, **values: Any) -> Any:
    """Do the same as `Peer.do`; skip if this platform does not export such memory."""
    try:
        return owner.do(code, **values)
    except Refused as error:
        if "Unsupported" in str(error):
            pytest.skip(f"this platform does not share it: {error}")
        raise


def opened_here(data: bytes, device: int = 0) -> torch.Tensor:
    try:
        return shared_memory.open_shared(data, torch.device("cuda", device))
    except Unsupported as error:
        pytest.skip(f"this platform does not open it: {error}")


@pytest.mark.gpu
@pytest.mark.parametrize("environment", [{}, EXPANDABLE], ids=["blocks", "expandable"])
def test_device_tensors_cross_with_the_right_offsets(environment: dict[str, str]) -> None:
    with Peer(**environment) as owner:
        owner.do(OWNER + MANY)
        shared = on_device(owner, "answer = [ipc.share(x[1:]) for x in xs]")
        opened = [opened_here(data) for data in shared]
        for i, tensor in enumerate(opened):
            assert tensor.device == torch.device("cuda", 0)
            assert bool((tensor == i).all())
            tensor[1] = 100 + i
        torch.cuda.synchronize()
        assert owner.do("answer = [x[2].item() for x in xs]") == [100 + i for i in range(7)]
        owner.do("[x.fill_(55) for x in xs]; torch.cuda.synchronize()")
        assert all(bool((tensor == 55).all()) for tensor in opened)
        view = on_device(owner, "answer = ipc.share(xs[3].view(512, 1024).t()[3:9, ::2])")
        assert opened_here(view).stride() == (1, 2048)
        with pytest.raises(Unsupported, match="rejects"):
            shared_memory.share(opened[3])  # torch passes none on
        with pytest.raises(Refused, match=r"Unsupported.*this process's"):
            owner.do("ipc.open_shared(ipc.share(xs[0]))")
        del opened, tensor
        torch.cuda.synchronize()


@pytest.mark.gpu
@two_devices
@pytest.mark.parametrize("environment", [{}, EXPANDABLE], ids=["blocks", "expandable"])
def test_memory_of_another_device_counts_as_the_readers(environment: dict[str, str]) -> None:
    if not torch.cuda.can_device_access_peer(1, 0):
        pytest.skip("these devices do not reach each other's memory")
    with Peer(**environment) as owner:
        owner.do(OWNER + MANY)
        data = on_device(owner, "answer = ipc.share(xs[5].view(64, -1)[7:])")
        opened = opened_here(data, 1)
        assert opened.device == torch.device("cuda", 1)
        assert bool((opened + 0 == 5).all())
        owner.do("xs[5][-1] = 77; torch.cuda.synchronize()")
        assert opened[-1, -1].item() == 77
        torch.cuda.synchronize()
        del opened


@pytest.mark.gpu
def test_device_memory_outlives_its_owner() -> None:
    with Peer() as owner:
        owner.do(OWNER)
        code = "x = torch.arange(1 << 20, device=device); torch.cuda.synchronize()\n"
        opened = opened_here(on_device(owner, f"{code}answer = ipc.share(x)"))
        owner.kill()
        assert torch.equal(opened, torch.arange(1 << 20, device="cuda:0"))
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_an_exported_allocation_that_nobody_opened_is_freed() -> None:
    with Peer() as owner:
        code = """
x = torch.ones(32 << 20, device=device)
before = torch.cuda.memory_allocated(device)
assert ipc.why_not(x) is None
held = [ipc.export(x.untyped_storage()) for _ in range(3)]
[one.close() for one in held]
del x
torch.cuda.ipc_collect()
answer = before - torch.cuda.memory_allocated(device)
"""
        assert on_device(owner, OWNER + code) == 128 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=two_devices)])
def test_a_stream_waits_for_the_event_of_another_process(index: int) -> None:
    if index and not torch.cuda.can_device_access_peer(1, 0):
        pytest.skip("these devices do not reach each other's memory")
    with Peer() as owner:
        code = """
x = torch.zeros(1 << 20, dtype=torch.int32, device=device)
event = torch.cuda.Event(interprocess=True)
event.record()
torch.cuda.synchronize()
answer = ipc.share(x), ipc.export_event(event)
"""
        data, handle = on_device(owner, OWNER + code)
        opened = opened_here(data, index)
        event = shared_memory.open_event(handle, torch.device("cuda", index))
        for number in (1, 2, 3):
            owner.do(
                "torch.cuda._sleep(400_000_000); x.fill_(number); event.record()", number=number
            )
            stream = torch.cuda.Stream(index)
            stream.wait_event(event)
            with torch.cuda.stream(stream):
                copied = opened.clone()
            stream.synchronize()
            assert bool((copied == number).all())
        with pytest.raises(Refused, match=r"Unsupported.*this process's"):
            owner.do("ipc.open_event(ipc.export_event(event), device)")
        with pytest.raises(Unsupported, match="interprocess=True"):
            shared_memory.export_event(torch.cuda.Event())
        owner.do("torch.cuda.synchronize()")
        del opened, event


@pytest.mark.gpu
def test_devices_are_known_by_their_uuid() -> None:
    """Fault 33: another process numbers the devices in another order."""
    count = torch.cuda.device_count()
    local = [shared_memory.identity(torch.device("cuda", i)) for i in range(count)]
    assert len(set(local)) == count
    order = ",".join(map(str, reversed(range(count))))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with Peer(CUDA_VISIBLE_DEVICES=order) if visible is None else Peer() as other:
        code = f"answer = [ipc.identity(torch.device('cuda', i)) for i in range({count})]"
        remote = other.do(SHARE + code)
    assert sorted(remote) == sorted(local)
    if visible is None:
        assert remote == local[::-1]


@pytest.mark.gpu
def test_a_forked_process_is_refused_device_memory() -> None:
    tensor = torch.zeros(4, device="cuda:0")

    def work(pipe: Any) -> None:
        gc.disable()  # which would end objects of CUDA that other tests left, and so the process
        pipe.send(shared_memory.why_not(tensor))
        pipe.recv()

    child = Child(work)
    assert "fork" in child.receive() or "refuses" in child.receive()
    child.end()
