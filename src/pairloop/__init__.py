"""pairloop turns the picks people make between two answers into a better language model, again and again."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pairloop")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"
