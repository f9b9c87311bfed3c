"""The package's version: what the card and ``--version`` say, and what the wheel is built with."""

__all__ = ["__version__"]

__version__ = "0.1.0"
