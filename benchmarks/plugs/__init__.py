# SPDX-License-Identifier: Apache-2.0
"""The benchmark of plugs: engines' transfers by their own code and by PortaKV."""
