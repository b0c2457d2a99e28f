"""Pixels to words. Knows nothing of jobs, files of rows or the command line."""

from batchcap.process.environment import settle

settle()  # before this package's modules import TensorFlow and Keras
