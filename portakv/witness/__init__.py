# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of blocks by which an engine sees that a restored KV cache has the right rows."""

from portakv.witness.faults import Fault as Fault
from portakv.witness.faults import WrongRows as WrongRows
from portakv.witness.witness import Comparison as Comparison
from portakv.witness.witness import Figures as Figures
from portakv.witness.witness import Witness as Witness
