# SPDX-License-Identifier: Apache-2.0
"""Transfer strategies: backends that execute a plan between a device and host memory."""
