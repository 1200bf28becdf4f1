# SPDX-License-Identifier: Apache-2.0
"""The errors of fp8 caches: every method on few rows, and figures that are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from portakv_benchmarks.encodings.errors import METHODS, error_of, examples, main, table


def test_every_method_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = examples(32)
    lines = table(rows)
    assert len(lines) == 2 + len(rows) * len(METHODS)
    torch.save({"keys": rows["normal"]}, tmp_path / "rows.pt")
    main([str(tmp_path / "rows.pt")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[2:] == [
        line.replace("| normal |", "| keys |") for line in lines[2 : 2 + len(METHODS)]
    ]


def test_known_errors() -> None:
    rows = torch.tensor([[[4.0, -1.0, 0.5, 0.0]]], dtype=torch.float32, device="cpu")
    made = torch.tensor([[[4.0, -1.1, 0.5, 0.0]]], dtype=torch.float32, device="cpu")
    rms, worst, off = error_of(rows, made)
    assert rms == pytest.approx(0.1 / 17.25**0.5, rel=1e-5)
    assert worst == pytest.approx(0.025, rel=1e-5)
    assert off == 0.25
    assert error_of(rows, rows) == (0, 0, 0)
