"""Settings: one frozen dataclass per command, checked once, passed whole.

The fields are the command line's flags, in order; defaults and help texts are defined here only.
"""

import re
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from batchcap.errors import UsageError

MAX_PIXELS = 100_000_000  # of a photo, unless more are allowed
MAX_WORDS = 1_000_000  # of a vocabulary
MAX_SHARDS = 99_999  # of five digits in names
MAX_STEPS = 10**9  # of training, or epochs
MAX_PIXEL_VALUE = 1000.0  # for a backbone
# A smaller rate, or a momentum nearer to 1, moves no weight in float32.
LEARNING_RATES = {"least": 1e-7, "most": 1}
MAX_MOMENTUM = 0.99999
DEFAULT_MODEL = Path(__file__).parent / "default_model"
CAPTIONS_THEMSELVES = Path("-")
# Folders of operating systems and storage devices, as patterns of `--exclude`.
SYSTEM_FOLDERS = ("lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", ".Trash*", "__MACOSX")


class Runtime(StrEnum):
    """What runs the model; `auto` is TensorFlow on GPUs, and OpenVINO with NumPy on CPUs."""

    AUTO = "auto"
    TENSORFLOW = "tensorflow"
    OPENVINO = "openvino"


class Precision(StrEnum):
    """Precision of the backbone's computation; features and the decoder are float32.

    int8 is for CPUs, and for models whose directory has the quantised backbone.
    """

    AUTO = "auto"
    INT8 = "int8"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class AttentionDetail(StrEnum):
    """How much attention a row holds."""

    SUMMARY = "summary"
    FULL = "full"
    NONE = "none"


class OnExisting(StrEnum):
    """What to do if the output exists."""

    RESUME = "resume"
    OVERWRITE = "overwrite"
    ERROR = "error"


class Engine(StrEnum):
    """Where photos are captioned."""

    LOCAL = "local"
    RAY = "ray"


class Truncated(StrEnum):
    """What to do with a photo whose file ends early."""

    ERROR = "error"
    ACCEPT = "accept"


class LogFormat(StrEnum):
    """Format of the log on stderr."""

    TEXT = "text"
    JSON = "json"


class TokenKind(StrEnum):
    """How captions are cut into words for comparison."""

    WORDS = "words"
    AI_CHALLENGER = "ai-challenger"
    CHAR = "char"
    PRETOKENIZED = "pretokenized"


class MatchBy(StrEnum):
    """Ids by which captions and references are matched."""

    AUTO = "auto"
    IMAGE_ID = "image-id"
    COCO_ID = "coco-id"
    NAME = "name"
    NUMBER = "number"


class ExportFormat(StrEnum):
    """Formats of other programs."""

    COCO = "coco"
    AI_CHALLENGER = "ai-challenger"
    JSONL = "jsonl"
    CSV = "csv"
    IMAGEFOLDER = "imagefolder"


class Objective(StrEnum):
    """Objective of training."""

    LIKELIHOOD = "likelihood"
    CIDER = "cider"


class Monitor(StrEnum):
    """Validation result that chooses the best epoch."""

    CIDER_D = "cider-d"
    LOSS = "loss"


class Decay(StrEnum):
    """Learning rate after the warm-up."""

    COSINE = "cosine"
    CONSTANT = "constant"


def _option(default: Any, description: str, **more: float | str) -> Any:
    """Return a field with its help text and inclusive limits, `least` and `most`.

    `alone` is the value of the flag if it is given without one.
    """
    return field(default=default, metadata={"help": description, **more})


def _image_column_option() -> Any:
    return _option("image", "Column of a Parquet INPUT with the photos or their paths.")


def _id_column_option() -> Any:
    return _option(
        None, "Column of a Parquet INPUT with unique ids [default: path, or file and row]."
    )


def _match_by_option() -> Any:
    return _option(
        MatchBy.AUTO,
        "How to match captions with references: by id, by COCO id, by file name without folders "
        "and extension, or by the number in the name. auto uses the strictest way that fits, and "
        "fails if two ways disagree.",
    )


def _check_limits(settings: Any) -> None:
    for name, spec in settings.__dataclass_fields__.items():
        given, least, most = getattr(settings, name), *map(spec.metadata.get, ("least", "most"))
        flag = "--" + name.replace("_", "-")
        for value in given if isinstance(given, tuple) else (given,):
            if value is None:
                continue
            if least is not None and not value >= least:  # so that NaN is refused too
                raise UsageError(f"{flag} must be at least {least}, not {value}")
            if most is not None and not value <= most:
                raise UsageError(f"{flag} must be at most {most}, not {value}")


def _check_output(output: Path | str) -> None:
    path = Path(output)
    is_there = isinstance(output, Path) and path.exists()
    is_known = path.suffix == ".parquet" or (is_there and path.is_dir())
    if not is_known and (path.suffix or is_there):
        raise UsageError(
            f"OUTPUT must be a .parquet file or a directory without a suffix, not {path.name!r}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, what it runs on, and how it generates captions."""

    model: Path = _option(DEFAULT_MODEL, "Model directory.  [default: the shipped model]")
    runtime: Runtime = _option(
        Runtime.AUTO,
        "What runs the model. auto: TensorFlow on a GPU, OpenVINO without one.",
    )
    precision: Precision = _option(
        Precision.AUTO,
        "Precision of the backbone. auto: float32; on CPUs int8 if the model has it.",
    )
    style: str | None = _option(
        None, "Caption style, if the model has styles: short or detailed [default: none]."
    )
    max_length: int | None = _option(
        None, "Maximum words per caption [default: the model's limit].", least=1
    )
    min_length: int = _option(0, "Minimum words per caption.", least=0)
    no_repeat_ngram: int = _option(0, "Never repeat an n-gram of this size (0: off).", least=0)
    beam_size: int = _option(1, "Beam size (1: greedy).", least=1, most=100)
    length_penalty: float = _option(
        1.0,
        "Score beams by log-probability / length ** PENALTY; 0 favours short captions.",
        least=-10,
        most=10,
    )
    temperature: float = _option(
        0.0,
        "Sampling temperature (0: take the most probable words).",
        least=0,
        most=100,
    )
    seed: int = _option(0, "RNG seed for sampling.")
    top_k: int | None = _option(
        None, "Sample from the K most probable words [default: all].", least=1
    )
    top_p: float = _option(
        1.0, "Sample from the most probable words that add up to this probability.", least=0, most=1
    )

    def __post_init__(self) -> None:
        _check_limits(self)
        if self.temperature > 0 and self.beam_size > 1:
            raise UsageError(
                "--beam-size and --temperature exclude each other: beam search does not sample"
            )
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise UsageError("--top-k and --top-p need a --temperature above 0")
        if self.precision is Precision.INT8 and self.runtime is Runtime.TENSORFLOW:
            raise UsageError(
                "int8 is for CPUs: omit --runtime tensorflow (an output keeps its precision)"
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings(ModelOptions):
    """Settings of `batchcap run`."""

    source: str
    output: Path | str  # a str is a URL
    batch_size: int = _option(64, "Photos per batch.", least=1)
    attention: AttentionDetail = _option(
        AttentionDetail.SUMMARY, "How much attention to write per word."
    )
    limit: int | None = _option(None, "Caption at most this many photos in this run.", least=1)
    glob: str | None = _option(
        None, "Caption the files that match, whatever their extension; * matches / too."
    )
    exclude: tuple[str, ...] = _option(
        (),
        "Skip files and folders that match, and everything below them; repeatable. Always skipped: "
        f"{', '.join(SYSTEM_FOLDERS[:-1])} and {SYSTEM_FOLDERS[-1]}.",
    )
    image_column: str = _image_column_option()
    id_column: str | None = _id_column_option()
    shard: str | None = _option(
        None,
        "Caption only shard I of N, written I/N and counted from 0, into its own part of OUTPUT.",
    )
    engine: Engine = _option(
        Engine.LOCAL, "Caption in this process, or by workers on a Ray cluster."
    )
    address: str | None = _option(
        None,
        "Ray cluster; auto: this machine's [default: RAY_ADDRESS, or start one here].",
    )
    workers: int | None = _option(
        None, "Ray workers [default: one per GPU, or one per machine without GPUs].", least=1
    )
    gpus_per_worker: float | None = _option(
        None, "GPUs per Ray worker, also fractions [default: 1 if there are GPUs].", least=0
    )
    on_existing: OnExisting = _option(
        OnExisting.RESUME,
        "What to do if OUTPUT exists: resume it, replace it, or fail.",
    )
    retry_failed: bool = _option(False, "Retry photos that failed earlier.")
    reuse: bool = _option(True, "Reuse existing captions for copies and renamed photos.")
    prune: bool = _option(False, "Drop rows whose photos are no longer in INPUT.")
    allow_empty: bool = _option(False, "Succeed even if INPUT has no photos.")
    max_failures: int | None = _option(
        None, "Exit with code 3 if more photos than this failed [default: no limit].", least=0
    )
    max_pixels: int = _option(
        MAX_PIXELS, "Reject photos with more pixels, without decoding them.", least=1
    )
    truncated: Truncated = _option(
        Truncated.ERROR, "Reject photos whose file ends early, or caption their readable part."
    )
    rows_per_part: int = _option(2000, "Commit after this many photos.", least=1)
    seconds_per_part: float = _option(60.0, "Commit after this many seconds.", least=0)
    stall_timeout: float = _option(
        300.0, "Abort if there is no progress for this many seconds.", least=1
    )
    dry_run: bool = _option(False, "Print what would be done, and write nothing.")
    log_format: LogFormat = _option(LogFormat.TEXT, "Format of the log on stderr.")
    metrics_file: Path | None = _option(
        None, "Write Prometheus metrics (node exporter, textfile) to this .prom file."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_output(self.output)
        index, count = self.shard_numbers
        if not 0 <= index < count <= MAX_SHARDS:
            raise UsageError(
                f"--shard must be I/N with 0 <= I < N <= {MAX_SHARDS:,}, not {self.shard}"
            )
        if self.engine is Engine.RAY and self.limit is not None:
            raise UsageError("--engine ray captions whole pieces of INPUT: omit --limit")
        if self.engine is Engine.RAY and self.source == "-":
            raise UsageError(
                "--engine ray cannot read INPUT from standard input: save the list to a file"
            )
        if self.precision is Precision.INT8 and self.gpus_per_worker:
            raise UsageError(
                "int8 is for CPUs: add --gpus-per-worker 0 (an output keeps its precision)"
            )
        if self.engine is Engine.LOCAL and (self.address or self.workers or self.gpus_per_worker):
            raise UsageError("--address, --workers and --gpus-per-worker need --engine ray")
        if self.prune and self.limit is not None:
            raise UsageError("--prune needs a full listing of INPUT: omit --limit")
        if self.metrics_file is not None and self.metrics_file.suffix != ".prom":
            raise UsageError(
                f"--metrics-file must end in .prom, the suffix that node exporter reads, not "
                f"{self.metrics_file.name!r}"
            )

    @cached_property
    def shard_numbers(self) -> tuple[int, int]:
        """Index and count of `shard`; (-1, 0) if it is malformed."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.shard or "0/1")
        return (int(match[1]), int(match[2])) if match else (-1, 0)


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Settings of `batchcap merge`; a str is a URL."""

    captions: Path | str
    output: Path | str

    def __post_init__(self) -> None:
        _check_output(self.output)


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(ModelOptions):
    """Settings of `batchcap caption`."""

    images: tuple[str, ...]
    attention_figure: Path | None = _option(
        None, "Draw the attention of each word over one IMAGE, as a PNG."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_figure is not None and len(self.images) != 1:
            raise UsageError(f"--attention-figure needs exactly one IMAGE, not {len(self.images)}")


@dataclass(frozen=True, kw_only=True)
class BenchSettings(ModelOptions):
    """Settings of `batchcap bench`."""

    images: Path | None = _option(None, "Directory of photos [default: generated photos].")
    limit: int = _option(1000, "Time at most this many photos.", least=1)
    batch_size: int = _option(64, "Photos per batch.", least=1)
    compare: bool = _option(False, "Compare all precisions that this machine supports.")
    json: bool = _option(False, "Print JSON instead of a table.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare and self.precision is not Precision.AUTO:
            raise UsageError("--compare measures all precisions: omit --precision")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Settings of `batchcap evaluate`."""

    captions: Path
    references: Path | None = None
    tokens: TokenKind = _option(
        TokenKind.WORDS,
        "Unit of comparison: words as jieba cuts them, without punctuation; words as in AI "
        "Challenger 2017; characters; or the text between spaces.",
    )
    match_by: MatchBy = _match_by_option()
    against: Path | None = _option(
        None, "Other captions of the same images: compare both files, image by image."
    )
    per_image: Path | None = _option(None, "Write each image's scores to this .parquet file.")
    training_captions: Path | None = _option(
        None, "Training captions: report the share of captions that occur there verbatim."
    )
    meteor: bool = _option(False, "Add METEOR; needs Java, and knows no Chinese.")
    resamples: int = _option(1000, "Bootstrap resamples for the intervals.", least=100)
    seed: int = _option(0, "RNG seed of the bootstrap.", least=0)
    json: bool = _option(False, "Print JSON instead of tables.")

    def __post_init__(self) -> None:
        _check_limits(self)
        needing = {"--against": self.against, "--per-image": self.per_image}
        for flag, value in needing.items():
            if value is not None and self.references is None:
                raise UsageError(f"{flag} needs REFERENCES")
        if self.match_by is not MatchBy.AUTO and self.references is None:
            raise UsageError("--match-by needs REFERENCES")
        if self.meteor and self.references is None:
            raise UsageError("--meteor needs REFERENCES")
        if self.per_image is not None and self.per_image.suffix != ".parquet":
            raise UsageError(f"--per-image must end in .parquet, not {self.per_image.name!r}")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of `batchcap export`."""

    captions: Path
    out: Path
    format: ExportFormat = _option(MISSING, "Format to write.")
    references: Path | None = _option(
        None,
        "Use the image ids of this file of references. Without FILE, as the last flag: CAPTIONS "
        "is a file of references itself. For coco only.",
        alone=str(CAPTIONS_THEMSELVES),
    )
    match_by: MatchBy = _match_by_option()

    def __post_init__(self) -> None:
        if self.references is not None and self.format is not ExportFormat.COCO:
            raise UsageError("--references needs --format coco")
        if self.match_by is not MatchBy.AUTO and self.references in (None, CAPTIONS_THEMSELVES):
            raise UsageError("--match-by needs --references FILE")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of `batchcap report`."""

    captions: Path
    out: Path
    images: str | None = _option(None, "INPUT of the run: directory, list, archives or URL.")
    image_column: str = _image_column_option()
    id_column: str | None = _id_column_option()
    evaluation: Path | None = _option(
        None, "File of `evaluate --per-image`: show scores and references too."
    )
    sample: int = _option(5000, "Show at most this many photos, chosen at random.", least=1)
    seed: int = _option(0, "RNG seed of the choice.", least=0)

    def __post_init__(self) -> None:
        _check_limits(self)
        if self.out.suffix not in (".html", ".htm"):
            raise UsageError(f"OUT must end in .html, not {self.out.name!r}")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of `batchcap train`; jobs/train-default.toml has those of the shipped model."""

    annotations: tuple[Path, ...] = _option(MISSING, "Captions of a data set; repeatable.")
    images: tuple[Path, ...] = _option(MISSING, "Directory of the photos; one per data set.")
    out: Path = _option(MISSING, "Model directory to write; must not exist.")
    weight: tuple[float, ...] = _option(
        (),
        "How often an epoch shows each photo, on average; one per data set [default: 1].",
        least=0.01,
        most=100,
    )
    validation_annotations: Path | None = _option(
        None, "Captions of the validation photos in the same directory [default: by split]."
    )
    train_on_val: bool = _option(
        False,
        "With --validation-annotations: also train on the val split of --annotations. The test "
        "split is never trained on.",
    )
    validation_count: int = _option(
        1000, "Photos held out for validation if the data names no validation split.", least=1
    )
    backbone: str = _option(
        "mobilenet",
        "CNN that extracts features: mobilenet, efficientnet-lite0 to -lite2 and others.",
    )
    backbone_weights: str = _option(
        "imagenet", 'Weights of the backbone: "imagenet" or a Keras file named *.weights.h5.'
    )
    image_size: int = _option(224, "Side of the input square, in pixels.", least=32, most=1024)
    input_range: tuple[float, float] | None = _option(
        None, "Values of black and white pixels [default: what the weights expect]."
    )
    vocabulary_size: int = _option(
        20_000, "Maximum size of the vocabulary.", least=5, most=MAX_WORDS
    )
    min_count: int = _option(3, "Replace words that occur less often by [UNK].", least=1)
    max_length: int = _option(
        20, "Maximum words per caption; longer captions are cut.", least=1, most=1000
    )
    units: int = _option(256, "Hidden size of the decoder.", least=1)
    layers: int = _option(2, "Decoder layers.", least=1)
    heads: int = _option(2, "Attention heads.", least=1)
    key_size: int = _option(128, "Size of each head's keys and values.", least=1)
    feature_norm: bool = _option(True, "Layer-normalise the image features.")
    dropout: float = _option(0.3, "Dropout rate.", least=0, most=0.99)
    input_dropout: float = _option(
        0.3, "Dropout rate of image features and embedded words.", least=0, most=0.99
    )
    label_smoothing: float = _option(
        0.1, "Label smoothing of the training loss.", least=0, most=0.99
    )
    flip: bool = _option(True, "Also train on flipped photos.")
    crops: int = _option(
        0, "Also train on this many random crops of each photo.", least=0, most=1000
    )
    batch_size: int = _option(32, "Photos per training step.", least=1)
    captions_per_image: int = _option(0, "Captions per photo and training step (0: all).", least=0)
    steps_per_epoch: int = _option(
        0, "Steps per epoch (0: one pass over the data).", least=0, most=MAX_STEPS
    )
    epochs: int = _option(14, "Maximum epochs of the likelihood phase.", least=1, most=MAX_STEPS)
    patience: int = _option(
        5, "End a phase after this many epochs without a better validation result.", least=1
    )
    monitor: Monitor = _option(Monitor.CIDER_D, "Validation result that chooses the best epoch.")
    learning_rate: float = _option(6e-4, "Peak learning rate of Adam.", **LEARNING_RATES)
    warmup_steps: int = _option(500, "Steps of linear warm-up.", least=0, most=MAX_STEPS)
    decay: Decay = _option(
        Decay.COSINE, "Learning rate after the warm-up: cosine decay to 0, or constant."
    )
    ema_momentum: float = _option(
        0.995,
        "Momentum of the weights' exponential moving average (0: off).",
        least=0,
        most=MAX_MOMENTUM,
    )
    objective: Objective = _option(
        Objective.LIKELIHOOD,
        "Train by likelihood only, or by likelihood and then self-critically by CIDEr-D.",
    )
    fine_tune_from: str = _option(
        "", "Fine-tune the backbone's layers after this one, once the decoder is trained."
    )
    fine_tune_epochs: int = _option(
        6, "Maximum epochs of the fine-tuning phase.", least=1, most=MAX_STEPS
    )
    fine_tune_learning_rate: float = _option(
        1e-4, "Peak learning rate of fine-tuning.", **LEARNING_RATES
    )
    cider_epochs: int = _option(
        8, "Maximum epochs of the self-critical phase.", least=1, most=MAX_STEPS
    )
    cider_learning_rate: float = _option(
        5e-5, "Learning rate of the self-critical phase.", **LEARNING_RATES
    )
    cider_samples: int = _option(
        5,
        "Captions sampled per photo in the self-critical phase.",
        least=2,
        most=1000,
    )
    precision: Precision = _option(
        Precision.AUTO,
        "Precision of training. auto: float32; bfloat16 is faster on recent GPUs.",
    )
    seed: int = _option(1, "RNG seed of training.", least=0, most=2**32 - 1)
    data_note: str = _option("", "Text about the data and its licence for the model card.")

    def __post_init__(self) -> None:
        _check_limits(self)
        count = len(self.annotations)
        for flag, given in (("--images", self.images), ("--weight", self.weight)):
            if len(given) != count and (given or flag == "--images"):
                raise UsageError(
                    f"{flag} occurs {len(given)} times but --annotations {count} times: give one "
                    "per data set"
                )
        if self.validation_annotations is not None and count > 1:
            raise UsageError(
                "--validation-annotations works with one data set only: with several, name the "
                "split in the annotations"
            )
        low, high = self.input_range or (0, 1)
        if not -MAX_PIXEL_VALUE <= low < high <= MAX_PIXEL_VALUE:
            raise UsageError(
                f"--input-range must be two rising values between -{MAX_PIXEL_VALUE:g} and "
                f"{MAX_PIXEL_VALUE:g}, not {low} and {high}"
            )
        if self.train_on_val and self.validation_annotations is None:
            raise UsageError("--train-on-val needs --validation-annotations")
        if self.precision in (Precision.FLOAT16, Precision.INT8):
            raise UsageError(
                f"--precision {self.precision} loses small gradients: use bfloat16 or float32"
            )


@dataclass(frozen=True, kw_only=True)
class QuantiseSettings:
    """Settings of `batchcap model quantise`."""

    model: Path
    images: Path = _option(MISSING, "Directory of photos like those to be captioned.")


@dataclass(frozen=True)
class DecodeSettings:
    """How captions are generated; recorded in every output.

    `temperature` 0 takes the most probable words; above 0, words are sampled. `seed`, `top_k` and
    `top_p` matter only then, `length_penalty` only with a `beam_size` above 1; see
    `model/decoding.py`.
    """

    max_length: int
    temperature: float = 0.0
    seed: int = 0
    top_k: int | None = None
    top_p: float = 1.0
    beam_size: int = 1
    length_penalty: float = 0.0
    min_length: int = 0
    no_repeat_ngram: int = 0
    style: str | None = None

    def __str__(self) -> str:
        how = f"beam of {self.beam_size}" if self.beam_size > 1 else "greedy"
        if self.temperature > 0:
            how = f"temperature {self.temperature:g}"
        return f"{how}, at most {self.max_length} words"


DECODE_DEFAULTS = {
    field.name: field.default for field in fields(DecodeSettings) if field.default is not MISSING
}
