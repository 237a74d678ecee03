"""The installed version, in a file of its own because looking it up takes a while."""

from importlib import metadata

try:
  __version__ = metadata.version('depthprune')
except metadata.PackageNotFoundError:  # used from a source folder
  __version__ = '0.0.0'
