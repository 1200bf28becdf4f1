# SPDX-License-Identifier: Apache-2.0
"""Which backend carries a copy out, with every candidate's answer on record."""
