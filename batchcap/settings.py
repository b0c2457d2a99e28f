"""What was asked for: one frozen dataclass a verb, checked once, passed whole.

The fields are the command line's flags, in order: their defaults and help texts stand here only.
"""

import re
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from batchcap.errors import UsageError

MAX_PIXELS = 100_000_000  # of a photo, unless more are allowed
MAX_WORDS = 1_000_000  # of a vocabulary
MAX_SHARES = 99_999  # of five digits in names
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
    """What runs the backbone. `auto` is OpenVINO where it is installed and there is no GPU."""

    AUTO = "auto"
    TENSORFLOW = "tensorflow"
    OPENVINO = "openvino"


class Precision(StrEnum):
    """What the backbone computes in; its weights and features are float32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class AttentionDetail(StrEnum):
    """How much of the attention goes into the file."""

    SUMMARY = "summary"
    FULL = "full"
    NONE = "none"


class OnExisting(StrEnum):
    """What to do with an output that exists."""

    RESUME = "resume"
    OVERWRITE = "overwrite"
    ERROR = "error"


class Engine(StrEnum):
    """What captions the photos."""

    LOCAL = "local"
    RAY = "ray"


class Truncated(StrEnum):
    """What to do with a photo whose file ends early."""

    ERROR = "error"
    ACCEPT = "accept"


class LogFormat(StrEnum):
    """How events are told on stderr."""

    TEXT = "text"
    JSON = "json"


class TokenKind(StrEnum):
    """How captions are cut into words to be compared."""

    WORDS = "words"
    AI_CHALLENGER = "ai-challenger"
    CHAR = "char"
    PRETOKENIZED = "pretokenized"


class MatchBy(StrEnum):
    """Which ids say that captions and references are of the same image."""

    AUTO = "auto"
    IMAGE_ID = "image-id"
    COCO_ID = "coco-id"
    NAME = "name"
    NUMBER = "number"


class ExportFormat(StrEnum):
    """What other programs read."""

    COCO = "coco"
    AI_CHALLENGER = "ai-challenger"
    JSONL = "jsonl"
    CSV = "csv"
    IMAGEFOLDER = "imagefolder"


class Objective(StrEnum):
    """What training raises."""

    LIKELIHOOD = "likelihood"
    CIDER = "cider"


class Monitor(StrEnum):
    """What is best on the validation photos."""

    CIDER_D = "cider-d"
    LOSS = "loss"


class Decay(StrEnum):
    """What happens to the learning rate after the warm-up."""

    COSINE = "cosine"
    CONSTANT = "constant"


def _option(default: Any, description: str, **more: float | str) -> Any:
    """A field with its help text and its limits, `least` and `most`, both included.

    `alone` is the value of a flag that is given without one.
    """
    return field(default=default, metadata={"help": description, **more})


def _image_column_option() -> Any:
    return _option("image", "Column of a Parquet INPUT: photos, or paths of photos.")


def _id_column_option() -> Any:
    return _option(
        None, "Column of a Parquet INPUT: ids of the photos [their paths, or file and row]."
    )


def _match_by_option() -> Any:
    return _option(
        MatchBy.AUTO,
        "How to match captions with references: by id, COCO id, file name without folders and "
        "extension, or the number in the name. auto takes the strictest that fits, and stops where "
        "two disagree.",
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
            f"OUTPUT is a .parquet file or a folder without a suffix, not {path.name!r}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, what it runs on, and how its words are chosen."""

    model: Path = _option(DEFAULT_MODEL, "Model directory  [default: the shipped model]")
    runtime: Runtime = _option(
        Runtime.AUTO, "What runs the backbone; auto: OpenVINO if installed and there is no GPU."
    )
    precision: Precision = _option(Precision.AUTO, "What the backbone computes in; auto: float32.")
    style: str | None = _option(
        None, "Style of the captions, one of the model's, such as short or detailed [any]."
    )
    max_length: int | None = _option(None, "Most words in a caption [the model's limit].", least=1)
    min_length: int = _option(0, "Fewest words in a caption.", least=0)
    no_repeat_ngram: int = _option(
        0, "Say no sequence of this many words twice in a caption; 0 allows all.", least=0
    )
    beam_size: int = _option(
        1, "Captions searched side by side for the most probable; 1 is greedy.", least=1, most=100
    )
    length_penalty: float = _option(
        1.0,
        "A beam's score is log-probability / words ** this: 0 favours short captions, 1 none.",
        least=-10,
        most=10,
    )
    temperature: float = _option(
        0.0,
        "0 takes the most probable words; above 0 draws, more freely the higher.",
        least=0,
        most=100,
    )
    seed: int = _option(0, "Seed of the draws; counts only with a temperature.")
    top_k: int | None = _option(None, "Draw from this many most probable words [all].", least=1)
    top_p: float = _option(
        1.0, "Draw from the most probable words that reach this probability.", least=0, most=1
    )

    def __post_init__(self) -> None:
        _check_limits(self)
        if self.temperature > 0 and self.beam_size > 1:
            raise UsageError("--beam-size searches, --temperature draws: give only one of them")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise UsageError("--top-k and --top-p limit draws: give a --temperature above 0 too")


@dataclass(frozen=True, kw_only=True)
class RunSettings(ModelOptions):
    """What `batchcap run` is asked."""

    source: str
    output: Path | str  # a str is a URL
    batch_size: int = _option(64, "Photos captioned at a time.", least=1)
    attention: AttentionDetail = _option(
        AttentionDetail.SUMMARY, "What to keep of the attention of each word."
    )
    limit: int | None = _option(None, "Take up at most this many photos in this run.", least=1)
    glob: str | None = _option(
        None, "Take the files that match, whatever their extension; * crosses folders too."
    )
    exclude: tuple[str, ...] = _option(
        (),
        "Leave out files and folders that match, and all below these; repeatable. Always left out: "
        f"{', '.join(SYSTEM_FOLDERS[:-1])} and {SYSTEM_FOLDERS[-1]}.",
    )
    image_column: str = _image_column_option()
    id_column: str | None = _id_column_option()
    shard: str | None = _option(
        None, "Caption share I of N only, as I/N with I from 0, into a part of OUTPUT of its own."
    )
    engine: Engine = _option(
        Engine.LOCAL, "What captions: this process, or workers on the machines of a Ray cluster."
    )
    address: str | None = _option(
        None, "Ray cluster, auto for the one here [RAY_ADDRESS, or this machine alone]."
    )
    workers: int | None = _option(
        None, "Workers on Ray [one for each GPU or, without any, each machine].", least=1
    )
    gpus_per_worker: float | None = _option(
        None, "GPUs, or the part of one, of a worker on Ray [1 where there are any].", least=0
    )
    on_existing: OnExisting = _option(
        OnExisting.RESUME,
        "What to do with an OUTPUT that exists: go on with it, replace it, or refuse.",
    )
    retry_failed: bool = _option(False, "Take up photos that failed before, too.")
    reuse: bool = _option(True, "Give copies and renamed photos the caption that is there.")
    prune: bool = _option(False, "Drop the rows of photos that INPUT no longer has.")
    allow_empty: bool = _option(False, "No photo at all is a success.")
    max_failures: int | None = _option(
        None, "Exit with code 3 if more photos than this have failed [any number].", least=0
    )
    max_pixels: int = _option(MAX_PIXELS, "Refuse photos of more pixels, undecoded.", least=1)
    truncated: Truncated = _option(
        Truncated.ERROR, "Photos whose file ends early: refuse them, or take what there is."
    )
    rows_per_part: int = _option(2000, "Commit after this many photos,", least=1)
    seconds_per_part: float = _option(60.0, "or after this many seconds.", least=0)
    stall_timeout: float = _option(300.0, "End if nothing moves for this many seconds.", least=1)
    dry_run: bool = _option(False, "Say what there is to do, and write nothing.")
    log_format: LogFormat = _option(LogFormat.TEXT, "How to tell of events on stderr.")
    metrics_file: Path | None = _option(
        None, "Write metrics for Prometheus's node exporter to this *.prom file."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_output(self.output)
        index, count = self.share
        if not 0 <= index < count <= MAX_SHARES:
            raise UsageError(
                f"--shard is I/N with I from 0 and below N, up to {MAX_SHARES:,}, not {self.shard}"
            )
        if self.engine is Engine.RAY and self.limit is not None:
            raise UsageError("--engine ray takes up whole pieces of INPUT: leave out --limit")
        if self.engine is Engine.RAY and self.source == "-":
            raise UsageError("--engine ray needs an INPUT that can be named, not standard input")
        if self.engine is Engine.LOCAL and (self.address or self.workers or self.gpus_per_worker):
            raise UsageError(
                "--address, --workers and --gpus-per-worker are for a cluster: add --engine ray"
            )
        if self.prune and self.limit is not None:
            raise UsageError("--prune needs to see all of INPUT: leave out --limit")
        if self.metrics_file is not None and self.metrics_file.suffix != ".prom":
            raise UsageError(
                f"--metrics-file must end in .prom, which node-exporter reads, not "
                f"{self.metrics_file.name!r}"
            )

    @property
    def share(self) -> tuple[int, int]:
        """Which share of the photos to caption, and of how many; (-1, 0) for what is none."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.shard or "0/1")
        return (int(match[1]), int(match[2])) if match else (-1, 0)


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """What `batchcap merge` is asked; a str is a URL."""

    captions: Path | str
    output: Path | str

    def __post_init__(self) -> None:
        _check_output(self.output)


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(ModelOptions):
    """What `batchcap caption` is asked."""

    images: tuple[str, ...]
    attention_figure: Path | None = _option(
        None, "Draw where the model looked for each word of one IMAGE, as a PNG."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_figure is not None and len(self.images) != 1:
            raise UsageError(f"--attention-figure draws one IMAGE, not {len(self.images)}")


@dataclass(frozen=True, kw_only=True)
class BenchSettings(ModelOptions):
    """What `batchcap bench` is asked."""

    images: Path | None = _option(None, "Directory of the photos [generated ones].")
    limit: int = _option(1000, "Most photos to time.", least=1)
    batch_size: int = _option(64, "Photos captioned at a time.", least=1)
    json: bool = _option(False, "Print JSON instead of a table.")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What `batchcap evaluate` is asked."""

    captions: Path
    references: Path | None = None
    tokens: TokenKind = _option(
        TokenKind.WORDS,
        "What is compared: words as jieba cuts them without punctuation, as AI Challenger 2017 "
        "had it, characters, or what stands between spaces.",
    )
    match_by: MatchBy = _match_by_option()
    against: Path | None = _option(
        None, "Other captions of the same images: compare the two, image by image."
    )
    per_image: Path | None = _option(None, "Write each image's scores to this .parquet file.")
    training_captions: Path | None = _option(
        None, "Captions of the training: say how many captions stand there word by word."
    )
    meteor: bool = _option(False, "METEOR too, which needs Java and knows no Chinese.")
    resamples: int = _option(1000, "Resamples of the images for the intervals.", least=100)
    seed: int = _option(0, "Seed of the resamples.", least=0)
    json: bool = _option(False, "Print JSON instead of tables.")

    def __post_init__(self) -> None:
        _check_limits(self)
        needing = {"--against": self.against, "--per-image": self.per_image}
        for flag, value in needing.items():
            if value is not None and self.references is None:
                raise UsageError(f"{flag} compares with references: name a file of REFERENCES")
        if self.match_by is not MatchBy.AUTO and self.references is None:
            raise UsageError("--match-by matches with references: name a file of REFERENCES")
        if self.meteor and self.references is None:
            raise UsageError("--meteor compares with references: name a file of REFERENCES")
        if self.per_image is not None and self.per_image.suffix != ".parquet":
            raise UsageError(f"--per-image must end in .parquet, not {self.per_image.name!r}")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What `batchcap export` is asked."""

    captions: Path
    out: Path
    format: ExportFormat = _option(MISSING, "Whose format to write.")
    references: Path | None = _option(
        None,
        "Give captions the ids that their images have in this file of references. Without FILE, "
        "as the last flag: CAPTIONS are references. For coco only.",
        alone=str(CAPTIONS_THEMSELVES),
    )
    match_by: MatchBy = _match_by_option()

    def __post_init__(self) -> None:
        if self.references is not None and self.format is not ExportFormat.COCO:
            raise UsageError("--references is for the format coco only")
        if self.match_by is not MatchBy.AUTO and self.references in (None, CAPTIONS_THEMSELVES):
            raise UsageError("--match-by matches with references: name a file of --references")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What `batchcap report` is asked."""

    captions: Path
    out: Path
    images: str | None = _option(
        None, "INPUT of the run, a folder, list, archives or URL: the photos to show."
    )
    image_column: str = _image_column_option()
    id_column: str | None = _id_column_option()
    evaluation: Path | None = _option(
        None, "What `evaluate --per-image` wrote: show scores and references too."
    )
    sample: int = _option(5000, "Show this many photos at most, drawn at random.", least=1)
    seed: int = _option(0, "Seed of the draw.", least=0)

    def __post_init__(self) -> None:
        _check_limits(self)
        if self.out.suffix not in (".html", ".htm"):
            raise UsageError(f"OUT is an .html file, not {self.out.name!r}")


@dataclass(frozen=True)
class TrainSettings:
    """What `batchcap train` is asked. jobs/train-default.toml is the shipped model's recipe."""

    annotations: tuple[Path, ...] = _option(
        MISSING, "Captions of the photos; repeatable, for several data sets."
    )
    images: tuple[Path, ...] = _option(MISSING, "Directory of the photos; one for each data set.")
    out: Path = _option(MISSING, "Model directory to write; must not exist yet.")
    weight: tuple[float, ...] = _option(
        (),
        "How often a data set's photos are seen in an epoch, on average; one for each [1].",
        least=0.01,
        most=100,
    )
    validation_annotations: Path | None = _option(
        None, "Captions of the validation photos, which may be in the same directory [by split]."
    )
    train_on_val: bool = _option(
        False,
        "With --validation-annotations: train on the annotations' photos of split val too. Those "
        "of split test are never trained on.",
    )
    validation_count: int = _option(
        1000, "Photos held out for validation where nothing else names them.", least=1
    )
    backbone: str = _option(
        "mobilenet", "CNN that sees the photos: mobilenet, efficientnet-lite0 to -lite2 and others."
    )
    backbone_weights: str = _option(
        "imagenet", 'Its weights: "imagenet" or a file of Keras named *.weights.h5.'
    )
    image_size: int = _option(
        224, "Side of the square that photos are resized to.", least=32, most=1024
    )
    input_range: tuple[float, float] | None = _option(
        None, "What pixel values 0 and 255 become [what the backbone's weights expect]."
    )
    vocabulary_size: int = _option(20_000, "Most words in the vocabulary.", least=5, most=MAX_WORDS)
    min_count: int = _option(3, "Words seen less often become [UNK].", least=1)
    max_length: int = _option(
        20, "Most words in a caption; longer ones are cut.", least=1, most=1000
    )
    units: int = _option(256, "Width of the decoder.", least=1)
    layers: int = _option(2, "Layers of the decoder.", least=1)
    heads: int = _option(2, "Attention heads.", least=1)
    key_size: int = _option(128, "Size of a head's keys and values.", least=1)
    feature_norm: bool = _option(True, "Normalise the features of each grid cell.")
    dropout: float = _option(0.3, "Share of activations dropped in training.", least=0, most=0.99)
    input_dropout: float = _option(
        0.3, "Share of features and embedded words dropped in training.", least=0, most=0.99
    )
    label_smoothing: float = _option(
        0.1, "Probability spread over all words in the training loss.", least=0, most=0.99
    )
    flip: bool = _option(True, "Train on mirrored photos too.")
    crops: int = _option(
        0, "Train on this many random parts of each photo too.", least=0, most=1000
    )
    batch_size: int = _option(32, "Photos in a training step.", least=1)
    captions_per_image: int = _option(
        0, "Captions of a photo in a training step; 0 for all it has.", least=0
    )
    steps_per_epoch: int = _option(0, "Steps of an epoch; 0 for one pass.", least=0, most=MAX_STEPS)
    epochs: int = _option(14, "Epochs at most.", least=1, most=MAX_STEPS)
    patience: int = _option(5, "Epochs without a better validation result before the end.", least=1)
    monitor: Monitor = _option(Monitor.CIDER_D, "Which validation result is the measure.")
    learning_rate: float = _option(6e-4, "Peak learning rate of Adam.", **LEARNING_RATES)
    warmup_steps: int = _option(
        500, "Steps in which the rate rises from 0.", least=0, most=MAX_STEPS
    )
    decay: Decay = _option(Decay.COSINE, "How the rate falls afterwards, to 0 at the last epoch.")
    ema_momentum: float = _option(
        0.995,
        "Momentum of the moving average of the weights that is kept; 0 for none.",
        least=0,
        most=MAX_MOMENTUM,
    )
    objective: Objective = _option(
        Objective.LIKELIHOOD,
        "What training raises: the likelihood of the captions, or after that their CIDEr-D "
        "(self-critical training).",
    )
    fine_tune_from: str = _option(
        "", "Layer of the backbone after which it is trained too, once the decoder is; '' for none."
    )
    fine_tune_epochs: int = _option(6, "Epochs of that at most.", least=1, most=MAX_STEPS)
    fine_tune_learning_rate: float = _option(1e-4, "Its peak learning rate.", **LEARNING_RATES)
    cider_epochs: int = _option(
        8, "Epochs of self-critical training at most.", least=1, most=MAX_STEPS
    )
    cider_learning_rate: float = _option(5e-5, "Its learning rate.", **LEARNING_RATES)
    cider_samples: int = _option(
        5,
        "Captions drawn of each photo, and compared with each other, in its steps.",
        least=2,
        most=1000,
    )
    precision: Precision = _option(
        Precision.AUTO,
        "What training computes in: float32, which auto is, or bfloat16, faster on newer GPUs.",
    )
    seed: int = _option(
        1, "Seed of the weights, the order, the flips and the dropout.", least=0, most=2**32 - 1
    )
    data_note: str = _option("", "What the model card says of the data and its licence.")

    def __post_init__(self) -> None:
        _check_limits(self)
        count = len(self.annotations)
        for flag, given in (("--images", self.images), ("--weight", self.weight)):
            if len(given) != count and (given or flag == "--images"):
                raise UsageError(
                    f"{flag} is given {len(given)} times, --annotations {count} times: each data "
                    "set needs one"
                )
        if self.validation_annotations is not None and count > 1:
            raise UsageError(
                "--validation-annotations is for one data set: name splits in the annotations of "
                "several"
            )
        low, high = self.input_range or (0, 1)
        if not -MAX_PIXEL_VALUE <= low < high <= MAX_PIXEL_VALUE:
            raise UsageError(
                f"--input-range must rise, between -{MAX_PIXEL_VALUE:g} and {MAX_PIXEL_VALUE:g}, "
                f"not go from {low} to {high}"
            )
        if self.train_on_val and self.validation_annotations is None:
            raise UsageError(
                "--train-on-val needs other validation photos: --validation-annotations"
            )
        if self.precision is Precision.FLOAT16:
            raise UsageError(
                "--precision float16 loses small gradients: train in bfloat16, or float32"
            )


@dataclass(frozen=True)
class DecodeSettings:
    """How words are chosen. Recorded in every file of captions: other settings, other captions.

    `temperature` 0 takes the most probable words, above 0 draws; `seed`, `top_k` and `top_p` count
    only then, `length_penalty` only with a `beam_size` above 1. What each means stands in
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
