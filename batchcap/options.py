"""What was asked for, made to fit the model that is to do it."""

from batchcap.contracts import UsageError
from batchcap.model.config import DecodeSettings, ModelConfig
from batchcap.settings import ModelOptions


def decode_settings_of(options: ModelOptions, model: ModelConfig) -> DecodeSettings:
    """How the model is to choose words; what does not count is as nobody had asked for it.

    Raises:
        UsageError: a length that the model or the other length does not allow.
    """
    longest = model.decoder.max_length
    if options.max_length and options.max_length > longest:
        raise UsageError(f"--max-length must be at most {longest}, the limit of {options.model}")
    max_length = options.max_length or longest
    if options.min_length > max_length:
        raise UsageError(
            f"--min-length {options.min_length} is more than the {max_length} words of a caption"
        )
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
    )
