"""Batches from a source, in an order that is arithmetic: nothing need be saved.

Example i of step s has the global position p = s · batch_size + i, the epoch
e = p // n, and is number shuffle(p % n, seed, e) of the source, a permutation that can
be evaluated at any point. So a run resumes at any step at once, an epoch repeats no
example, and the global batch is the same however many hosts share it.
"""

import functools
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from ldm_jax import picture
from ldm_jax.config import UserError
from ldm_jax.data import preprocess
from ldm_jax.data.sources import Source
from ldm_jax.data.tf_cpu import tf

Batch = dict[str, np.ndarray]
_MAX_THREADS = 16


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    ops: Sequence[tuple[str, dict]] = (),
    fields: Sequence[str] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless batches from `start_step` on; this host's rows [batch_size / hosts, ...].

    `batch_size` is the global one; host h gets the h-th contiguous part of each batch.
    `fields` are the columns to carry, by default all but strings; `image` arrives as
    uint8 [h, w, 3] unless `ops` (see `preprocess`) change it. Position p of an endless
    source is its example p.
    """
    local = _local_batch_size(batch_size, process_count)
    n = len(source)
    endless = source.example is not None
    read = (_maker if endless else _reader)(source, ops, fields)

    def example(count):
        position = count // local * batch_size + process_index * local + count % local
        random = tf.stack([tf.constant(seed, tf.int64), position])
        if endless:
            return read(position, random)
        order_seed = tf.stack([tf.constant(seed, tf.int64), position // n])
        index = tf.random.experimental.index_shuffle(position % n, order_seed, n - 1)
        return read(index, random)

    counts = tf.data.Dataset.range(start_step * local, np.iinfo(np.int64).max)
    return _iterate(counts, example, local)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    ops: Sequence[tuple[str, dict]] = (),
    fields: Sequence[str] | None = None,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The first `limit` examples (all by default) once, in order; this host's rows.

    `_mask` (float32) is 1 for an example and 0 for the padding of the last batch. All
    hosts get equally many batches. Random ops draw the same in every pass.
    """
    local = _local_batch_size(batch_size, process_count)
    n = len(source) if limit is None else min(limit, len(source))
    read = _reader(source, ops, fields)

    def example(count):
        position = count // local * batch_size + process_index * local + count % local
        seed = tf.stack([tf.constant(0, tf.int64), position])
        row = read(tf.minimum(position, n - 1), seed)
        return {**row, "_mask": tf.cast(position < n, tf.float32)}

    num_batches = -(-n // batch_size)
    return _iterate(tf.data.Dataset.range(num_batches * local), example, local)


def pictures(source: Source, ops: Sequence[tuple[str, dict]]) -> np.ndarray:
    """All pictures of a source as the nets see them, uint8 [n, h, w, c]."""
    batches = eval_batches(source, batch_size=64, ops=ops, fields=("image",))
    rows = [batch["image"][batch["_mask"] > 0] for batch in batches]
    return picture.to_uint8(np.concatenate(rows))


def prefetch_to_device(
    iterator: Iterable[Batch], sharding: jax.sharding.Sharding, size: int = 2
) -> "DevicePrefetch":
    """Keeps `size` batches on the devices ahead of the consumer.

    `sharding` splits the first axis. Columns of strings stay behind.
    """
    return DevicePrefetch(iterator, sharding, size)


class DevicePrefetch:
    """Iterator over batches of global jax.Arrays, filled by a thread.

    `waited` sums the seconds that the consumer spent waiting for data. An error of the
    thread is raised where the batch was asked for. `close()` ends the thread.
    """

    def __init__(self, iterator, sharding, size):
        self.waited = 0.0
        self._iterator, self._sharding = iter(iterator), sharding
        self._ready = queue.Queue()
        self._room = threading.Semaphore(size)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, jax.Array]:
        if self._closed.is_set():
            raise StopIteration
        start = time.perf_counter()
        batch, error = self._ready.get()
        self.waited += time.perf_counter() - start
        if error is not None:
            self.close()
            raise error
        self._room.release()
        return batch

    def close(self) -> None:
        """Stops the thread and waits for it; the iteration ends."""
        self._closed.set()
        self._room.release()
        self._thread.join()

    def _fill(self):
        try:
            while True:
                self._room.acquire()
                if self._closed.is_set():
                    return
                self._ready.put((self._transfer(next(self._iterator)), None))
        except BaseException as error:  # handed over; StopIteration too
            self._ready.put((None, error))

    def _transfer(self, batch):
        return {
            name: jax.make_array_from_process_local_data(self._sharding, column)
            for name, column in batch.items()
            if column.dtype.kind not in "OSU"
        }


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size}: make it a multiple of the {process_count} hosts"
        )
    return batch_size // process_count


def _chosen(source: Source, fields) -> Batch:
    """The columns to carry; UserError for one that is not there."""
    if len(source) == 0:
        raise UserError("the source is empty; give it at least one example")
    for name in fields or ():
        if name not in source.fields:
            have = ", ".join(source.fields)
            raise UserError(f"fields: no {name!r} in the source, which has {have}")
    return {
        name: column
        for name, column in source.fields.items()
        if (name in fields if fields else name == "image" or _is_numeric(column))
    }


def _reader(source: Source, ops, fields):
    """Makes `read(index, seed) -> example`, processed, of the stored rows."""
    columns = _chosen(source, fields)
    tensors = {
        # TensorFlow takes an object array of bytes only as a list.
        name: tf.constant(column.tolist() if column.dtype.kind == "O" else column)
        for name, column in columns.items()
    }
    process = preprocess.chain(ops)
    image_kind = source.fields["image"].dtype.kind if "image" in columns else None

    def read(index, seed):
        example = {name: tensor[index] for name, tensor in tensors.items()}
        if image_kind == "U":
            example["image"] = tf.io.read_file(example["image"])
        if image_kind in ("U", "O"):
            example["image"] = _decode(example["image"])
        return process(example, seed)

    return read


def _maker(source: Source, ops, fields):
    """Makes `read(index, seed) -> example`, processed, of an endless source."""
    like = _chosen(source, fields)  # their shapes and dtypes
    types = [column.dtype for column in like.values()]
    process = preprocess.chain(ops)

    def values(index):
        row = source.example(int(index))
        return [np.asarray(row[name], like[name].dtype) for name in like]

    def read(index, seed):
        made = tf.numpy_function(values, [index], types, stateful=False)
        for value, column in zip(made, like.values(), strict=True):
            value.set_shape(column.shape[1:])
        return process(dict(zip(like, made, strict=True)), seed)

    return read


def _is_numeric(column: np.ndarray) -> bool:
    return column.dtype.kind not in "OSU"


def _decode(data):
    """Decodes a picture file to uint8 [h, w, 3]; what is transparent becomes white."""
    png = tf.strings.substr(data, 1, 3) == "PNG"
    webp = tf.strings.substr(data, 8, 4) == "WEBP"
    decode = functools.partial(tf.io.decode_image, data, expand_animations=False)
    # WebP is decoded as it is, with three or four channels: it refuses to add alpha.
    image = tf.case(
        [(png, lambda: decode(channels=4)), (webp, lambda: decode(channels=0))],
        default=lambda: decode(channels=3),
    )
    opaque = tf.fill(tf.concat([tf.shape(image)[:2], [1]], axis=0), tf.uint8.max)
    rgba = tf.concat([image, tf.cast(opaque, tf.uint8)], axis=-1)[..., :4]
    colour, alpha = tf.split(tf.cast(rgba, tf.int32), [3, 1], axis=-1)
    white = (colour * alpha + 255 * (255 - alpha) + 127) // 255
    return tf.ensure_shape(tf.cast(white, tf.uint8), [None, None, 3])


def _iterate(counts, example, batch_size) -> Iterator[Batch]:
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = min(_MAX_THREADS, os.cpu_count() or 1)
    dataset = counts.map(example, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.batch(batch_size, drop_remainder=True)
    return dataset.prefetch(2).with_options(options).as_numpy_iterator()
