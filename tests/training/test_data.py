"""From annotations and photos to batches: splits, token tables, cached features, mirrored views."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from batchcap.errors import InputError, UsageError
from batchcap.model.backbones import build_backbone, extract_features
from batchcap.model.config import BackboneConfig
from batchcap.model.vocabulary import (
    END_ID,
    PADDING_ID,
    SPECIAL_WORDS,
    START_ID,
    UNKNOWN_ID,
    Vocabulary,
)
from batchcap.photos.images import LoadSettings, load_image
from batchcap.settings import TrainSettings
from batchcap.training import data
from batchcap.training.augmentation import seen, training_views
from batchcap.training.data import (
    AugmentedPhotos,
    CachedFeatures,
    Example,
    Tokens,
    TrainingBatches,
    data_set_names,
    extract_all,
    load_examples,
    load_pixels,
    token_table,
    trim,
)
from batchcap.training.feature_cache import FEATURES_FILE

PHOTOS = 10
VOCABULARY = Vocabulary((*SPECIAL_WORDS, "左边", "右边", "狗", "草地", *map(str, range(PHOTOS))))
LEFT, RIGHT, DOG, GRASS = VOCABULARY.encode(["左边", "右边", "狗", "草地"])
BACKBONE = BackboneConfig("mobilenet", image_size=32)


def write_annotations(path: Path, splits: dict[str, str | None]) -> Path:
    lines = [
        json.dumps({"image_id": name, "captions": ["一只狗在跑"], "split": split})
        for name, split in splits.items()
    ]
    path.write_text("\n".join(lines))
    return path


def data_set(folder: Path, splits: dict[str, str | None], **settings: Any) -> TrainSettings:
    """A folder of annotations, and a file for every photo."""
    for name in splits:
        (folder / name).write_bytes(name.encode())
    annotations = write_annotations(folder / "captions.jsonl", splits)
    return TrainSettings(
        annotations=(annotations,), images=(folder,), out=folder / "model", **settings
    )


def ids(examples: list[Example]) -> list[str]:
    return [example.image_id for example in examples]


def example(*captions: str, image_id: str = "1.jpg", path: Path = Path("1.jpg")) -> Example:
    """A photo with captions whose words are separated by spaces."""
    cut = tuple(tuple(caption.split()) for caption in captions)
    return Example(image_id, path, sha256=image_id.encode().hex(), captions=cut)


def test_annotations_determine_the_split(tmp_path):
    settings = data_set(tmp_path, {"1": "train", "2": "val", "3": "test", "4": "train"})
    training, validation = load_examples(settings)
    assert (ids(training), ids(validation)) == (["1", "4"], ["2"])


@pytest.mark.parametrize(("on_val", "trained_on"), [(False, ["1", "4"]), (True, ["1", "2", "4"])])
def test_with_validation_annotations_val_is_trained_on_if_requested_and_test_never(
    tmp_path, on_val, trained_on
):
    settings = data_set(
        tmp_path,
        {"1": "train", "2": "val", "3": "test", "4": None, "5": "extra", "6": None},
        validation_annotations=write_annotations(tmp_path / "val.jsonl", {"6": None}),
        train_on_val=on_val,
    )
    training, validation = load_examples(settings)
    assert (ids(training), ids(validation)) == (trained_on, ["6"])


def test_test_photos_of_the_validation_annotations_are_not_trained_on(tmp_path):
    others = write_annotations(tmp_path / "val.jsonl", {"2": "val", "3": "test"})
    settings = data_set(tmp_path, {"1": None, "2": None, "3": None}, validation_annotations=others)
    training, validation = load_examples(settings)
    assert (ids(training), ids(validation)) == (["1"], ["2"])


def test_training_on_val_needs_other_validation_photos(tmp_path):
    with pytest.raises(UsageError, match="--train-on-val needs"):
        data_set(tmp_path, {"1": "train", "2": "val"}, train_on_val=True)


def test_validation_photos_are_not_trained_on_under_another_name(tmp_path, caplog):
    settings = data_set(tmp_path, {"1": "train", "2": "train", "3": "val"})
    (tmp_path / "2").write_bytes(b"3")
    training, validation = load_examples(settings)
    assert (ids(training), ids(validation)) == (["1"], ["3"])
    assert "skipped 1 training photos that are validation or test photos too" in caplog.text


def test_test_photos_are_not_trained_on_under_another_name(tmp_path):
    settings = data_set(tmp_path, {"1": "train", "2": "train", "3": "val", "4": "test"})
    (tmp_path / "2").write_bytes(b"4")
    training, validation = load_examples(settings)
    assert (ids(training), ids(validation)) == (["1"], ["3"])


def test_photos_of_other_splits_are_counted(tmp_path, caplog):
    settings = data_set(tmp_path, {"1": "train", "2": "val", "3": "test", "4": None})
    with caplog.at_level(logging.INFO):
        load_examples(settings)
    assert "skipped for training: 2 photos of other splits" in caplog.text


def test_holding_out_all_photos_is_refused(tmp_path):
    settings = data_set(tmp_path, {"1": None, "2": None}, validation_count=2)
    with pytest.raises(UsageError, match="--validation-count 2"):
        load_examples(settings)


def test_validation_photos_are_random_without_a_split(tmp_path):
    unsplit = {str(i): None for i in range(PHOTOS)}
    found = {}
    for seed in (1, 2):
        settings = data_set(tmp_path, unsplit, validation_count=3, seed=seed)
        training, validation = found[seed] = load_examples(settings)
        assert len(validation) == 3
        assert sorted(ids(training) + ids(validation)) == list(unsplit)
        assert load_examples(settings) == (training, validation)
    assert found[1] != found[2]


def test_examples_have_path_digest_and_words(tmp_path):
    (training,), _ = load_examples(data_set(tmp_path, {"1": "train", "2": "val"}))
    assert training.path.read_bytes() == b"1"
    assert training.sha256 == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    assert training.captions == (("一只", "狗", "在", "跑"),)


def test_photos_without_a_file_are_skipped_and_counted(tmp_path, caplog):
    settings = data_set(tmp_path, {"1": "train", "2": "train", "3": "val"})
    (tmp_path / "2").unlink()
    training, _ = load_examples(settings)
    assert ids(training) == ["1"]
    assert f"1 of 2 annotated photos are not in {tmp_path} or cannot be read" in caplog.text


def test_photo_whose_name_is_too_long_is_skipped(tmp_path, caplog):
    settings = data_set(tmp_path, {"1": "train", "2": "val"})
    write_annotations(tmp_path / "captions.jsonl", {"1": "train", "x" * 300: "train", "2": "val"})
    training, _ = load_examples(settings)
    assert ids(training) == ["1"]
    assert "1 of 2 annotated photos" in caplog.text


def test_captions_without_words_are_skipped(tmp_path, caplog):
    settings = data_set(tmp_path, {"1": "train", "2": "train", "3": "val"})
    captions = {"1": ["。", "一只狗"], "2": ["。"], "3": ["狗"]}
    lines = [
        {"image_id": name, "captions": texts, "split": "val" if name == "3" else "train"}
        for name, texts in captions.items()
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (training,), _ = load_examples(settings)
    assert (training.image_id, training.captions) == ("1", (("一只", "狗"),))
    assert "skipped captions without words (2 photos, such as 1)" in caplog.text


def test_karpathys_test_photos_are_never_trained_on(tmp_path):
    splits = ["train", "restval", "val", "test"]
    folder = tmp_path / "val2014"
    folder.mkdir()
    for split in splits:
        (folder / split).write_bytes(split.encode())
    images = [
        {"filepath": "val2014", "filename": split, "split": split, "sentences": [{"raw": "狗"}]}
        for split in splits
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images}))
    settings = TrainSettings(annotations=(path,), images=(tmp_path,), out=tmp_path / "model")
    for validating in (settings, replace(settings, validation_annotations=path)):
        training, validation = load_examples(validating)
        assert ids(training) == ["val2014/train", "val2014/restval"]
        assert ids(validation) == ["val2014/val"]


@pytest.mark.parametrize(
    ("splits", "empty"), [({"1": "train"}, "validation"), ({"1": "val"}, "training")]
)
def test_side_without_photos_is_refused(tmp_path, splits, empty):
    with pytest.raises(InputError, match=f"captions.jsonl .* no {empty} photo"):
        load_examples(data_set(tmp_path, splits))


def test_token_table_holds_start_words_end_and_padding():
    (table,) = token_table([example("狗 草地", "草地")], VOCABULARY, max_length=4)
    assert table.tolist() == [
        [START_ID, DOG, GRASS, END_ID, PADDING_ID],
        [START_ID, GRASS, END_ID, PADDING_ID, PADDING_ID],
    ]


def test_token_table_marks_unknown_words():
    ((row,),) = token_table([example("狗 宇航员")], VOCABULARY, max_length=3)
    assert row.tolist() == [START_ID, DOG, UNKNOWN_ID, END_ID]


def styled(*styles: str | None) -> list[Example]:
    return [replace(example(*["狗"] * len(styles)), styles=styles)] * PHOTOS


def test_captions_of_a_style_begin_with_its_id():
    table = token_table(styled("short", None, "long"), VOCABULARY, 3, ["long", "short"])
    assert table[0, :, 0].tolist() == [len(VOCABULARY) + 1, START_ID, len(VOCABULARY)]


def test_half_of_the_captions_of_a_style_begin_with_start():
    captions = token_table(styled("short", None), VOCABULARY, 3, ["short"])
    batches = batches_of(captions, batch_size=PHOTOS)
    starts = np.concatenate([batches[step][1][:, :, 0] for step in range(20)])
    assert set(starts[:, 0]) == {START_ID, len(VOCABULARY)}
    assert 60 < (starts[:, 0] == START_ID).sum() < 140
    assert (starts[:, 1] == START_ID).all()


@pytest.mark.parametrize("caption", ["狗 草地 狗", "狗 草地 狗 草地 狗"])
def test_caption_that_is_too_long_loses_its_tail_and_its_end(caption):
    ((row,),) = token_table([example(caption)], VOCABULARY, max_length=3)
    assert row.tolist() == [START_ID, DOG, GRASS, DOG]


def test_photos_with_fewer_captions_get_rows_of_padding():
    table = token_table([example("狗", "草地", "狗"), example("狗")], VOCABULARY, max_length=3)
    assert table.shape == (2, 3, 4)
    assert table[1, 0].any()
    assert (table[1, 1:] == PADDING_ID).all()


@pytest.mark.parametrize("longest", [1, 5, 9])
def test_trimmed_captions_are_as_long_as_the_longest(longest):
    captions = np.full((2, 3, 10), PADDING_ID, np.int32)
    captions[:, :, 0] = START_ID
    captions[1, 2, 1 : longest + 1] = DOG
    np.testing.assert_array_equal(trim(captions), captions[:, :, : longest + 1])


VIEWS = training_views(flip=True, crops=2)


def batches_of(captions: Tokens, *sizes: int, **settings: Any) -> TrainingBatches:
    """Batches in which a photo is seen as its number from 1, negative if mirrored.

    `sizes` are the numbers of photos of each data set.
    """
    sizes = sizes or (len(captions),)
    nowhere = (Path(),) * len(sizes)
    asked = TrainSettings(annotations=nowhere, images=nowhere, out=Path(), **settings)

    def number(photos: Any, rng: np.random.Generator) -> Any:
        mirrored = asked.flip & (rng.random(len(photos)) < 0.5)
        return np.where(mirrored, -1 - photos, 1 + photos).astype(np.float32), mirrored

    data_sets = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return TrainingBatches(number, captions, data_sets, VOCABULARY, asked)


def one_caption_each() -> Tokens:
    """A photo's caption has its index in the table, and the word for left."""
    return token_table([example(f"{i} 左边") for i in range(PHOTOS)], VOCABULARY, max_length=4)


def photos_of(batch: tuple[npt.NDArray[np.float32], Tokens, Any]) -> list[int]:
    return np.abs(batch[0]).ravel().astype(int).tolist()


def test_pass_sees_every_photo_once():
    batches = batches_of(one_caption_each(), batch_size=5)
    assert batches.steps_per_pass == 2
    for number in range(3):
        seen = photos_of(batches[2 * number]) + photos_of(batches[2 * number + 1])
        assert sorted(seen) == list(range(1, PHOTOS + 1))


def test_passes_have_different_orders():
    batches = batches_of(one_caption_each(), batch_size=PHOTOS)
    assert photos_of(batches[0]) != photos_of(batches[1])


def test_photos_that_fill_no_batch_wait_for_another_pass():
    batches = batches_of(one_caption_each(), batch_size=4)
    assert batches.steps_per_pass == 2
    seen = photos_of(batches[0]) + photos_of(batches[1])
    assert len(set(seen)) == 8


def test_batch_is_never_larger_than_the_data():
    batches = batches_of(one_caption_each(), batch_size=100)
    assert batches.steps_per_pass == 1
    assert sorted(photos_of(batches[5])) == list(range(1, PHOTOS + 1))


def test_batch_does_not_depend_on_earlier_steps():
    batches, resumed = (batches_of(one_caption_each(), batch_size=3, seed=7) for _ in range(2))
    of_steps = [batches[step] for step in range(9)]
    for array, again in zip(of_steps[8], resumed[8], strict=True):
        np.testing.assert_array_equal(array, again)


def test_seed_changes_the_batches():
    one, other = (batches_of(one_caption_each(), batch_size=5, seed=seed) for seed in (1, 2))
    assert photos_of(one[0]) != photos_of(other[0])


def test_mirrored_photos_have_mirrored_captions():
    batches = batches_of(one_caption_each(), batch_size=PHOTOS)
    mirrored_count = 0
    for step in range(20):
        features, captions, _ = batches[step]
        is_mirrored = features.ravel() < 0
        np.testing.assert_array_equal(captions[:, 0, 2], np.where(is_mirrored, RIGHT, LEFT))
        mirrored_count += is_mirrored.sum()
    assert 60 < mirrored_count < 140


def test_captions_stay_with_their_photos():
    batch = batches_of(one_caption_each(), batch_size=PHOTOS)[0]
    places = [int(VOCABULARY.words[word]) for word in batch[1][:, 0, 1]]
    assert [place + 1 for place in places] == photos_of(batch)


def test_photos_are_seen_as_often_as_the_weight_of_their_data_set_says():
    """Four photos are seen twice per pass, six in half of the passes."""
    batches = batches_of(one_caption_each(), 4, 6, weight=(2.0, 0.5), batch_size=11)
    assert batches.steps_per_pass == 1
    halves = set()
    for step in range(3):
        _, _, data_sets = batches[step]
        counts = np.bincount(photos_of(batches[step]), minlength=1 + PHOTOS)[1:]
        assert counts[:4].tolist() == [2] * 4
        assert sorted(counts[4:]) == [0, 0, 0, 1, 1, 1]
        numbers = [int(photo > 4) for photo in photos_of(batches[step])]
        assert data_sets.tolist() == numbers
        halves.add(counts.tobytes())
    assert len(halves) > 1


def test_data_set_with_a_tiny_weight_shows_a_photo():
    batches = batches_of(one_caption_each(), 4, 6, weight=(0.01, 0.01), batch_size=32)
    assert sorted(batches[0][2].tolist()) == [0, 1]


def test_equal_weights_change_nothing():
    one, other = (
        batches_of(one_caption_each(), *sizes, batch_size=PHOTOS, weight=weight)
        for sizes, weight in (((PHOTOS,), ()), ((4, 6), (1.0, 1.0)))
    )
    assert sorted(photos_of(one[0])) == sorted(photos_of(other[0]))
    assert one.steps_per_pass == other.steps_per_pass


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"images": 1}, "--images occurs 1 times but --annotations 2 times"),
        ({"weight": (1.0,)}, "--weight occurs 1 times but --annotations 2 times"),
        ({"weight": (1.0, 0.0)}, "--weight must be at least 0.01, not 0.0"),
        ({"weight": (1.0, float("nan"))}, "--weight must be at least 0.01, not nan"),
        (
            {"validation_annotations": Path()},
            "--validation-annotations works with one data set only",
        ),
    ],
)
def test_settings_that_do_not_fit_several_data_sets_are_refused(asked, reason):
    images = (Path(),) * asked.pop("images", 2)
    with pytest.raises(UsageError, match=reason):
        TrainSettings(annotations=(Path(), Path()), images=images, out=Path(), **asked)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/captions.txt"], ["captions"]),
        (["flickr8k-cn/captions.zh.txt", "jobs/everyday-zh.jsonl"], ["captions", "everyday-zh"]),
        (["x/a/captions.zh.txt", "x/b/captions.zh.jsonl"], ["a", "b"]),
        (["a/x/1/c.txt", "b/x/1/c.txt"], ["a", "b"]),
        (["a/../b/c.txt", "d/c.txt"], ["b", "d"]),
        (["a/c.txt", "a/c.txt"], ["1", "2"]),
    ],
)
def test_data_sets_are_named_by_the_parts_in_which_paths_differ(paths, names):
    assert data_set_names([Path(path) for path in paths]) == names


def test_a_photo_held_out_of_one_data_set_is_trained_on_in_none(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one = data_set(folders[0], {"1": "train", "2": "val", "3": "test"})
    two = data_set(folders[1], {"2": "train", "3": "train", "4": "train", "5": "val"})
    settings = replace(
        one, annotations=one.annotations + two.annotations, images=one.images + two.images
    )
    training, validation = load_examples(settings)
    assert [(each.image_id, each.data_set) for each in training] == [("1", 0), ("4", 1)]
    assert [(each.image_id, each.data_set) for each in validation] == [("2", 0), ("5", 1)]


def test_nothing_is_mirrored_without_flip():
    batches = batches_of(one_caption_each(), batch_size=PHOTOS, flip=False)
    for step in range(20):
        features, captions, _ = batches[step]
        assert (features > 0).all()
        assert (captions[:, 0, 2] == LEFT).all()


def test_batches_are_trimmed():
    captions = token_table([example("狗")] * PHOTOS, VOCABULARY, max_length=30)
    assert batches_of(captions)[0][1].shape == (PHOTOS, 1, len(("START", "狗", "END")))


def test_captions_are_drawn_before_rows_of_padding():
    words = [str(i) for i in range(5)]
    captions = token_table([example(*words), example("狗")], VOCABULARY, max_length=4)
    batches = batches_of(captions, captions_per_image=2)
    drawn = set()
    for step in range(40):
        features, batch, _ = batches[step]
        of_first, of_second = batch[np.argsort(np.abs(features.ravel())), :, 1]
        assert len(set(of_first)) == 2
        assert of_second.tolist() == [DOG, PADDING_ID]
        drawn |= set(of_first)
    assert drawn == set(VOCABULARY.encode(words))


def test_all_captions_are_taken_if_more_are_requested():
    captions = token_table([example("狗", "草地")], VOCABULARY, max_length=4)
    _, batch, _ = batches_of(captions, captions_per_image=9)[0]
    assert batch[0, :, 1].tolist() == [DOG, GRASS]


@pytest.fixture(scope="module")
def backbone() -> keras.Model:
    """Random layers that amplify their input a little, so that features are not nearly 0."""
    keras.utils.set_random_seed(1)
    backbone = build_backbone(BACKBONE, None)
    for variable in backbone.variables:
        if variable.path.endswith("gamma"):
            variable.assign(np.full(variable.shape, 6))
    return backbone


@pytest.fixture
def photos(tmp_path: Path) -> list[Example]:
    """More photos than an extraction batch."""
    rng = np.random.default_rng(1)
    examples = [example("狗", image_id=f"{i}.png", path=tmp_path / f"{i}.png") for i in range(35)]
    for photo in examples:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(photo.path)
    return examples


def test_features_equal_those_of_the_backbone(backbone, photos, tmp_path):
    cache, good = extract_all(photos, backbone, BACKBONE, VIEWS, cache_root=tmp_path)
    assert good == photos
    features = CachedFeatures(cache, good, VIEWS)
    pixels = np.stack(
        [np.asarray(load_image(photo.path, LoadSettings(32)).pixels) for photo in photos]
    )
    sha256s = [photo.sha256 for photo in photos]
    for rows, view in zip(features.places, VIEWS, strict=True):
        expected = extract_features(backbone, BACKBONE, seen(pixels, view, sha256s))
        np.testing.assert_allclose(features.rows[rows], expected, rtol=2e-3, atol=1e-3)
    np.testing.assert_array_equal(features.whole(3, 5), features.rows[features.places[0, 3:5]])


def test_each_view_of_each_photo_is_drawn(backbone, photos, tmp_path):
    cache, good = extract_all(photos, backbone, BACKBONE, VIEWS, cache_root=tmp_path)
    features, rng = CachedFeatures(cache, good, VIEWS), np.random.default_rng(0)
    everything = np.arange(len(good))
    found: list[set[bytes]] = [set() for _ in good]
    for _ in range(60):
        shown, mirrored = features(everything, rng)
        for photo in everything:
            (view,) = np.flatnonzero(
                (features.rows[features.places[:, photo]] == shown[photo]).all(axis=(1, 2))
            )
            assert mirrored[photo] == VIEWS[view].mirrored
            found[photo].add(bytes([view]))
    assert {len(views) for views in found} == {len(VIEWS)}


def test_photos_are_extracted_once(backbone, photos, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cache, _ = extract_all(photos[:30], backbone, BACKBONE, cache_root=tmp_path)
    assert cache.row_count == 30
    assert "0 photos in the cache, 30 to extract" in caplog.text
    cache, _ = extract_all(photos, backbone, BACKBONE, cache_root=tmp_path)
    assert cache.row_count == 35
    assert "30 photos in the cache, 5 to extract" in caplog.text


def test_views_are_added_when_requested(backbone, photos, tmp_path):
    extract_all(photos, backbone, BACKBONE, cache_root=tmp_path)
    cache, _ = extract_all(photos, backbone, BACKBONE, VIEWS, cache_root=tmp_path)
    features = CachedFeatures(cache, photos, VIEWS)
    for view in features.places[1:]:
        difference = np.abs(features.rows[features.places[0]] - features.rows[view])
        assert (difference.max(axis=(1, 2)) > 0.03).all()


def test_other_weights_have_a_cache_of_their_own(backbone, photos, tmp_path):
    cache, _ = extract_all(photos[:1], backbone, BACKBONE, cache_root=tmp_path)
    other, _ = extract_all(
        photos[:1], build_backbone(BACKBONE, None), BACKBONE, cache_root=tmp_path
    )
    assert other.folder != cache.folder
    assert (cache.row_count, other.row_count) == (1, 1)


def test_features_of_other_code_have_a_cache_of_their_own(backbone, photos, tmp_path, monkeypatch):
    cache, _ = extract_all(photos[:1], backbone, BACKBONE, cache_root=tmp_path)
    monkeypatch.setattr(data, "LIBRARIES", ("pillow", "keras", "numpy"))
    other, _ = extract_all(photos[:1], backbone, BACKBONE, cache_root=tmp_path)
    assert other.folder != cache.folder


def test_damaged_rows_are_extracted_again(backbone, photos, tmp_path, caplog):
    cache, _ = extract_all(photos, backbone, BACKBONE, cache_root=tmp_path)
    whole = cache.rows().copy()
    rows = np.memmap(cache.folder / FEATURES_FILE, np.float16, "r+", shape=whole.shape)
    rows[3, 0, 7] = np.nan
    rows.flush()
    cache, good = extract_all(photos, backbone, BACKBONE, cache_root=tmp_path)
    assert "1 row of the cache is damaged; extracting again" in caplog.text
    features = CachedFeatures(cache, good).whole(0, len(good))
    np.testing.assert_allclose(features, whole, rtol=2e-3, atol=1e-3)


def test_features_that_are_not_finite_are_refused_and_not_cached(photos, tmp_path):
    layer = keras.layers.Conv2D(3, 32, strides=32, kernel_initializer="ones")
    backbone = keras.Sequential([keras.Input((32, 32, 3)), layer])
    backbone.set_weights([1e6 * weight for weight in backbone.get_weights()])
    for _ in range(2):
        with pytest.raises(InputError, match=r"features of 0\.png are not finite.*weights"):
            extract_all(photos, backbone, BACKBONE, cache_root=tmp_path)


def test_corrupt_photo_is_skipped_and_named(backbone, photos, tmp_path, caplog):
    photos[3].path.write_bytes(b"no photo")
    cache, good = extract_all(photos, backbone, BACKBONE, VIEWS, cache_root=tmp_path)
    assert good == photos[:3] + photos[4:]
    assert "skipped 3.png: " in caplog.text
    assert cache.row_count == len(VIEWS) * len(good)
    assert CachedFeatures(cache, good, VIEWS).places.shape == (len(VIEWS), len(good))


def test_augmented_photos_are_drawn_anew_and_mirrored_half_of_the_time(photos):
    sight, rng = AugmentedPhotos(photos, side=32, flip=True), np.random.default_rng(0)
    first, mirrored = sight(np.arange(35), rng)
    second, _ = sight(np.arange(35), rng)
    assert first.shape == (35, 32, 32, 3)
    assert first.dtype == np.uint8
    assert (first != second).any(axis=(1, 2, 3)).all()
    assert 5 < mirrored.sum() < 30
    again, _ = sight(np.arange(35), np.random.default_rng(0))
    np.testing.assert_array_equal(again, first)


def test_without_flips_no_augmented_photo_is_mirrored(photos):
    _, mirrored = AugmentedPhotos(photos, 32, flip=False)(np.arange(35), np.random.default_rng(0))
    assert not mirrored.any()


def test_photo_damaged_since_the_start_is_named(photos):
    photos[2].path.write_bytes(b"no photo")
    with pytest.raises(InputError, match=r"2\.png has changed since the start"):
        load_pixels(photos, 32)
