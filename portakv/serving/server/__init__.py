# SPDX-License-Identifier: Apache-2.0
"""The store server of a host, whose store serves processes of several engines; its clients."""
