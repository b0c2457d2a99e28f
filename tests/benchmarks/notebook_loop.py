"""The baseline: the notebook's model and its generation loop, one photo at a time, eagerly.

Layers, string lookups and loop are the notebook's: for every word, it reads the whole caption again
with `keras.layers.MultiHeadAttention`, and attends to the photo's features again. The weights are a
batchcap model's, so that both write the same captions.
"""

from collections.abc import Callable
from typing import Any

import einops
import keras
import tensorflow as tf

from batchcap.model.config import DecoderConfig
from batchcap.model.network import Attention, CaptionDecoder, DecoderLayer
from batchcap.model.tensorflow_captioner import TensorFlowCaptioner
from batchcap.model.vocabulary import SPECIAL_WORDS

PADDING, _, START, END = SPECIAL_WORDS


class SeqEmbedding(keras.layers.Layer):
    def __init__(self, trained: CaptionDecoder) -> None:
        super().__init__()
        config = trained.config
        self.positions = keras.layers.Embedding(config.max_length, config.units)
        self.words = keras.layers.Embedding(config.vocabulary_size, config.units, mask_zero=True)
        self.add = keras.layers.Add()
        self.positions.build()
        self.words.build()
        self.positions.set_weights(trained.positions.get_weights())
        (vectors,) = trained.words.get_weights()
        self.words.set_weights([vectors[: config.vocabulary_size]])  # without those of styles

    def call(self, tokens: Any) -> Any:
        embedded = self.words(tokens)
        places = tf.range(tf.shape(embedded)[1])[tf.newaxis, :]
        return self.add([embedded, self.positions(places)])


class NotebookLayer(keras.layers.Layer):
    def __init__(self, config: DecoderConfig, trained: DecoderLayer) -> None:
        super().__init__()
        self.self_attention = _multi_head(config, trained.self_attention, config.units)
        self.cross_attention = _multi_head(config, trained.cross_attention, config.feature_size)
        self.adds = [keras.layers.Add() for _ in range(2)]
        self.feed_forward = keras.Sequential(
            [
                keras.layers.Dense(2 * config.units, activation="relu"),
                keras.layers.Dense(config.units),
                keras.layers.Dropout(config.dropout),
            ]
        )
        self.feed_forward.build((None, None, config.units))
        self.feed_forward.set_weights(trained.widen.get_weights() + trained.narrow.get_weights())
        self.norms = [keras.layers.LayerNormalization() for _ in trained.norms]
        for norm, trained_norm in zip(self.norms, trained.norms, strict=True):
            norm.build((None, None, config.units))
            norm.set_weights(trained_norm.get_weights())

    def call(self, image: Any, x: Any) -> Any:
        self_norm, cross_norm, feed_norm = self.norms
        x = self_norm(self.adds[0]([x, self.self_attention(x, x, use_causal_mask=True)]))
        from_image, self.scores = self.cross_attention(x, image, return_attention_scores=True)
        x = cross_norm(self.adds[1]([x, from_image]))
        return feed_norm(x + self.feed_forward(x))


def _multi_head(config: DecoderConfig, trained: Attention, seen_size: int) -> Any:
    layer = keras.layers.MultiHeadAttention(config.heads, config.key_size)
    layer.build((None, None, config.units), (None, None, seen_size))
    weights = []
    for dense in (trained.query, trained.key, trained.value):
        kernel, bias = dense.get_weights()
        weights.append(einops.rearrange(kernel, "c (h k) -> c h k", h=config.heads))
        weights.append(einops.rearrange(bias, "(h k) -> h k", h=config.heads))
    kernel, bias = trained.project.get_weights()
    weights.append(einops.rearrange(kernel, "(h k) u -> h k u", h=config.heads))
    layer.set_weights([*weights, bias])
    return layer


class TokenOutput(keras.layers.Layer):
    def __init__(self, trained: CaptionDecoder) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(trained.config.vocabulary_size)
        self.dense.build((None, None, trained.config.units))
        self.dense.set_weights(trained.output_logits.get_weights())
        self.bias = trained.banned

    def call(self, x: Any) -> Any:
        return self.dense(x) + self.bias


class NotebookCaptioner(keras.Model):
    def __init__(self, captioner: TensorFlowCaptioner) -> None:
        super().__init__()
        trained = captioner.decoder
        words = list(captioner.vocabulary.words)
        words[0] = ""
        self.feature_extractor = captioner.backbone
        self.feature_norm = trained.feature_norm
        self.word_to_index = keras.layers.StringLookup(
            mask_token="", oov_token=words[1], vocabulary=words
        )
        self.index_to_word = keras.layers.StringLookup(
            mask_token="", oov_token=words[1], vocabulary=words, invert=True
        )
        self.seq_embedding = SeqEmbedding(trained)
        self.decoder_layers = [NotebookLayer(trained.config, layer) for layer in trained.layers]
        self.output_layer = TokenOutput(trained)

    def call(self, inputs: Any) -> Any:
        image, tokens = inputs
        image = self.feature_norm(einops.rearrange(image, "b h w c -> b (h w) c"))
        x = self.seq_embedding(tokens)
        for layer in self.decoder_layers:
            x = layer(image, x)
        return self.output_layer(x)

    def simple_gen(self, image: Any, max_length: int) -> str:
        tokens = self.word_to_index([[START]])
        features = self.feature_extractor(image[tf.newaxis, ...])
        for _ in range(max_length):
            logits = self((features, tokens)).numpy()[:, -1, :]
            next_token = tf.argmax(logits, axis=-1)[:, tf.newaxis]
            tokens = tf.concat([tokens, next_token], axis=1)
            if next_token[0] == self.word_to_index(END):
                break
        words = [word for word in self.index_to_word(tokens[0, 1:]).numpy() if word != END.encode()]
        return b" ".join(words).decode()


def notebook_loop(captioner: TensorFlowCaptioner) -> Callable[[str], str]:
    """Return a function from a JPEG's path to its greedy caption, words joined by spaces."""
    model = NotebookCaptioner(captioner)
    config = captioner.config
    low, high = config.backbone.input_range
    side = config.backbone.image_size

    def caption(path: str) -> str:
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        image = tf.image.resize(image, (side, side)) * ((high - low) / 255) + low
        return model.simple_gen(image, config.decoder.max_length)

    return caption
