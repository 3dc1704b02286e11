"""Operations on one example, named in configs as a list of (name, kwargs).

Each is `op(example, seed, **kwargs) -> example`: `example` a dict of tensors, images
[h, w, c]; `seed` two int64 that differ for every example of every epoch and for every
op of the list. What is random depends on the seed only, so a resumed run sees the same
crops. `keys` are the images to treat, all alike: a segmentation map is cropped where
its picture is.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence

from ldm_jax.config import UserError
from ldm_jax.data.tf_cpu import tf

RANDOM = ("random_crop", "flip_lr")
OPS = ("resize", "center_crop", "random_crop", "flip_lr", "pad", "to_float")


def chain(ops: Sequence[tuple[str, dict]]) -> Callable[[dict, object], dict]:
    """Makes one `f(example, seed)` of a config's list; UserError on a wrong entry."""
    steps = [_step(name, kwargs) for name, kwargs in ops]

    def apply(example: dict, seed) -> dict:
        for number, step in enumerate(steps):
            fold_in = tf.random.experimental.stateless_fold_in
            example = step(dict(example), fold_in(seed, number))
        return example

    return apply


def _step(name: str, kwargs: dict) -> Callable:
    if name not in OPS:
        near = difflib.get_close_matches(name, OPS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "no such op."
        raise UserError(f"preprocessing op {name!r}: {hint} Ops: {', '.join(OPS)}")
    op = globals()[name]
    try:
        inspect.signature(op).bind(None, None, **kwargs)
    except TypeError as error:
        raise UserError(f"preprocessing op {name!r}: {error}") from error
    return functools.partial(op, **kwargs)


def resize(example, seed, *, size, method="bicubic", keys=("image",)):
    """Scales so that the shorter side is `size`, or to exactly `size` = (h, w).

    Shrinking is antialiased; use method="nearest" for maps of class numbers.
    """
    del seed
    for key in keys:
        image = example[key]
        h, w = tf.shape(image)[0], tf.shape(image)[1]
        if isinstance(size, int):
            short = tf.minimum(h, w)
            # Round half up, in integers: floats would differ between h and w.
            target = (h * size + short // 2) // short, (w * size + short // 2) // short
        else:
            target = tuple(size)
        resized = tf.image.resize(image, target, method=method, antialias=True)
        if image.dtype == tf.uint8 and resized.dtype != tf.uint8:
            resized = tf.clip_by_value(tf.round(resized), 0.0, 255.0)
        example[key] = tf.cast(resized, image.dtype)
    return example


def center_crop(example, seed, *, size, keys=("image",)):
    """Cuts the middle `size` × `size`; the picture must be that large."""
    del seed
    for key in keys:
        shape = tf.shape(example[key])
        example[key] = _crop(example[key], (shape[:2] - size) // 2, size)
    return example


def random_crop(example, seed, *, size, keys=("image",)):
    """Cuts `size` × `size` anywhere; the picture must be that large."""
    room = tf.shape(example[keys[0]])[:2] - size
    # Drawn as fractions, because a range of integers must be known to be positive.
    where = tf.random.stateless_uniform([2], seed)
    offset = tf.cast(where * tf.cast(room + 1, tf.float32), tf.int32)
    for key in keys:
        example[key] = _crop(example[key], tf.minimum(offset, room), size)
    return example


def _crop(image, offset, size):
    shape = tf.shape(image)
    large_enough = tf.debugging.Assert(
        tf.reduce_min(shape[:2]) >= size,
        [f"cannot crop {size} x {size}; put resize or pad before, picture is", shape],
    )
    with tf.control_dependencies([large_enough]):
        cropped = tf.slice(
            image, [offset[0], offset[1], 0], [size, size, tf.shape(image)[2]]
        )
    return tf.ensure_shape(cropped, [size, size, image.shape[2]])


def flip_lr(example, seed, *, p=0.5, keys=("image",)):
    """Mirrors left and right with probability `p`."""
    flip = tf.random.stateless_uniform([], seed) < p
    for key in keys:
        image = example[key]
        example[key] = tf.where(flip, tf.reverse(image, axis=[1]), image)
    return example


def pad(example, seed, *, value=255, keys=("image",)):
    """Makes the picture square by borders of `value` on both short sides."""
    del seed
    for key in keys:
        image = example[key]
        h, w = tf.shape(image)[0], tf.shape(image)[1]
        missing = tf.maximum(h, w) - tf.stack([h, w])
        before, after = missing // 2, missing - missing // 2
        borders = tf.concat([tf.stack([before, after], axis=1), [[0, 0]]], axis=0)
        fill = tf.cast(value, image.dtype)
        example[key] = tf.pad(image, borders, constant_values=fill)
    return example


def to_float(example, seed, *, keys=("image",)):
    """uint8 to float32 in [-1, 1]."""
    del seed
    for key in keys:
        example[key] = tf.cast(example[key], tf.float32) / 127.5 - 1.0
    return example
