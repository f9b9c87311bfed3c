"""Sparse copies of files of the Hub: what is said to be there is there, whatever happened to the files meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_surgery.hub.partial import PartialFile, Range, merged, total_bytes

CONTENT = bytes(range(256)) * 40
SIZE = len(CONTENT)
RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: Range(min(pair), max(pair))))


def put(partial: PartialFile, begin: int, end: int) -> None:
    partial.write(begin, CONTENT[begin:end])
    partial.record(begin, end, zlib.crc32(CONTENT[begin:end]))


def open_copy(folder: Path, identity: str = "a") -> PartialFile:
    return PartialFile(folder / "weights.safetensors", identity, SIZE)


@given(RANGES, st.integers(0, 30))
def test_merged_ranges_hold_the_same_bytes_and_a_few_to_spare(ranges: list[Range], spare: int) -> None:
    wanted = {i for begin, end in ranges for i in range(begin, end)}
    result = merged(ranges, spare=spare)
    found = [i for begin, end in result for i in range(begin, end)]
    assert found == sorted(set(found))
    assert wanted <= set(found)
    assert len(found) <= len(wanted) + spare
    assert all(a.end < b.begin for a, b in pairwise(result))
    assert total_bytes(merged(ranges)) == len(wanted)


def test_what_was_recorded_is_there_the_next_time(tmp_path: Path) -> None:
    with open_copy(tmp_path) as partial:
        assert partial.missing([(0, SIZE)]) == [(0, SIZE)]
        put(partial, 100, 200)
        put(partial, 300, 400)
    with open_copy(tmp_path) as partial:
        assert partial.missing([(50, 350)]) == [(50, 100), (200, 300)]
        assert partial.missing([(120, 180), (310, 400)]) == []
        assert partial.read(300, 400) == CONTENT[300:400]
    assert (tmp_path / "weights.safetensors").stat().st_size == SIZE


def test_bytes_that_were_written_but_not_recorded_are_not_there(tmp_path: Path) -> None:
    with open_copy(tmp_path) as partial:
        partial.write(0, CONTENT[:100])
    with open_copy(tmp_path) as partial:
        assert partial.missing([(0, 100)]) == [(0, 100)]


def test_another_file_starts_anew(tmp_path: Path) -> None:
    with open_copy(tmp_path) as partial:
        put(partial, 0, 100)
    with open_copy(tmp_path, "b") as partial:
        assert partial.missing([(0, 100)]) == [(0, 100)]
        assert partial.read(0, 100) == bytes(100)


@pytest.mark.parametrize("lost", [1, 4, 9], ids=lambda n: f"{n} bytes lost")
def test_a_torn_last_line_is_no_line(tmp_path: Path, lost: int) -> None:
    with open_copy(tmp_path) as partial:
        put(partial, 0, 100)
        put(partial, 100, 200)
    journal = tmp_path / "weights.safetensors.parts"
    os.truncate(journal, journal.stat().st_size - lost)
    with open_copy(tmp_path) as partial:
        assert partial.missing([(0, 200)]) == [(100, 200)]
        put(partial, 100, 200)
    with open_copy(tmp_path) as partial:
        assert partial.missing([(0, 200)]) == []


@pytest.mark.parametrize("line", [b"x y z\n", b"5\n", b"9 3 1\n", b"0 99999999 1\n", b"-5 10 1\n", b"\xff\n"])
def test_a_line_that_means_nothing_is_passed_over(tmp_path: Path, line: bytes) -> None:
    with open_copy(tmp_path) as partial:
        put(partial, 0, 100)
    with (tmp_path / "weights.safetensors.parts").open("ab") as journal:
        journal.write(line)
    with open_copy(tmp_path) as partial:
        assert partial.missing([(0, 200)]) == [(100, 200)]


def test_a_flipped_byte_is_fetched_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_copy(tmp_path) as partial:
        put(partial, 0, 100)
        put(partial, 100, 200)
    path = tmp_path / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[150] ^= 1
    path.write_bytes(data)
    with open_copy(tmp_path) as partial:
        assert partial.missing([(0, 100)]) == []
        assert not caplog.records
        assert partial.missing([(0, 200)]) == [(100, 200)]
    assert "damaged" in caplog.text


def test_a_copy_cut_short_starts_anew(tmp_path: Path) -> None:
    with open_copy(tmp_path) as partial:
        put(partial, 0, 100)
    os.truncate(tmp_path / "weights.safetensors", SIZE - 1)
    with open_copy(tmp_path) as partial:
        assert partial.missing([(0, 100)]) == [(0, 100)]


def test_a_second_process_waits(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from unet_surgery.hub.partial import PartialFile\n"
        f"with PartialFile(Path(sys.argv[1]), 'a', {SIZE}) as partial: print(partial.missing([(0, 100)]))"
    )
    with open_copy(tmp_path) as partial:
        command = [sys.executable, "-c", code, str(tmp_path / "weights.safetensors")]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.0)
        put(partial, 0, 100)
    assert other.communicate(timeout=20)[0] == "[]\n"


def test_as_it_is(tmp_path: Path) -> None:
    with open_copy(tmp_path) as partial:
        put(partial, 0, 100)
    with PartialFile.as_it_is(tmp_path / "weights.safetensors") as partial:
        assert partial.size == SIZE
        assert partial.missing([(0, 101)]) == [(100, 101)]
    with pytest.raises(OSError, match="parts"):
        PartialFile.as_it_is(tmp_path / "nothing")
