# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for vendors' packages, and jobs that hold a backend against a vendor's own package."""
