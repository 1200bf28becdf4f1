# SPDX-License-Identifier: Apache-2.0
"""Engines: backends that carry a plan out between a device and host memory."""
