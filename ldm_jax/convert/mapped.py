"""Arrays that lie in a file: read where they are, and let go when they were used."""

import json
import mmap
import pathlib
import struct

import ml_dtypes  # noqa: F401  gives numpy the names bfloat16 and float8_*
import numpy as np

# As safetensors calls them.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file as read-only views of it.

    The file must have been found sound, as `safetensors.safe_open` does. Raises
    ValueError for a dtype that numpy has not.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    raw, arrays = np.frombuffer(data, np.uint8)[8 + length :], {}
    for key, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{key} is of dtype {entry['dtype']}")
        begin, end = entry["data_offsets"]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        # By ndarray, which takes any alignment.
        arrays[key] = np.ndarray(entry["shape"], dtype, raw[begin:end])
    return arrays


def forget(array: np.ndarray) -> None:
    """Lets the memory go in which the file's part of `array` was read, if there is.

    It is read again where it is used again.
    """
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    known = isinstance(owner, mmap.mmap) and hasattr(owner, "madvise")
    if not known or not array.nbytes:
        return
    first = np.frombuffer(owner, np.uint8).__array_interface__["data"][0]
    begin = array.__array_interface__["data"][0] - first
    page = begin // mmap.PAGESIZE * mmap.PAGESIZE
    # The next array may begin on its last page, which then is read again.
    owner.madvise(mmap.MADV_DONTNEED, page, begin + array.nbytes - page)
