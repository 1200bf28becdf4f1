# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of blocks by which an engine sees that a restored KV cache has the right rows."""

from portakv.witness.faults import Fault, WrongRows
from portakv.witness.witness import Comparison, Figures, Witness

__all__ = ["Comparison", "Fault", "Figures", "Witness", "WrongRows"]
