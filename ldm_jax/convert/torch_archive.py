"""Reads the files of `torch.save` without torch, and without running what they say.

A checkpoint is a pickle, a program for a stack machine that may call any function.
Here an own machine knows the few instructions that tensors need. It imports nothing
and calls nothing: the name of a class or function stays a name, and those of the
tables below stand for code in this file.

Both formats are read: the zip archive of torch 1.6 and later, and the older one, five
pickles and then the storages, which torchvision's VGG16 is in.
"""

import dataclasses
import functools
import mmap
import pathlib
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  gives numpy the names bfloat16 and float8_*
import numpy as np

from ldm_jax.config import UserError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_PICKLE = 2**28  # bytes; 1,500 tensors take 2**18
_MAX_REPEATED = 2**26  # elements of a tensor that repeats a smaller storage's

_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}
# Types without a storage class of their own: bytes, and the type beside the shape.
_DTYPES = {
    f"torch.{name}": name
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
}
_FUNCTIONS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}
_PARAMETERS = "torch.nn.modules.container.ParameterDict"
_KNOWN = _FUNCTIONS | _STORAGES.keys() | _DTYPES.keys()

# Instructions that push what stands beside them.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_DAMAGE = (
    *(ValueError, LookupError, TypeError, OverflowError, EOFError, RuntimeError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)


class NoEntryError(UserError):
    """A sound file that lacks the entry which was asked for."""


class _Refused(Exception):
    """What a file holds that no file of tensors needs."""


@dataclasses.dataclass(frozen=True)
class _Global:
    """The name of a class or function, and all that is ever made of it."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    raw: np.ndarray  # its bytes
    dtype: np.dtype
    big_endian: bool = False


# (key, dtype, elements) of a storage; None while a first pass only takes notes.
_FindStorage = Callable[[str, np.dtype, int], _Storage | None]


def load(path: str | pathlib.Path, keep: str | Sequence[str] | None = None) -> Any:
    """What a .pth, .pt or .ckpt file holds: dicts, lists, tuples, numbers and arrays.

    Arrays are read-only views of the file, which is read where they are (those of a
    compressed archive are unpacked). Tensors that share storage share memory. `keep`
    takes one entry of the outermost dict, the first of several names that is there; the
    others may then hold whatever a trainer left, of which nothing is built. Raises
    UserError in one line where the file is damaged or would need code to be run,
    NoEntryError where it has no such entry.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            tree = _load(file, lenient=keep is not None)
        if keep is not None:
            tree = _entry(path, tree, [keep] if isinstance(keep, str) else keep)
        _check_plain(tree)
    except _Refused as error:
        raise UserError(
            f"{path}: {error}; nothing of it was run; save its tensors alone, as a dict"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; give a file of torch.save"
        ) from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: damaged, cut short or not of torch.save"
            f" ({type(error).__name__}: {reason:.200}); fetch it again"
        ) from error
    return tree


def _load(file: BinaryIO, lenient: bool) -> Any:
    if not file.seek(0, 2):
        raise EOFError("the file is empty")
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if data[:4] == b"PK\3\4":
        return _load_zip(file, np.frombuffer(data, np.uint8), lenient)
    return _load_legacy(data, lenient)


def _entry(path: pathlib.Path, tree: Any, keys: Sequence[str]) -> Any:
    if not isinstance(tree, dict):
        raise NoEntryError(f"{path}: holds no dict; load all of it")
    for key in keys:
        if key in tree:
            return tree[key]
    raise NoEntryError(
        f"{path}: no entry {' or '.join(map(repr, keys))}; name one of"
        f" {list(tree)[:9]!r:.200}"
    )


def _check_plain(tree: Any) -> None:
    """Refuses names and bare storages that stand where data should."""
    # Without recursion: depth is the file's choice, and it may hold itself.
    pending, seen = [tree], set()
    while pending:
        item = pending.pop()
        if isinstance(item, _Global):
            raise _Refused(f"holds {_quoted(item.name)}, which is not data")
        if isinstance(item, _Storage):
            raise _Refused("holds a storage that is no tensor's")
        if isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            pending += item
            pending += item.values() if isinstance(item, dict) else ()


def _quoted(name: str) -> str:
    return f"{name!r:.100}"


# --- formats


def _load_zip(file: BinaryIO, data: np.ndarray, lenient: bool) -> Any:
    """torch >= 1.6: `name/data.pkl` and the storages `name/data/0`, `name/data/1`, …"""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"a zip archive with {len(pickles)} data.pkl")
        root = pickles[0].removesuffix("data.pkl")

        def member(name: str, checked: bool) -> np.ndarray:
            info = members[name]
            if checked and info.file_size > _MAX_PICKLE:
                raise ValueError(f"{name} is of an absurd size")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                return np.frombuffer(archive.read(info), np.uint8)
            head = data[info.header_offset :][:30].tobytes()
            magic, *lengths = struct.unpack("<4s22xHH", head)
            start = info.header_offset + len(head) + sum(lengths)
            raw = data[start:][: info.file_size]
            if magic != b"PK\3\4" or raw.size != info.file_size:
                raise EOFError(f"{name} is not where the archive says")
            # torch can be told to leave the checksums out; they are 0 then.
            if checked and info.CRC and zlib.crc32(raw) != info.CRC:
                raise ValueError(f"wrong checksum of {name}")
            return raw

        big = False
        if f"{root}byteorder" in members:
            big = member(f"{root}byteorder", checked=True).tobytes() == b"big"

        @functools.cache
        def storage(key, dtype, size):
            # To check what is mapped would be to read the whole file.
            raw = member(f"{root}data/{key}", checked=False)
            return _Storage(_bytes_of(raw, key, dtype, size), dtype, big)

        program = member(pickles[0], checked=True).tobytes()
        return _Machine(storage, lenient).run(program)


def _load_legacy(data: mmap.mmap, lenient: bool) -> Any:
    """Before: magic number, version, machine, object, storage keys; then storages."""

    def none(*_):
        raise _Refused("refers to a storage before its tensors")

    try:
        magic = _Machine(none, False).run(data)
    except (_Refused, *_DAMAGE):
        magic = None
    if magic != _MAGIC:
        raise ValueError(f"it begins with {data[:16]!r}")
    version, _ = _Machine(none, False).run(data), _Machine(none, False).run(data)
    if version != _PROTOCOL:
        raise ValueError(f"version {version!r:.20}")

    # Storages come last, and only the object says of what type they are.
    types: dict[str, tuple[np.dtype, int]] = {}

    def note(key, dtype, size):
        if types.setdefault(key, (dtype, size)) != (dtype, size):
            raise ValueError(f"two types of storage {_quoted(key)}")

    begin = data.tell()
    _Machine(note, lenient).run(data)
    keys = _Machine(none, False).run(data)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise TypeError("its list of storages is none")
    if sorted(keys) != sorted(types):
        raise ValueError("its list of storages does not fit its tensors")
    raw, storages, position = np.frombuffer(data, np.uint8), {}, data.tell()
    for key in keys:
        dtype, size = types[key]
        (claimed,) = struct.unpack("<q", data[position : position + 8])
        if claimed != size:
            raise ValueError(f"storage {_quoted(key)} has {claimed} elements")
        content = _bytes_of(raw[position + 8 :], key, dtype, size)
        storages[key] = _Storage(content, dtype)
        position += 8 + content.size
    data.seek(begin)
    return _Machine(lambda key, *_: storages[key], lenient).run(data)


def _bytes_of(raw: np.ndarray, key: str, dtype: np.dtype, size: int) -> np.ndarray:
    length = dtype.itemsize * size
    if not 0 <= length <= raw.size:
        raise EOFError(
            f"storage {_quoted(key)} should have {length} bytes, there are {raw.size}"
        )
    return raw[:length]


# --- tensors


def _tensor(storage, offset, shape, strides, dtype=None, metadata=()) -> Any:
    """A view of a storage; numpy's constructor refuses one that goes beyond it."""
    if storage is None:
        return None
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor without a storage")
    if any(metadata):
        raise _Refused("holds a lazily negated or conjugated tensor")
    if dtype is None:
        dtype = storage.dtype
    item = dtype.itemsize
    if len(shape) != len(strides) or min(0, offset, *shape, *strides) < 0:
        raise ValueError(f"a tensor of shape {shape!r:.60}, strides {strides!r:.60}")
    array = np.ndarray(
        shape, dtype, storage.raw, offset * item, [item * step for step in strides]
    )
    if array.size > max(_MAX_REPEATED, storage.raw.size // item):
        raise ValueError(f"a tensor of shape {shape!r:.60} from few numbers")
    if storage.big_endian:
        array = array.view(f"u{item}").byteswap().view(dtype)
    return array


# --- the stack machine


class _Machine:
    """Runs one pickle. `lenient` lets unknown names pass as what they are, names."""

    def __init__(self, storage: _FindStorage, lenient: bool):
        self.storage, self.lenient = storage, lenient
        self.stack, self.marked, self.memo = [], [], {}

    def run(self, program: bytes | mmap.mmap) -> Any:
        """The object that `program` describes; of a file, it reads up to its end."""
        for opcode, arg, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                break
            self.step(opcode.name, arg)
        return self.stack.pop()

    def step(self, op: str, arg: Any) -> None:
        push = self.stack.append
        match op:
            case "PROTO" | "FRAME":
                pass
            case _ if op in _LITERALS:
                push(arg)
            case _ if op in _CONSTANTS:
                push(_CONSTANTS[op])
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "MARK":
                self.marked.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self.since_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self.take(int(op[-1]))))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[arg])
            case "SETITEM" | "APPEND":
                items = self.take(2 if op == "SETITEM" else 1)
                self.fill(items, dict if op == "SETITEM" else list)
            case "SETITEMS" | "APPENDS":
                items = self.since_mark()
                self.fill(items, dict if op == "SETITEMS" else list)
            case "BINPERSID":
                push(self.persistent(self.stack.pop()))
            case "GLOBAL":
                push(self.named(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                module, name = self.take(2)
                push(self.named(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                function, args = self.take(2)
                push(self.call(op, function, args))
            case "NEWOBJ_EX":
                function, args, _ = self.take(3)
                push(self.call(op, function, args))
            case "BUILD":
                target, state = self.take(2)
                # Embeddings of textual inversion stand in one.
                if isinstance(target, _Global) and target.name == _PARAMETERS:
                    push(state["_parameters"])
                    return
                # An OrderedDict's attributes, such as a state dict's version numbers.
                if not isinstance(target, dict | _Global):
                    raise _Refused("sets the attributes of what has none")
                push(target)
            case _:
                raise _Refused(f"has the pickle instruction {op}")

    def take(self, count: int) -> list:
        if len(self.stack) < count:
            raise IndexError("an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def since_mark(self) -> list:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def fill(self, items: list, kind: type) -> None:
        """Adds to the list or dict on top; to a name, which stays one, nothing."""
        target = self.stack[-1]
        if isinstance(target, _Global):
            return
        if not isinstance(target, kind):
            raise TypeError(f"not a {kind.__name__}")
        if kind is list:
            target += items
        else:
            pairs = zip(items[::2], items[1::2], strict=True)
            target |= ((_key(key), value) for key, value in pairs)

    def named(self, name: str) -> _Global:
        if name not in _KNOWN and not self.lenient:
            raise _Refused(f"refers to {_quoted(name)}")
        return _Global(name)

    def call(self, op: str, function: Any, args: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(args, tuple):
            raise _Refused(f"has {op} of what is no function")
        if function.name not in _KNOWN:
            return function  # lenient, or `named` had refused it
        if op != "REDUCE":
            raise _Refused(f"has {op} of {function.name}")
        match function.name:
            case "collections.OrderedDict":
                pairs = _sequence(args[0]) if args else []
                return {_key(key): value for key, value in pairs}
            case "torch.Size":
                return tuple(_sequence(args[0]))
            case "torch._utils._rebuild_parameter":
                return args[0]
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
                return _tensor(*args[:4], metadata=args[6:])
            case "torch._utils._rebuild_tensor_v3":
                dtype = np.dtype(_DTYPES[_name(args[6])])
                return _tensor(*args[:4], dtype, metadata=args[7:])
        raise _Refused(f"calls {function.name}")

    def persistent(self, reference: Any) -> _Storage | None:
        """A storage by ("storage", type, key, device, elements[, view])."""
        if not isinstance(reference, tuple) or reference[:1] != ("storage",):
            raise _Refused("refers to something that is kept outside")
        kind, key, _, size = reference[1:5]
        if reference[5:] not in ((), (None,)):
            raise _Refused("holds storages within storages, of torch before 0.4")
        if not isinstance(key, str) or not isinstance(size, int):
            raise TypeError("a storage without key or size")
        return self.storage(key, np.dtype(_STORAGES[_name(kind)]), size)


def _name(item: Any) -> str:
    if not isinstance(item, _Global):
        raise TypeError("no type where one should be")
    return item.name


def _sequence(items: Any) -> list | tuple:
    if not isinstance(items, list | tuple):
        raise TypeError("no list where one should be")
    return items


def _key(key: Any) -> Any:
    """A dict's key, flat: the hash of a deep tuple would overflow the C stack."""
    flat = (str, int, float, bytes, type(None), _Global)
    parts = key if type(key) is tuple else (key,)
    if not all(isinstance(part, flat) for part in parts):
        raise _Refused("has a dict's key that is neither text nor number")
    return key
