"""From a resolved teacher to a described one: its config, and its weights ready to be opened."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.ldm.teacher import GivenConfig, open_single_file
from unet_surgery.checkpoint.reader import Weights
from unet_surgery.checkpoint.sizes import parse_size
from unet_surgery.checkpoint.teacher import MAX_CONFIG_BYTES, TeacherFolder, is_hub_id, open_teacher
from unet_surgery.errors import TeacherError, UsageError, printable
from unet_surgery.hub.resolve import ResolvedTeacher, resolve_teacher
from unet_surgery.hub.transport import NoRangesError

__all__ = ["open_resolved", "opened_header"]

log = logging.getLogger(__name__)


def open_resolved(
    found: ResolvedTeacher,
    teacher_id: str | None = None,
    *,
    config_only: bool = False,
    max_header: str | int = MAX_HEADER_BYTES,
    config: str | Path | None = None,
    offered: TeacherFolder | None = None,
) -> TeacherFolder:
    """Describe the teacher; a single file by ``config``, else by that of ``offered`` if it is of the same shapes."""
    if teacher_id is not None and not is_hub_id(teacher_id):
        raise UsageError("the teacher's id is not a Hub id", expected="org/name", found=printable(teacher_id))
    if config is not None and found.file is None:
        raise UsageError("the teacher has a config.json of its own", hint="leave --config out: it is for single files")
    try:
        if found.file is not None:
            return open_single_file(
                found.file,
                variant=found.variant,
                config=_given_config(config, offered),
                weights=found.remote,
                cards=None if found.hub is None else found.folder,
                teacher_id=teacher_id or found.teacher_id,
                max_header_bytes=parse_size(max_header),
                commit=found.commit,
                address=found.address,
            )
        return open_teacher(
            found.folder,
            variant=found.variant,
            config_only=config_only or found.hub is not None,  # the cache may hold weights that are not meant
            teacher_id=teacher_id or found.teacher_id,
            max_header_bytes=parse_size(max_header),
            weights=found.remote or found.local,
            commit=found.commit,
            address=found.address,
        )
    except OSError as error:
        raise TeacherError(
            "the teacher cannot be read", where=str(error.filename or found.folder), found=error.strerror
        ) from error


def _given_config(config: str | Path | None, offered: TeacherFolder | None) -> GivenConfig | None:
    if config is None:
        return None if offered is None else GivenConfig(offered.config, offered.name, str(offered.unet), offered=True)
    path = Path(config)
    if path.suffix == ".json" and path.is_file():
        return GivenConfig(read_object(path, MAX_CONFIG_BYTES), path.name, str(path))
    found = resolve_teacher(str(config))
    if found.file is not None:
        raise UsageError(
            "a single file has no config", where=str(config), expected="a config.json, or a model's folder or id"
        )
    model = open_resolved(found, config_only=True)
    return GivenConfig(model.config, model.name, str(model.unet / "config.json"))


@contextmanager
def opened_header(teacher: TeacherFolder) -> Iterator[Weights | None]:
    """Open the weights to read their header; None where there are none, or a server would only send them whole."""
    if teacher.weights is None:
        yield None
        return
    try:
        weights = teacher.open_weights()
    except NoRangesError:
        log.info("the Hub sends whole files only: planning by the config alone")
        yield None
        return
    with weights:
        yield weights
