# SPDX-License-Identifier: Apache-2.0
"""Read tensors through a bound layout in the core: `native/core/view.h` and `tensors.h`.

The module knows words and torch; `portakv.view.bound` knows what they mean.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from portakv.core.library import address_in, function, function_of_numbers, pylibrary, written

#: The code of `native/core/core.h` for which the tensors themselves show no reason.
PAST_64_BITS = -3

#: The version of DLPack's exchange API that the core is written for.
_DLPACK = 1
_EXCHANGE = b"dlpack_exchange_api"

#: Code, bits and lanes by which DLPack describes a dtype.
_DESCRIBED = {
    "bool": (6, 8, 1),
    "uint8": (1, 8, 1),
    "uint16": (1, 16, 1),
    "uint32": (1, 32, 1),
    "uint64": (1, 64, 1),
    "int8": (0, 8, 1),
    "int16": (0, 16, 1),
    "int32": (0, 32, 1),
    "int64": (0, 64, 1),
    "float16": (2, 16, 1),
    "float32": (2, 32, 1),
    "float64": (2, 64, 1),
    "bfloat16": (4, 16, 1),
    "complex32": (5, 32, 1),
    "complex64": (5, 64, 1),
    "complex128": (5, 128, 1),
    "float8_e4m3fn": (10, 8, 1),
    "float8_e4m3fnuz": (11, 8, 1),
    "float8_e5m2": (12, 8, 1),
    "float8_e5m2fnuz": (13, 8, 1),
    "float8_e8m0fnu": (14, 8, 1),
    "float4_e2m1fn_x2": (17, 4, 2),
}
#: Added to the position of a dtype that DLPack does not describe.
_UNDESCRIBED = 1 << 32


class _Torch(ctypes.Structure):
    """`PortakvTorch` of `core.h`."""

    _fields_ = (
        ("exchange", ctypes.c_void_p),
        ("tensor", ctypes.py_object),
        ("parameter", ctypes.py_object),
        ("is_pinned", ctypes.py_object),
        ("forms", ctypes.py_object),
        ("handle_at", ctypes.c_int64),
        ("storage_offset", ctypes.c_void_p),
        ("storage_bytes", ctypes.c_void_p),
        ("dtype", ctypes.c_void_p),
        ("uint8", ctypes.c_int64),
        ("int8", ctypes.c_int64),
        ("is_neg", ctypes.c_void_p),
        ("is_conj", ctypes.c_void_p),
        ("is_inference", ctypes.c_void_p),
        ("requires_grad", ctypes.c_void_p),
        ("raise_version", ctypes.c_void_p),
    )


class Words(NamedTuple):
    """The answer of `read_words`."""

    form: bytes
    slots: int
    #: Numbers of the tensors that stay in the table of addresses.
    entries: list[int]
    #: Sorted, disjoint ranges [first byte, past the last byte).
    spans: list[tuple[int, int]]


class TensorReader(NamedTuple):
    """The core's function that reads plain tensors."""

    #: Takes the address of a bound layout's words, and tensors; see `portakv_view_read_tensors`.
    read: Callable[[int, object], Any]
    #: The address of the `PortakvTorch`, which is the first word of bound layouts.
    address: int
    #: The `PortakvTorch` itself, which has to stay.
    objects: object


def tensor_reader(forms: dict[Any, Any]) -> TensorReader | None:
    """Return the core's reader of plain tensors; ``forms`` are known forms by their words.

    None: this torch does not describe tensors by the exchange API of DLPack, or lacks a function.
    """
    exchange = _exchange_api()
    at = handle_at()
    if not exchange or at is None:
        return None
    tensor = torch.Tensor
    try:
        objects = _Torch(
            exchange,
            tensor,
            torch.nn.Parameter,
            tensor.is_pinned,
            forms,
            at,
            address_in_torch("aoti_torch_get_storage_offset"),
            address_in_torch("aoti_torch_get_storage_size"),
            address_in_torch("aoti_torch_get_dtype"),
            _torch_library()["aoti_torch_dtype_uint8"](),
            _torch_library()["aoti_torch_dtype_int8"](),
            address_in_torch("_ZN2at6native6is_negERKNS_6TensorE"),
            address_in_torch("_ZN2at6native7is_conjERKNS_6TensorE"),
            address_in_torch("_ZN2at6native12is_inferenceERKNS_6TensorE"),
            address_in_torch("_ZNK3c1010TensorImpl13requires_gradEv"),
            address_in_torch("_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"),
        )
    except AttributeError:
        return None
    reads = function("view_read_tensors", ctypes.py_object, ctypes.c_void_p, ctypes.py_object)
    return TensorReader(reads, ctypes.addressof(objects), objects)


@cache
def handle_at() -> int | None:
    """Return the bytes from a tensor's object to torch's handle of it; None: there is none.

    The object starts with a head that all objects have. Since torch 2.10 the handle follows: the
    `at::Tensor` of C++, which is the address of the tensor's implementation.
    """
    tensor = torch.empty(0, device="cpu")
    at = object.__basicsize__
    address = ctypes.c_void_p.from_address(id(tensor) + at).value
    return at if address == tensor._cdata else None


@cache
def _torch_library() -> ctypes.PyDLL:
    """Return torch's extension, which finds functions in all libraries of torch."""
    return ctypes.PyDLL(torch._C.__file__)


def address_in_torch(name: str) -> int:
    """Return the address of a function of torch's libraries; raise `AttributeError` if this torch
    has none of that name."""
    return address_in(_torch_library(), name)


def _exchange_api() -> int:
    """Return the address of the exchange API of torch's tensors; 0 if there is none to use."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    # The core looks for the interpreter's functions among those that all libraries share.
    if capsule is None or not pylibrary().portakv_python_found():
        return 0
    # A separate object, without the declarations of other modules.
    pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
    pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    pointer.restype = ctypes.c_void_p
    address: int = pointer(capsule, _EXCHANGE)
    major = ctypes.c_uint32.from_address(address).value
    return address if major == _DLPACK else 0


def read_words(
    bound: int,
    sizes: Sequence[int],
    tensors: Sequence[int],
    place: int,
    table_on_device: bool,
    alignment: int,
) -> Words | int:
    """Read tensors that words describe; the arguments are those of `portakv_view_read`.

    Returns a code if they cannot be read.
    """
    size_words = array("q", sizes)
    tensor_words = array("q", tensors)
    at = size_words.buffer_info()[0], tensor_words.buffer_info()[0]
    terms = *at, place, table_on_device, alignment
    count, out = written(_read_function(), 256 + 8 * len(tensors), bound, *terms)
    if count < 0:
        return count
    slots, entries, ranges, _ = out[:4]
    begin = 4 + entries
    past = begin + 2 * ranges
    spans = []
    if ranges:
        spans = list(zip(out[begin:past:2], out[begin + 1 : past : 2], strict=True))
    return Words(out[past:count].tobytes(), slots, out[4:begin].tolist(), spans)


@cache
def _read_function() -> Callable[..., int]:
    """Return `portakv_view_read`."""
    numbers = (ctypes.c_int64,) * 3
    words = (ctypes.c_void_p,) * 3
    room = ctypes.c_void_p, ctypes.c_int64
    return function_of_numbers(8, "view_read", *words, *numbers, *room)


@cache
def dtype_words() -> dict[torch.dtype, int]:
    """Return the word of each dtype: the fields of DLPack's description, or a number of its own."""
    dtypes = {each for each in vars(torch).values() if isinstance(each, torch.dtype)}
    words = {}
    for number, dtype in enumerate(sorted(dtypes, key=str)):
        fields = _DESCRIBED.get(name_of(dtype))
        words[dtype] = _UNDESCRIBED + number
        if fields is not None:
            code, bits, lanes = fields
            words[dtype] = code | bits << 8 | lanes << 16
    return words


@cache
def dtype_names() -> dict[int, str]:
    """Return the name of the dtype of each word; "" for 0, which stands for bytes."""
    names = {word: name_of(dtype) for dtype, word in dtype_words().items()}
    return {**names, 0: ""}


@cache
def words_of_dtypes() -> dict[str, int]:
    """Return the word of each dtype by its name; that of bytes, "", is 0."""
    return {name: word for word, name in dtype_names().items()}


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``float16``."""
    return str(dtype).partition(".")[2]


# ------------------------------------------------------------------------------------------------
# Ask the kernel whether host memory may be written, for copies that would else end the process.

#: Why a destination is refused, as a clause.
READ_ONLY = (
    "its memory is mapped for reading only. Copy into other memory, or map it with PROT_WRITE"
)


def writable(first: int, past: int) -> bool:
    """Return False if a write of the first or the last byte of a range on the host would fail.

    Memory that the kernel lets the process write is writable, whatever its owner says about it,
    such as a read-only numpy array. `portakv_writable` of ``core.h`` says more.
    """
    return _writable()(first, past) != 0


@cache
def _writable() -> Callable[[int, int], int]:
    """Return the function. It never waits: another thread might not give the interpreter back for
    milliseconds."""
    return function("writable", ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
