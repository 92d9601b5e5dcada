"""Version of the installed package. Importing importlib.metadata takes 1 to 2 ms, so the package imports this module
lazily.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("homeagent")
except PackageNotFoundError:
    __version__ = "unknown"  # the package runs from a folder and is not installed
