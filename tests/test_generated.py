"""A generated folder's own bookkeeping, without a model: who begins, who finishes, who drew, whatever comes between."""

from __future__ import annotations

import errno
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from teachers import entries, folder_bytes

from unet_surgery.checkpoint import disk
from unet_surgery.errors import OutputError
from unet_surgery.sample import generated
from unet_surgery.sample.generated import GeneratedFolder, read_generation

CAPTIONS = ("a", "b", "c", "d")
FACTS: dict[str, Any] = {"batch": 2, "device": "cpu", "versions": {"torch": "1"}}


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


PNG = png()


def folder_at(root: Path) -> GeneratedFolder:
    return GeneratedFolder(root, CAPTIONS, (4, 4), {"seed": 0})


def work(root: Path, facts: dict[str, Any] = FACTS) -> bool:
    """What one process does: nothing where all is there."""
    folder = folder_at(root)
    folder.begin()
    with folder.part(0, os.getpid()):
        if missing := folder.missing():
            folder.drawn_by(facts)
        for index in missing:
            folder.write(index, PNG)
    return folder.finish({"images": len(CAPTIONS)})


def in_processes(count: int, run: Callable[[int], None]) -> None:
    children = []
    for number in range(count):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                run(number)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * count


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_many_processes_over_a_finished_folder(tmp_path: Path) -> None:
    """None finds anything of another's half there, and nothing is written."""
    root = tmp_path / "out"
    assert work(root)
    before = folder_bytes(root)

    def again(_: int) -> None:
        for _ in range(100):
            assert not work(root)

    in_processes(4, again)
    assert folder_bytes(root) == before


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_many_processes_that_begin_while_others_finish(tmp_path: Path) -> None:
    """Each has a picture of its own that is lost again and again, so the folder is begun and finished all the time."""
    root = tmp_path / "out"
    work(root)

    def again(number: int) -> None:
        folder, dice = folder_at(root), random.Random(number)
        for _ in range(25):
            folder.path(number).unlink()
            folder.begin()
            with folder.part(number, len(CAPTIONS)):
                folder.drawn_by(FACTS | {"batch": dice.choice([2, 3])})
                folder.write(number, PNG)
            if not folder.missing():
                folder.finish({})

    in_processes(len(CAPTIONS), again)
    work(root)
    assert not folder_at(root).missing()
    assert {one["batch"] for one in read_generation(root)["drawn_by"]} <= {2, 3}
    assert entries(root) == ["00000.png", "00001.png", "00002.png", "00003.png", "generation.json", "metadata.csv"]


def test_settings_that_another_process_removes_just_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between writing and reading them: they are no damage, and are looked for again."""
    read, lost = generated.read_object, []

    def once(path: Path) -> dict[str, Any]:
        if not lost:
            lost.append(path)
            path.unlink()
        return read(path)

    monkeypatch.setattr(generated, "read_object", once)
    assert work(tmp_path / "out")
    assert lost


def test_a_process_that_begins_while_another_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something new in ``.unfinished`` after it was emptied: removed as well, and no error."""
    remove, refused = disk.remove_tree, []

    def once(path: Path) -> None:
        if not refused:
            refused.append(path)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        remove(path)

    monkeypatch.setattr(disk, "remove_tree", once)
    assert work(tmp_path / "out")
    assert refused
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_the_facts_of_all_who_drew(tmp_path: Path) -> None:
    root = tmp_path / "out"
    folder = folder_at(root)
    folder.begin()
    for batch in (2, 3, 2):
        folder.drawn_by(FACTS | {"batch": batch})
    assert work(root)
    said = read_generation(root)
    assert sorted(one["batch"] for one in said["drawn_by"]) == [2, 3]
    assert (said["batch"], said["device"], said["versions"]) == (None, "cpu", {"torch": "1"})
    folder.path(1).unlink()
    assert not work(root, FACTS | {"batch": 2, "device": "cuda"})  # what was finished is added to
    said = read_generation(root)
    assert (len(said["drawn_by"]), said["batch"], said["device"]) == (3, None, None)
    assert said["images"] == len(CAPTIONS)


def test_a_folder_finished_before_facts_were_kept(tmp_path: Path) -> None:
    """What it says of the one that finished it stays, beside what is new."""
    root = tmp_path / "out"
    work(root)
    path = root / "generation.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "drawn_by"}
    path.write_text(json.dumps(old))
    folder_at(root).path(0).unlink()
    work(root, FACTS | {"device": "cuda"})
    said = read_generation(root)
    assert [one["device"] for one in said["drawn_by"]] == ["cpu", "cuda"]
    assert (said["device"], said["batch"]) == (None, 2)


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    root = tmp_path / "out"
    work(root)
    (root / "generation.json").write_text("[")
    with pytest.raises(OutputError, match="JSON") as caught:
        folder_at(root).begin()
    assert caught.value.where == str(root / "generation.json")
    assert not (root / ".unfinished").exists()
    other = folder_at(tmp_path / "other")
    other.begin()
    (tmp_path / "other" / ".unfinished" / "settings.json").write_text("[")
    with pytest.raises(OutputError, match="settings of this unfinished folder are damaged"):
        other.begin()
