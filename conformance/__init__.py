# SPDX-License-Identifier: Apache-2.0
"""The conformance suite: an oracle, structures to copy, and a verdict on a backend."""

from __future__ import annotations

SUITE_VERSION = "2026.12"
SPEC_VERSION = "1"
