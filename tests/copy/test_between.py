# SPDX-License-Identifier: Apache-2.0
"""Copies between two devices of one type: every byte, by a kernel that reads the peer's rows and
through the host; what they wait for, and what waits for them; what is refused."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support.block_cases import BLOCK_BYTES, DST, SIZE, SRC, Pair, block_first, layered
from support.cuda_cases import COPIES, HND, NHD, Copy, End, by
from support.device_cases import check_canaries, current, delay, on
from support.guarded_memory import filled, refused
from support.peer_cases import ReadsPeers, Two, answering, judge, reading, settle_both, two_of

from portakv import DeviceMismatch, Index, KVView, LayoutError, SlotError, Unsupported, copy_rows
from portakv.copy import submit
from portakv.interconnect import peer

HOST = "the test says so"


@pytest.fixture
def two(accelerator: torch.device) -> Two:
    return two_of(accelerator)


@pytest.fixture
def through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "unmapped", answering(HOST))


@pytest.fixture(params=["mapped", "through the host"])
def route(request: pytest.FixtureRequest, two: Two, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select how rows cross; devices that map no memory only go through the host."""
    if request.param == "through the host":
        monkeypatch.setattr(peer, "unmapped", answering(HOST))
    elif peer.unmapped(*two):
        pytest.skip(peer.unmapped(*two))
    return str(request.param)


@pytest.mark.parametrize("name", COPIES)
def test_every_byte_of_every_shape(two: Two, route: str, name: str) -> None:
    for overlap in ("compute", "idle"):
        done = judge(COPIES[name](), two, overlap=overlap)
        engines = ("bounce",) if route == "through the host" else ("zero_copy", "cuda", "triton")
        assert done.statistics.strategy in engines


def wide(layout: str, heads: int, blocks: int, size: int, dim: int = 128, **more: Any) -> End:
    """Layers of bfloat16 keys and values of real widths."""
    inner = (heads, size) if layout == HND else (size, heads)
    made = [filled((2, blocks, *inner, dim), torch.bfloat16) for _ in range(2)]
    return End(made, layout, **more)


FLEX = "block layer kv token head dim"
MLA = "layer | block token dim"
#: What engines exchange, each with the blocks that are read and written.
EXCHANGED = {
    "NHD to HND": lambda: Copy(
        by(wide(NHD, 8, 6, 16), [4, 0, 5], 16), by(wide(HND, 8, 6, 16), [1, 3, 2], 16), 48
    ),
    "vLLM to FlexKV": lambda: Copy(
        by(wide(NHD, 8, 6, 16), [4, 0, 5], 16),
        by(End(filled((6, 2, 2, 16, 8, 128), torch.bfloat16), FLEX), [1, 3, 2], 16),
        48,
    ),
    "rows of 256 B": lambda: Copy(
        by(wide(NHD, 1, 6, 16), [4, 0, 5], 16), by(wide(HND, 1, 6, 16), [1, 3, 2], 16), 48
    ),
    "MLA, 1152 B": lambda: Copy(
        by(End([filled((6, 64, 576), torch.bfloat16) for _ in range(2)], MLA), [4, 0, 5], 64),
        by(End([filled((6, 64, 576), torch.bfloat16) for _ in range(2)], MLA), [1, 3, 2], 64),
        192,
    ),
    "16 to 64 tokens a block": lambda: Copy(
        by(wide(NHD, 8, 9, 16), [4, 0, 5, 8, 1, 7], 16), by(wide(NHD, 8, 3, 64), [2, 0], 64), 96
    ),
}


@pytest.mark.parametrize("name", EXCHANGED)
def test_what_engines_exchange(two: Two, route: str, name: str) -> None:
    judge(EXCHANGED[name](), two)


def test_a_slice_of_heads(two: Two, route: str) -> None:
    """Two of eight heads, as another tensor parallel size has them; the rest stays poisoned."""
    src = [filled((2, 6, 16, 8, 64), torch.bfloat16, device=two[0]) for _ in range(2)]
    dst = [filled((2, 5, 16, 2, 64), torch.bfloat16, poison=True, device=two[1]) for _ in range(2)]
    expected = [x.cpu() for x in dst]
    view = KVView(src, NHD).slice(heads=slice(4, 6))
    copy_rows(view, KVView(dst, NHD), Index([3, 5, 0], 16), Index([4, 1, 2], 16)).synchronize()
    settle_both(two)
    for read, rows, result in zip(src, expected, dst, strict=True):
        rows[:, [4, 1, 2]] = read.cpu()[:, [3, 5, 0], :, 4:6]
        assert torch.equal(result.cpu().view(torch.int16), rows.view(torch.int16))
        check_canaries(result)


def crossing(two: Two) -> Pair:
    src = layered(two[0])
    dst = block_first(two[1])
    settle_both(two)
    return Pair(src, dst)


def test_every_way_of_blocks(two: Two, route: str, options: dict[str, Any]) -> None:
    for more in ({}, {"overlap": "idle"}, {"stream": torch.Stream(two[1])}):
        blocks = crossing(two)
        blocks.start(**options, **more).synchronize()
        settle_both(two)
        assert blocks.landed()
        for tensor in (*blocks.src.tensors, blocks.dst.tensors):
            check_canaries(tensor)


def small_slices(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """With a reason of their own they are not the launches that other tests prepared."""
    monkeypatch.setattr(peer, "SLICE", nbytes)
    monkeypatch.setattr(peer, "unmapped", answering(f"{HOST}, {nbytes} B at a time"))


def test_slices_through_the_host(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two buffers in turns, each used several times; ids that are skipped on either side."""
    small_slices(monkeypatch, 1000)
    for name in ("pool to pool", "several units of an id", "opaque pages", "two nests"):
        assert HOST in judge(COPIES[name](), two).statistics.why
    ids = [5, 0, -1, 11, 7, 3], [0, -1, 2, 9, 4, 1]
    for places in ((two[0], two[1]), (two[1], two[0]), (two[0], None), (None, two[1])):
        src = layered(two[0], blocks=3)
        dst = layered(two[1], blocks=3)
        settle_both(two)
        indices = [
            x if y is None else torch.tensor(x).to(y) for x, y in zip(ids, places, strict=True)
        ]
        expected = dst.rows()
        for src_id, dst_id in zip(*ids, strict=True):
            if src_id >= 0 and dst_id >= 0:
                expected[:, :, dst_id] = src.rows()[:, :, src_id]
        copy_rows(src.view, dst.view, *indices).synchronize()
        settle_both(two)
        assert torch.equal(dst.rows(), expected)


def test_a_backend_that_reads_peers_on_the_simulated_device(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's way of a mapped copy, with a reader in the place of kernels."""
    if two[0].type == "cuda":
        pytest.skip("kernels read there")
    monkeypatch.setattr(peer, "unmapped", answering(""))
    with reading(ReadsPeers):
        for options in ({}, {"overlap": "idle"}, {"by_layer": True}, {"cancellable": True}):
            src = layered(two[0])
            dst = layered(two[1])
            settle_both(two)
            blocks = Pair(src, dst)
            done = blocks.start(**options)
            done.synchronize()
            settle_both(two)
            assert blocks.landed()
            assert done.statistics.strategy == ReadsPeers.name
            assert done.statistics.why == "reads the peer's rows, with the whole device"


# Order, in both directions. Ids, and tables of addresses, are on the devices before: sending them
# would wait for what the streams hold.


class Late:
    """A copy that was made before, whose source gets its rows late."""

    def __init__(self, two: Two) -> None:
        src = layered(two[0])
        dst = block_first(two[1])
        self.fresh = layered(two[0])
        self.two = two
        self.ids = (Index(SRC, SIZE), Index(DST, SIZE))
        settle_both(two)
        Pair(src, dst).start(*self.ids).synchronize()
        settle_both(two)
        self.blocks = Pair(self.fresh, dst)
        self.blocks.src = src

    def produce(self) -> None:
        """Fill the owner's memory on its current stream."""
        delay(current(self.two[0]))
        for tensor, made in zip(self.blocks.src.tensors, self.fresh.tensors, strict=True):
            tensor.copy_(made)

    def spoil(self) -> None:
        """Likewise."""
        for tensor in self.blocks.src.tensors:
            tensor.fill_(7)

    def landed(self) -> bool:
        settle_both(self.two)
        return self.blocks.landed()


@pytest.mark.parametrize("how", ["current stream", "side stream", "by layer"])
def test_it_waits_for_the_owner_and_the_owner_for_it(two: Two, route: str, how: str) -> None:
    for _ in range(2):
        late = Late(two)
        stream = torch.Stream(two[1]) if how == "side stream" else None
        late.produce()
        delay(stream or current(two[1]))
        late.blocks.start(*late.ids, stream=stream, by_layer=how == "by layer")
        late.spoil()
        assert late.landed()


@pytest.mark.parametrize("options", [{"cancellable": True}, {"detached": True}], ids=str)
def test_what_only_the_handle_orders_waits_for_the_owner(
    two: Two, route: str, options: dict[str, Any]
) -> None:
    """Also for a current stream of the owner that no other thread has."""
    late = Late(two)
    with on(torch.Stream(two[0])):
        late.produce()
        done = late.blocks.start(*late.ids, **options)
        done.synchronize()
        late.spoil()
    assert late.landed()


def test_buffers_are_not_filled_before_they_were_emptied(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch, BLOCK_BYTES)  # five
    for _ in range(2):
        late = Late(two)
        late.produce()
        delay(current(two[1]))
        late.blocks.start(*late.ids)
        assert late.landed()


def test_without_its_order_it_reads_other_bytes(two: Two, through_the_host: None) -> None:
    if two[0].type == "cuda":
        pytest.skip("the simulated device alone takes the worst order every time")
    late = Late(two)
    with on(torch.Stream(two[0])):
        late.produce()  # on a stream that is not the current one when it copies
    late.blocks.start(*late.ids).synchronize()
    assert not late.landed()


def test_a_source_that_is_let_go_is_held(two: Two, route: str) -> None:
    for options in ({}, {"detached": True}, {"detached": True, "by_layer": True}):
        late = Late(two)
        late.produce()
        shape = late.fresh.tensors[0].shape
        delay(current(two[1]))
        late.blocks.start(*late.ids, **options)
        late.blocks.src = late.fresh = late.blocks.dst
        gc.collect()  # a view that was cut into slices is part of a cycle
        taken = [torch.full(shape, 9, dtype=torch.float16, device=two[0]) for _ in range(9)]
        assert late.landed()
        del taken


def test_the_current_device_stays(two: Two, route: str) -> None:
    for index in (0, 1):
        torch.accelerator.set_device_index(index)
        try:
            blocks = crossing(two)
            blocks.start().synchronize()
            assert blocks.landed()
            assert torch.accelerator.current_device_index() == index
        finally:
            torch.accelerator.set_device_index(0)


# What is refused


def test_devices_of_two_types() -> None:
    cache = layered()
    meta = torch.device("meta")
    with refused(DeviceMismatch, "cpu", "meta", "pinned host memory"):
        cache.view.as_peer(meta)


def test_nobody_writes_into_a_peers_memory(two: Two) -> None:
    blocks = crossing(two)
    with refused(LayoutError, "peer", "its own device", watch=blocks.dst.tensors):
        copy_rows(blocks.src.view, blocks.dst.view.as_peer(two[0]), [1], [2])


def test_bad_ids_between_devices(two: Two, route: str) -> None:
    blocks = crossing(two)
    with refused(SlotError, "at position 8", "slot 36", watch=blocks.dst.tensors):
        blocks.start([5, 0, 9, 2, 3])
    for device in two:
        with pytest.raises(SlotError, match="Position 8"):
            blocks.start(torch.tensor([5, 0, 9, 2, 3]).to(device)).synchronize()


def test_engines_and_limits_that_read_no_peers(two: Two, through_the_host: None) -> None:
    blocks = crossing(two)
    with refused(
        Unsupported, "'staged' was named", "does not read a peer", watch=blocks.dst.tensors
    ):
        blocks.start(backend="staged")
    done = blocks.start(backend="reference")
    done.synchronize()
    assert "'reference' was named" in done.statistics.why
    assert blocks.landed()


def test_no_copy_between_devices_inside_a_capture(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = crossing(two)
    monkeypatch.setattr(submit, "capturing", lambda device: device == two[0])
    with refused(Unsupported, str(two[0]), str(two[1]), "outside", watch=blocks.dst.tensors):
        blocks.start()
