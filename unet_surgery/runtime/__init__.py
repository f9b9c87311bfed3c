"""Below the torch line: students as diffusers models, and pickles opened for their tensors."""

from unet_surgery.runtime.convert import ConvertResult, convert
from unet_surgery.runtime.load import load_unet
from unet_surgery.runtime.verify import VerifyReport, verify

__all__ = ["ConvertResult", "VerifyReport", "convert", "load_unet", "verify"]
