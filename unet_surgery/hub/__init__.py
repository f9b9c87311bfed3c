"""Where teachers come from: a folder, a built-in name, or the Hugging Face Hub."""

from unet_surgery.hub.resolve import ResolvedTeacher, cache_folder, resolve_teacher

__all__ = ["ResolvedTeacher", "cache_folder", "resolve_teacher"]
