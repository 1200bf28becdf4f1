# SPDX-License-Identifier: Apache-2.0
"""Examples to copy from. A clone has them as ``portakv_examples``; no release contains them.

`portakv/cli` links to `offload_transformers`, which `portakv demo` runs.
"""
