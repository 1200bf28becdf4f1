# SPDX-License-Identifier: Apache-2.0
"""Strategies: backends that carry a plan out between a device and host memory."""
