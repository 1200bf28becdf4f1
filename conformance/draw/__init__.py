# SPDX-License-Identifier: Apache-2.0
"""Structures of copies, drawn by hypothesis or written down by hand."""
