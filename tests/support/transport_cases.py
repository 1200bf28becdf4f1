# SPDX-License-Identifier: Apache-2.0
"""Transports within one process, of the contract suite."""

from portakv_conformance.contract.transport import End, Wire, slot_of, wire

__all__ = ["End", "Wire", "slot_of", "wire"]
