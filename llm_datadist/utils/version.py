"""The version of the installed distribution, looked up when it is first asked for."""
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("llm-datadist")
except PackageNotFoundError:                        # a source tree that was not installed
    __version__ = "0+unknown"
