"""The shipped model against a naive reference; model directories, whole and damaged."""

import json
import pickle
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from helpers.plain_beam import plain_beam_search
from safetensors.numpy import load_file, save_file

from batchcap.errors import ModelError
from batchcap.model.backbones import BACKBONES, Backbone, build_backbone, extract_features
from batchcap.model.caption import Caption
from batchcap.model.captioner import Captioner, uniform_draws
from batchcap.model.config import (
    CARD_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    METRICS_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    BackboneConfig,
    DecoderConfig,
    ModelConfig,
    fingerprint,
)
from batchcap.model.network import build_decoder
from batchcap.model.tensorflow_captioner import (
    TensorFlowCaptioner,
    get_weights,
    load_for_tensorflow,
    round_weights,
    save_captioner,
)
from batchcap.model.vocabulary import END_ID, SPECIAL_WORDS, START_ID, Vocabulary
from batchcap.photos.images import LoadSettings, load_image
from batchcap.settings import DEFAULT_MODEL, DecodeSettings

Pixels = npt.NDArray[np.uint8]
CaptionOne = Callable[[Pixels], "Written"]

MODEL_FILES = (CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE)
BATCH = 16
TINY_VOCABULARY = Vocabulary((*SPECIAL_WORDS, "狗", "草地", "frisbee"))
TINY_CONFIG = ModelConfig(
    FORMAT_VERSION,
    BackboneConfig("tiny", image_size=64),
    DecoderConfig(
        vocabulary_size=len(TINY_VOCABULARY),
        grid_cells=4,
        feature_size=3,
        max_length=5,
        units=8,
        layers=1,
        heads=2,
        key_size=4,
    ),
)


class Written(NamedTuple):
    """A caption without its attention."""

    tokens: list[int]
    log_probs: list[float]  # END's comes last, if it was reached
    finished: bool


def written(captions: list[Caption]) -> list[Written]:
    return [Written(c.ids.tolist(), c.log_probs.tolist(), c.finished) for c in captions]


def caption_photos(
    captioner: Captioner,
    photos: Pixels,
    keys: list[str] | None = None,
    batch_size: int = BATCH,
    **settings: float,
) -> list[Written]:
    """Caption any number of photos; the last batch is padded.

    Features are always extracted `BATCH` at a time: each batch size takes 150 MB for good.
    """
    asked = DecodeSettings(captioner.config.decoder.max_length, **settings)
    keys = keys or photo_keys(photos)
    features = np.concatenate(
        [captioner.extract(photos[start : start + BATCH]) for start in range(0, len(photos), BATCH)]
    )
    captions: list[Written] = []
    for start in range(0, len(photos), batch_size):
        batch = features[start : start + batch_size]
        padded = np.pad(batch, [(0, batch_size - len(batch)), *[(0, 0)] * (batch.ndim - 1)])
        captions += written(
            captioner.caption_features(padded, asked, keys[start : start + batch_size])
        )
    return captions


def photo_keys(photos: Pixels) -> list[str]:
    return [f"photo {i}" for i in range(len(photos))]


@pytest.fixture(scope="module", params=["captioner", "reference"])
def captioner(request: pytest.FixtureRequest) -> Captioner:
    """The shipped model by OpenVINO and NumPy, then by TensorFlow."""
    found: Captioner = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def photos(photo_crops: Pixels) -> Pixels:
    """One batch of photos."""
    return photo_crops[:BATCH]


@pytest.fixture(scope="module")
def greedy_captions(captioner: Captioner, photos: Pixels) -> list[Written]:
    return caption_photos(captioner, photos)


@pytest.fixture(scope="module")
def sampled_captions(captioner: Captioner, photos: Pixels) -> list[Written]:
    return caption_photos(captioner, photos, temperature=1.0)


def naive_captioner(captioner: TensorFlowCaptioner) -> CaptionOne:
    """Return a captioner for one photo, without a cache: it rereads the caption for each word.

    The two calls of the network are compiled for speed; the loop is plain Python.
    """
    decoder = captioner.decoder
    look = tf.function(partial(extract_features, captioner.backbone, captioner.config.backbone))

    @tf.function(reduce_retracing=True)
    def read(tokens: Any, features: Any) -> Any:
        return decoder(tokens, decoder.keys_values(features))

    def caption(photo: Pixels) -> Written:
        features = look(tf.constant(photo[None]))
        tokens, log_probs = [START_ID], []
        for _ in range(captioner.config.decoder.max_length):
            logits = read(tf.constant([tokens]), features).numpy()[0, -1].astype(np.float64)
            word = int(logits.argmax())
            log_probs.append(logits[word] - np.log(np.exp(logits).sum()))
            if word == END_ID:
                return Written(tokens[1:], log_probs, finished=True)
            tokens.append(word)
        return Written(tokens[1:], log_probs, finished=False)

    return caption


def assert_same_captions(captions: list[Written], expected: list[Written]) -> None:
    """Assert equal words and log-probabilities, up to a tie of two words.

    Which of the two is chosen depends on how a CPU rounds.
    """
    for caption, of_same_photo in zip(captions, expected, strict=True):
        words, others = (
            [*one.tokens, *[END_ID] * one.finished] for one in (caption, of_same_photo)
        )
        pairs = zip(words, others, strict=False)
        tie = next((place for place, (word, other) in enumerate(pairs) if word != other), None)
        if tie is None:
            assert words == others
        compared = slice(None if tie is None else tie + 1)
        log_probs = of_same_photo.log_probs[compared]
        assert caption.log_probs[compared] == pytest.approx(log_probs, abs=1e-4)


def count_differing(captions: list[Written], others: list[Written]) -> int:
    return sum(a.tokens != b.tokens for a, b in zip(captions, others, strict=True))


def remembering(caption: CaptionOne) -> CaptionOne:
    """Return the function with a memory, for the runtimes to compare with the same captions."""
    known: dict[bytes, Written] = {}

    def remembered(photo: Pixels) -> Written:
        key = photo.tobytes()
        if key not in known:
            known[key] = caption(photo)
        return known[key]

    return remembered


@pytest.fixture(scope="module")
def naive(reference: TensorFlowCaptioner) -> CaptionOne:
    return remembering(naive_captioner(reference))


def assert_equal_to_naive_loop(captioner: Captioner, naive: CaptionOne, photos: Pixels) -> None:
    expected = [naive(photo) for photo in photos]
    assert len({tuple(caption.tokens) for caption in expected}) > len(photos) / 4
    assert_same_captions(caption_photos(captioner, photos), expected)


def test_captions_equal_those_of_a_naive_loop(captioner, naive, photo_crops):
    assert_equal_to_naive_loop(captioner, naive, photo_crops[:48])


def validation_photos(captioner: Captioner, flickr8k: Path, count: int) -> Pixels:
    names = (flickr8k / "val.txt").read_text().split()[:count]
    paths = [flickr8k / "images" / f"{Path(name).stem}.jpg" for name in names]
    size = captioner.config.backbone.image_size
    return np.stack([np.asarray(load_image(path, LoadSettings(size)).pixels) for path in paths])


@pytest.mark.slow
def test_captions_of_flickr8k_equal_those_of_a_naive_loop(captioner, naive, flickr8k):
    assert_equal_to_naive_loop(captioner, naive, validation_photos(captioner, flickr8k, 200))


def test_captions_do_not_depend_on_the_batch_size(captioner, photos, greedy_captions):
    captions = caption_photos(captioner, photos, batch_size=3)
    assert_same_captions(captions, greedy_captions)


def test_samples_do_not_depend_on_the_batch_size(captioner, photos, sampled_captions):
    captions = caption_photos(captioner, photos, batch_size=3, temperature=1.0)
    assert_same_captions(captions, sampled_captions)


def test_captions_do_not_depend_on_the_order(captioner, photos, greedy_captions):
    backwards = caption_photos(captioner, photos[::-1])
    assert_same_captions(backwards[::-1], greedy_captions)


def test_samples_do_not_depend_on_the_order(captioner, photos, sampled_captions):
    keys = photo_keys(photos)[::-1]
    backwards = caption_photos(captioner, photos[::-1], keys, temperature=1.0)
    assert_same_captions(backwards[::-1], sampled_captions)


def test_another_seed_samples_other_captions(captioner, photos, sampled_captions):
    again = caption_photos(captioner, photos, temperature=1.0, seed=0)
    assert_same_captions(again, sampled_captions)
    other = caption_photos(captioner, photos, temperature=1.0, seed=1)
    assert count_differing(other, sampled_captions) > BATCH / 2


def test_greedy_captions_do_not_depend_on_the_seed(captioner, photos, greedy_captions):
    assert_same_captions(caption_photos(captioner, photos, seed=1), greedy_captions)


def test_copies_of_a_photo_with_other_keys_get_other_samples(captioner, photos):
    copies = np.repeat(photos[:1], BATCH, axis=0)
    captions = caption_photos(captioner, copies, temperature=1.0)
    assert len({tuple(caption.tokens) for caption in captions}) > BATCH / 4


def test_captions_of_photos_equal_those_of_their_features(captioner, photos, greedy_captions):
    settings = DecodeSettings(captioner.config.decoder.max_length)
    captions = captioner.caption(photos, settings, photo_keys(photos))
    assert_same_captions(written(captions), greedy_captions)


@pytest.fixture(scope="module")
def beam_captions(captioner: Captioner, photo_crops: Pixels) -> list[Written]:
    return caption_photos(captioner, photo_crops[:BATCH], beam_size=3, length_penalty=1.0)


def naive_beam(captioner: TensorFlowCaptioner, beam_size: int, length_penalty: float) -> CaptionOne:
    """Return a beam search for one photo in plain Python: it rereads captions for each word."""
    decoder = captioner.decoder

    @tf.function(reduce_retracing=True)
    def read(tokens: Any, features: Any) -> Any:
        return decoder(tokens, decoder.keys_values(features))[:, -1]

    def caption(photo: Pixels) -> Written:
        features = extract_features(captioner.backbone, captioner.config.backbone, photo[None])

        def next_log_probs(captions: list[list[int]]) -> Any:
            tokens = tf.constant([[START_ID, *words] for words in captions])
            logits = read(tokens, features).numpy().astype(np.float64)
            return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

        longest = captioner.config.decoder.max_length
        best = plain_beam_search(next_log_probs, beam_size, length_penalty, longest)
        return Written(*best)

    return caption


@pytest.fixture(scope="module")
def plain_beam(reference: TensorFlowCaptioner) -> CaptionOne:
    return remembering(naive_beam(reference, 3, 1.0))


def assert_equal_to_plain_beam_search(
    captioner: Captioner, plain_beam: CaptionOne, photos: Pixels
) -> None:
    captions = caption_photos(captioner, photos, beam_size=3, length_penalty=1.0)
    assert_same_captions(captions, [plain_beam(photo) for photo in photos])


@pytest.mark.slow
def test_beam_search_equals_plain_python(captioner, plain_beam, photo_crops):
    assert_equal_to_plain_beam_search(captioner, plain_beam, photo_crops[:8])


@pytest.mark.slow
def test_beam_search_of_flickr8k_equals_plain_python(captioner, plain_beam, flickr8k):
    photos = validation_photos(captioner, flickr8k, 40)
    assert_equal_to_plain_beam_search(captioner, plain_beam, photos)


@pytest.mark.slow
def test_beam_captions_do_not_depend_on_the_batch_size(captioner, photo_crops, beam_captions):
    captions = caption_photos(
        captioner, photo_crops[:BATCH], batch_size=3, beam_size=3, length_penalty=1.0
    )
    assert_same_captions(captions, beam_captions)


@pytest.mark.slow
def test_top_k_and_top_p_samples_do_not_depend_on_the_batch_size(captioner, photos):
    limits = {"top_k": 20, "top_p": 0.9}
    whole = caption_photos(captioner, photos, temperature=1.0, **limits)
    assert_same_captions(
        caption_photos(captioner, photos, batch_size=3, temperature=1.0, **limits), whole
    )


def test_length_limit_cuts_greedy_captions_and_changes_no_word(captioner, photos, greedy_captions):
    captions = captioner.caption(photos, DecodeSettings(max_length=3), photo_keys(photos))
    for short, whole in zip(written(captions), greedy_captions, strict=True):
        assert short.tokens == whole.tokens[:3]


def test_uniform_draws_depend_on_key_and_seed_alone():
    settings = DecodeSettings(max_length=9, temperature=1.0, seed=3)
    draws = uniform_draws(settings, ["a", "b", "a"])
    np.testing.assert_array_equal(draws[0], draws[2])
    assert len(np.unique(draws)) == 2 * 9
    assert ((draws >= 0) & (draws < 1)).all()
    other_seed = uniform_draws(DecodeSettings(max_length=9, temperature=1.0, seed=4), ["a"])
    assert not np.isin(other_seed, draws).any()


def test_shipped_vocabulary_is_chinese(captioner):
    assert {"一个", "狗", "草地"} <= set(captioner.vocabulary.words)


def tiny_cnn(weights: None, input_shape: tuple[int, int, int]) -> keras.Sequential:
    """A backbone that is built in no time."""
    layer = keras.layers.Conv2D(3, 32, strides=32, name="conv")
    return keras.Sequential([keras.Input(input_shape), layer], name="tiny")


@pytest.fixture
def tiny_captioner(monkeypatch: pytest.MonkeyPatch) -> TensorFlowCaptioner:
    monkeypatch.setitem(BACKBONES, "tiny", Backbone(tiny_cnn, (-1.0, 1.0)))
    keras.utils.set_random_seed(1)
    backbone, decoder = (
        build_backbone(TINY_CONFIG.backbone, None),
        build_decoder(TINY_CONFIG.decoder),
    )
    return TensorFlowCaptioner(TINY_CONFIG, TINY_VOCABULARY, backbone, decoder)


@pytest.fixture
def model(tiny_captioner: TensorFlowCaptioner, tmp_path: Path) -> Path:
    """A model directory, to be damaged."""
    save_captioner(tiny_captioner, tmp_path / "model")
    return tmp_path / "model"


def test_uncompiled_captions_are_the_same(tiny_captioner, model):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 64, 64, 3), np.uint8)
    captions = caption_photos(load_for_tensorflow(model, compiled=False), pixels)
    assert_same_captions(captions, caption_photos(load_for_tensorflow(model), pixels))


def weights_of(captioner: TensorFlowCaptioner) -> dict[str, npt.NDArray[Any]]:
    return get_weights(captioner.backbone, captioner.decoder)


def test_saved_model_is_loaded_as_stored(tiny_captioner, model):
    loaded = load_for_tensorflow(model)
    assert loaded.config == tiny_captioner.config
    assert loaded.vocabulary == tiny_captioner.vocabulary
    for name, weight in weights_of(tiny_captioner).items():
        stored_type = np.float32 if weight.ndim == 1 else np.float16
        np.testing.assert_array_equal(weights_of(loaded)[name], weight.astype(stored_type))


def test_rounded_weights_are_loaded_unchanged(tiny_captioner, tmp_path):
    round_weights(tiny_captioner.decoder.variables + tiny_captioner.backbone.variables)
    save_captioner(tiny_captioner, tmp_path)
    loaded = weights_of(load_for_tensorflow(tmp_path))
    for name, weight in weights_of(tiny_captioner).items():
        np.testing.assert_array_equal(loaded[name], weight)


def test_shipped_model_is_the_same_when_saved_again(reference, tmp_path):
    save_captioner(reference, tmp_path)
    for name in MODEL_FILES:
        assert (tmp_path / name).read_bytes() == (DEFAULT_MODEL / name).read_bytes()


@pytest.mark.parametrize("name", MODEL_FILES)
def test_fingerprint_changes_with_any_byte_that_changes_captions(model, name):
    path, original = model / name, fingerprint(model)
    content = path.read_bytes()
    for place in range(0, len(content), 1 + len(content) // 300):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert fingerprint(model) != original, place
    path.write_bytes(content)
    assert fingerprint(model) == original


@pytest.mark.parametrize("name", [METRICS_FILE, CARD_FILE])
def test_fingerprint_ignores_files_that_change_no_caption(model, name):
    original = fingerprint(model)
    (model / name).write_text("{}")
    assert fingerprint(model) == original


def assert_refused(model: Path, name: str, *details: str) -> None:
    """Assert that loading names the invalid file and the details."""
    with pytest.raises(ModelError) as refusal:
        load_for_tensorflow(model)
    for part in (str(model), name, *details):
        assert part in str(refusal.value)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_missing_file_is_named(model, name):
    (model / name).unlink()
    assert_refused(model, name)


def test_missing_directory_is_named(tmp_path):
    assert_refused(tmp_path / "nothing", CONFIG_FILE)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{\0}\0"])
def test_config_that_is_not_a_json_object_is_refused(model, content):
    (model / CONFIG_FILE).write_bytes(content)
    assert_refused(model, CONFIG_FILE)


@pytest.mark.parametrize(
    "field", ["max_length", "units", "layers", "heads", "key_size", "feature_size"]
)
def test_sizes_beyond_the_weights_are_refused_before_anything_is_allocated(model, field):
    """A foreign config.json with huge sizes ran the machine out of memory."""
    config = json.loads((model / CONFIG_FILE).read_text())
    config["decoder"][field] = 10**9
    (model / CONFIG_FILE).write_text(json.dumps(config))
    assert_refused(model, CONFIG_FILE, "decoder.", WEIGHTS_FILE if field != "layers" else field)


def section_and_key(config: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    *sections, key = field.split(".")
    return reduce(dict.__getitem__, sections, config), key


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("colour", 1),
        ("backbone", "mobilenet"),
        ("backbone.colour", 1),
        ("backbone.name", 1),
        ("backbone.name", "telescope"),
        ("backbone.image_size", "64"),
        ("backbone.image_size", 31),
        ("backbone.image_size", 1025),
        ("backbone.input_range", [0.0]),
        ("backbone.input_range", ["0", "1"]),
        ("backbone.input_range", [1.0, 0.0]),
        ("backbone.input_range", [0.0, float("inf")]),
        ("backbone.input_range", [float("nan"), 1.0]),
        ("decoder", None),
        ("decoder.colour", 1),
        ("decoder.vocabulary_size", 4),
        ("decoder.grid_cells", 0),
        ("decoder.grid_cells", 9),
        ("decoder.feature_size", 0),
        ("decoder.max_length", -1),
        ("decoder.units", "256"),
        ("decoder.units", 8.5),
        ("decoder.units", True),
        ("decoder.layers", 0),
        ("decoder.heads", 0),
        ("decoder.key_size", None),
        ("decoder.dropout", 1.0),
        ("decoder.dropout", -0.1),
        ("decoder.dropout", "0.3"),
        ("decoder.styles", "short"),
        ("decoder.styles", ["Short"]),
        ("format_version", 2),
        ("format_version", "1"),
    ],
)
def test_wrong_field_is_named(model, field, value):
    config = json.loads((model / CONFIG_FILE).read_text())
    section, key = section_and_key(config, field)
    section[key] = value
    (model / CONFIG_FILE).write_text(json.dumps(config))
    assert_refused(model, CONFIG_FILE, field)


@pytest.mark.parametrize(
    "field",
    [
        "backbone",
        "decoder",
        "decoder.vocabulary_size",
        "decoder.grid_cells",
        "decoder.feature_size",
    ],
)
def test_missing_field_is_named(model, field):
    config = json.loads((model / CONFIG_FILE).read_text())
    section, key = section_and_key(config, field)
    del section[key]
    (model / CONFIG_FILE).write_text(json.dumps(config))
    assert_refused(model, CONFIG_FILE, field)


def test_vocabulary_of_another_size_is_refused(model):
    with (model / VOCABULARY_FILE).open("a") as file:
        file.write("猫\n")
    assert_refused(model, VOCABULARY_FILE, "8 words", CONFIG_FILE, "7")


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"decoder/output/bias": np.zeros(7)}))


def write_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["decoder/output/bias"] = np.zeros(7)


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_float8(path: Path) -> None:
    """Numpy lacks this type."""
    tensor = {"dtype": "F8_E4M3", "shape": [7], "data_offsets": [0, 7]}
    header = json.dumps({"decoder/output/bias": tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(7))


@pytest.mark.parametrize(
    "damage", [write_pickle, write_hdf5, cut_in_half, cut_last_byte, write_nothing, write_float8]
)
def test_damaged_or_foreign_weights_are_refused(model, damage):
    damage(model / WEIGHTS_FILE)
    assert_refused(model, WEIGHTS_FILE, "damaged")


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def test_loading_runs_no_pickle(model, tmp_path):
    canary = tmp_path / "canary"
    trap = pickle.dumps(Trap(canary))
    (model / WEIGHTS_FILE).write_bytes(trap)
    assert_refused(model, WEIGHTS_FILE)
    assert not canary.exists()
    pickle.loads(trap)
    assert canary.exists()


def write_lambda(path: Path, canary: Path, suffix: str) -> None:
    touch = keras.layers.Lambda(lambda x, name=str(canary): __import__("os").mknod(name) or x)
    saved = path.with_suffix(suffix)
    keras.Sequential([keras.Input((1,)), touch]).save(saved)
    saved.replace(path)


def write_external_link(path: Path, canary: Path) -> None:
    with h5py.File(path, "w") as file:
        file["decoder/output/bias"] = h5py.ExternalLink("/etc/passwd", "/")


def write_zip_bomb(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        file.writestr("model.weights.h5", bytes(2**28))


def write_endless_header(path: Path, canary: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{")


def write_saved_model(path: Path, canary: Path) -> None:
    """A graph that writes a file, as the whole model directory."""

    @tf.function(input_signature=())
    def write() -> tf.Tensor:
        tf.io.write_file(str(canary), "harm")
        return tf.constant(0)

    module = tf.Module()
    module.write = write
    shutil.rmtree(path.parent)
    tf.saved_model.save(module, path.parent)


@pytest.mark.parametrize(
    "attack",
    [
        partial(write_lambda, suffix=".keras"),
        partial(write_lambda, suffix=".h5"),
        write_external_link,
        write_zip_bomb,
        write_endless_header,
        write_saved_model,
    ],
)
def test_hostile_model_is_refused_and_runs_no_code(model, tmp_path, attack):
    canary = tmp_path / "canary"
    attack(model / WEIGHTS_FILE, canary)
    canary.unlink(missing_ok=True)
    tracemalloc.start()
    with pytest.raises(ModelError) as refusal:
        load_for_tensorflow(model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refusal.value.exit_code == 1
    assert not canary.exists()
    assert peak < 50_000_000


@pytest.fixture
def change_weights(model: Path) -> Callable[..., None]:
    """Replaces tensors of `model.safetensors`; None removes one."""

    def change(changes: dict[str, npt.NDArray[Any] | None]) -> None:
        weights = load_file(model / WEIGHTS_FILE) | changes
        kept = {name: value for name, value in weights.items() if value is not None}
        save_file(kept, model / WEIGHTS_FILE)

    return change


@pytest.mark.parametrize("name", ["backbone/tiny/conv/kernel", "decoder/layer_0/narrow/bias"])
def test_missing_tensor_is_named(model, change_weights, name):
    change_weights({name: None})
    assert_refused(model, WEIGHTS_FILE, "lacks", name)


@pytest.mark.parametrize("name", ["backbone/head/kernel", "decoder/layer_1/narrow/bias"])
def test_unknown_tensor_is_named(model, change_weights, name):
    change_weights({name: np.zeros(3, np.float16)})
    assert_refused(model, WEIGHTS_FILE, "has the unknown tensor", name)


@pytest.mark.parametrize("shape", [(6,), (1, 7), ()])
def test_tensor_of_wrong_shape_is_named(model, change_weights, shape):
    change_weights({"decoder/output/bias": np.zeros(shape, np.float16)})
    assert_refused(model, WEIGHTS_FILE, "decoder/output/bias", str(shape), "(7,)")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_tensor_that_is_not_finite_is_named(model, change_weights, number):
    bias = np.zeros(7, np.float16)
    bias[4] = number
    change_weights({"decoder/output/bias": bias})
    assert_refused(model, WEIGHTS_FILE, "decoder/output/bias", "not finite")


def test_valid_model_is_accepted(model, change_weights):
    change_weights({"decoder/output/bias": np.zeros(7, np.float16)})
    load_for_tensorflow(model)
