# SPDX-License-Identifier: Apache-2.0
"""The example of a model whose cache leaves and returns: what it proves, made to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from portakv import AdaptiveConnector, Transfer
from portakv.runtime.devices import usual_device

DEVICE = usual_device()
pytestmark = pytest.mark.xdist_group("transformers")  # one process imports it, for ten seconds


@pytest.fixture
def example() -> Any:
    """Import the example here: it imports transformers, which takes seconds, not while pytest
    collects."""
    from portakv_examples import offload_transformers

    return offload_transformers


@pytest.mark.filterwarnings("ignore:Expected pinned host memory")
@pytest.mark.parametrize("host", ["pageable", "pinned"])
def test_the_example_is_bit_identical_and_its_control_is_not(
    host: str, example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits may round a low bit away; the caches themselves cannot."""
    caches: list[list[torch.Tensor]] = []
    decode = example.decode

    def noted(model: Any, cache: Any, first: torch.Tensor) -> torch.Tensor:
        caches.append([x.view(torch.int32) for y in cache.layers for x in (y.keys, y.values)])
        logits: torch.Tensor = decode(model, cache, first)
        return logits

    monkeypatch.setattr(example, "decode", noted)
    assert example.run([str(DEVICE), "--host", host]) == 0
    output = capsys.readouterr().out
    assert f"tokens in {host if DEVICE.type == 'cuda' else 'pageable'} memory" in output
    assert "bit-identical" in output
    stayed, came_back, noise = caches
    assert [tuple(x.shape) for x in stayed] == [(1, 4, 235, 32)] * 8
    assert all(torch.equal(x, y) for x, y in zip(stayed, came_back, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(stayed, noise, strict=True))


def spoiling(load: Callable[..., None]) -> Callable[..., None]:
    """Return ``load``, which first turns the sign of one number."""

    def load_spoilt(connector: Any, chunks: list[torch.Tensor], slots: torch.Tensor) -> None:
        chunks[1][1, 0, 5, 3].neg_()
        load(connector, chunks, slots)

    return load_spoilt


def spare_pages(self: torch.Tensor, *words: Any, **named: Any) -> torch.Tensor:
    return self if self.dim() == 5 else NORMAL(self, *words, **named)


NORMAL = torch.Tensor.normal_
#: What the example claims and is made not to hold: where (None: in the example, whose
#: own function is wrapped), by what, and what the outcome says.
SPOILT: dict[str, tuple[Any, str, Any, dict[str, bool]]] = {
    "chunks that do not come back": (
        AdaptiveConnector,
        "to_gpu",
        lambda *_, **__: Transfer(),
        {"identical": False},
    ),
    "the sign of one number": (
        None,
        "load",
        spoiling,
        {"identical": False, "control_differs": True},
    ),
    "pages that were not lost": (torch.Tensor, "normal_", spare_pages, {"control_differs": False}),
}


@pytest.mark.parametrize("what", SPOILT)
def test_the_example_sees_what_is_wrong(
    what: str, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, spoilt, expected = SPOILT[what]
    if owner is None:
        owner = example
        spoilt = spoilt(example.load)
    monkeypatch.setattr(owner, name, spoilt)
    outcome = vars(example.main(DEVICE, lambda line: None))
    assert {name: outcome[name] for name in expected} == expected
    assert (outcome["tokens"], outcome["chunks"]) == (235, 4)


def test_the_example_refuses_what_is_no_device(
    example: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.run(["nonsense"]) == 1
    assert "Device 'nonsense' was requested, but torch cannot use it" in capsys.readouterr().err
