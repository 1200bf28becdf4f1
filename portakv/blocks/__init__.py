# SPDX-License-Identifier: Apache-2.0
"""`copy_blocks`: whole blocks by their ids, within a device or between a device and the host."""

from portakv.blocks.blocks import copy_blocks as copy_blocks
from portakv.copy.handle import BlockTransfer as BlockTransfer
