# SPDX-License-Identifier: Apache-2.0
"""Jobs of vLLM's offloading end in order, and tell how long the device copied."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from support.core_cases import noise
from torch.cuda import _sleep

from portakv import BlockTransfer, KVView, copy_rows
from portakv.host import pinned
from portakv.integrations.vllm.moves import Job, Lane
from portakv.runtime.transfer import retire

BLOCKS = 64
PAGE = 1 << 20


def views(device: torch.device) -> tuple[KVView, KVView]:
    """Pages on a device and on the host, 64 MiB."""
    pages = noise(BLOCKS, PAGE, dtype=torch.uint8).to(device)
    host = pinned.empty((BLOCKS, 1, PAGE), torch.uint8)
    return (
        KVView([pages], "layer | block (token dim)", block_size=1),
        KVView([host], "layer | block token dim"),
    )


def test_jobs_of_the_host_end_in_order() -> None:
    """There the host's clock counts."""
    src, dst = views(torch.device("cpu"))
    lane = Lane(torch.device("cpu"))
    for number in (7, 3):
        lane.submit(number, lambda: copy_rows(src, dst, range(BLOCKS), range(BLOCKS)))
    for job in lane.jobs.values():
        job.transfer.synchronize()
    assert [*lane.ended()] == [7, 3]
    assert all(job.seconds() == job.transfer.statistics.seconds for job in lane.jobs.values())


def test_a_job_has_not_ended_before_its_time_is_known() -> None:
    """The device completes the event that ends the time after the one that ends the transfer.
    Control: a lane that asks the transfer alone takes out the job, and its time is an error."""
    src, dst = views(torch.device("cpu"))
    lane = Lane(torch.device("cpu"))
    transfer = copy_rows(src, dst, range(BLOCKS), range(BLOCKS))
    transfer.synchronize()
    end = Mock(spec=torch.Event)
    end.query.return_value = False
    begin = Mock(spec=torch.Event)
    begin.elapsed_time.return_value = 11.0
    lane.jobs[1] = Job(transfer, begin, end)

    assert [*lane.ended()] == []
    assert [*lane.jobs] == [1]

    end.query.return_value = True
    (number,) = lane.ended()
    job = lane.jobs.pop(number)
    assert number == 1
    assert job.seconds() == 0.011


@pytest.mark.gpu
@pytest.mark.parametrize("paced", [False, True])
def test_the_wait_for_the_model_is_no_time_of_a_copy(paced: bool) -> None:
    """The current stream is busy for ten times as long as the copy takes. Control: by the host's
    clock, as for paced copies, the job has that time too."""
    device = torch.device("cuda", torch.cuda.current_device())
    src, dst = views(device)
    lane = Lane(device, {"max_gbps": 1e3} if paced else None)

    def copy() -> BlockTransfer:
        return copy_rows(src, dst, range(BLOCKS), range(BLOCKS))

    with lane.current():
        copy().synchronize()
    _sleep(200_000_000)  # 0.1 s or more
    lane.submit(1, copy)
    lane.jobs[1].synchronize()
    (number,) = lane.ended()
    job = lane.jobs.pop(number)
    assert torch.equal(dst.tensors[0].view(-1), src.tensors[0].cpu().view(-1))
    seconds = job.seconds()
    by_host = job.transfer.statistics.seconds
    assert seconds is not None
    assert by_host is not None
    assert seconds > 0
    assert (seconds < by_host / 3) is not paced


@pytest.mark.gpu
@pytest.mark.parametrize("used", [True, False])
def test_memory_that_a_lane_uses_is_not_handed_out_before_its_copies_end(used: bool) -> None:
    """The caches are released while a copy waits, and other work writes memory of their size.
    Control: the lane has not named them, so that the copy reads what was written there."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()  # of other tests, which would be handed out first
    src, dst = views(device)
    expected = src.tensors[0].cpu()
    lane = Lane(device)
    assert lane.stream is not None
    if used:
        lane.use(src)

    def submit(view: KVView) -> None:
        lane.submit(1, lambda: copy_rows(view, dst, range(BLOCKS), range(BLOCKS)))

    submit(src)
    lane.jobs[1].synchronize()
    dst.tensors[0].zero_()
    # Each fourth copy releases memory of copies that have ended. To free another test's pinned
    # memory waits for the device.
    retire()
    # The driver loads a kernel at its first launch, and waits for the device then.
    torch.full((8,), 99, dtype=torch.uint8, device=device)
    with lane.current():
        _sleep(400_000_000)  # 0.2 s or more
    submit(src)
    lane.jobs.clear()
    address = src.tensors[0].data_ptr()
    del src
    others = list[torch.Tensor]()  # in all free memory of this size
    while len(others) < 16 and address not in [each.data_ptr() for each in others]:
        others.append(torch.full((BLOCKS, PAGE), 99, dtype=torch.uint8, device=device))
    assert not lane.stream.query()  # the copy waits
    assert (address in [each.data_ptr() for each in others]) is not used
    torch.cuda.synchronize()
    assert int(others[-1][0, 0]) == 99
    assert torch.equal(dst.tensors[0].view(-1), expected.view(-1)) is used
