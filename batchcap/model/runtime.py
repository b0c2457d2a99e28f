"""TensorFlow, started once and quietly."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def start_tensorflow() -> str:
    """Import TensorFlow and find its devices; names the one that work will run on.

    What C++ code prints meanwhile is dropped: on a machine without a GPU it speaks of nothing else,
    before it has read its log level.
    """
    with _no_stderr():
        import tensorflow as tf

        # Else float32 has 10 bits on newer GPUs, and captions change with the batch.
        tf.config.experimental.enable_tensor_float_32_execution(False)
        gpus = tf.config.list_physical_devices("GPU")
        if not gpus:
            return "CPU"
        return str(tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU"))


@contextmanager
def _no_stderr() -> Iterator[None]:
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
