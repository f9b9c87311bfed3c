"""Where teachers come from (a folder, a built-in name, the Hugging Face Hub), and where students go."""

from unet_surgery.hub.resolve import ResolvedTeacher, cache_folder, resolve_teacher

__all__ = ["ResolvedTeacher", "cache_folder", "resolve_teacher"]
