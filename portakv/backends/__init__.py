# SPDX-License-Identifier: Apache-2.0
"""Backends: one file for each way of carrying a plan out. Nothing is imported until asked."""
