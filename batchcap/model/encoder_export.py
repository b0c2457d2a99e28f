"""Exports the encoder, from pixels to features, for CPUs without TensorFlow."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from batchcap.model.backbones import extract_features
from batchcap.model.encoder import Graphs
from batchcap.model.runtime import import_openvino, openvino_core
from batchcap.model.tensorflow_captioner import TensorFlowCaptioner, variables


def export_encoder(captioner: TensorFlowCaptioner) -> Graphs:
    """Return the encoder as OpenVINO's graph.

    Its inputs are `pixels`, `uint8[B, S, S, 3]`, and weights, named as in `model.safetensors`: the
    graph holds none. Its output has the features, `float32[B, G, D]`.
    """
    extract = partial(extract_features, captioner.backbone, captioner.config.backbone)
    size = captioner.config.backbone.image_size
    traced = tf.function(extract, autograph=False).get_concrete_function(
        tf.TensorSpec((None, size, size, 3), tf.uint8)
    )
    named = variables(captioner.backbone, captioner.decoder)
    handles = {id(variable.value.handle): name for name, variable in named.items()}
    weights = {
        inside.op.name: handles[id(outside)]
        for outside, inside in traced.graph.captures
        if id(outside) in handles
    }
    graph = convert_variables_to_constants_v2(traced).graph.as_graph_def()
    for node in graph.node:
        if node.name in weights:
            _make_input(node, named[weights[node.name]].shape)
    return _as_openvino(graph, weights)


def _make_input(node: Any, shape: tuple[int, ...]) -> None:
    """Replace a constant by an input of its shape and type."""
    dtype = node.attr["dtype"].type
    node.ClearField("attr")
    node.op = "Placeholder"
    node.attr["dtype"].type = dtype
    for size in shape:
        node.attr["shape"].shape.dim.add().size = size


def _as_openvino(graph: Any, weights: dict[str, str]) -> Graphs:
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "encoder.pb").write_bytes(graph.SerializeToString())
        model = openvino_core().read_model(folder / "encoder.pb")
        for parameter in model.get_parameters():
            node = parameter.get_friendly_name().removesuffix(":0")
            parameter.set_friendly_name(weights.get(node, "pixels"))
        openvino.save_model(model, folder / "encoder.xml", compress_to_fp16=False)
        return {
            "float32": np.fromfile(folder / "encoder.xml", np.uint8),
            "float32_constants": np.fromfile(folder / "encoder.bin", np.uint8),
        }
