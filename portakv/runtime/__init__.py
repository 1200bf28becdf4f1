# SPDX-License-Identifier: Apache-2.0
"""Streams, events, completion, devices, drivers and compilers. It knows no view and no plan."""
