# SPDX-License-Identifier: Apache-2.0
"""The path that configurations name; see `portakv.integrations.vllm.connector`."""

from portakv.integrations.vllm.connector import PortaKVConnector as PortaKVConnector
