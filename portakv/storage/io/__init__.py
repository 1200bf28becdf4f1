# SPDX-License-Identifier: Apache-2.0
"""I/O engines of the disk tier: they move bytes between open files and memory."""
