"""The int8 backbone: near float32's, the same in any batch, never mixed with float32's rows."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from helpers.small_model import make_squares, small_captioner, write_encoder
from PIL import Image

from batchcap.captioning.options import precision_for
from batchcap.captioning.run import plan_run, run_captioning
from batchcap.captioning.summary import RunSummary
from batchcap.cli import batchcap
from batchcap.errors import InputError, ModelError, OtherOutputError, OutputError, UsageError
from batchcap.model.config import ENCODER_FILE, fingerprint
from batchcap.model.encoder import int8_digest
from batchcap.model.openvino_captioner import load_for_openvino
from batchcap.model.tensorflow_captioner import save_captioner
from batchcap.settings import (
    DecodeSettings,
    Engine,
    Precision,
    QuantiseSettings,
    RunSettings,
    Runtime,
)
from batchcap.training import quantisation
from batchcap.training.quantisation import CALIBRATION_PHOTOS, quantise_model

SIZE = 64
LONGEST = 6
ROUNDING = 1e-5  # of log-probabilities


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squares(tmp_path_factory.mktemp("squares")) / "images"


@pytest.fixture(scope="module")
def pixels(photos: Path) -> Any:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(photos.glob("*.png"))])


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    captioner = small_captioner(SIZE)
    save_captioner(captioner, folder)
    write_encoder(captioner, folder)
    return folder


@pytest.fixture(scope="module")
def quantised(float_model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(float_model, tmp_path_factory.mktemp("quantised") / "model")
    return quantise_model(QuantiseSettings(model=folder, images=photos))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchcap.model.runtime.has_gpu", lambda: False)


@pytest.fixture
def model(float_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(float_model, tmp_path / "model")


def test_int8_features_are_near_those_of_float32(quantised: Path, pixels: Any) -> None:
    expected = load_for_openvino(quantised).extract(pixels)
    found = load_for_openvino(quantised, Precision.INT8).extract(pixels)
    assert 0.98 < np.corrcoef(found.ravel(), expected.ravel())[0, 1] < 0.999999


def test_captions_in_int8_do_not_depend_on_the_batch(quantised: Path, pixels: Any) -> None:
    captioner = load_for_openvino(quantised, Precision.INT8)
    settings = DecodeSettings(LONGEST)
    keys = [str(number) for number in range(len(pixels))]
    whole = captioner.caption(pixels, settings, keys)
    for number, expected in enumerate(whole):
        (alone,) = captioner.caption(pixels[number : number + 1], settings, [keys[number]])
        assert alone.words == expected.words
        np.testing.assert_allclose(alone.log_probs, expected.log_probs, atol=ROUNDING)


def test_quantising_changes_the_digest_and_not_the_fingerprint(
    float_model: Path, quantised: Path
) -> None:
    assert int8_digest(float_model) is None
    assert int8_digest(quantised) is not None
    assert fingerprint(quantised) == fingerprint(float_model)


def run(model: Path, source: Path, output: Path, **asked: Any) -> RunSummary:
    settings = RunSettings(source=str(source), output=output, model=model, **asked)
    return run_captioning(settings)


@pytest.fixture
def source(photos: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for path in sorted(photos.glob("*.png"))[:3]:
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("name", ["o", "o.parquet"])
def test_rows_say_which_int8_backbone_wrote_them(
    quantised: Path, source: Path, tmp_path: Path, name: str
) -> None:
    output = tmp_path / name
    metadata = run(quantised, source, output).metadata
    assert metadata["batchcap.precision"] == "int8"
    assert metadata["batchcap.int8"] == int8_digest(quantised)
    path = output if output.is_file() else next(output.glob("part-*"))
    assert pq.read_metadata(path).metadata[b"batchcap.precision"] == b"int8"


def test_float32_rows_stay_float32_after_the_model_is_quantised(
    model: Path, photos: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o.parquet"
    run(model, source, output)
    quantise_model(QuantiseSettings(model=model, images=photos))
    shutil.copy(photos / "010.png", source)
    summary = run(model, source, output)
    assert summary.counts.already_done == 3
    assert summary.metadata["batchcap.precision"] == "float32"
    assert "batchcap.int8" not in summary.metadata
    with pytest.raises(OtherOutputError, match="another precision"):
        run(model, source, output, precision=Precision.INT8)


def test_int8_rows_are_continued_where_auto_would_be_float32(
    monkeypatch: pytest.MonkeyPatch, quantised: Path, photos: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o.parquet"
    run(quantised, source, output)
    shutil.copy(photos / "010.png", source)
    monkeypatch.setattr("batchcap.model.runtime.has_gpu", lambda: True)
    summary = run(quantised, source, output)
    assert summary.counts.captioned == 1
    assert summary.metadata["batchcap.precision"] == "int8"


def test_rows_of_another_int8_backbone_are_refused(
    quantised: Path, float_model: Path, photos: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o.parquet"
    run(quantised, source, output)
    with pytest.raises(OtherOutputError, match="another int8 backbone"):
        run(float_model, source, output)
    other = shutil.copytree(float_model, tmp_path / "other")
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "020.png", tmp_path / "one")
    quantise_model(QuantiseSettings(model=other, images=tmp_path / "one"))
    with pytest.raises(OtherOutputError, match="another int8 backbone"):
        run(other, source, output)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, Precision.INT8),
        ({"engine": Engine.RAY}, Precision.FLOAT32),
        ({"engine": Engine.RAY, "gpus_per_worker": 1}, Precision.FLOAT32),
        ({"engine": Engine.RAY, "gpus_per_worker": 0}, Precision.INT8),
        ({"engine": Engine.RAY, "runtime": Runtime.OPENVINO}, Precision.INT8),
        ({"engine": Engine.RAY, "precision": Precision.INT8}, Precision.INT8),
    ],
)
def test_workers_of_ray_get_int8_only_without_gpus(
    asked: dict[str, Any], expected: Precision
) -> None:
    settings = RunSettings(source="in", output="out", **asked)
    assert precision_for(settings, "digest") is expected


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"runtime": Runtime.TENSORFLOW}, "omit --runtime tensorflow"),
        ({"engine": Engine.RAY, "gpus_per_worker": 1}, "add --gpus-per-worker 0"),
    ],
)
def test_int8_on_gpus_is_refused(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        RunSettings(source="in", output="out", precision=Precision.INT8, **asked)


def test_int8_rows_are_not_continued_by_tensorflow(
    quantised: Path, photos: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o.parquet"
    run(quantised, source, output)
    shutil.copy(photos / "010.png", source)
    by_tensorflow = RunSettings(
        source=str(source), output=output, model=quantised, runtime=Runtime.TENSORFLOW
    )
    for attempt in (plan_run, run_captioning):
        with pytest.raises(UsageError, match="omit --runtime tensorflow"):
            attempt(by_tensorflow)
    assert len(pq.read_table(output)) == 3


def test_the_command_adds_the_backbone(model: Path, photos: Path) -> None:
    done = CliRunner().invoke(batchcap, ["model", "quantise", str(model), "--images", str(photos)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"wrote an int8 backbone into {model}\n"
    assert "yes, for CPUs" in CliRunner().invoke(batchcap, ["model", "show", str(model)]).stdout


def test_a_directory_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, model: Path, photos: Path
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(quantisation, "write_graphs", refuse)
    with pytest.raises(OutputError, match=r"Read-only.*quantise a copy of the model"):
        quantise_model(QuantiseSettings(model=model, images=photos))


def test_a_signal_ends_quantising_at_once(model: Path, photos: Path) -> None:
    before = (model / ENCODER_FILE).read_bytes()
    program = (
        "import sys, time\n"
        "from batchcap.cli import main\n"
        "from batchcap.training.quantisation import import_nncf\n"
        "def quantize(*_, **__):\n"
        "    print('busy', file=sys.stderr, flush=True)\n"
        "    time.sleep(200)\n"
        "import_nncf().quantize = quantize\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, "model", "quantise", model, "--images", photos]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line == "busy\n":
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, rest
    assert "Traceback" not in rest
    assert (model / ENCODER_FILE).read_bytes() == before


def test_missing_nncf_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, model: Path, photos: Path
) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'batchcap\[train\]'"):
        quantise_model(QuantiseSettings(model=model, images=photos))


def test_unreadable_photos_are_skipped_and_none_is_an_error(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"no photo")
    before = (model / ENCODER_FILE).read_bytes()
    with pytest.raises(InputError, match="none of 1 photos can be read"):
        quantise_model(QuantiseSettings(model=model, images=folder))
    assert (model / ENCODER_FILE).read_bytes() == before
    Image.new("RGB", (SIZE, SIZE)).save(folder / "b.png")
    quantise_model(QuantiseSettings(model=model, images=folder))
    assert int8_digest(model)


def test_a_model_of_an_earlier_version_is_exported_first(model: Path, photos: Path) -> None:
    (model / ENCODER_FILE).unlink()
    quantise_model(QuantiseSettings(model=model, images=photos))
    assert int8_digest(model)


@pytest.mark.parametrize("count", [1, 511, 512, 513, 1023, 1500, 5000])
def test_photos_come_from_all_over_the_list(count: int) -> None:
    names = [str(number) for number in range(count)]
    spread = [str(name) for name in quantisation._spread(names)]
    assert sorted(spread) == sorted(names)
    assert int(max(spread[:CALIBRATION_PHOTOS], key=int)) >= count - 10


def test_kinds_of_cpu_agree(quantised: Path, photos: Path, tmp_path: Path) -> None:
    """Those without VNNI add products in 16 bits, which weights of 8 bits would overflow."""
    program = (
        "import sys\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from PIL import Image\n"
        "from helpers import small_model\n"
        "from batchcap.model.openvino_captioner import load_for_openvino\n"
        "from batchcap.settings import Precision\n"
        "model, photos, out = map(Path, sys.argv[1:])\n"
        "pixels = [np.asarray(Image.open(path)) for path in sorted(photos.glob('*.png'))]\n"
        "captioner = load_for_openvino(model, Precision.INT8)\n"
        "np.save(out, captioner.extract(np.stack(pixels)))\n"
    )
    found = []
    for kind in ("AVX2", "AVX512_CORE", "ALL"):
        out = tmp_path / f"{kind}.npy"
        environment = os.environ | {
            "ONEDNN_MAX_CPU_ISA": kind,
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        subprocess.run(
            [sys.executable, "-c", program, quantised, photos, out], env=environment, check=True
        )
        found.append(np.load(out))
    for features in found[1:]:
        np.testing.assert_allclose(features, found[0], atol=0.02 * np.abs(found[0]).max())


def test_lost_constants_are_damage(quantised: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(quantised, tmp_path / "model")
    with np.load(damaged / ENCODER_FILE) as arrays:
        kept = {name: array for name, array in arrays.items() if name != "int8_constants"}
    np.savez(damaged / ENCODER_FILE, **kept)
    with pytest.raises(ModelError, match=r"encoder\.npz is damaged"):
        int8_digest(damaged)
