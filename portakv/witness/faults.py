# SPDX-License-Identifier: Apache-2.0
"""Faults of restored blocks, and their names by comparison with other known fingerprints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal[
    "changed bytes",
    "zeros",
    "other block",
    "shifted blocks",
    "shifted tokens",
    "not written",
    "half written",
    "missing layers",
    "missing group",
    "older version",
    "planes exchanged",
    "heads exchanged",
    "layers exchanged",
    "other rank",
    "unlike",
]


@dataclass(frozen=True)
class Fault:
    """A restored block whose rows differ from the rows that were stored under its key.

    Attributes:
        group: the name of the view.
        key: the engine's hash of the block.
        block: the engine's block that was restored.
        layers: layers that differ, by their place in the view.
        heads: heads that differ, by their place in the view.
        kind: the pattern of the difference; "unlike" if no known fingerprint explains it.
        versus: the fingerprint that explains the rows, such as "key 1f2e..., block 7"; may be
            empty.
        sentence: the fault in English, for a log.
        report: the file for ``portakv witness show``; None if none was written.
    """

    group: str
    key: bytes
    block: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    kind: Kind
    versus: str
    sentence: str
    report: Path | None = None
