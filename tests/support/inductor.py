# SPDX-License-Identifier: Apache-2.0
"""The report of the backend `compiled` about inductor for the CPU of this machine."""

from __future__ import annotations

import pytest
import torch

from portakv.backends.compiled import Compiled

_answer = Compiled.probe(torch.device("cpu"))
needs_inductor = pytest.mark.skipif(not _answer.accepted, reason=_answer.reason)
