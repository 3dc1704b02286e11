import argparse
import collections
import contextlib
import copyreg
import itertools
import pathlib
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.convert import torch_archive

# --- files written by hand, instruction by instruction, so that no torch is needed


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def name(module, of_it):
    return f"c{module}\n{of_it}\n".encode()


def items(*values):
    return b"(" + b"".join(values) + b"t"


def mapping(**values):
    return b"}(" + b"".join(text(k) + v for k, v in values.items()) + b"u"


def storage(key, kind="FloatStorage", size=6, view=b""):
    module = "torch.storage" if kind == "UntypedStorage" else "torch"
    fields = (text("storage"), name(module, kind), text(key), text("cpu"), number(size))
    return items(*fields, view) + b"Q"


def tensor(storage, shape=(6,), strides=(1,), offset=0, extra=b"", version="v2"):
    shape, strides = (items(*map(number, sizes)) for sizes in (shape, strides))
    hooks = name("collections", "OrderedDict") + b")R"
    args = items(storage, number(offset), shape, strides, b"\x89", hooks, extra)
    return name("torch._utils", f"_rebuild_tensor_{version}") + args + b"R"


def write_zip(path, program, storages=(), compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        for key, content in members.items():
            archive.writestr(f"archive/{key}", content)
        for key, _, content in storages:
            archive.writestr(f"archive/data/{key}", content)
    return path


def write_legacy(path, program, storages=(), magic=0x1950A86A20F9469CFC6C):
    keys = b"](" + b"".join(text(key) for key, _, _ in storages) + b"e"
    heads = [b"\x8a\x0a" + magic.to_bytes(10, "little"), b"M\xe9\x03", b"}"]
    pickles = [b"\x80\x02" + head + b"." for head in (*heads, program, keys)]
    contents = [struct.pack("<q", size) + content for _, size, content in storages]
    path.write_bytes(b"".join(pickles + contents))
    return path


ROOT = pathlib.Path(__file__).parents[2]
WRITERS = [write_zip, write_legacy]
SIX = np.arange(6, dtype=np.float32)
SIXES = tensor(storage("0"))


def refusal(path, **kwargs):
    """The one line of the UserError that loading raises."""
    with pytest.raises(UserError) as info:
        torch_archive.load(path, **kwargs)
    message = str(info.value)
    assert message.startswith(f"{path}: ") and "\n" not in message, message
    return message


def six(write, path, program=None, **kwargs):
    """A file with one storage "0" of six floats, and by default the tensor of it."""
    program = mapping(a=SIXES) if program is None else program
    return write(path, program, [("0", 6, SIX.tobytes())], **kwargs)


# --- what tensors are


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *[("Double", "f8"), ("Float", "f4"), ("Half", "f2"), ("Long", "i8")],
        *[("Int", "i4"), ("Short", "i2"), ("Char", "i1"), ("Byte", "u1")],
        *[("Bool", "?"), ("BFloat16", "bfloat16")],
    ],
)
def test_types(tmp_path, write, kind, dtype):
    expected = np.array([0, 1, 0, 1, 1]).astype(dtype)
    program = mapping(a=tensor(storage("7", f"{kind}Storage", 5), (5,)))
    path = write(tmp_path / "x.pth", program, [("7", 5, expected.tobytes())])
    found = torch_archive.load(path)["a"]
    assert found.dtype == expected.dtype and not found.flags.writeable
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("dtype", ["uint16", "uint64", "float8_e4m3fn"])
def test_types_beside_untyped_storages(tmp_path, write, dtype):
    expected = np.arange(1, 4).astype(dtype)
    extra, size = name("torch", dtype), expected.nbytes
    one = tensor(storage("0", "UntypedStorage", size), (2,), (1,), 1, extra, "v3")
    path = write(tmp_path / "x", one, [("0", size, expected.tobytes())])
    found = torch_archive.load(path)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, expected[1:])


@pytest.mark.parametrize("write", WRITERS)
def test_shapes_strides_and_offsets(tmp_path, write):
    views = {
        "transposed": ((3, 2), (1, 3), 0, SIX.reshape(2, 3).T),
        "rows": ((2, 2), (3, 2), 0, SIX.reshape(2, 3)[:, ::2]),
        "tail": ((4,), (1,), 2, SIX[2:]),
        "scalar": ((), (), 5, np.float32(5)),
        "repeated": ((4, 2), (0, 1), 1, np.tile(SIX[1:3], (4, 1))),
        "empty": ((0, 3), (3, 1), 6, np.zeros((0, 3))),
    }
    tensors = {key: tensor(storage("0"), *view[:3]) for key, view in views.items()}
    found = torch_archive.load(six(write, tmp_path / "x.pt", mapping(**tensors)))
    for key, (*_, expected) in views.items():
        np.testing.assert_array_equal(found[key], expected, err_msg=key)
        assert found[key].shape == np.shape(expected)
    assert np.shares_memory(found["transposed"], found["tail"])


@pytest.mark.parametrize("write", WRITERS)
def test_trees(tmp_path, write):
    parameter = tensor(storage("0")) + b"\x88" + b"N"
    program = mapping(
        lists=b"](" + number(1) + text("ü") + b"N" + b"\x88" + b"e",
        pairs=items(number(-5), b"G" + struct.pack(">d", 0.5)),
        nested=name("collections", "OrderedDict") + b")R" + text("k") + b"]s"
        # What a state dict's `_metadata` is set with.
        + mapping(version=number(1)) + b"b",
        old=name("collections", "OrderedDict")
        + items(b"](](" + text("b") + number(2) + b"ee") + b"R",
        size=name("torch", "Size") + items(items(number(3))) + b"R",
        parameter=name("torch._utils", "_rebuild_parameter") + items(parameter) + b"R",
    )  # fmt: skip
    found = torch_archive.load(six(write, tmp_path / "x.pt", program))
    np.testing.assert_array_equal(found.pop("parameter"), SIX)
    assert found == {
        "lists": [1, "ü", None, True],
        "pairs": (-5, 0.5),
        "nested": {"k": []},
        "old": {"b": 2},
        "size": (3,),
    }


@pytest.mark.parametrize("write", WRITERS)
def test_storages_in_their_order_not_that_of_use(tmp_path, write):
    program = items(tensor(storage("9")), tensor(storage("10", "ByteStorage", 3), (3,)))
    storages = [("10", 3, b"abc"), ("9", 6, SIX.tobytes())]
    floats, letters = torch_archive.load(write(tmp_path / "x", program, storages))
    np.testing.assert_array_equal(floats, SIX)
    assert letters.tobytes() == b"abc"


def test_python_2_and_old_tensors(tmp_path):
    shape = items(number(2), number(3)), items(number(3), number(1))
    program = b"}U\x01k" + name("torch._utils", "_rebuild_tensor")
    program += items(storage("0", view=b"N"), number(0), *shape) + b"Rs"
    found = torch_archive.load(six(write_legacy, tmp_path / "x.pth", program))
    np.testing.assert_array_equal(found["k"], SIX.reshape(2, 3))


@pytest.mark.parametrize(("kind", "dtype"), [("Float", "f4"), ("BFloat16", "bfloat16")])
def test_big_endian(tmp_path, kind, dtype):
    expected = np.arange(6).reshape(2, 3).astype(dtype)
    swapped = expected.view(f"u{expected.itemsize}").byteswap().tobytes()
    program = tensor(storage("0", f"{kind}Storage"), (3, 2), (1, 3))
    path = write_zip(tmp_path / "x", program, [("0", 6, swapped)], byteorder="big")
    found = torch_archive.load(path)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected.T)


def test_compressed_archive(tmp_path):
    program, options = items(SIXES, SIXES), dict(compression=zipfile.ZIP_DEFLATED)
    one, other = torch_archive.load(six(write_zip, tmp_path / "x", program, **options))
    np.testing.assert_array_equal(one, SIX)
    assert np.shares_memory(one, other)


@pytest.mark.parametrize("write", WRITERS)
def test_only_what_is_asked_for_is_read(tmp_path, write):
    """1 GiB of zeros, a hole in the file: listing and one element take no memory."""
    path, size = tmp_path / "x.ckpt", 2**28
    program = mapping(a=tensor(storage("0", size=size), (size,)))
    content = bytearray(write(path, program, [("0", size, b"")]).read_bytes())
    end = len(content)
    if write is write_zip:
        # zipfile writes no holes: the empty member before the directory is grown.
        end, entry = content.index(b"PK\1\2"), content.rindex(b"PK\1\2")
        content[entry + 20 : entry + 28] = struct.pack("<II", 4 * size, 4 * size)
        place = content.rindex(b"PK\5\6") + 16
        content[place : place + 4] = struct.pack("<I", end + 4 * size)
    with path.open("wb") as file:
        file.write(content[:end])
        file.truncate(end + 4 * size)
        file.seek(0, 2)
        file.write(content[end:])
    tracemalloc.start()
    try:
        found = torch_archive.load(path)["a"]
        assert found.shape == (size,) and found[-1] == 0
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# --- what is no tensor


def exploits(sentinel):
    """Programs that run `touch sentinel` when pickle reads them."""
    run, cmd = name("os", "system"), text(f"touch '{sentinel}'")
    call = run + items(cmd) + b"R"
    module = name("importlib", "import_module") + items(text("os")) + b"R"
    lazy = name("builtins", "map") + items(run, b"](" + cmd + b"e")
    eager, blank = name("builtins", "bytes"), name("types", "SimpleNamespace") + b")R"
    registered = items(text("os"), text("system"), number(250)) + b"R0\x82\xfa"
    getter = text("builtins") + text("getattr") + b"\x93"
    return {
        "REDUCE": call,
        "STACK_GLOBAL": text("os") + text("system") + b"\x93" + items(cmd) + b"R",
        "getattr": getter + items(module, text("system")) + b"R" + items(cmd) + b"R",
        "INST": b"(" + cmd + b"ios\nsystem\n",
        "OBJ": b"(" + run + cmd + b"o",
        "NEWOBJ": eager + items(lazy + b"\x81") + b"\x81",
        "NEWOBJ_EX": eager + items(lazy + b"}\x92") + b"}\x92",
        "BUILD": blank + mapping(__setstate__=run) + b"b" + cmd + b"b",
        "copyreg": name("copyreg", "add_extension") + registered + items(cmd) + b"R",
        "state": name("collections", "OrderedDict") + b")R" + mapping(x=call) + b"b",
    }


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("exploit", exploits(""))
def test_nothing_runs(tmp_path, write, exploit):
    sentinel = tmp_path / "ran"
    program = exploits(sentinel)[exploit]
    with contextlib.suppress(Exception):
        pickle.loads(b"\x80\x04" + program + b".")
    assert sentinel.exists(), "not dangerous, so no test"
    sentinel.unlink()
    if exploit == "copyreg":
        copyreg.remove_extension("os", "system", 250)
        copyreg.clear_extension_cache()

    alone = refusal(six(write, tmp_path / "alone.pth", program))
    assert "nothing of it was run" in alone
    program = mapping(state_dict=mapping(a=SIXES), callbacks=program)
    path = six(write, tmp_path / "inside.ckpt", program)
    refusal(path)
    if exploit in ("INST", "OBJ", "copyreg"):  # of protocols that torch never wrote
        refusal(path, keep="state_dict")
    else:
        found = torch_archive.load(path, keep="state_dict")
        np.testing.assert_array_equal(found["a"], SIX)
    assert not sentinel.exists()


@pytest.mark.parametrize("write", WRITERS)
def test_what_trainers_leave_is_passed_over(tmp_path, write):
    """Classes as keys, objects with state, numpy scalars: names, and never more."""
    callback = name("pytorch_lightning.callbacks", "ModelCheckpoint")
    dtype = name("numpy", "dtype") + items(text("f8")) + b"R" + items(number(3)) + b"b"
    data = name("_codecs", "encode") + items(text("x" * 8), text("latin1")) + b"R"
    best = name("numpy.core.multiarray", "scalar") + items(dtype, data) + b"R"
    hparams = name("argparse", "Namespace") + b")\x81" + mapping(lr=number(1)) + b"b"
    listed = name("omegaconf", "ListConfig") + b")R(" + number(1) + b"e"
    mapped = name("omegaconf", "DictConfig") + b")R(" + text("a") + b"Nu"
    program = mapping(
        callbacks=b"}" + callback + best + b"s",
        hyper_parameters=hparams,
        subclasses=items(listed, mapped),
        state_dict=mapping(a=SIXES),
        mixed=mapping(a=SIXES, b=callback),
        keyed=b"}" + callback + b"Ns",
        bare=b"]" + storage("0") + b"a",
    )  # fmt: skip
    path = six(write, tmp_path / "last.ckpt", program)
    assert "pytorch_lightning.callbacks.ModelCheckpoint" in refusal(path)
    found = torch_archive.load(path, keep="state_dict")
    np.testing.assert_array_equal(found["a"], SIX)
    mixed = "holds 'pytorch_lightning.callbacks.ModelCheckpoint', which is not data"
    assert mixed in refusal(path, keep="mixed")
    assert "ModelCheckpoint" in refusal(path, keep="keyed")
    assert "a storage that is no tensor's" in refusal(path, keep="bare")
    assert "no entry 'state'; name one of ['callbacks'," in refusal(path, keep="state")


@pytest.mark.parametrize("key", [b")" + b"\x85" * 300_000, b"](" + b")e"])
def test_keys_that_are_no_keys(tmp_path, key):
    """The hash of nested tuples overflows the stack of C: in a process of its own."""
    path = write_zip(tmp_path / "x", b"}" + key + b"Ns")
    code = "import sys, ldm_jax.convert.torch_archive as a; a.load(sys.argv[1])"
    command = [sys.executable, "-c", code, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert b"a dict's key that is neither" in done.stderr, done


def test_dicts_that_hold_themselves(tmp_path):
    path = write_zip(tmp_path / "x", b"}q\0" + text("me") + b"h\0s")
    found = torch_archive.load(path)
    assert found["me"] is found


# --- damage


@pytest.mark.parametrize("write", WRITERS)
def test_cut_short_anywhere(tmp_path, write):
    whole = six(write, tmp_path / "x.pth").read_bytes()
    for length in [0, 1, 3, 4, 30, 80, len(whole) // 2, *range(-60, 0, 3)]:
        path = tmp_path / "short.pth"
        path.write_bytes(whole[:length])
        assert "damaged, cut short or not of torch.save" in refusal(path)


@pytest.mark.parametrize("write", WRITERS)
def test_any_wrong_byte_is_no_crash(tmp_path, write):
    whole = six(write, tmp_path / "x.pth").read_bytes()
    path = tmp_path / "damaged.pth"
    refused = 0
    for position, change in itertools.product(range(len(whole)), (0x01, 0x80, 0xFF)):
        content = bytearray(whole)
        content[position] ^= change
        path.write_bytes(content)
        try:
            torch_archive.load(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(whole)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("program", "words"),
    [
        (tensor(storage("0", size=7)), "storage"),
        (tensor(storage("0", size=2**60)), "storage"),
        (tensor(storage("0", size=-1)), "storage"),
        (tensor(storage("0"), (7,)), "strides is incompatible"),
        (tensor(storage("0"), (2, 3), (6, 1)), "strides is incompatible"),
        (tensor(storage("0"), (6,), (1,), 1), "strides is incompatible"),
        (tensor(storage("0"), (6,), (1,), -1), "shape (6,)"),
        (tensor(storage("0"), (6,), (-1,), 5), "shape (6,)"),
        (tensor(storage("0"), (-1,), (1,)), "shape (-1,)"),
        (tensor(storage("0"), (6, 1), (1,)), "shape (6, 1)"),
        (tensor(storage("0"), (2**40,), (0,)), "from few numbers"),
        (tensor(storage("0"), (2**40, 2**40), (0, 0)), "damaged"),
        (tensor(storage("0"), extra=mapping(neg=b"\x88")), "negated"),
        (tensor(storage("0", "QInt8Storage")), "torch.QInt8Storage"),
        (tensor(storage("0", view=items(text("1"), b"K\0K\0"))), "storages within"),
        (tensor(storage("0", "Size")), "damaged"),
        (tensor(number(0)), "without a storage"),
        (tensor(storage("../0")), "damaged"),
        (tensor(storage("/etc/passwd")), "damaged"),
        (storage("0"), "a storage that is no tensor's"),
        (name("torch", "FloatStorage") + b")R", "calls torch.FloatStorage"),
        (items(text("module"), number(1)) + b"Q", "kept outside"),
        (items(SIXES, name("torch", "Size")), "'torch.Size', which is not data"),
        (mapping() + b")R", "REDUCE of what is no function"),
        (b"]" + mapping(a=b"N") + b"b", "attributes of what has none"),
        (b"\x8f", "instruction EMPTY_SET"),
        (b"h\x05", "KeyError"),
        (b"R", "empty stack"),
    ],
)
def test_impossible_tensors(tmp_path, write, program, words):
    message = refusal(six(write, tmp_path / "x.pth", program))
    assert words in message


def test_checksum_of_the_pickle(tmp_path):
    path = six(write_zip, tmp_path / "x.pt")
    content = path.read_bytes()
    path.write_bytes(content.replace(text("a"), text("b"), 1))
    assert "wrong checksum of archive/data.pkl" in refusal(path)
    # torch.serialization.set_crc32_options(False) leaves zeros in the directory.
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 16 : entry + 20] = bytes(4)
    path.write_bytes(content)
    np.testing.assert_array_equal(torch_archive.load(path)["b"], SIX)


def test_not_a_torch_file(tmp_path):
    assert "No such file" in refusal(tmp_path / "nowhere.pth")
    assert "s a directory" in refusal(tmp_path)
    (tmp_path / "page").write_bytes(b"<!DOCTYPE html>\n<html>\n")
    assert "it begins with b'<!DOCTYPE html>" in refusal(tmp_path / "page")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("../data.pkl", b"")
        archive.writestr("/data.pkl", b"")
    assert "2 data.pkl" in refusal(tmp_path / "other.zip")
    path = write_legacy(tmp_path / "x.pth", SIXES, [("0", 5, SIX.tobytes())])
    assert "storage '0' has 5 elements" in refusal(path)
    path = six(write_legacy, tmp_path / "x.pth", magic=0x1950A86A20F9469CFC6D)
    assert "it begins with" in refusal(path)
    write_zip(tmp_path / "huge", bytes(2**28), compression=zipfile.ZIP_DEFLATED)
    assert "archive/data.pkl is of an absurd size" in refusal(tmp_path / "huge")


# --- files that torch writes


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="pip install -e '.[test,parity]'")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_torchs_files(tmp_path, torch, zipped, protocol):
    base = torch.arange(24.0).reshape(2, 3, 4)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    dtypes = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16"]
    dtypes += ["int8", "uint8", "bool"] + ["uint16", "float8_e5m2"] * zipped
    tree = {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": torch.nn.Parameter(base[:, 1]),
        "views": [base, base.permute(2, 0, 1), base[1, ::2, 3], base[1, 2, 3]],
        "expanded": base[:1, :1].expand(5, 3, 4),
        "types": {d: torch.arange(5).to(getattr(torch, d)) for d in dtypes},
        "empty": torch.zeros(0, 3),
        "size": base.shape,
        "plain": (1, 2.5, None, True, "text", 2**40, -3),
    }
    path = tmp_path / "x.pt"
    options = dict(_use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    torch.save(tree, path, **options)

    def compare(ours, theirs):
        if isinstance(theirs, torch.Tensor):
            assert str(theirs.dtype) == f"torch.{ours.dtype}"
            assert ours.shape == tuple(theirs.shape)
            ours, theirs = ours.astype(np.float64), theirs.detach().to(torch.float64)
            np.testing.assert_array_equal(ours, theirs.numpy())
        elif isinstance(theirs, collections.abc.Mapping):
            assert list(ours) == list(theirs)
            for key in theirs:
                compare(ours[key], theirs[key])
        elif isinstance(theirs, list | tuple):
            for one, other in zip(ours, theirs, strict=True):
                compare(one, other)
        else:
            assert ours == theirs and type(ours) is type(theirs)

    found = torch_archive.load(path)
    compare(found, tree)
    assert np.shares_memory(found["views"][0], found["views"][1])
    assert np.shares_memory(found["views"][0], found["parameter"])


def test_torchs_file_of_a_trainer(tmp_path, torch):
    state_dict = torch.nn.Linear(3, 2).state_dict()
    tree = {
        "state_dict": state_dict,
        "hyper_parameters": argparse.Namespace(lr=1e-4, dtype=torch.float16),
        "callbacks": {argparse.ArgumentParser: {"best": np.float64(0.5)}},
        "when": {"set", "of"},
        "device": torch.device("cpu"),
    }
    torch.save(tree, tmp_path / "last.ckpt")
    refusal(tmp_path / "last.ckpt")
    found = torch_archive.load(tmp_path / "last.ckpt", keep="state_dict")
    for key, value in state_dict.items():
        np.testing.assert_array_equal(found[key], value.numpy())
