"""Training on all GPUs of a machine: each replica learns from its part of a batch."""

from typing import Any

import tensorflow as tf


def training_strategy() -> Any:
    """Return a strategy that mirrors weights on several GPUs; on one GPU or CPUs, the default."""
    gpus = tf.config.list_logical_devices("GPU")
    return tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()


def replica_batch(batch: Any) -> Any:
    """Return this replica's part of a tensor along its first axis, which all share equally."""
    replica = tf.distribute.get_replica_context()
    rows = batch.shape[0] // replica.num_replicas_in_sync
    start = rows * replica.replica_id_in_sync_group
    rest = batch.shape.rank - 1
    return tf.slice(batch, [start, *[0] * rest], [rows, *[-1] * rest])


def joined(strategy: Any, parts: Any) -> Any:
    """Concatenate the tensors of all replicas along the first axis."""
    return tf.concat(strategy.experimental_local_results(parts), axis=0)


def summed_over_replicas(value: Any) -> Any:
    """Return the sum of a tensor over all replicas."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def sum_variable(size: int) -> Any:
    """Return `float32[size]` zeros: each replica adds to its own; reading gives the sum."""
    return tf.Variable(
        tf.zeros(size),
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )
