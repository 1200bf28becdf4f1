# SPDX-License-Identifier: Apache-2.0
"""What a later pull of weights does not check, plan or list again, and changes that it notices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from support.cuda_on_cpu import why_not
from support.interrupts import in_other_thread
from support.sums_on_cpu import SMALL, HostDriver
from support.weight_cases import Channels, find_wrong_copies, make_channels, shared, whole_of

from portakv.errors import InvalidTerms, LayoutError
from portakv.migrate import checksum
from portakv.migrate.checksum import BoxSums, CachedTables, SumKernel, SummedPart
from portakv.weights import Parameter, publish, pull_weights
from portakv.weights.parameters import Box, facts_of

channels = pytest.fixture(make_channels)
needs_gxx = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
CPU = torch.device("cpu")


class Followed(SumKernel):
    """A kernel of the host that counts the parts that a reader lists."""

    def __init__(self) -> None:
        super().__init__(CPU, HostDriver(), SMALL)
        self.listed = 0
        self.reader = threading.get_ident()  # the thread that pulls

    def pull(self, *terms: Any) -> int:
        """Pull in a thread that does the work of the pull itself, as the main one does not."""

        def act() -> int:
            self.reader = threading.get_ident()
            return pull_weights(*terms)

        nbytes: int = in_other_thread(act)
        return nbytes

    def tables(self, parts: Any) -> Any:
        some = [*parts]
        self.listed += len(some)
        return super().tables(some)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Followed:
    """The kernel that computes the checksums of readers.

    Owners compute theirs in workers, by torch: on the host a kernel runs in one thread at a time.
    """
    made = Followed()

    def find(device: torch.device) -> Followed | None:
        return made if threading.get_ident() == made.reader else None

    monkeypatch.setattr(checksum, "kernel_of", find)
    return made


@needs_gxx
def test_tables_are_listed_once_and_find_wrong_bytes(
    channels: Channels, kernel: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bit that a later copy changes is found by the tables of the first pull."""
    rows = shared(whole_of((6, 8)))
    half = shared(whole_of((6, 8)))
    owner = publish(channels(), {"rows": rows, "tied": rows, "half": half})
    into = torch.zeros(6, 8, dtype=torch.int32)
    part = torch.zeros(6, 4, dtype=torch.int32)
    local: dict[str, Parameter | torch.Tensor] = {
        "rows": into,
        "tied": into,
        "half": Parameter.split(part, 1, (8,), (1, 2)),
    }
    channel = channels()
    kernel.pull(channel, owner.ticket, local)
    assert kernel.listed == 3
    pull = partial(kernel.pull, channel, owner.ticket, local)
    find_wrong_copies(monkeypatch, pull, {"rows, tied": into, "half": part})
    with owner.update():
        rows.fill_(5)
    kernel.pull(channel, owner.ticket, local)
    assert into.eq(5).all()
    assert torch.equal(part, half[:, 4:])
    assert kernel.listed == 3
    owner.close()


@needs_gxx
def test_tables_of_copied_parts_are_not_launched_again(kernel: Followed) -> None:
    """A part whose words lie apart is copied for each launch; others are read where they lie."""
    plain = torch.arange(12, dtype=torch.int16).view(3, 4)
    odd = torch.arange(24, dtype=torch.int16).view(3, 8)[:, ::2]
    for tensor, again in ((plain, True), (odd, False)):
        kept: CachedTables = {}
        sums = BoxSums()
        sums.add([SummedPart(0, tensor, (0, 0))], kept)
        assert sums.again(CPU, kept) == again
        assert not sums.again(CPU, {})
        once = BoxSums()
        once.add([SummedPart(0, tensor, (0, 0))])
        (expected,) = once.results(1)
        assert sums.results(1) == [expected * (1 + again) % (1 << 64)]
        tensor[1, 1] += 1
        later = BoxSums()
        if later.again(CPU, kept):
            assert later.results(1) != [expected]


def moved(local: dict[str, Any]) -> None:
    local["w"].data = torch.zeros(6, 4, dtype=torch.int32)


def turned(local: dict[str, Any]) -> None:
    local["w"].set_(torch.zeros(4, 6, dtype=torch.int32).t())


def swapped(local: dict[str, Any]) -> None:
    local["w"] = torch.zeros(6, 4, dtype=torch.int32)


@needs_gxx
@pytest.mark.parametrize("change", [moved, turned, swapped])
def test_tensors_that_get_other_memory_are_filled_there(
    channels: Channels, kernel: Followed, change: Callable[[dict[str, Any]], None]
) -> None:
    """Without addresses and strides among the facts, former tables would sum the former memory."""
    source = shared(whole_of((6, 4)))
    owner = publish(channels(), {"w": source})
    local = {"w": torch.zeros(6, 4, dtype=torch.int32)}
    channel = channels()
    for _ in range(3):
        kernel.pull(channel, owner.ticket, local)
        assert torch.equal(local["w"], source)
        former = local["w"].view(-1) if local["w"].is_contiguous() else local["w"].t().view(-1)
        former.zero_()
        change(local)
        kernel.pull(channel, owner.ticket, local)
        assert torch.equal(local["w"], source)
        assert not former.any()
    owner.close()


def test_faults_that_come_after_a_good_pull_are_refused(channels: Channels) -> None:
    """The checks are left out for the same facts alone."""
    source = shared(whole_of((6, 4)))
    owner = publish(channels(), {"w": source})
    channel = channels()
    into = torch.zeros(6, 4, dtype=torch.int32)
    extents: Any = [6, 4]
    boxes = [Box((0, 0), (0, 0), extents)]
    listed = Parameter(into, [6, 4], boxes)
    for _ in range(3):  # a parameter has copies of its lists
        pull_weights(channel, owner.ticket, {"w": listed})
        assert torch.equal(into, source)
        into.zero_()
        boxes[0] = Box((0, 0), (1, 0), (6, 4))
        extents[0] = 7

    with pytest.raises(LayoutError, match="Expected a box in a tensor"):
        pull_weights(channel, owner.ticket, {"w": Parameter(into, [6, 4], boxes)})
    boxes[0] = Box((0, 0), (0, 0), (6, "4"))  # type: ignore[arg-type]
    with pytest.raises(InvalidTerms, match="whole numbers"):
        pull_weights(channel, owner.ticket, {"w": Parameter(into, [6, 4], boxes)})
    boxes[0] = Box((0, 0), (0, 0), extents)
    with pytest.raises(LayoutError):
        pull_weights(channel, owner.ticket, {"w": Parameter(into, [6, 4], boxes)})

    other = torch.zeros(6, 1, dtype=torch.int32).expand(6, 4)
    for wrong, error in ((other, LayoutError), (into.to_sparse(), LayoutError), (3, InvalidTerms)):
        with pytest.raises(error):
            pull_weights(channel, owner.ticket, {"w": wrong})  # type: ignore[dict-item]
    with pytest.raises(LayoutError, match="w: its dtype"):
        pull_weights(channel, owner.ticket, {"w": into.view(torch.float32)})
    with pytest.raises(InvalidTerms):
        pull_weights(channel, owner.ticket, {"w\udc80": into})
    assert not into.any()
    owner.close()


class Making(Mapping[str, torch.Tensor]):
    """A mapping that makes another tensor for each look, the last one in ``made``."""

    def __init__(self) -> None:
        self.made = list[torch.Tensor]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.made.append(torch.zeros(6, 4, dtype=torch.int32))
        return self.made[-1]

    def __iter__(self) -> Any:
        return iter(["w"])

    def __len__(self) -> int:
        return 1


def test_a_mapping_that_makes_tensors_is_read_once(channels: Channels) -> None:
    """The tensor that is filled is the tensor that was checked."""
    source = shared(whole_of((6, 4)))
    owner = publish(channels(), {"w": source})
    local = Making()
    channel = channels()
    for turn in range(1, 4):
        pull_weights(channel, owner.ticket, local)
        assert len(local.made) == turn
        assert torch.equal(local.made[-1], source)
    owner.close()


def test_facts_differ_wherever_checks_or_plans_may() -> None:
    """Parameters without a key are checked each time."""
    tensor = torch.zeros(4, 4, dtype=torch.complex64)
    box = Box((0, 0), (0, 0), (4, 4))
    cases: list[dict[str, Parameter | torch.Tensor]] = [
        {"w": tensor},
        {"v": tensor},
        {"w": tensor.clone()},
        {"w": tensor.t()[:, :3]},
        {"w": tensor.view(torch.int64)},
        {"w": tensor.conj()},
        {"w": tensor[:3]},
        {"w": Parameter(tensor, (8, 4), [box])},
        {"w": Parameter(tensor, (4, 8), [box])},
        {"w": Parameter(tensor, (4, 8), [box._replace(offset=(0, 4))])},
        {"w": Parameter(tensor, packing="packed")},
        {"w": Parameter(tensor, block=(2, 2))},
        {"w": tensor, "x": tensor},
    ]
    keys = [facts_of(case) for case in cases]
    assert None not in keys
    assert len({*keys}) == len(cases)
    assert facts_of({"w": Parameter(tensor)}) == keys[0]  # a checked tensor is met again as plain
    assert facts_of({"w": Parameter(tensor, (8, 4), (box,))}) == keys[7]
    assert facts_of({"w": Parameter(tensor, [8, 4], [Box([0, 0], [0, 0], [4, 4])])}) == keys[7]  # type: ignore[arg-type]
    for odd in (tensor.to_sparse(), 3, Parameter(None)):  # type: ignore[arg-type]
        assert facts_of({"w": odd}) is None  # type: ignore[dict-item]
