# SPDX-License-Identifier: Apache-2.0
"""The media below host memory that keep blocks: disks, folders of files, and buckets."""
