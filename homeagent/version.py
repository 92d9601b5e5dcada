"""Version of the package. Import this module lazily, because the import takes 1 to 2 ms."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("homeagent")
except PackageNotFoundError:
    __version__ = "unknown"  # the package runs from a folder and is not installed
