"""Pixels to words. Knows nothing of jobs, files of rows or the command line."""

from batchcap.process.environment import settle

settle()  # before TensorFlow and Keras are imported, which the modules of this package do
