"""Which release of the package this is, as it was installed. To import this costs a millisecond or two."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("homeagent")
except PackageNotFoundError:
    __version__ = "unknown"  # run from a folder that was never installed
