# SPDX-License-Identifier: Apache-2.0
"""The fault table: what a storage tier delivers while its disk, process or neighbours fail.

``portakv conform --tier MODULE:CLASS`` runs each fault of `table` over a tier of a family of
`families`: a secondary tier of vLLM, an L2 adapter of LMCache, a storage backend of SGLang's
HiCache, or a tier of a block store. The tier runs in a separate process (`child`). The process that
judges (`subject`, `trial`) damages its files, and answers its system calls (`intercept`).
"""
