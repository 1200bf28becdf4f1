# SPDX-License-Identifier: Apache-2.0
"""Read and check committed results: the support matrix and the records that prove its levels."""
