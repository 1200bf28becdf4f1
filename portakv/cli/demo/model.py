# SPDX-License-Identifier: Apache-2.0
"""The demo's first part: the example with a model, if `transformers` is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

EXAMPLE = "portakv_examples.offload_transformers"
EXTRA = "pip install 'portakv[demo]'"


@dataclass(frozen=True)
class ModelPart:
    """How the example went.

    Attributes:
        skipped: why it did not run; empty where it did.
        good: the logits were bit-identical and the control's were not, or it was skipped.
        found: the example's own outcome, by name.
        story: the lines that it told.
    """

    skipped: str
    good: bool
    found: dict[str, Any] = field(default_factory=dict)
    story: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {"skipped": self.skipped or None, **self.found, "story": self.story}


def run_model(device: torch.device, tell: Callable[[str], None]) -> ModelPart:
    """Run the example on ``device``; its lines go to ``tell`` as they come.

    A `transformers` that is missing or cannot be imported is told, not raised.

    Raises:
        PortaKVError: as the calls of the example do.
    """
    try:
        example = importlib.import_module(EXAMPLE)
    except ImportError as error:
        if (error.name or "").startswith("portakv"):
            raise
        why = f"it needs transformers ({error}); {EXTRA} adds it"
        tell(f"skipped  {why}")
        return ModelPart(why, good=True)
    story: list[str] = []

    def hear(line: str) -> None:
        story.append(line)
        tell(line)

    outcome = example.main(device, hear)
    good = outcome.identical and outcome.control_differs
    return ModelPart("", good, dict(vars(outcome)), story)
