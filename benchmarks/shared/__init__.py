# SPDX-License-Identifier: Apache-2.0
"""What the device and the host benchmarks share."""
