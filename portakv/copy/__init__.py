# SPDX-License-Identifier: Apache-2.0
"""Copy rows from one view to another, ordered on a stream: the one primitive of PortaKV."""

from portakv.copy.counting import count_copies as count_copies
from portakv.copy.options import CopyOptions as CopyOptions
from portakv.copy.rows import copy_rows as copy_rows
from portakv.copy.rows import copy_runs as copy_runs
