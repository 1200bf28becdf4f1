# SPDX-License-Identifier: Apache-2.0
"""Host memory, plain and small copies under every setting of torch that an engine may have made.

What is made under a setting is used after it too, as an engine does that loads in one mode and
serves in another.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.ambient import STATES, State

from portakv.host import pinned
from portakv.host.memcpy import copy_
from portakv.host.pool import PinnedPool
from portakv.host.small import to_device

pytestmark = [
    pytest.mark.parametrize("state", STATES.values(), ids=STATES),
    pytest.mark.filterwarnings("ignore:Expected pinned host memory"),
]
NUMBERS = np.arange(48, dtype=np.int32)


@pytest.fixture(autouse=True)
def _warned() -> None:
    """Warn once of pageable memory, before a state makes the warning an error."""
    with pinned.allocate(1), pinned.register(np.zeros(1, np.uint8)):
        pass


def same(tensor: torch.Tensor, wanted: np.ndarray) -> bool:
    """Compare with numpy, as torch's own functions are under the setting as well."""
    return bool(np.array_equal(tensor.detach().cpu().numpy(), wanted))


def test_pinned_memory(device: torch.device, state: State) -> None:
    existing = np.zeros(5000, np.uint8)
    with state(device):
        tensor = pinned.empty((6, 8))
        nothing = pinned.empty((0, 4))
        memory = pinned.allocate(100)
        registered = pinned.register(existing)
        pool = PinnedPool(64, 1, limit=2)
        blocks = pool.acquire_many(2)
    for each in (tensor, nothing):
        assert (each.dtype, each.device.type) == (torch.float32, "cpu")
    for each in (tensor, memory.tensor, registered.tensor, *(block.tensor for block in blocks)):
        each.fill_(1)  # also what was made in inference mode
        assert bool(each.numpy().all())
    with state(device):
        for one in blocks:
            one.release()
        for made in (pool, memory, registered):
            made.close()


@pytest.mark.parametrize("made", ["before", "under it"])
def test_plain_copies(device: torch.device, state: State, made: str) -> None:
    """There and back, whole and by columns, between tensors made in either mode."""

    def places() -> list[torch.Tensor]:
        return [
            torch.zeros(6, 8, dtype=torch.int32, device=device),
            torch.zeros(6, 8, dtype=torch.int32, device="cpu"),
        ]

    source, other = (torch.from_numpy(NUMBERS).view(shape) for shape in ((6, 8), (8, 6)))
    there, back = places()
    with state(device):
        if made == "under it":
            there, back = places()
        copy_(there, source).synchronize()
        copy_(back[:, :3], there[:, :3], non_blocking=True).synchronize()
        copy_(back[:, 3:], there[:, 3:]).synchronize()
    assert same(back, source.numpy())
    copy_(there, other.t()).synchronize()
    copy_(back, there).synchronize()
    assert same(back, other.t().numpy())


@pytest.mark.parametrize(
    "values",
    [NUMBERS, NUMBERS.tolist(), range(48), torch.from_numpy(NUMBERS), bytes(range(48))],
    ids=lambda values: type(values).__name__,
)
def test_small_copies(device: torch.device, state: State, values: object) -> None:
    out = torch.zeros(48, dtype=torch.int32, device=device)
    with state(device):
        under_it = torch.zeros(48, dtype=torch.int32, device=device)
        made = to_device(values, device, torch.int32)  # type: ignore[arg-type]
        assert to_device(values, out=out) is out  # type: ignore[arg-type]
        assert to_device(values, out=under_it) is under_it  # type: ignore[arg-type]
        assert all(same(each, NUMBERS) for each in (made, out, under_it))
    assert made.device == torch.zeros(1, device=device).device
    made.add_(1)  # also what was made in inference mode
    assert same(made, NUMBERS + 1)
    to_device(NUMBERS + 1, out=under_it)
    assert same(under_it, NUMBERS + 1)
