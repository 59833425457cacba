"""The version, where modules below the package's public names can read it."""

__version__ = "0.1.0"
