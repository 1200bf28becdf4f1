# SPDX-License-Identifier: Apache-2.0
"""Weights in tiles: each byte is copied once, and a pull finds tiles that lie elsewhere by now."""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.weight_cases import Channels, make_channels, shared

from portakv.errors import TransferError, Unsupported
from portakv.weights import Parameter, plan, publish, pull_weights
from portakv.weights import pull as weight_mapped
from portakv.weights.owner import Versioned
from portakv.weights.plan import TILES, Tiles, cut, fits_tiles

channels = pytest.fixture(make_channels)
_sizes = st.lists(st.integers(1, 300).map(lambda n: n * TILES[-1]), max_size=6)


@given(_sizes)
def test_tiles_cover_each_byte_of_each_tensor_once(sizes: list[int]) -> None:
    starts = [0, *accumulate(size + 16 for size in sizes)]
    runs = [(start, 7 * start, size) for start, size in zip(starts, sizes, strict=False)]
    covered = np.zeros(starts[-1], np.int64)
    moved = np.zeros(starts[-1], np.int64)
    for size, into, src in cut(np.array(runs, np.int64).reshape(-1, 3)):
        for first, read in zip(into.tolist(), src.tolist(), strict=True):
            covered[first : first + size] += 1
            moved[first : first + size] = read + np.arange(size)
    expected = np.zeros_like(covered)
    for start, read, size in runs:
        expected[start : start + size] = 1
        inside = slice(start, start + size)
        assert (moved[inside] == read + np.arange(size)).all()
    assert (covered == expected).all()


def test_tiles_copy_tensors_of_several_sizes_again_and_again() -> None:
    sizes = [512, 4096, 70_144, 131_072, 512 * 3]
    sources = [torch.randint(0, 255, (n,), dtype=torch.uint8) for n in sizes]
    local = [torch.zeros_like(x) for x in sources]
    tiles = Tiles([*zip(local, sources, strict=True)])
    for round in range(4):
        for x in sources:
            x.add_(round)
        tiles.issue()
        assert all(map(torch.equal, local, sources))


def test_tensors_that_tiles_cannot_copy() -> None:
    whole = torch.zeros(4, 1024, dtype=torch.uint8)
    assert fits_tiles(whole, whole.clone())
    assert not fits_tiles(whole[:, :512], whole[:, 512:]), "strides"
    assert not fits_tiles(whole[0, :100], whole[1, :100]), "no whole tile"
    assert not fits_tiles(whole.view(-1)[1:513], whole.view(-1)[1025:1537]), "alignment"
    assert not fits_tiles(whole[:0], whole[:0]), "empty"
    assert not fits_tiles(whole, torch.empty_like(whole, device="meta")), "two devices"


@pytest.fixture
def tiled_host(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Copies weights of the host in tiles, and counts the launches."""
    issued = list[int]()

    def issue(tiles: Tiles, original: object = Tiles.issue) -> None:
        issued.append(1)
        assert callable(original)
        original(tiles)

    for module in (plan, weight_mapped):
        monkeypatch.setattr(module, "tiled_on", lambda device: True)
    monkeypatch.setattr(Tiles, "issue", issue)
    return issued


def values(n: int, first: int) -> npt.NDArray[np.int32]:
    return np.arange(first, first + n, dtype=np.int32)


def test_a_pull_copies_what_fits_in_tiles(channels: Channels, tiled_host: list[int]) -> None:
    """Beside a part with strides, a small tensor and a tied name; versions of tensors grow."""
    large = shared(values(12_800, 5).reshape(100, 128))
    small = shared(values(3, 9))
    split = shared(values(64, 1).reshape(8, 8))
    owner = publish(channels(), {"large": large, "tied": large, "small": small, "split": split})
    into = torch.zeros(100, 128, dtype=torch.int32)
    part = torch.zeros(8, 4, dtype=torch.int32)
    few = torch.zeros(3, dtype=torch.int32)
    local: dict[str, Parameter | torch.Tensor] = {
        "large": into,
        "tied": into,
        "small": few,
        "split": Parameter.split(part, 1, (8,), (1, 2)),
    }
    counted = Versioned({"w": Parameter(into)}, {})
    pull = partial(pull_weights, channels(), owner.ticket, local)
    for round in range(3):
        with owner.update():
            large.add_(round)
        version = counted.version()
        pull()
        assert torch.equal(into, large)
        assert torch.equal(part, split[:, 4:])
        assert torch.equal(few, small)
        assert counted.version() > version
        assert len(tiled_host) == round + 1
    owner.close()


def test_tiles_of_another_owner_are_made_anew(channels: Channels, tiled_host: list[int]) -> None:
    """Two owners with one description have one plan, and other memory."""
    into = torch.zeros(1024, dtype=torch.int32)
    channel = channels()
    for first in (1, 5, 9):
        source = shared(values(1024, first))
        owner = publish(channels(), {"w": source})
        pull_weights(channel, owner.ticket, {"w": into})
        assert torch.equal(into, source)
        owner.close()
    assert len(tiled_host) == 3


@pytest.mark.usefixtures("tiled_host")
def test_wrong_bytes_of_tiles_are_found(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shared(values(1024, 1))
    owner = publish(channels(), {"w": source})
    into = torch.zeros(1024, dtype=torch.int32)
    pull = partial(pull_weights, channels(), owner.ticket, {"w": into})
    pull()
    with monkeypatch.context() as patch:
        patch.setattr(Tiles, "issue", lambda tiles: None)
        into.zero_()
        with pytest.raises(TransferError, match="others of w"):
            pull()
    pull()
    assert torch.equal(into, source)
    owner.close()


def test_without_a_backend_for_addresses_tensors_are_copied_as_before(
    channels: Channels, tiled_host: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise Unsupported("Copying", "of this test")

    monkeypatch.setattr(plan, "copy_rows", refuse)
    # A separate size: tensors at the addresses of former ones would use the tiles of those.
    source = shared(values(3200, 1))
    owner = publish(channels(), {"w": source})
    into = torch.zeros(3200, dtype=torch.int32)
    pull_weights(channels(), owner.ticket, {"w": into})
    assert torch.equal(into, source)
    assert not tiled_host
    owner.close()
