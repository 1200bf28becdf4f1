# SPDX-License-Identifier: Apache-2.0
"""Cases and helpers that several tests share."""
