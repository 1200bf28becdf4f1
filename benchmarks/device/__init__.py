# SPDX-License-Identifier: Apache-2.0
"""The benchmark of copies inside a device, against `copy_` of the same bytes."""
