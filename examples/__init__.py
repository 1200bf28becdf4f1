# SPDX-License-Identifier: Apache-2.0
"""Examples to copy from. They travel in the wheel as ``portakv_examples``, for `portakv demo`."""
