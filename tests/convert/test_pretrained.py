import hashlib
import http.server
import pathlib
import threading

import jax
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.convert import pretrained
from ldm_jax.nets import lpips
from tests.convert import test_torch_archive as archives

OPTION = "autoencoder_stage.loss.vgg"
CONTENT = b"weights, as it were"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Puts what "vgg16" means at another address; returns the cache, which is empty."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LDM_JAX_CACHE", str(cache))

    def at(url, sha256=SHA256):
        vgg16 = pretrained.Published(url, sha256, len(CONTENT), "vgg.pth")
        monkeypatch.setitem(pretrained.PUBLISHED, "vgg16", vgg16)
        return cache

    return at


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.pth"
    path.write_bytes(CONTENT)
    return path


def refusal(call, *args):
    with pytest.raises(UserError) as info:
        call(*args)
    assert "\n" not in str(info.value)
    return str(info.value)


def refused_fetch():
    message = refusal(pretrained.fetch, "vgg16", None, OPTION)
    assert message.startswith(f"{OPTION}: ") and f"set {OPTION} to" in message
    return message


# --- fetch


def test_table_agrees_with_the_names_that_torch_hub_gives():
    """<name>-<first eight digits of the sha256>.pth"""
    for name in ("vgg16", "inception"):
        published = pretrained.PUBLISHED[name]
        assert published.url.endswith(f"/{published.file}")
        assert published.file.endswith(f"-{published.sha256[:8]}.pth")
    for published in pretrained.PUBLISHED.values():
        assert len(published.sha256) == 64 and int(published.sha256, 16)


def test_given_paths_are_taken_as_they_are(source, publish):
    publish("file:///nowhere")
    assert pretrained.fetch("vgg16", str(source), OPTION) == source
    message = refusal(pretrained.fetch, "vgg16", "/no/where.pth", OPTION)
    assert message.startswith(f"{OPTION}: no file '/no/where.pth'")


def test_downloaded_once(source, publish, capsys):
    cache = publish(source.as_uri())
    found = pretrained.fetch("vgg16")
    assert found.read_bytes() == CONTENT
    assert f"downloading {source.as_uri()} (" in capsys.readouterr().out
    assert list(cache.iterdir()) == [found]
    source.unlink()
    assert pretrained.fetch("vgg16") == found
    assert capsys.readouterr().out == ""


def test_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert pretrained.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("LDM_JAX_CACHE")
    assert pretrained.cache_dir() == tmp_path / "b" / "ldm_jax" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    home = pathlib.Path.home() / ".cache" / "ldm_jax" / "weights"
    assert pretrained.cache_dir() == home


def test_wrong_checksum_leaves_nothing(source, publish):
    cache = publish(source.as_uri(), sha256="0" * 64)
    message = refused_fetch()
    assert f"has the sha256 {SHA256}, not {'0' * 64};" in message
    assert list(cache.iterdir()) == []


def test_offline(publish):
    cache = publish("http://127.0.0.1:9/vgg.pth")  # discard: nobody answers
    message = refused_fetch()
    assert "can't download the weights" in message
    assert "fetch http://127.0.0.1:9/vgg.pth where there is a network" in message
    assert list(cache.iterdir()) == []


def test_cache_that_is_a_file(publish, source):
    publish(source.as_uri()).write_bytes(b"")
    assert "can't download the weights" in refused_fetch()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path != "/gone" else 404)
        missing = 5 if self.path == "/short" else 0
        self.send_header("Content-Length", str(len(CONTENT) + missing))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("path", ["short", "gone"])
def test_download_that_breaks_off(server, publish, path):
    # Claims five bytes that never come.
    content = hashlib.sha256(CONTENT + bytes(5)).hexdigest()
    cache = publish(f"http://127.0.0.1:{server.server_port}/{path}", content)
    message = refused_fetch()
    assert "404" in message or path == "short"
    assert list(cache.iterdir()) == []


def test_two_at_once(source, publish, monkeypatch):
    """Both download, since neither sees the other's file before it is whole."""
    cache, found = publish(source.as_uri()), []
    copy, both = pretrained._copy, threading.Barrier(2)

    def copy_and_wait(url, path):
        sha256 = copy(url, path)
        both.wait(20)
        return sha256

    monkeypatch.setattr(pretrained, "_copy", copy_and_wait)

    def fetch():
        found.append(pretrained.fetch("vgg16"))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [cache / "vgg.pth"] * 2
    assert [path.read_bytes() for path in cache.iterdir()] == [CONTENT]


# --- LPIPS

# Of the convolutions in torchvision's `features`: index, block, output channels.
CONVS = [(0, 1, 64), (2, 1, 64), (5, 2, 128), (7, 2, 128), (10, 3, 256), (12, 3, 256)]
CONVS += [(14, 3, 256), (17, 4, 512), (19, 4, 512), (21, 4, 512)]
CONVS += [(24, 5, 512), (26, 5, 512), (28, 5, 512)]
# Weights overlap in one storage, so that files are small.
NUMBERS = np.random.default_rng(0).uniform(size=2**11).astype(np.float32)


def _tensor(shape, offset):
    storage = archives.storage("0", size=len(NUMBERS))
    steps = [step * (size > 1) for step, size in zip((1, 2, 5, 7), shape, strict=False)]
    return archives.tensor(storage, shape, steps, offset)


def _vgg(key):
    """{key(index, block, leaf): tensor} of the convolutions."""
    entries, width = {}, 3
    for index, block, features in CONVS:
        weight = _tensor((features, width, 3, 3), index)
        entries[key(index, block, "weight")] = weight
        entries[key(index, block, "bias")] = _tensor((features,), 100 + index)
        width = features
    return entries


def _heads(key):
    return {
        key.format(i): _tensor((1, width, 1, 1), 200 + i)
        for i, width in enumerate(lpips.WIDTHS)
    }


def _write(path, entries, write=archives.write_zip):
    program = archives.mapping(**entries)
    return write(path, program, [("0", len(NUMBERS), NUMBERS.tobytes())])


def _torchvision(index, block, leaf):
    return f"features.{index}.{leaf}"


def _sliced(index, block, leaf):
    return f"net.slice{block}.{index}.{leaf}"


SCALING = {f"scaling_layer.{name}": _tensor((1, 3), 0) for name in ("shift", "scale")}
BLOCKS = [(1, 2), (2, 2), (3, 3), (4, 3), (5, 3)]
LAYOUTS = {
    "torchvision": (
        _vgg(_torchvision) | {"classifier.0.weight": _tensor((4, 4), 0)},
        _heads("lin{}.model.1.weight"),
    ),
    "taming": (_vgg(_sliced) | _heads("lin{}.model.1.weight") | SCALING, None),
    "lpips": (
        _vgg(_sliced)
        | _heads("lin{}.model.1.weight")
        | _heads("lins.{}.model.1.weight")
        | SCALING,
        None,
    ),
    "lins": (_vgg(_sliced), _heads("lins.{}.model.1.weight")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    vgg, heads = LAYOUTS[layout]
    vgg = _write(tmp_path / "vgg.pth", vgg)
    if heads is not None:
        heads = _write(tmp_path / "heads.pth", heads, archives.write_legacy)
    params = pretrained.lpips_params(vgg, heads)

    x = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    made = jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), x, x)["params"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, made)
    assert jax.tree.map(np.shape, params) == shapes

    names = [f"conv_{b}_{n}" for b, depth in BLOCKS for n in range(1, depth + 1)]
    for name, (index, _, features) in zip(names, CONVS, strict=True):
        h, w, i, o = np.indices(shapes["vgg"][name]["kernel"])
        expected = NUMBERS[index + 1 * o + 2 * i + 5 * h + 7 * w]
        np.testing.assert_array_equal(params["vgg"][name]["kernel"], expected)
        expected = NUMBERS[100 + index :][:features]
        np.testing.assert_array_equal(params["vgg"][name]["bias"], expected)
    for i, width in enumerate(lpips.WIDTHS):
        expected = NUMBERS[200 + i :][: 2 * width : 2]
        np.testing.assert_array_equal(params[f"head_{i}"], expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features.0.bias": None}, "missing features.0.bias"),
        ({"features.0.bias": _tensor((3,), 0)}, "does not fit vgg/conv_1_1/bias"),
        ({"features.1.bias": _tensor((3,), 0)}, "unknown features.1.bias"),
        ({"lin0.model.1.weight": _tensor((1, 3, 1, 1), 0)}, "does not fit head_0"),
    ],
)
def test_weights_of_another_net(tmp_path, change, words):
    entries = LAYOUTS["torchvision"][0] | LAYOUTS["torchvision"][1] | change
    entries = {key: value for key, value in entries.items() if value is not None}
    path = _write(tmp_path / "x.pth", entries)
    message = refusal(pretrained.lpips_params, path)
    assert message.startswith(f"{path}: not the weights of") and words in message


def test_file_without_a_state_dict(tmp_path):
    path = archives.write_zip(tmp_path / "x.pth", archives.items(archives.number(1)))
    assert "holds no state dict but tuple" in refusal(pretrained.lpips_params, path)
