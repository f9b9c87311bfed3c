"""Which files of a folder or an archive are pictures, where nothing names them: by the ends of their names."""

from __future__ import annotations

__all__ = ["SUFFIXES"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm")
"""In lower case. Other programs have lists of their own: pytorch-fid's is in :mod:`unet_surgery.evaluate.pictures`."""
