# SPDX-License-Identifier: Apache-2.0
"""Memory that processes share without a copy: what crosses, how long it lives, what is refused."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from support.hostile_bytes import lied, mutated, sealed
from support.named_memory import named_memory
from support.peer_process import Peer
from support.pool_processes import Child

from portakv.errors import HostMemoryError, InvalidTerms, PeerError, PortaKVError, Unsupported
from portakv.migrate import Channel, Owner, Shard, shared_memory
from portakv.migrate.described import strided
from portakv.view import KVView
from portakv.weights import publish

SHARE = "import os, torch\nfrom portakv.migrate import shared_memory as ipc\n"
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with Peer() as process:
        process.do(SHARE)
        yield process


def view_of(tensor: torch.Tensor, at: int, to: int) -> torch.Tensor:
    """Bytes of a tensor as a storage of their own."""
    buffer = (ctypes.c_ubyte * (to - at)).from_address(tensor.data_ptr() + at)
    return torch.frombuffer(buffer, dtype=torch.uint8)


def sample(*shape: int) -> torch.Tensor:
    """Numbers in shared memory."""
    tensor = shared_memory.shared_empty(shape, torch.float32)
    return tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float32).view(shape))


def descriptors() -> list[str]:
    gc.collect()
    return os.listdir("/proc/self/fd")


def test_both_processes_read_what_either_wrote(peer: Peer) -> None:
    local = sample(4, 6)
    peer.do("remote = ipc.open_shared(data); remote[1] = -1", data=shared_memory.share(local))
    assert bool((local[1] == -1).all())
    local[2] = 7
    assert peer.do("answer = remote.tolist()") == local.tolist()
    data = peer.do(
        "own = torch.arange(24, dtype=torch.int16).share_memory_().view(2, 12)\n"
        "answer = ipc.share(own[1])"
    )
    opened = shared_memory.open_shared(data)
    assert opened.tolist() == list(range(12, 24))
    opened[3] = 99
    assert peer.do("answer = own[1, 3].item()") == 99


VIEWS = {
    "slice": lambda x: x[3:5, 1:, 2],
    "every second": lambda x: x[::2, :, ::3],
    "transposed": lambda x: x.permute(2, 0, 1),
    "expanded": lambda x: x[1:2].expand(5, -1, -1),
    "one number": lambda x: x[5, 6, 7],
    "no elements": lambda x: x[3:3],
    "parameter": lambda x: x.detach().requires_grad_()[2],
    "overlapping": lambda x: x.as_strided((4, 4), (2, 1), 17),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_keep_their_shape_strides_and_offset(peer: Peer, view: str) -> None:
    part = VIEWS[view](sample(6, 7, 8))
    code = "x = ipc.open_shared(data); answer = x.tolist(), x.stride(), x.requires_grad"
    assert peer.do(code, data=shared_memory.share(part)) == (part.tolist(), part.stride(), False)


def test_suballocations_and_every_dtype_cross(peer: Peer) -> None:
    whole = shared_memory.shared_empty(1 << 16, torch.uint8)
    whole.copy_(torch.arange(1 << 16, dtype=torch.int32).to(torch.uint8))
    names = "bool uint8 int16 uint32 int64 float16 bfloat16 float8_e4m3fn complex64"
    for at, text in enumerate(names.split()):
        dtype = getattr(torch, text)
        part = whole[4096 * at + 24 : 4096 * at + 24 + 6 * 8].view(dtype)[1:]
        code = "x = ipc.open_shared(data); answer = str(x.dtype), bytes(x.view(torch.uint8))"
        message = peer.do(code, data=shared_memory.share(part))
        assert message == (str(dtype), bytes(part.view(torch.uint8)))


def test_memory_whose_end_is_no_whole_element_crosses(peer: Peer) -> None:
    pages = sample(3000).view(torch.uint8)
    odd = view_of(pages, 4, 11999)
    part = odd[8:4008].view(torch.float32)
    assert part.untyped_storage().nbytes() % 4 == 3
    message = peer.do("answer = ipc.open_shared(data).tolist()", data=shared_memory.share(part))
    assert message == list(map(float, range(3, 1003)))


def test_memory_that_the_kernel_keeps_in_parts_crosses(peer: Peer) -> None:
    tensor = sample(4 * mmap.PAGESIZE)
    advise = ctypes.CDLL(None).madvise
    page = ctypes.c_void_p(tensor.data_ptr() + 5 * mmap.PAGESIZE)
    assert advise(page, ctypes.c_size_t(mmap.PAGESIZE), 10) == 0  # MADV_DONTFORK
    lines = Path("/proc/self/maps").read_text().split(f"{tensor.data_ptr():x}-")[1].splitlines()
    assert int(lines[0].split("-")[0].split()[0], 16) < tensor.data_ptr() + tensor.nbytes
    message = peer.do("answer = ipc.open_shared(data)[-1].item()", data=shared_memory.share(tensor))
    assert message == tensor.numel() - 1


def test_whole_allocations_are_exported_and_let_go(peer: Peer) -> None:
    tensor = sample(100, 10)
    exported = shared_memory.export(tensor[3].untyped_storage())
    assert exported.tensor is not None
    assert exported.tensor.shape == (4000,)
    peer.do("remote = ipc.open_shared(handle)", handle=exported.handle)
    assert peer.do("answer = remote.view(torch.float32)[35].item()") == 35
    again = shared_memory.open_shared(exported.handle)  # host memory: by its own process too
    assert again.data_ptr() != tensor.data_ptr()
    for _ in range(2):
        exported.close()
    assert exported.tensor is None
    assert tensor[3, 5] == 35


def test_who_opened_memory_passes_it_on(peer: Peer) -> None:
    local = sample(10)
    passed = peer.do(
        "x = ipc.open_shared(data); answer = ipc.share(x[4:])", data=shared_memory.share(local)
    )
    third = Child(lambda pipe: shared_memory.open_shared(passed)[:1].fill_(50))
    assert third.end() == 0
    assert local[4] == 50


def test_tensors_of_one_file_are_one_region(peer: Peer) -> None:
    """Several storages of a file, slices, and a tensor without elements; others have regions of
    their own."""
    name = f"ipc-{os.getpid()}"
    with named_memory(name, 6000) as memory:
        first = memory[:3000]
        second = memory[3000:]
        other = sample(5, 6)
        tensors = {
            "second": second,
            "part": first[100:].view(50, 58)[2:, ::7],
            "first": first,
            "nothing": first[:0],
            "other": other[2:].t(),
        }
        first.copy_(torch.arange(3000) % 251)
        second.fill_(7)
        regions, places = shared_memory.export_all(tensors, "Sharing tensors")
        assert len(regions) == 2
        assert places["nothing"] is None
        opened = [shared_memory.open_shared(region.handle) for region in regions]
        assert all(x.dtype == torch.uint8 and x.ndim == 1 for x in opened)
        for what, place in places.items():
            if place is not None:
                tensor = tensors[what]
                kind = tensor.dtype, tensor.shape, tensor.stride()
                seen = strided(opened[place[0]], place[1], *kind)
                assert torch.equal(seen, tensor), what
        code = "answer = ipc.open_shared(data).numel()"
        assert peer.do(code, data=regions[0].handle) == opened[0].numel()
        for region in regions:
            region.close()
        with pytest.raises(Unsupported, match=r"^Sharing tensors\['own'\]: it does not lie"):
            shared_memory.export_all({"first": first, "own": torch.zeros(3)}, "Sharing tensors")


def test_many_regions_are_opened_without_descriptors(peer: Peer) -> None:
    """And what was opened so is still the other process's memory."""
    handles = peer.do(
        "tensors = [ipc.shared_empty(300, torch.uint8).fill_(i) for i in range(40)]\n"
        "answer = [ipc.share(x[100:]) for x in tensors]"
    )
    before = descriptors()
    opener = shared_memory.Opener(descriptors=False)
    opened = [opener.open(one) for one in handles]
    assert descriptors() == before
    assert [x.tolist() for x in opened] == [[i] * 200 for i in range(40)]
    opened[3][7] = 99
    assert peer.do("answer = tensors[3][107].item()") == 99
    with pytest.raises(Unsupported, match="its file is not open here"):
        shared_memory.share(opened[0])
    assert descriptors() == before


# --- how long it lives


def test_memory_outlives_the_tensor_that_was_shared(peer: Peer) -> None:
    local = sample(5000)
    peer.do("x = ipc.open_shared(data)", data=shared_memory.share(local))
    del local
    gc.collect()
    assert peer.do("answer = x.sum().item()") == sum(range(5000))


def test_memory_outlives_its_owner() -> None:
    def work(pipe: Any) -> None:
        tensor = shared_memory.shared_empty(5000, torch.int32).fill_(3)
        pipe.send(shared_memory.share(tensor))
        pipe.recv()

    owner = Child(work)
    data = owner.receive()
    opened = shared_memory.open_shared(data)
    owner.kill()
    assert opened.sum() == 15_000
    with pytest.raises(PeerError, match=f"process {owner.pid}, got a process that has ended"):
        shared_memory.open_shared(data)


def test_nothing_is_left_behind(peer: Peer) -> None:
    before = descriptors()
    for _ in range(3):
        local = sample(1000)
        peer.do("x = ipc.open_shared(data); answer = ipc.share(x)", data=shared_memory.share(local))
        again = shared_memory.open_shared(shared_memory.share(local))
        other = shared_memory.open_shared(
            peer.do("own = x.clone().share_memory_(); answer = ipc.share(own)")
        )
        assert torch.equal(again, other)
    result = Path("/dev/shm").glob("*portakv*")
    assert not [one for one in result if str(os.getpid()) in one.name]
    assert not list(Path("/dev/shm").glob(f"torch_{peer.pid}_*"))
    del local, again, other
    assert descriptors() == before


def test_memory_that_is_gone_is_not_opened(peer: Peer) -> None:
    data = peer.do("x = ipc.shared_empty(10, torch.uint8); answer = ipc.share(x); del x")
    with pytest.raises(PeerError, match="got none any more"):
        shared_memory.open_shared(data)
    peer.do("xs = [ipc.shared_empty(10, torch.uint8) for _ in range(9)]")  # take its number
    with pytest.raises(PeerError, match=r"has another file.* share it again"):
        shared_memory.open_shared(data)


def test_a_forked_process_shares_and_opens() -> None:
    before = sample(6)
    local = sample(8)
    data = shared_memory.share(local)

    def work(pipe: Any) -> None:
        opened = shared_memory.open_shared(data)
        opened[0] = 40
        pipe.send(shared_memory.share(before))
        pipe.recv()

    child = Child(work)
    remote = shared_memory.open_shared(child.receive())
    assert local[0] == 40
    assert torch.equal(remote, before)
    assert remote.data_ptr() != before.data_ptr()
    assert child.end() == 0


# --- what is refused


def test_memory_of_one_process_is_refused_and_not_moved() -> None:
    """Fault 21: the export is refused, and the reason kept."""
    tensor = torch.arange(10)
    address = tensor.data_ptr()
    with pytest.raises(Unsupported, match=r"does not lie in shared memory; .*shared_empty"):
        shared_memory.share(tensor)
    assert shared_memory.why_not(tensor) == (
        "it does not lie in shared memory; take it from `shared_empty`, or call its "
        "share_memory_() before any view holds its address"
    )
    assert tensor.data_ptr() == address
    assert not tensor.is_shared()
    assert shared_memory.why_not(tensor.share_memory_()) is None
    with pytest.raises(Unsupported, match="shared memory"):
        shared_memory.export(torch.arange(10).untyped_storage())


def test_a_file_on_a_disk_is_no_shared_memory(tmp_path: Path) -> None:
    mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=64, dtype=torch.uint8)
    assert "shared memory" in str(shared_memory.why_not(mapped))


@pytest.mark.filterwarnings("ignore:.*(quantiz|nested tensors):UserWarning")
def test_odd_tensors_are_refused() -> None:
    """Fault 21: not every tensor has memory that strides tell of."""
    numbers = sample(4, 4)
    odd = [
        numbers.to_sparse(),
        torch.view_as_complex(numbers.view(2, 4, 2)).conj(),
        torch.quantize_per_tensor(numbers, 0.1, 10, torch.quint8),
        torch.nested.nested_tensor([numbers[0], numbers[1]]),
    ]
    for tensor in odd:
        assert "not a plain tensor" in str(shared_memory.why_not(tensor))
    assert "meta" in str(shared_memory.why_not(torch.empty(3, device="meta")))


def test_memory_of_a_device_that_is_not_here_is_refused() -> None:
    data = lied(shared_memory.share(sample(4)), device="cuda", process={0: 0})
    for device in ("cuda:17", "nonsense", "cpu"):
        with pytest.raises(Unsupported, match=r"device=.* is not"):
            shared_memory.open_shared(data, device)
    with pytest.raises(Unsupported, match=r"device=meta is not"):
        shared_memory.open_shared(shared_memory.share(sample(4)), "meta")


def test_a_number_of_a_process_that_is_used_again_is_refused(peer: Peer) -> None:
    data = peer.do("x = ipc.shared_empty(10, torch.uint8); answer = ipc.share(x)")
    assert shared_memory.open_shared(data).numel() == 10
    with pytest.raises(PeerError, match=f"process {peer.pid}, got a process that has ended"):
        shared_memory.open_shared(lied(data, process={2: 12345}))
    with pytest.raises(PeerError, match="has ended"):
        shared_memory.open_shared(lied(data, process={1: 1 << 40}))
    with pytest.raises(Unsupported, match="container has a separate process namespace"):
        shared_memory.open_shared(lied(data, process={0: 7}))


def test_hosts_and_devices_are_known_by_themselves(peer: Peer) -> None:
    """Fault 33: by the host's start and the device's UUID, not by a name or an address."""
    assert peer.do("answer = ipc.host_id()") == shared_memory.host_id()
    assert shared_memory.identity(torch.device("cpu")) == shared_memory.host_id()
    assert len(shared_memory.host_id().split("/")[0]) == 36
    data = lied(shared_memory.share(sample(4)), host="another/26")
    with pytest.raises(Unsupported, match=r"another host's, or a container's.* use a transport"):
        shared_memory.open_shared(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_another_users_memory_is_refused() -> None:
    data = shared_memory.share(local := sample(4))

    def work(pipe: Any) -> None:
        os.setuid(65534)
        # The kernel hides a process that changed its user from itself, unless it says otherwise.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        try:
            shared_memory.open_shared(data)
        except Unsupported as error:
            pipe.send(str(error))

    child = Child(work)
    message = child.receive()
    assert f"process {os.getpid()}'s (Permission denied); run both as one us" in message
    assert child.end() == 0
    assert local[3] == 3


def test_a_process_without_descriptors_is_told_so() -> None:
    """Not that the memory is gone, as each mapping has a descriptor."""
    data = shared_memory.share(local := sample(4))

    def work(pipe: Any) -> None:
        opened = [shared_memory.open_shared(data)]
        few = len(os.listdir("/proc/self/fd")) + 8
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
        try:
            while True:
                opened.append(shared_memory.open_shared(data))
        except PeerError as error:
            pipe.send(str(error))

    child = Child(work)
    assert "this process has too many open files: `ulimit -n` allows" in child.receive()
    assert child.end() == 0
    assert local[3] == 3


def test_no_file_but_one_in_memory_is_opened(peer: Peer, tmp_path: Path) -> None:
    data = peer.do("x = ipc.shared_empty(10, torch.uint8); answer = ipc.share(x)")
    (tmp_path / "file").write_bytes(b"\0" * 100)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "file", tmp_path / "pipe", Path("/dev/null")):
        place = peer.do("fd = os.open(path, os.O_RDWR); answer = fd", path=str(path))
        file = os.stat(path)
        handle = np.array([place, file.st_dev, file.st_ino], "<u8").tobytes()
        with pytest.raises(PeerError, match="has another file"):
            shared_memory.open_shared(lied(data, words={0: handle}))
        peer.do("os.close(fd)")
    with pytest.raises(PeerError, match="has another file"):
        shared_memory.open_shared(lied(data, words={1: 11}))
    for handle in (b"", b"x" * 23, b"\xff" * 24):
        with pytest.raises(PeerError):
            shared_memory.open_shared(lied(data, words={0: handle}))


def test_changed_bytes_are_refused_and_nothing_is_opened() -> None:
    rng = random.Random(1)
    data = shared_memory.share(sample(64, 3)[1:, :2])
    exported = shared_memory.export(sample(10).untyped_storage())
    before = descriptors()
    words = set()
    for i in range(10_000):
        was = (data, exported.handle)[i % 2]
        bad = mutated(rng, was)
        if bad == was:
            continue
        with pytest.raises(PeerError) as caught:
            shared_memory.open_shared(bad)
        words.add(str(caught.value))
    assert len(words) == 1
    assert descriptors() == before
    for other in (None, "text", 5, b"", b"\0" * 16, sealed(b""), sealed(b"\x90"), [data]):
        expected = PeerError if isinstance(other, bytes) else InvalidTerms
        with pytest.raises(expected, match="got"):
            shared_memory.open_shared(other)  # type: ignore[arg-type]


def test_lies_with_a_right_checksum_open_no_more_than_the_memory() -> None:
    rng = random.Random(2)
    local = sample(64, 3)
    data = shared_memory.share(local[1:, :2])
    before = descriptors()
    refused = 0
    for _ in range(3_000):
        try:
            result = shared_memory.open_shared(sealed(mutated(rng, data[16:])))
        except PortaKVError as error:
            refused += str(error).endswith(".")
            continue
        last = sum((n - 1) * x for n, x in zip(result.shape, result.stride(), strict=True))
        nbytes = (result.storage_offset() + last + 1) * result.itemsize
        assert result.untyped_storage().nbytes() <= local.nbytes
        assert 0 in result.shape or nbytes <= local.nbytes
    assert refused > 2_000
    del result
    assert descriptors() == before
    hostile: list[dict[str, Any]] = [
        {"kind": ["float32", [1 << 48] * 3, [0, 0, 0]]},
        {"kind": ["float32", [0], [1]]},
        {"kind": ["float32", [2], [1, 1]]},
        {"kind": ["float32", [2], [1 << 48]]},
        {"kind": ["quint8", [2], [1]]},
        {"kind": ["nn", [2], [1]]},
        {"kind": ["float32", [2], [-1]]},
        {"offset": 1 << 48},
        {"offset": -1},
        {"words": [b"", 0, 0, b"", 0, b"", False]},
        {"more": 1},
    ]
    for lie in hostile:
        with pytest.raises(PeerError, match="got other bytes"):
            shared_memory.open_shared(lied(data, **lie))


# --- what is set around it


def test_settings_of_torch_change_nothing() -> None:
    local = sample(6)
    data = shared_memory.share(local)
    empty = shared_memory.share(local[:0])
    with torch.inference_mode():
        opened = shared_memory.open_shared(data)
        made = shared_memory.shared_empty(3, torch.int8)
        none = shared_memory.open_shared(empty)
        assert shared_memory.why_not(local[1:]) is None
        exported = shared_memory.export(local.untyped_storage())
    for tensor in (opened, made, none, exported.tensor):
        assert tensor is not None
        assert not tensor.is_inference()
    with torch.device("meta"):
        opened = shared_memory.open_shared(data)
        made = shared_memory.shared_empty(3, torch.int8)
        none = shared_memory.open_shared(empty)
        exported = shared_memory.export(local.untyped_storage())
    for tensor in (opened, made, none, exported.tensor):
        assert tensor is not None
        assert tensor.device.type == "cpu"
    assert torch.equal(opened, local)


def test_shared_memory_is_there_from_the_start() -> None:
    tensor = shared_memory.shared_empty((3, 5), torch.bfloat16)
    assert (tensor.shape, tensor.dtype, float(tensor.abs().sum())) == ((3, 5), torch.bfloat16, 0)
    assert shared_memory.shared_empty(0, torch.uint8).shape == (0,)
    assert shared_memory.shared_empty((4, 0), torch.float64).dtype == torch.float64
    with pytest.raises(HostMemoryError, match=r"bytes of shared memory.*Request less"):
        shared_memory.shared_empty(1 << 60, torch.uint8)
    handle = msgspec.msgpack.decode(shared_memory.share(tensor)[16:])["words"][0]
    with pytest.raises(PermissionError):
        os.ftruncate(int.from_bytes(handle[:8], "little"), 1)  # would kill who has it mapped


def test_a_thousand_allocations_are_shared_by_one_look_at_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counts reads, as a time would depend on the machine."""
    tensors = {
        f"{n}": shared_memory.shared_empty(8, torch.uint8).fill_(n % 251) for n in range(100)
    }
    reads = list[str]()
    read_text = Path.read_text

    def counted(path: Path, *args: Any, **kwargs: Any) -> str:
        reads.append(str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", counted)
    with closing(Channel()) as channel, closing(publish(channel, tensors)):
        assert reads.count("/proc/self/maps") == 1
        caches = [shared_memory.shared_empty((2, 4, 16, 2, 8), torch.float16) for _ in range(100)]
        reads.clear()
        owner = Owner(channel, Shard(KVView(caches, "vllm-nhd")), model="m")
        owner.close()
        assert reads.count("/proc/self/maps") == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: shared_memory.share(cast(Any, None)),
        lambda: shared_memory.shared_empty((-1,), torch.float32),
        lambda: shared_memory.shared_empty(-1, torch.float32),
        lambda: shared_memory.shared_empty(1, cast(Any, "float32")),
        lambda: shared_memory.shared_empty(cast(Any, None), torch.float32),
        lambda: shared_memory.shared_empty(cast(Any, "3"), torch.float32),
        lambda: shared_memory.shared_empty(cast(Any, (1.5,)), torch.float32),
        lambda: shared_memory.shared_empty(1 << 62, torch.float32),
    ],
)
def test_wrong_arguments_of_shared_memory_are_named(call: Callable[[], object]) -> None:
    with pytest.raises(InvalidTerms, match=r"Expected (tensor|shape|dtype) to be"):
        call()
