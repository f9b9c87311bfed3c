"""A teacher in a repository of the Hub: which of its files are needed for what, and how they come here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unet_surgery.checkpoint.components import INDEX, component_names
from unet_surgery.checkpoint.layout import WeightsChoice, choose_weights, component_files, shard_files
from unet_surgery.checkpoint.licence import CARD, is_licence_file
from unet_surgery.checkpoint.teacher import LocalWeights
from unet_surgery.errors import HubError, TeacherError, first_few, printable
from unet_surgery.hub.download import cached_file, download, missing_bytes
from unet_surgery.hub.partial import JOURNAL, PartialFile
from unet_surgery.hub.remote import RemoteWeights
from unet_surgery.hub.repository import Repository, look_up

__all__ = ["HubTeacher", "find_hub_teacher"]

log = logging.getLogger(__name__)

SINGLE_FILE = ".safetensors"


@dataclass(frozen=True, slots=True)
class HubTeacher:
    """A pipeline or a U-Net in the folder ``inside`` ("" or ending in a slash) of a repository, or a ``file`` there.

    ``unet`` is the U-Net's folder there, in the same form. ``names`` are all files of the repository, or, without a
    network, those that the caches hold.
    """

    repository: Repository
    inside: str
    unet: str
    names: Sequence[str] = field(repr=False)
    asked_variant: str | None
    file: str | None = None

    @property
    def path(self) -> Path | None:
        """The single file in the Hub cache; None if this is a folder, or the cache has not all of it."""
        return None if self.file is None else cached_file(self.repository, f"{self.inside}{self.file}")

    def configs(self) -> Path:
        """Fetch what a plan needs besides the weights' header, and return the teacher's folder in the cache.

        Raises:
            HubError, OutputError: as :func:`unet_surgery.hub.download.download`.
        """
        wanted = [INDEX, f"{self.unet}config.json"] if self.file is None else self._cards()
        names = [f"{self.inside}{name}" for name in wanted if f"{self.inside}{name}" in self.names]
        folder = download(self.repository, names) if names else self.repository.folder
        return folder / self.inside

    def part_configs(self) -> None:
        """Fetch the configs of a pipeline's other parts into the folder that :meth:`configs` returns, no weights.

        Raises:
            HubError, OutputError: as :func:`unet_surgery.hub.download.download`.
        """
        ends = ("/config.json", "/scheduler_config.json")
        there = [n for n in self.names if n.startswith(self.inside) and n.endswith(ends)]
        wanted = [n for n in there if n.removeprefix(self.inside).count("/") == 1]
        if self.file is None and f"{self.inside}{INDEX}" in self.names and wanted:
            download(self.repository, wanted)

    def own_file(self, name: str) -> Path | None:
        """Fetch a file that stands in the model's own folder, and return where it is; None if there is none.

        Raises:
            HubError, OutputError: as :func:`unet_surgery.hub.download.download`.
        """
        path = f"{self.inside}{name}"
        return download(self.repository, [path]) / path if path in self.names else None

    def cached(self) -> LocalWeights | None:
        """Return the U-Net's weights that the repository's listing means, if the Hub cache has them whole."""
        choice = self._choice()
        paths = [] if choice is None else [cached_file(self.repository, name) for name in self._weights(choice)]
        if choice is None or not paths or None in paths:
            return None
        assert paths[0] is not None
        return LocalWeights(paths[0].parent, choice)

    def remote(self) -> RemoteWeights | None:
        """Return the U-Net's weights as they lie on the Hub; None if there are none, or the cache has them whole."""
        choice = self._choice()
        if choice is None or self.cached() is not None:
            return None
        if choice.variant != self.asked_variant:
            log.info("the only weights there are of variant %s: taking these", choice.variant)
        shards = shard_files(self._unet_names(), choice) or [choice.file]
        return RemoteWeights(self.repository, f"{self.inside}{self.unet}", choice, tuple(shards))

    def fetch(self, *, unet_only: bool, weights: bool) -> int:
        """Fetch the pipeline's other parts (not if ``unet_only``), and the U-Net's ``weights`` whole.

        Returns the number of bytes that were not there yet.

        Raises:
            HubError, OutputError: as :func:`unet_surgery.hub.download.download`.
            TeacherError: the repository holds no U-Net with safetensors weights.
        """
        names = [f"{self.inside}{name}" for name in self._cards()]
        if self.file is None and f"{self.inside}{INDEX}" in self.names and not unet_only:
            for part in component_names(self.configs()):
                files = component_files(self._inside(f"{part}/"), self.asked_variant)
                names += [f"{self.inside}{part}/{name}" for name in files]
        if weights:
            names += self._weights(self._choose())
        num_bytes = missing_bytes(self.repository, names)
        if names:
            download(self.repository, names)
        return num_bytes

    def _choice(self) -> WeightsChoice | None:
        try:
            return self._choose()
        except (TeacherError, HubError):  # a plan needs none
            return None

    def _cards(self) -> list[str]:
        return [name for name in self._inside("") if name == CARD or is_licence_file(name)]

    def _choose(self) -> WeightsChoice:
        """Without the Hub's listing, nothing may stand in for the weights that were asked for."""
        if self.file is not None:
            return WeightsChoice(self.file, sharded=False, variant=None)
        offline = self.repository.files is None
        try:
            return choose_weights(self._unet_names(), self.asked_variant, where=self._shown, exact=offline)
        except TeacherError as error:
            if not offline:
                raise
            raise HubError(
                "the Hugging Face Hub cannot be reached, and its cache lacks these weights",
                where=self._shown,
                expected=f"variant {self.asked_variant}" if self.asked_variant else "the plain weights",
                found=error.found,
                hint="try again with a network, or name the variant that is cached",
            ) from error

    def _weights(self, choice: WeightsChoice) -> list[str]:
        files = [choice.file, *shard_files(self._unet_names(), choice)]
        return [f"{self.inside}{self.unet}{name}" for name in files]

    def _unet_names(self) -> list[str]:
        return self._inside(self.unet)

    def _inside(self, folder: str) -> list[str]:
        """Return the names of the files that stand directly in a folder of the teacher's."""
        start = f"{self.inside}{folder}"
        return [
            name.removeprefix(start) for name in self.names if name.startswith(start) and "/" not in name[len(start) :]
        ]

    @property
    def _shown(self) -> str:
        return f"{self.repository.id}/{self.inside}{self.unet}".rstrip("/")


def find_hub_teacher(repository: str, inside: str, revision: str | None, variant: str | None) -> HubTeacher:
    """Find the teacher in the folder ``inside`` ("" for the top) of a repository; asks the Hub once.

    Raises:
        HubError: the Hub refuses, or cannot be reached and the caches do not hold it.
        TeacherError: there is no U-Net there.
    """
    found = look_up(repository, revision)
    names = list(found.files) if found.files is not None else _cached_names(found)
    if found.files is None:
        log.warning("the Hub cannot be reached; using the cached copy of %s", repository)
    if inside.endswith(SINGLE_FILE):
        return _single_file(found, inside, names, variant)
    start = f"{inside}/" if inside else ""
    is_pipeline = f"{start}{INDEX}" in names
    unet = "unet/" if is_pipeline or f"{start}unet/config.json" in names else ""
    if f"{start}{unet}config.json" not in names:
        files = [name for name in names if name.startswith(start) and name.endswith(SINGLE_FILE)]
        raise TeacherError(
            "the repository holds no U-Net",
            where=f"{repository}/{inside}" if inside else repository,
            expected="unet/config.json or config.json",
            found=first_few(sorted(names)) or "an empty repository",
            hint=_where_else(repository, names, files),
        )
    return HubTeacher(found, start, unet, names, variant)


def _where_else(repository: str, names: Sequence[str], files: Sequence[str]) -> str | None:
    """Return where in a repository a teacher may be: a folder with a pipeline or a U-Net, else a single file."""
    ends = (f"/{INDEX}", "/unet/config.json")
    folders = [name.removesuffix(end) for end in ends for name in names if name.endswith(end)]
    if folders:
        return f"for the folder: {repository}/{printable(folders[0])}"
    return f"for a single file: {repository}/{printable(files[0])}" if files else None


def _single_file(repository: Repository, path: str, names: Sequence[str], variant: str | None) -> HubTeacher:
    if path not in names:
        files = sorted(name for name in names if name.endswith(SINGLE_FILE))
        raise TeacherError(
            "the repository holds no such file",
            where=f"{repository.id}/{path}",
            found=first_few(files) or f"no {SINGLE_FILE} files",
        )
    folder, slash, name = path.rpartition("/")
    return HubTeacher(repository, folder + slash, "", names, variant, file=name)


def _cached_names(repository: Repository) -> list[str]:
    """Return the files that the Hub cache or this package's own holds of a commit."""
    snapshot = repository.snapshot
    whole = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    copies = [path.with_name(path.name.removesuffix(JOURNAL)) for path in repository.folder.rglob(f"*{JOURNAL}")]
    parts = {path.relative_to(repository.folder).as_posix() for path in copies if _is_copy(path)}
    return sorted(whole | parts)


def _is_copy(path: Path) -> bool:
    try:
        PartialFile.as_it_is(path)
    except (OSError, ValueError):
        return False
    return True
