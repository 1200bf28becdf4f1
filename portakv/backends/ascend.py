# SPDX-License-Identifier: Apache-2.0
"""`ascend`: rows on Huawei's NPUs, by the AscendC kernel or through the ops of torch_npu.

The executor of each plan is the first that takes it:

| a plan that                                         | is executed by                     |
|-----------------------------------------------------|------------------------------------|
| is any, if the kernel was built (see below)         | the AscendC kernel                 |
| scatters by slots into dense pages, both of two kv  | `npu_scatter_pa_kv_cache` (layers) |
| gathers whole blocks of dense pages, both of two kv | `npu_gather_pa_kv_cache` (layers)  |
| reads other rows under ids                          | `index_select`, into the chunk     |
| writes other rows under ids, 1 or 8 bytes wide      | `npu_scatter_nd_update_`           |
| writes other rows under ids, 2 or 4 bytes wide      | `index_copy_`                      |
| has no ids                                          | `copy_`                            |

Dense pages are ``[blocks, block_size, heads, dim]`` without holes: (key, value) tuples, merged
caches, MLA's latent and rope of unequal widths. Of three kv (DSA) the third goes by rows, and so
does everything else: head-major pages, NZ described by its layout, pages with holes. NZ as a format
that only the vendor knows (``FRACTAL_NZ``) is `Unsupported`: its bytes do not lie where strides
say. The paged ops forbid negative slots, and no op skips or guards: the caller of a launch removes
bad ids. The kernel does both. Neither has run on an NPU (``conformance/support_matrix.toml``).

Sources: docstrings of torch_npu 2.13.0; CANN's pages on aclnnScatterPaKvCache,
aclnnGatherPaKvCache, aclnnScatterNdUpdate, aclnnIndexSelect and aclnnInplaceIndexCopy.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch

from portakv.backends._vendor_rows import TOKENS, by_ids_first, packed, planes
from portakv.backends.ascend_kernel import KernelRows, find_kernel, refusal
from portakv.backends.base import Backend, Capabilities, Decision, FormatCheck, Launch, MoveLaunch
from portakv.backends.strided import Ops, StridedCopy
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.devices import VENDOR_PACKAGES, Unusable, imported, version_of
from portakv.view.form import Form

#: The arguments of each op. The texts of all schemas are in conformance/vendor.
CALLS = {
    "npu_scatter_pa_kv_cache": {
        "key",
        "value",
        "key_cache",
        "value_cache",
        "slot_mapping",
        "cache_mode",
    },
    "npu_gather_pa_kv_cache": {
        "key_cache",
        "value_cache",
        "block_tables",
        "seq_lens",
        "key",
        "value",
    },
    "npu_scatter_nd_update_": {"input", "indices", "updates"},
    "get_npu_format": {"input"},
}
#: The axes of a plane that the paged ops take, outermost first.
PAGES = ("block", *TOKENS)
#: Formats whose bytes lie where strides say: NCHW, ND, NCDHW, the initial formats of tensors.
_STRIDED = (0, 2, 30)
#: Rows of the paged ops: whole 32 B, as CANN's vector memory requires, and at most 148 KiB.
_LINE = 32
_MOST = 148 * 1024
_SCATTER_ND = (torch.int64, torch.int8)


class Ascend(Backend):
    """The AscendC kernel if it was built, else the ops of torch_npu."""

    name = "ascend"
    find_kernel = staticmethod(find_kernel)

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        #: True if torch_npu, or the driver below it, declares itself a stand-in.
        self.emulated = bool(getattr(_vendor(), "EMULATED", False))
        self._kernel, _ = self.find_kernel(self.emulated)
        self.carrier = "the AscendC kernel" if self._kernel else "the ops of torch_npu"
        self.library = self._kernel.path if self._kernel else ""

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type != "npu":
            return Decision(cls.name, False, f"it runs on npu devices, not on {device.type}")
        try:
            vendor = _vendor()
            emulated = bool(getattr(vendor, "EMULATED", False))
            _, by = cls.find_kernel(emulated)
        except Unusable as error:
            return Decision(cls.name, False, str(error))
        version = f"torch_npu {version_of(vendor)}{', emulated' if emulated else ''}"
        return Decision(cls.name, True, f"{version}; copies go {by}")

    @classmethod
    def hides(cls, device: torch.device) -> FormatCheck | None:
        known = device.type == "npu" and hasattr(torch.ops.npu, "get_npu_format")
        return _private_format if known else None

    def capabilities(self) -> Capabilities:
        guards = self._kernel is not None
        return Capabilities(frozenset({("device", "device")}), skips_negative=guards, guards=guards)

    def check(self, plan: CopyPlan) -> Decision:
        decision = super().check(plan)
        by = _paged_op(plan) or "rows, through index ops"
        if self._kernel:
            why = refusal(plan)
            by = f"index ops, after a wait, since {why}" if why else "the AscendC kernel"
        by = f"takes the plan by {by}"
        return replace(decision, reason=by) if decision.accepted else decision

    def prepare(self, plan: CopyPlan) -> Launch:
        if self._kernel:
            return KernelRows(self._kernel, plan, self.device)
        return _OpRows(plan, self.device)


def _vendor() -> ModuleType:
    """Return the module torch_npu, after a check of every op that this module calls.

    Raises:
        Unusable: it is not installed, is broken, is of another release, or has other ops.
    """
    release = ".".join(torch.__version__.split(".")[:2])
    install = VENDOR_PACKAGES["npu"][1]
    vendor = imported("torch_npu", install)
    version = version_of(vendor)
    if not f"{version}.".startswith(f"{release}."):
        raise Unusable(
            f"torch_npu {version} is installed, which is not for torch {torch.__version__}", install
        )
    for name, passed in CALLS.items():
        op = getattr(getattr(torch.ops.npu, name, None), "default", None)
        if op is None:
            raise Unusable(f"torch_npu {version} has no op {name}", install)
        arguments = op._schema.arguments
        demanded = {each.name for each in arguments if not each.has_default_value()}
        if not demanded <= passed <= {each.name for each in arguments}:
            raise Unusable(
                f"an op of torch_npu {version} is {op._schema}, which cannot be called with "
                f"{', '.join(sorted(passed))}",
                install,
            )
    return vendor


class _OpRows(MoveLaunch):
    """Execute a plan by the paged ops if they serve it, else by rows.

    The ops are launched on the current device, wherever their tensors are.
    """

    tables = False, False

    def __init__(self, plan: CopyPlan, device: torch.device) -> None:
        self._unit = plan.unit
        self.device = device
        self._op = _paged_op(plan)
        # Rows of even size move as float16, which is never computed with.
        even = all(size % 2 == 0 for size in (plan.vector, *plan.src.widths))
        self._dtype = torch.float16 if even else torch.int8
        pairs = plan.src.kv // 2 if self._op else 0
        self._pairs = [(layer, 2 * i) for i in range(pairs) for layer in range(plan.src.layers)]
        nests = plan.nests if not pairs else plan.nests[2 * pairs :] if plan.src.kv % 2 else ()
        self._rows = [StridedCopy(nest, plan.unit, _OPS) for nest in nests]

    @torch.no_grad()
    def carry(self, move: Move, status: torch.Tensor | None) -> None:
        if self._pairs:
            self._paged(move)
        for rows in self._rows:
            rows(move)

    def _paged(self, move: Move) -> None:
        gathers = self._op == "npu_gather_pa_kv_cache"
        count = move.count
        cache, ids, chunk, dense = by_ids_first(move)
        if gathers:
            blocks = ids.units(count, self._unit, cache.device).to(torch.int32)
            tokens = torch.full((1,), count, dtype=torch.int32, device=cache.device)
            more: dict[str, object] = {"block_tables": blocks[None], "seq_lens": tokens}
        else:
            slots = ids.ids_on(cache.device)[ids.offset : ids.offset + count]
            more = {"slot_mapping": slots, "cache_mode": "Norm"}
        op = getattr(torch.ops.npu, self._op).default
        pages = planes(cache, self._dtype)
        rows = planes(chunk, self._dtype)
        moved = slice(dense.offset, dense.offset + count)
        for layer, k in self._pairs:
            key, value = (row[moved] for row in rows[layer][k : k + 2])
            key_cache, value_cache = pages[layer][k : k + 2]
            op(key=key, value=value, key_cache=key_cache, value_cache=value_cache, **more)


def _paged_op(plan: CopyPlan) -> str:
    """Return the name of the paged op that serves a plan; empty if none does."""
    src = plan.src
    dst = plan.dst
    # With an odd number of kv the last one goes by rows, and needs a separate nest.
    alone = src.kv % 2 and len(plan.nests) != src.kv
    if src.kv < 2 or alone or not (_dense(src) and _dense(dst)) or src.paged == dst.paged:
        return ""
    if dst.paged and not plan.src_step and plan.dst_step == 1:
        return "npu_scatter_pa_kv_cache"
    whole = src.paged and plan.src_step and plan.unit == src.block_size and not plan.dst_step
    return "npu_gather_pa_kv_cache" if whole else ""


def _dense(form: Form) -> bool:
    """Return True if planes, and the tokens' rows, lie as the paged ops take them."""
    rows = [form.heads * width for width in form.widths]
    whole = all(size % _LINE == 0 and size <= _MOST for size in rows)
    return whole and packed(form, PAGES if form.paged else TOKENS)


def _scatter_rows(
    matrix: torch.Tensor, axis: int, numbers: torch.Tensor, rows: torch.Tensor
) -> None:
    if matrix.dtype in _SCATTER_ND:
        torch.ops.npu.npu_scatter_nd_update_.default(matrix, numbers[:, None], rows)
    else:
        matrix.index_copy_(axis, numbers, rows)


_OPS = Ops(by_plane=True, holes=False, put=_scatter_rows)  # see `Ops.holes`


def _private_format(tensor: torch.Tensor) -> str:
    """Return why a tensor's bytes do not lie where strides say, and a remedy; empty if they do."""
    number = int(torch.ops.npu.get_npu_format.default(tensor))
    if number in _STRIDED:
        return ""
    return (
        f"a tensor in NPU format {number} (29 is FRACTAL_NZ) does not lie where its strides say; "
        "cast it by torch_npu.npu_format_cast(tensor, 2), or keep NZ in plain memory under a "
        "layout such as 'layer kv | block head dim/32 token dim%32'"
    )
