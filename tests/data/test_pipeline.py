"""Batches: every example once an epoch, any step at once, the same for any hosts."""

import itertools
import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from ldm_jax.config import UserError
from ldm_jax.data import pipeline, sources

OPS = (("random_crop", {"size": 12}), ("flip_lr", {}), ("to_float", {}))


@pytest.fixture(scope="module")
def source():
    drawn = sources.load("synthetic", "train", resolution=16, count=50)
    return drawn.with_fields(index=np.arange(50), tokens=np.eye(50, 7, dtype=np.int32))


def train(source, steps, **kwargs):
    arguments = {"batch_size": 8, "seed": 0, "ops": OPS, **kwargs}
    return list(itertools.islice(pipeline.train_batches(source, **arguments), steps))


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_shapes_and_columns(source):
    batch = train(source, 1)[0]
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "image": ((8, 12, 12, 3), "float32"),
        "label": ((8,), "int32"),
        "index": ((8,), "int64"),
        "tokens": ((8, 7), "int32"),
    }
    rows = source.fields["tokens"][batch["index"]]
    np.testing.assert_array_equal(batch["tokens"], rows)
    captions = train(source, 1, fields=["caption", "index"], ops=())[0]
    expected = [source.fields["caption"][i].encode() for i in captions["index"]]
    assert list(captions["caption"]) == expected


def test_an_epoch_repeats_nothing_and_misses_nothing(source):
    batches = train(source, 25, fields=["index"], ops=())
    order = np.concatenate([batch["index"] for batch in batches])
    epochs = order.reshape(4, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(epochs[0]) != list(range(50))


def test_order_follows_the_seed(source):
    assert_same(train(source, 3), train(source, 3))
    first, other = (train(source, 1, seed=seed)[0]["index"] for seed in (0, 1))
    assert (first != other).any()


def test_resume_is_exact(source):
    straight = train(source, 16)  # beyond two epochs
    for start in (1, 6, 13):
        assert_same(train(source, 16 - start, start_step=start), straight[start:])


def test_the_far_future_is_reached_at_once(source):
    assert train(source, 1, start_step=10**12)[0]["image"].shape == (8, 12, 12, 3)


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_share_the_same_global_batch(source, hosts):
    whole = train(source, 9)
    parts = [
        train(source, 9, process_index=host, process_count=hosts)
        for host in range(hosts)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_augmentation_differs_between_epochs():
    base = sources.load("synthetic", "train", resolution=16, count=1)
    batches = train(base, 8, batch_size=1, ops=OPS[:1])
    assert len({batch["image"].tobytes() for batch in batches}) > 2


def test_eval_pads_the_last_batch(source):
    batches = list(pipeline.eval_batches(source, batch_size=16, ops=OPS))
    assert [batch["_mask"].sum() for batch in batches] == [16, 16, 16, 2]
    assert batches[0]["_mask"].dtype == np.float32
    mask = np.concatenate([batch["_mask"] for batch in batches]) == 1
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index[mask], np.arange(50))
    assert_same(batches, list(pipeline.eval_batches(source, batch_size=16, ops=OPS)))
    limited = list(pipeline.eval_batches(source, batch_size=16, limit=20))
    assert [batch["_mask"].sum() for batch in limited] == [16, 4]


def test_eval_gives_every_host_as_many_batches(source):
    whole = list(pipeline.eval_batches(source, batch_size=16))
    parts = [
        list(
            pipeline.eval_batches(
                source, batch_size=16, process_index=host, process_count=4
            )
        )
        for host in range(4)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_folder_pictures_are_decoded_on_white(tmp_path):
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (6, 4), (0, 0, 255, 0)).save(tmp_path / "b.png")
    Image.new("L", (6, 4), 80).save(tmp_path / "c.png")
    Image.new("RGB", (6, 4), (0, 255, 0)).save(tmp_path / "d.webp", lossless=True)
    Image.new("RGBA", (6, 4), (0, 0, 0, 51)).save(tmp_path / "e.webp", lossless=True)
    Image.new("CMYK", (6, 4), (0, 0, 0, 0)).save(tmp_path / "f.jpg")
    Image.new("L", (6, 4), 80).save(tmp_path / "g.jpg")
    source = sources.load("folder", "all", path=str(tmp_path))
    expected = [
        (255, 0, 0),
        (255, 255, 255),
        (80, 80, 80),
        (0, 255, 0),
        (204, 204, 204),
        (255, 255, 255),
        (80, 80, 80),
    ]
    files = [open(path, "rb").read() for path in source.fields["image"]]
    encoded = source.with_fields(image=np.array(files, object))
    for each in (source, encoded):
        batch = next(pipeline.eval_batches(each, batch_size=7))
        assert batch["image"].shape == (7, 4, 6, 3)
        np.testing.assert_allclose(batch["image"][:, 2, 2], expected, atol=1)


def test_errors(source):
    with pytest.raises(UserError, match="batch_size=9.*multiple of the 2 hosts"):
        train(source, 1, batch_size=9, process_count=2)
    with pytest.raises(UserError, match="no 'depth' in the source"):
        train(source, 1, fields=["depth"])
    with pytest.raises(UserError, match="empty"):
        train(source.take(0), 1)


@pytest.fixture(scope="module")
def sharding():
    return NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))


def test_prefetch_shards_in_order_and_leaves_strings(source, sharding):
    fields = ["image", "index", "caption"]
    plain = train(source, 5, fields=fields)
    prefetch = pipeline.prefetch_to_device(iter(plain), sharding)
    batches = list(prefetch)
    assert len(batches) == 5 and prefetch.waited > 0
    for batch, expected in zip(batches, plain, strict=True):
        assert set(batch) == {"image", "index"}
        assert batch["image"].sharding.is_equivalent_to(sharding, 4)
        np.testing.assert_array_equal(batch["image"], expected["image"])
        np.testing.assert_array_equal(batch["index"], expected["index"])


def test_prefetch_stays_the_asked_number_ahead(sharding):
    made, enough = [], threading.Event()

    def endless():
        for number in itertools.count():
            made.append(number)
            if len(made) == 4:
                enough.set()
            yield {"x": np.full((8,), number, np.int32)}

    prefetch = pipeline.prefetch_to_device(endless(), sharding, size=3)
    assert np.asarray(next(prefetch)["x"])[0] == 0
    assert enough.wait(10)
    assert not prefetch._room.acquire(timeout=0.2)
    assert len(made) == 4  # one taken, three ready
    prefetch.close()
    assert not prefetch._thread.is_alive()
    assert list(prefetch) == []


def test_prefetch_hands_over_errors(sharding):
    def failing():
        yield {"x": np.zeros(8, np.float32)}
        raise OSError("disk gone")

    prefetch = pipeline.prefetch_to_device(failing(), sharding)
    next(prefetch)
    with pytest.raises(OSError, match="disk gone"):
        next(prefetch)
    with pytest.raises(StopIteration):
        next(prefetch)
    assert not prefetch._thread.is_alive()
