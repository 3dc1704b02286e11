"""TensorFlow as the data layer uses it: `from ldm_jax.data.tf_cpu import tf`.

TensorFlow would otherwise take all the memory of the accelerators that JAX needs, so
they are hidden from it before its first operation.
"""

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")
