# SPDX-License-Identifier: Apache-2.0
"""`copy_blocks`: whole blocks by their ids, within a device or between a device and the host."""
