"""The version, where the build and the manifest both find it."""

__version__ = "0.1.0.dev0"
