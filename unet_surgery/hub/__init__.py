"""Where teachers come from (a folder, a built-in name, the Hugging Face Hub), and where students go."""

from unet_surgery.hub.cache import cache_folder
from unet_surgery.hub.resolve import (
    ResolvedTeacher,
    Transfer,
    check_teacher_name,
    fetch_teacher,
    local_path,
    resolve_teacher,
)

__all__ = [
    "ResolvedTeacher",
    "Transfer",
    "cache_folder",
    "check_teacher_name",
    "fetch_teacher",
    "local_path",
    "resolve_teacher",
]
