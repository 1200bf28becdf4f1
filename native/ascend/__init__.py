# SPDX-License-Identifier: Apache-2.0
"""Where the AscendC sources will live; there are none yet.

Planned: the kernel, its launch file apart, and an emulation for a machine without the vendor's
toolkit. Until they exist no backend uses this folder.
"""
