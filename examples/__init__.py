# SPDX-License-Identifier: Apache-2.0
"""Examples to copy from. The wheel has them as ``portakv_examples``, for `portakv demo`."""
