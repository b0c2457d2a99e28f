"""Annotated photos to training batches: splits, token tables, cached features.

The batch of a step depends only on the seed and the step's number, so that a killed training
resumes exactly where it was.
"""

import hashlib
import logging
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import compress, zip_longest
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt

from batchcap.caption_files.annotations import AnnotatedImage, read_annotations
from batchcap.errors import InputError, UsageError
from batchcap.model import backbones, efficientnet_lite, encoder, extraction
from batchcap.model.backbones import weights_digest
from batchcap.model.captioner import Extract
from batchcap.model.config import BackboneConfig
from batchcap.model.encoder import Encoder
from batchcap.model.extraction import tensorflow_extractor
from batchcap.model.vocabulary import (
    END_ID,
    PADDING_ID,
    START_ID,
    Vocabulary,
    mirrored_ids,
    segment,
    start_ids,
)
from batchcap.photos import formats, images, jpeg, pixels, png, rejections, tiff, webp
from batchcap.photos.images import LoadSettings, load_image
from batchcap.process.environment import cache_folder, code_version
from batchcap.process.progress import progress
from batchcap.process.wording import counted, printable
from batchcap.schema import Rejection
from batchcap.settings import TrainSettings
from batchcap.training import augmentation
from batchcap.training.augmentation import PLAIN, View, augmented, seen
from batchcap.training.feature_cache import FeatureCache

EXTRACTION_BATCH = 32
ANY_STYLE = 0.5  # share of a style's captions that begin with START instead
# Code that turns a file into features: if it changes, features are extracted again.
FEATURE_CODE = (
    *(formats, images, jpeg, pixels, png, tiff, webp, rejections),
    *(augmentation, backbones, efficientnet_lite, extraction),
)
LIBRARIES = ("pillow", "keras")

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """A photo and its captions, cut into words.

    `sha256` is of the file's bytes, `data_set` the number of its data set. `styles` has one entry
    per caption, or none.
    """

    image_id: str
    path: Path
    sha256: str
    captions: tuple[tuple[str, ...], ...]
    data_set: int = 0
    styles: tuple[str | None, ...] = ()


def load_examples(settings: TrainSettings) -> tuple[list[Example], list[Example]]:
    """Return training and validation examples of all data sets, one set after the other.

    They follow the annotations' split, or are split at random. Photos without a file or a word are
    skipped. Photos of splits other than train, and copies of any data set's validation or test
    photos, are not trained on. The log counts them.

    Raises:
        UsageError: there are too few photos to hold out.
        InputError: annotations are invalid, or a data set has no photo left on one of the sides.
    """
    training: list[Example] = []
    validation: list[Example] = []
    tested: set[str | None] = set()
    for number, sources in enumerate(zip(settings.annotations, settings.images, strict=True)):
        annotations, images = sources
        annotated = read_annotations(annotations)
        chosen, held_out, test = _split(annotations, annotated, settings)
        training += _read_all(chosen, images, number)
        validation += _read_all(held_out, images, number)
        tested |= _digests(test, images)
    training = _without(training, {example.sha256 for example in validation} | tested)
    check_each_set(settings, training, validation)
    return training, validation


def check_each_set(
    settings: TrainSettings, training: Sequence[Example], validation: Sequence[Example]
) -> None:
    """Check that each data set has training and validation photos.

    Raises:
        InputError: one has none.
    """
    for side, examples in (("training", training), ("validation", validation)):
        found = {example.data_set for example in examples}
        for number, sources in enumerate(zip(settings.annotations, settings.images, strict=True)):
            if number not in found:
                raise InputError(
                    f"{sources[0]} and {sources[1]} have no {side} photo: check the split, and "
                    "that both belong to the same data set"
                )


def numbers_of_sets(examples: Sequence[Example]) -> npt.NDArray[np.int32]:
    """Return `int32[examples]`: the number of each example's data set."""
    return np.array([example.data_set for example in examples], np.int32)


def data_set_names(annotations: Sequence[Path]) -> list[str]:
    """Return a short name per data set: the last part of its path that is unique."""
    paths = [path.resolve() for path in annotations]
    for depth in range(max(len(path.parts) for path in paths)):
        names = [path.parts[-1 - depth] if depth < len(path.parts) else "" for path in paths]
        names = [name.partition(".")[0] for name in names] if depth == 0 else names
        if all(names) and len(set(names)) == len(names):
            return names
    return [str(number) for number in range(1, 1 + len(annotations))]


def _split(
    path: Path, annotated: list[AnnotatedImage], settings: TrainSettings
) -> tuple[list[AnnotatedImage], list[AnnotatedImage], list[AnnotatedImage]]:
    """Return training, validation and test photos; no test photo is in training."""
    test = [image for image in annotated if image.split == "test"]
    if settings.validation_annotations is not None:
        validating = read_annotations(settings.validation_annotations)
        validation = [image for image in validating if image.split == "val"] or validating
        if others := len(validating) - len(validation):
            log.info("skipped for validation: %s of other splits", counted(others, "photo"))
        wanted = {None, "train", "val"} if settings.train_on_val else {None, "train"}
        test += [image for image in validating if image.split == "test"]
        return _of_splits(annotated, wanted), validation, test
    if any(image.split for image in annotated):
        validation = [image for image in annotated if image.split == "val"]
        training = _of_splits(annotated, {"train"}, used_elsewhere=len(validation))
        return training, validation, test
    if settings.validation_count >= len(annotated):
        raise UsageError(
            f"{path} has {len(annotated)} photos and names no split: lower --validation-count "
            f"{settings.validation_count}, or give --validation-annotations"
        )
    order = np.random.default_rng(settings.seed).permutation(len(annotated))
    held_out = set(order[: settings.validation_count].tolist())
    return (
        [image for i, image in enumerate(annotated) if i not in held_out],
        [image for i, image in enumerate(annotated) if i in held_out],
        test,
    )


def _of_splits(
    annotated: list[AnnotatedImage], splits: set[str | None], used_elsewhere: int = 0
) -> list[AnnotatedImage]:
    """Return the photos of these splits; log the others unless they are used elsewhere."""
    chosen = [image for image in annotated if image.split in splits]
    if others := len(annotated) - len(chosen) - used_elsewhere:
        log.info("skipped for training: %s of other splits", counted(others, "photo"))
    return chosen


def _digests(annotated: Sequence[AnnotatedImage], images: Path) -> set[str | None]:
    """Return the SHA-256 of each photo, including None if one is missing or unreadable."""
    with ThreadPoolExecutor() as pool:
        return set(pool.map(lambda image: _file_digest(images / image.image_id), annotated))


def _without(training: list[Example], held_out: Container[str | None]) -> list[Example]:
    """Return training photos that are not also validation or test photos, under any name."""
    kept = [example for example in training if example.sha256 not in held_out]
    if both := len(training) - len(kept):
        log.warning("skipped %d training photos that are validation or test photos too", both)
    return kept


def _read_all(annotated: Sequence[AnnotatedImage], images: Path, data_set: int) -> list[Example]:
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda image: _file_digest(images / image.image_id), annotated))
    examples, missing, wordless = [], [], []
    for image, digest in zip(annotated, digests, strict=True):
        if digest is None:
            missing.append(image.image_id)
            continue
        captions = [tuple(segment(caption)) for caption in image.captions]
        if not all(captions):
            wordless.append(image.image_id)
        if any(captions):
            path = images / image.image_id
            styles = tuple(compress(image.styles, captions))
            worded = tuple(filter(None, captions))
            examples.append(Example(image.image_id, path, digest, worded, data_set, styles))
    if missing:
        log.warning(
            "%d of %d annotated photos are not in %s or cannot be read, such as %s",
            len(missing),
            len(annotated),
            images,
            printable(missing[0]),
        )
    if wordless:
        photos = f"{counted(len(wordless), 'photo')}, such as {printable(wordless[0])}"
        log.warning("skipped captions without words (%s)", photos)
    return examples


def _file_digest(path: Path) -> str | None:
    """Return the SHA-256 of a file; None if it is missing or unreadable."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # no permission, or a name that is too long
        return None


def styles_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the styles of captions, in order of first appearance."""
    return tuple(dict.fromkeys(style for one in examples for style in one.styles if style))


def token_table(
    examples: Sequence[Example],
    vocabulary: Vocabulary,
    max_length: int,
    styles: Sequence[str] = (),
) -> Tokens:
    """Return captions as ids, START to END and padding: `int32[images, captions, max_length + 1]`.

    Every image has as many rows as the one with the most captions; rows without a caption are all
    padding. A caption that is too long loses its tail and its END. Captions of one of `styles`
    begin with that style's id instead of START.
    """
    starts = start_ids(len(vocabulary), styles)
    most = max(len(example.captions) for example in examples)
    table = np.full((len(examples), most, max_length + 1), PADDING_ID, np.int32)
    for i, example in enumerate(examples):
        for j, (words, style) in enumerate(zip_longest(example.captions, example.styles)):
            start = starts.get(style, START_ID)
            ids = [start, *vocabulary.encode(words), END_ID][: max_length + 1]
            table[i, j, : len(ids)] = ids
    return table


class Sight(Protocol):
    """A source of what the model sees of photos in training: features or pixels."""

    def __call__(
        self, photos: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return features or pixels of the photos with these numbers, and which are mirrored."""


class CachedFeatures:
    """Cached backbone features of one random view per photo.

    `places`, `int64[views, examples]`, are their rows.
    """

    def __init__(
        self, cache: FeatureCache, examples: Sequence[Example], views: Sequence[View] = (PLAIN,)
    ) -> None:
        self.rows = cache.rows()
        self.mirrored = np.array([view.mirrored for view in views])
        self.places = np.array(
            [[cache.row_of[view.key(example.sha256)] for example in examples] for view in views]
        )

    def __call__(
        self, photos: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return features `float32[n, G, D]`, and which are mirrored."""
        views = rng.integers(len(self.places), size=len(photos))
        return self._read(self.places[views, photos]), self.mirrored[views]

    def whole(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return features `float32[n, G, D]` of whole photos."""
        return self._read(self.places[0, start:stop])

    def _read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return self.rows[rows].astype(np.float32)


class AugmentedPhotos:
    """Photos with a new augmentation each time."""

    def __init__(self, examples: Sequence[Example], side: int, flip: bool) -> None:
        self.examples, self.side, self.flip = examples, side, flip

    def __call__(
        self, photos: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return pixels `uint8[n, S, S, 3]`, and which are mirrored."""
        mirrored = self.flip & (rng.random(len(photos)) < 0.5)
        pixels = load_pixels([self.examples[photo] for photo in photos], self.side)
        return augmented(pixels, mirrored, rng), mirrored


def load_pixels(examples: Sequence[Example], side: int) -> npt.NDArray[np.uint8]:
    """Return pixels `uint8[n, S, S, 3]` of photos that were readable before.

    Raises:
        InputError: one of them can't be read any more.
    """
    settings = LoadSettings(side)
    pixels = np.empty((len(examples), side, side, 3), np.uint8)
    for row, example in zip(pixels, examples, strict=True):
        loaded = load_image(example.path, settings).pixels
        if isinstance(loaded, Rejection):
            raise InputError(f"{example.path} has changed since the start: {loaded.message}")
        row[:] = loaded
    return pixels


def extract_all(
    examples: Sequence[Example],
    backbone: keras.Model,
    config: BackboneConfig,
    views: Sequence[View] = (PLAIN,),
    *,
    int8: Encoder | None = None,
    cache_root: Path | None = None,
) -> tuple[FeatureCache, list[Example]]:
    """Extract the features that the cache of this backbone lacks, or of its int8 version.

    Returns the cache, and the examples with a readable photo; the others are logged.

    Raises:
        InputError: no photo is readable, or features are not finite.
    """
    made_by = f"{config} {weights_digest(backbone)} {code_version(*FEATURE_CODE, *LIBRARIES)}"
    if int8 is not None:
        made_by += f" {int8.digest} {code_version(encoder, 'openvino')}"
    root = cache_root or cache_folder("features")
    rows, columns, channels = backbone.output_shape[1:]
    cache = FeatureCache(
        root / hashlib.sha256(made_by.encode()).hexdigest()[:16], (rows * columns, channels)
    )
    with cache.writing():
        if damaged := cache.drop_damaged(v.key(e.sha256) for v in views for e in examples):
            log.warning(
                "%s of the cache %s damaged; extracting again",
                counted(damaged, "row"),
                "is" if damaged == 1 else "are",
            )
        views = [v for v in views if any(v.key(e.sha256) not in cache.row_of for e in examples)]
        missing = [e for e in examples if any(v.key(e.sha256) not in cache.row_of for v in views)]
        if missing:
            log.info(
                "features: %d photos in the cache, %d to extract",
                len(examples) - len(missing),
                len(missing),
            )
        extract = int8 or tensorflow_extractor(backbone, config)
        rejected = set(_extract(missing, cache, extract, config, views))
    if len(rejected) == len(examples):
        raise InputError(f"none of {len(examples)} photos can be read, such as {examples[0].path}")
    return cache, [example for example in examples if example.path not in rejected]


def _extract(
    examples: Sequence[Example],
    cache: FeatureCache,
    extract: Extract,
    config: BackboneConfig,
    views: Sequence[View],
) -> Iterator[Path]:
    """Extract and cache features; yield the paths of unreadable photos."""
    load_settings = LoadSettings(config.image_size)
    with progress("features", len(examples), "photo") as bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(examples), EXTRACTION_BATCH):
            batch = examples[start : start + EXTRACTION_BATCH]
            loaded = pool.map(lambda e: load_image(e.path, load_settings), batch)
            pixels = np.zeros((EXTRACTION_BATCH, config.image_size, config.image_size, 3), np.uint8)
            good: list[Example] = []
            for example, image in zip(batch, loaded, strict=True):
                if isinstance(image.pixels, Rejection):
                    log.warning("skipped %s: %s", printable(example.image_id), image.pixels.message)
                    yield example.path
                else:
                    pixels[len(good)] = image.pixels
                    good.append(example)
            sha256s = [example.sha256 for example in good]
            for view in views:
                features = np.asarray(extract(np.asarray(seen(pixels, view, sha256s))))
                with np.errstate(over="ignore"):
                    features = features[: len(good)].astype(np.float16)
                _check_finite(features, good)
                cache.append([view.key(sha256) for sha256 in sha256s], features)
            bar.update(len(batch))


def _check_finite(features: npt.NDArray[np.float16], examples: Sequence[Example]) -> None:
    for example, row in zip(examples, features, strict=True):
        if not np.isfinite(row).all():
            raise InputError(
                f"the backbone's features of {printable(example.image_id)} are not finite, or too "
                "large for float16: check --backbone-weights and --input-range"
            )


class TrainingBatches:
    """The endless stream of training batches, addressed by step number.

    In each pass, a data set's photos are shown as often as its `settings.weight`: with 1.5, all of
    them once and a random half again; at least one photo. A random half of the captions with a
    style begins with START instead, so that START means any style.
    """

    def __init__(
        self,
        sight: Sight,
        captions: Tokens,
        data_sets: npt.NDArray[np.int32],
        vocabulary: Vocabulary,
        settings: TrainSettings,
    ) -> None:
        self.sight, self.captions, self.data_sets = sight, captions, data_sets
        self.first_style = len(vocabulary)
        styles = np.arange(self.first_style, 1 + captions.max(), dtype=np.int32)
        self.mirrored_ids = np.concatenate([mirrored_ids(vocabulary), styles])
        self.seed, self.weights = settings.seed, settings.weight or (1.0,) * (1 + data_sets.max())
        per_pass = len(self._order(0))
        self.batch_size = min(settings.batch_size, per_pass)
        self.steps_per_pass = per_pass // self.batch_size
        most = captions.shape[1]
        self.captions_per_image = min(settings.captions_per_image or most, most)

    def __getitem__(self, step: int) -> tuple[npt.NDArray[Any], Tokens, npt.NDArray[np.int32]]:
        """Return a step's batch: what is seen of B photos, their captions and data sets.

        The latter two are `int32[B, C, T + 1]` and `int32[B]`.
        """
        pass_number, index = divmod(step, self.steps_per_pass)
        chosen = self._order(pass_number)[index * self.batch_size :][: self.batch_size]
        rng = np.random.default_rng((self.seed, pass_number, 1 + index))
        seen, mirrored = self.sight(chosen, rng)
        captions = self._draw_captions(self.captions[chosen], rng)
        captions = np.where(mirrored[:, None, None], self.mirrored_ids[captions], captions)
        starts = captions[:, :, 0]
        starts[(starts >= self.first_style) & (rng.random(starts.shape) < ANY_STYLE)] = START_ID
        return seen, trim(captions), self.data_sets[chosen]

    def _order(self, pass_number: int) -> npt.NDArray[np.int64]:
        """Return the photos of a pass, some several times or not at all."""
        rng = np.random.default_rng((self.seed, pass_number))
        parts = []
        for data_set, weight in enumerate(self.weights):
            photos = np.flatnonzero(self.data_sets == data_set)
            times, rest = divmod(weight, 1)
            parts += [photos] * int(times)
            if rest:
                count = max(round(rest * len(photos)), int(times == 0))
                parts.append(rng.permutation(photos)[:count])
        return rng.permutation(np.concatenate(parts))

    def _draw_captions(self, captions: Tokens, rng: np.random.Generator) -> Tokens:
        if self.captions_per_image == captions.shape[1]:
            return captions
        # Adding `is_padding` sorts rows of padding behind all captions.
        is_padding = captions[:, :, 1] == PADDING_ID
        order = np.argsort(rng.random(is_padding.shape) + is_padding, axis=1)
        drawn = order[:, : self.captions_per_image, None]
        return np.take_along_axis(captions, drawn, axis=1)


def trim(captions: Tokens) -> Tokens:
    """Cut `int32[B, C, T + 1]` to its longest caption."""
    longest = int((captions != PADDING_ID).any(axis=(0, 1)).sum())
    return captions[:, :, :longest]
