"""Settings of a run, adapted to its model."""

from dataclasses import dataclass
from pathlib import Path

from batchcap.errors import UsageError
from batchcap.model.config import ModelConfig, read_config
from batchcap.model.runtime import precision_of
from batchcap.photos.images import LoadSettings
from batchcap.settings import (
    AttentionDetail,
    DecodeSettings,
    Engine,
    ModelOptions,
    Precision,
    RunSettings,
    Runtime,
    Truncated,
)

READER_TIMEOUTS = 4  # per stall timeout: a file that hangs two readers is given up before that


def decode_settings_of(options: ModelOptions, model: ModelConfig) -> DecodeSettings:
    """Return the decode settings for a model; settings without effect get their defaults.

    Raises:
        UsageError: a length that the model or the other length does not allow, or a style that the
            model does not know.
    """
    longest = model.decoder.max_length
    if options.max_length and options.max_length > longest:
        raise UsageError(f"--max-length must be at most {longest}, the limit of {options.model}")
    max_length = options.max_length or longest
    if options.min_length > max_length:
        raise UsageError(
            f"--min-length {options.min_length} exceeds the maximum of {max_length} words"
        )
    if options.style not in (None, *model.decoder.styles):
        advice = (
            f"choose {' or '.join(model.decoder.styles)}" if model.decoder.styles else "omit it"
        )
        raise UsageError(f"--style {options.style}: {options.model} has no such style; {advice}")
    return DecodeSettings(
        max_length=max_length,
        temperature=options.temperature,
        seed=options.seed if options.temperature > 0 else 0,
        top_k=options.top_k,
        top_p=options.top_p,
        beam_size=options.beam_size,
        length_penalty=options.length_penalty if options.beam_size > 1 else 0.0,
        min_length=options.min_length,
        no_repeat_ngram=options.no_repeat_ngram,
        style=options.style,
    )


def precision_for(options: ModelOptions, int8: str | None) -> Precision:
    """Return the precision for a new output; `int8` is the `int8_digest` of the model.

    On Ray, `auto` is float32 unless workers have no GPUs: this machine may be another kind.

    Raises:
        UsageError: int8 is requested, but the model does not have it.
    """
    runtime = options.runtime
    if isinstance(options, RunSettings) and options.engine is Engine.RAY:
        on_gpus = runtime is Runtime.AUTO and options.gpus_per_worker != 0
        runtime = Runtime.TENSORFLOW if on_gpus else Runtime.OPENVINO
    return precision_of(options.precision, runtime, has_int8=int8 is not None)


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of a worker, on whatever machine it runs.

    reader_timeout_s: time limit for reading a photo. compiled: whether there are enough photos for
    compiling to pay.
    """

    model: Path
    runtime: Runtime
    precision: Precision
    load: LoadSettings
    decode: DecodeSettings
    batch_size: int
    attention: AttentionDetail
    run_id: str
    reader_timeout_s: float
    compiled: bool = True


def worker_settings_of(
    settings: RunSettings, decode: DecodeSettings, batch_size: int, run_id: str
) -> WorkerSettings:
    """Return the settings of a run's workers.

    Raises:
        ModelError: the model directory is wrong.
    """
    side = read_config(settings.model).backbone.image_size
    accept = settings.truncated is Truncated.ACCEPT
    return WorkerSettings(
        model=settings.model,
        runtime=settings.runtime,
        precision=settings.precision,
        load=LoadSettings(side, settings.max_pixels, accept),
        decode=decode,
        batch_size=batch_size,
        attention=settings.attention,
        run_id=run_id,
        reader_timeout_s=settings.stall_timeout / READER_TIMEOUTS,
        # Compiling takes seconds: too long for a single batch.
        compiled=batch_size == settings.batch_size,
    )
