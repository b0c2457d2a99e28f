"""Reads and checks a model directory."""

from pathlib import Path
from typing import NamedTuple

from batchcap.errors import ModelError
from batchcap.model.config import (
    CONFIG_FILE,
    VOCABULARY_FILE,
    ModelConfig,
    model_file,
    read_config,
)
from batchcap.model.vocabulary import Vocabulary
from batchcap.model.weights import Weights, check_sizes, read_weights


class ModelDirectory(NamedTuple):
    """What a model directory has; its files fit each other."""

    path: Path
    config: ModelConfig
    vocabulary: Vocabulary
    weights: Weights


def read_model_directory(path: Path) -> ModelDirectory:
    """Read the files that change captions.

    Raises:
        ModelError: a file is missing or damaged, a field is wrong, or files belong to different
            models.
    """
    config = read_config(path)
    vocabulary = Vocabulary.load(model_file(path, VOCABULARY_FILE))
    if len(vocabulary) != config.decoder.vocabulary_size:
        raise ModelError(
            f"{path / VOCABULARY_FILE} has {len(vocabulary)} words, but {CONFIG_FILE} says "
            f"{config.decoder.vocabulary_size}: the files belong to different models"
        )
    weights = read_weights(path)
    check_sizes(config.decoder, weights, path / CONFIG_FILE)
    return ModelDirectory(path, config, vocabulary, weights)
