# SPDX-License-Identifier: Apache-2.0
"""What a committed result bears out: the matrix, its records and their checks."""
