# SPDX-License-Identifier: Apache-2.0
"""Compare block stores with fio, LMCache's disk tier and plain calls of the same bytes."""
