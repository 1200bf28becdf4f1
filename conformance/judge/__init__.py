# SPDX-License-Identifier: Apache-2.0
"""What judges a copy: the oracle, its reading of layouts, test bytes, and what is judged."""
