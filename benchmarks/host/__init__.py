# SPDX-License-Identifier: Apache-2.0
"""The benchmark of copies between a device and host memory, against a plain memcpy."""
