# SPDX-License-Identifier: Apache-2.0
"""Block stores beside fio, LMCache's disk tier and plain calls of the same bytes."""
