# SPDX-License-Identifier: Apache-2.0
"""Streams, events, completion, devices, drivers and compilers. No module here imports views or
plans."""
