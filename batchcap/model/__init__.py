"""Pixels to words. Knows nothing of jobs, files of rows or the command line."""

import os

# Read by TensorFlow and Keras when they are first imported, which the modules of this package do
# after this line. A GPU's memory is taken as needed, so that two workers fit on one card.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
# By itself TensorFlow uses oneDNN only on CPUs with AVX-512; convolutions gain on the others too.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
