"""Loads a model for the machine at hand."""

from pathlib import Path

from batchcap.model.captioner import Captioner
from batchcap.model.runtime import Execution
from batchcap.settings import Runtime


def load_captioner(directory: Path, execution: Execution, compiled: bool = True) -> Captioner:
    """Load and check a model directory, to run as `execution` says.

    With `compiled` False, TensorFlow does not compile: the first caption is ready seconds earlier.

    Raises:
        ModelError: a file is missing, a field is wrong, or weights do not fit.
    """
    if execution.runtime is Runtime.OPENVINO:
        from batchcap.model.openvino_captioner import load_for_openvino

        return load_for_openvino(directory, execution.precision)
    from batchcap.model.tensorflow_captioner import load_for_tensorflow

    return load_for_tensorflow(directory, execution.precision, compiled)
