# SPDX-License-Identifier: Apache-2.0
"""Mutants that take one layout for another: keys and values, layers, heads and tokens."""

from __future__ import annotations

from dataclasses import replace

from portakv.backends.base import Pending
from portakv.plan.plan import CopyPlan
from portakv.view.form import Form, KVRows, Step
from portakv_conformance.mutants.base import Call, HostRows


class _Misread(HostRows):
    def carry(self, call: Call) -> Pending | None:
        plan = call.plan
        forms = self.forms(call)
        if forms != (plan.src, plan.dst):
            plan = CopyPlan(*forms, plan.src_step, plan.dst_step, plan.unit)
        return super().carry(replace(call, plan=plan))

    def forms(self, call: Call) -> tuple[Form, Form]:
        """Return the forms of both sides as the mutant takes them."""
        return self.read(call.plan.src), call.plan.dst

    def read(self, form: Form) -> Form:
        """Return the form of a source as the mutant takes it."""
        raise NotImplementedError


@_Misread.mutate("read")
def SwappedKeysAndValues(right: HostRows, form: Form) -> Form:
    """Keys are copied to the values and values to the keys."""
    return form if len(set(form.widths)) > 1 else replace(form, parts=form.parts[::-1])


@SwappedKeysAndValues.mutate("read")
def SwappedTuples(right: _Misread, form: Form) -> Form:
    """Keys and values are swapped where each has a separate tensor."""
    return right.read(form) if len({part.table for part in form.parts}) > 1 else form


@_Misread.mutate("read")
def SwappedLayers(right: HostRows, form: Form) -> Form:
    """Layers are walked from the last to the first on one side only."""
    return replace(form, parts=tuple(map(_last_layer_first, form.parts)))


def _last_layer_first(part: KVRows) -> KVRows:
    if len(part.layer) != 1:
        return part
    step = part.layer[0]
    last = part.layer[0].extent - 1
    back = (Step(step.extent, -step.table, -step.stride),)
    table = part.table + last * step.table
    offset = part.offset + last * step.stride
    return replace(part, table=table, offset=offset, layer=back)


@_Misread.mutate("read")
def FirstLayerForAll(right: HostRows, form: Form) -> Form:
    """The address of the first layer is used for every layer of the source."""
    layers = [tuple(Step(at.extent, 0, 0) for at in part.layer) for part in form.parts]
    pairs = zip(form.parts, layers, strict=True)
    return replace(form, parts=tuple(replace(part, layer=layer) for part, layer in pairs))


class TokensBeforeHeads(_Misread):
    """Wrong token order: a cache of heads before tokens (HND) is walked as tokens before heads."""

    def forms(self, call: Call) -> tuple[Form, Form]:
        return self.read(call.plan.src), self.read(call.plan.dst)

    def read(self, form: Form) -> Form:
        parts = []
        for part, width in zip(form.parts, form.widths, strict=True):
            token = part.token
            head = part.head
            if len(token) == len(head) == 1 and head[0].stride > token[0].stride > 0:
                token = (replace(token[0], stride=head[0].extent * width),)
                head = (replace(head[0], stride=width),)
            parts.append(replace(part, token=token, head=head))
        return replace(form, parts=tuple(parts))


@_Misread.mutate("forms")
def HeadsOfTheOtherSide(right: HostRows, call: Call) -> tuple[Form, Form]:
    """The stride between heads is read from the destination and used for both sides."""
    src = call.plan.src
    dst = call.plan.dst
    if any(step.table for part in dst.parts for step in part.head):
        return src, dst
    pairs = zip(src.parts, dst.parts, strict=True)
    parts = tuple(replace(own, head=other.head) for own, other in pairs)
    return replace(src, parts=parts), dst


@_Misread.mutate("forms")
def TwoBlocksTakenForKv(right: HostRows, call: Call) -> tuple[Form, Form]:
    """Layout guessed from sizes: an axis of two blocks is taken for keys and values."""
    return _guess(call.plan.src, call.src.slots), call.plan.dst


def _guess(form: Form, slots: int) -> Form:
    """[2 blocks, kv, ...] read as [kv, 2 blocks, ...]."""
    if form.block_size == 0 or slots != 2 * form.block_size or form.kv != 2:
        return form
    first, second = form.parts
    kv = second.offset - first.offset
    if len(first.block) != 1 or first.table != second.table or not 0 < kv < first.block[0].stride:
        return form
    block = (replace(first.block[0], stride=kv),)
    after = first.offset + first.block[0].stride
    parts = (replace(first, block=block), replace(second, offset=after, block=block))
    return replace(form, parts=parts)


@_Misread.mutate("read")
def TwoLayersTakenForKv(right: HostRows, form: Form) -> Form:
    """Layout guessed from the count of tensors: a list of two layers is taken for (key, value)."""
    parts = form.parts
    layer = form.parts[0].layer
    if form.layers != 2 or form.kv != 2 or len(layer) != 1 or not layer[0].table:
        return form
    distance = parts[1].offset - parts[0].offset
    across = (Step(2, 0, distance),)
    second = replace(parts[0], table=parts[0].table + layer[0].table, layer=across)
    return replace(form, parts=(replace(parts[0], layer=across), second))


@HostRows.mutate("carry")
def LostThroughContiguous(right: HostRows, call: Call) -> None:
    """A destination that is not contiguous is copied through .contiguous() and thrown away."""
    if all(owner.is_contiguous() for owner in call.dst.owners):
        right.carry(call)
