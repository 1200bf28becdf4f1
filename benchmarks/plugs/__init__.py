# SPDX-License-Identifier: Apache-2.0
"""The benchmark of integrations: engines' transfers by their own code and by PortaKV."""
