# SPDX-License-Identifier: Apache-2.0
"""Rows and weights that cross between processes and devices, alongside raw copies of the same bytes
and other projects' engines."""
