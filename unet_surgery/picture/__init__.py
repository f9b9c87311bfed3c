"""The architecture picture: a plan as an SVG of the teacher's U, with what the surgery removes drawn as ghosts.

Pure, but for :mod:`unet_surgery.picture.png`, which asks a converter. A plan becomes fates (``fate``), fates become a
scene of rectangles and texts (``layout``, ``frame``), and a scene becomes text (``svg``).
"""

from unet_surgery.picture.compose import draw

__all__ = ["draw"]
