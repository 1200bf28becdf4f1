# SPDX-License-Identifier: Apache-2.0
"""What a serving engine calls: `AdaptiveConnector` over registered caches."""
