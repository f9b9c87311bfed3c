"""Below the torch line: students as diffusers models."""

from unet_surgery.runtime.load import load_unet
from unet_surgery.runtime.verify import VerifyReport, verify

__all__ = ["VerifyReport", "load_unet", "verify"]
