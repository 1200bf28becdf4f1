# SPDX-License-Identifier: Apache-2.0
"""Blocks of a KV cache outside of the device: on the host, on disks, in object stores."""
