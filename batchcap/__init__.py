"""Chinese captions for directories of photos, in batch and unattended."""

from importlib.metadata import version

__version__ = version("batchcap")
