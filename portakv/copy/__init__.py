# SPDX-License-Identifier: Apache-2.0
"""The one primitive: rows from one view to another, ordered on a stream."""

from portakv.copy.copy import copy_move as copy_move
from portakv.copy.copy import copy_rows as copy_rows
