"""Chooses device, runtime and precision; starts TensorFlow quietly."""

import ctypes
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batchcap.errors import BatchcapError, UsageError, first_line
from batchcap.process.environment import settle_caches
from batchcap.process.stderr import kept_back
from batchcap.process.threads import in_new_thread, locked_cache
from batchcap.settings import Precision, Runtime


@dataclass(frozen=True)
class Execution:
    """How the backbone runs, with every `auto` resolved."""

    device: str = "CPU"
    runtime: Runtime = Runtime.TENSORFLOW
    precision: Precision = Precision.FLOAT32

    def __str__(self) -> str:
        return f"{self.device} with {self.runtime}, {self.precision}"


def choose_execution(runtime: Runtime, precision: Precision) -> Execution:
    """Choose device and runtime on this machine for a precision other than `auto`.

    TensorFlow starts only where it will run the model, or where a GPU may be.

    Raises:
        UsageError: the runtime, or this CPU, lacks the precision.
    """
    if runtime is Runtime.AUTO:
        on_gpu = precision is not Precision.INT8 and has_gpu() and start_tensorflow() != "CPU"
        runtime = Runtime.TENSORFLOW if on_gpu else Runtime.OPENVINO
    if runtime is Runtime.OPENVINO:
        _check_openvino_computes_in(precision)
        return Execution("CPU", runtime, precision)
    if precision is Precision.INT8:
        raise UsageError(
            "int8 is for CPUs: omit --runtime tensorflow (an output keeps its precision)"
        )
    return Execution(start_tensorflow(), runtime, precision)


def has_gpu() -> bool:
    """Return whether there is a GPU that TensorFlow may be able to use.

    That is one of NVIDIA, by its driver, one of AMD, or one of a plug-in's, such as Apple's Metal.
    """
    if Path("/dev/kfd").exists() or find_spec("tensorflow-plugins") is not None:
        return True
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return False
    return (
        not driver.cuInit(0)
        and not driver.cuDeviceGetCount(ctypes.byref(count))
        and count.value > 0
    )


def precision_of(
    precision: Precision, runtime: Runtime = Runtime.TENSORFLOW, has_int8: bool = False
) -> Precision:
    """Return the precision; `auto` is int8 if the model has it and no GPU is there, else float32.

    Raises:
        UsageError: int8 is requested, but the model does not have it.
    """
    if precision is Precision.INT8 and not has_int8:
        raise UsageError("--precision int8: the model has none; `batchcap model quantise` adds it")
    if precision is not Precision.AUTO:
        return precision
    if not has_int8 or runtime is Runtime.TENSORFLOW:
        return Precision.FLOAT32
    return Precision.FLOAT32 if runtime is Runtime.AUTO and has_gpu() else Precision.INT8


def _check_openvino_computes_in(precision: Precision) -> None:
    name = {Precision.BFLOAT16: "BF16", Precision.FLOAT16: "FP16"}.get(precision, "FP32")
    if name not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UsageError(
            f"this CPU does not support {precision}: use --precision float32, "
            "or --runtime tensorflow, which emulates it slowly"
        )


def import_openvino() -> Any:
    """Import `openvino` without its telemetry."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_module("openvino")


def openvino_core() -> Any:
    """Return this process's only `openvino.Core`, with the CPU plugin loaded.

    The plugin gives its loading thread a stack for signal handlers, and unmaps that stack when any
    thread frees the plugin: the next signal to the loading thread would crash the process. So a
    thread that ends loads the plugin, and the plugin is never freed.
    """
    return _core_with("CPU")


def _load_core(device: str) -> Any:
    def load() -> Any:
        core = import_openvino().Core()
        core.get_versions(device)  # loads its plugin
        return core

    return in_new_thread(load)


_core_with = locked_cache(_load_core)


def start_tensorflow() -> str:
    """Import TensorFlow and Keras, and return the name of the device.

    Output of C++ code is shown only if the import fails: it complains about a missing GPU before
    it reads its log level.

    Raises:
        BatchcapError: TensorFlow can't be imported.
    """
    settle_caches()
    with kept_back("TensorFlow"):
        try:
            import keras  # noqa: F401 - reads its settings
            import tensorflow as tf
        except Exception as error:
            raise BatchcapError(
                f"cannot import TensorFlow ({_first_cause(error)}): check its installation and the "
                "machine's memory"
            ) from error
        # Otherwise newer GPUs round float32 to 10 bits, and captions change with the batch.
        tf.config.experimental.enable_tensor_float_32_execution(False)
        gpus = tf.config.list_physical_devices("GPU")
        if not gpus:
            return "CPU"
        return str(tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU"))


def _first_cause(error: BaseException) -> str:
    """Return the first error of a chain: TensorFlow's own first line says nothing."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return first_line(error)
