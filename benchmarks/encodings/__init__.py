# SPDX-License-Identifier: Apache-2.0
"""Measure copies that pack and unpack rows."""
