"""The latent cache: what it holds, how it is made by many or after a kill, and what it refuses."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from teachers import entries, folder_bytes

import unet_surgery
from unet_surgery.data import cache as caching
from unet_surgery.data import cachefolder, shards
from unet_surgery.data.cache import make_cache
from unet_surgery.data.cacheplan import CacheSettings, Part, shard_ranges
from unet_surgery.data.encode import as_pixels, encode_moments, in_half
from unet_surgery.data.images import PictureSet
from unet_surgery.data.latents import LatentCache, check_cache
from unet_surgery.data.memory import encode_all
from unet_surgery.data.pictures import decode_picture
from unet_surgery.data.sources import open_source
from unet_surgery.errors import DataError, OutputBusyError, OutputError, TeacherError, UsageError
from unet_surgery.runtime.parts import Parts, load_parts, tokenize

COUNT, SIDE = 40, 16
BAD = {3: (b"", "empty"), 17: (b"<html>", "html")}
OPTIONS: dict[str, Any] = {"resolution": SIDE, "batch": 4, "shard_samples": 12, "max_bad": 0.1, "device": "cpu"}
SHARDS = [f"data-{i:05d}-of-00004.arrow" for i in range(4)]


def picture(number: int, side: int = 20) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def write_pictures(root: Path, bad: dict[int, tuple[bytes, str]], count: int = COUNT) -> Path:
    root.mkdir()
    with open(root / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for number in range(count):
            (root / f"{number:03d}.png").write_bytes(bad[number][0] if number in bad else picture(number))
            rows.writerow([f"{number:03d}.png", f"picture number {number}"])
    return root


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The kernels that a CPU uses, and so the last bits, depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(unet_surgery.__file__).parents[1]))
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set", BAD)


@pytest.fixture(scope="module")
def parts(tiny: Path) -> Parts:
    return load_parts(tiny)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that one process made without a fault."""
    out = tmp_path_factory.mktemp("cache") / "latents"
    result = make_cache(pictures, "tiny-random", out, **OPTIONS)
    assert result.finished
    assert (result.num_samples, result.num_encoded, result.num_shards) == (COUNT - 2, COUNT - 2, 4)
    return out


@pytest.fixture
def same_parts(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the same pipeline again and again is what takes time in these tests."""
    monkeypatch.setattr(shards, "load_parts", lambda folder, **options: parts)


def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# --- what it holds --------------------------------------------------------------------------------------------------


def test_it_holds_the_moments_of_every_good_picture(whole: Path, pictures: Path, parts: Parts) -> None:
    """Compared with diffusers' own posterior of each picture alone: the batch makes no difference beyond rounding."""
    latents = LatentCache(whole, parts)
    source = open_source(pictures)
    good = [number for number in range(COUNT) if number not in BAD]
    assert len(latents) == len(good)
    moments, ids = latents.batch(range(len(good)))
    assert moments.dtype == torch.float16
    assert ids.dtype == torch.int64
    for place, number in enumerate(good):
        pixels = as_pixels(decode_picture(source.read(number).image, SIDE)[None])
        posterior = parts.vae.encode(pixels).latent_dist
        expected = torch.cat([posterior.mean, posterior.std], 1)[0]
        torch.testing.assert_close(moments[place].float(), expected, rtol=1e-3, atol=1e-3)
        assert latents.caption(place) == f"picture number {number}"
        assert latents.id(place) == f"{number:03d}.png"
        assert torch.equal(ids[place], tokenize(parts.tokenizer, [f"picture number {number}"])[0])
    assert torch.equal(latents.empty_ids(), tokenize(parts.tokenizer, [""])[0])
    assert latents.facts.settings.scaling_factor == parts.vae.config.scaling_factor


def test_the_batch_changes_rounding_only(pictures: Path, whole: Path, tmp_path: Path, same_parts: None) -> None:
    make_cache(pictures, "tiny-random", tmp_path / "out", **{**OPTIONS, "batch": 9})
    ours, theirs = LatentCache(tmp_path / "out"), LatentCache(whole)
    a, b = ours.batch(range(len(ours)))[0].float(), theirs.batch(range(len(theirs)))[0].float()
    torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)


def test_datasets_opens_it(whole: Path) -> None:
    """The oracle: the library whose format it is."""
    import datasets

    theirs = datasets.load_from_disk(str(whole)).with_format("arrow")
    ours = LatentCache(whole)
    assert theirs.column_names == ["moments", "ids", "caption", "id"]
    table = theirs[:]
    moments, ids = ours.batch(range(len(ours)))
    values = table["moments"].combine_chunks().values.to_numpy()
    assert (values.reshape(-1, 8, 8, 8) == moments.numpy()).all()
    assert (np.array(table["ids"].to_pylist()) == ids.numpy()).all()
    assert table["caption"].to_pylist() == [ours.caption(i) for i in range(len(ours))]
    row = datasets.load_from_disk(str(whole))[5]
    assert row["id"] == ours.id(5)
    assert len(row["moments"]) == 8 * 8 * 8


def test_it_says_what_it_is(whole: Path, tiny: Path) -> None:
    assert entries(whole) == ["cache.json", *SHARDS, "dataset_info.json", "quarantine.jsonl", "state.json"]
    facts = json.loads((whole / "cache.json").read_text())
    assert facts["count"] == COUNT - len(BAD)
    assert facts["bad"] == {"empty": 1, "html": 1}
    assert facts["examples"] == {"empty": ["003.png"], "html": ["017.png"]}
    assert facts["teacher"] == {"name": "tiny-random", "commit": None}
    assert facts["settings"]["moments_shape"] == [8, 8, 8]
    for name, shard in facts["shards"].items():
        data = (whole / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard["sha256"], shard["num_bytes"])
    lines = [json.loads(line) for line in (whole / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [("003.png", "empty"), ("017.png", "html")]
    everything = b"".join(folder_bytes(whole).values())
    assert str(tiny.parent).encode() not in everything  # nothing of this machine


def test_flipped_pictures_are_encoded_too(pictures: Path, tmp_path: Path, parts: Parts, same_parts: None) -> None:
    """A flipped latent is not the latent of the flipped picture."""
    make_cache(pictures, "tiny-random", tmp_path / "out", **{**OPTIONS, "max_bad": 0.2}, flip=True, limit=8)
    latents = LatentCache(tmp_path / "out")
    count = len(latents) // 2
    assert count == 7
    plain, ids = latents.batch(range(count))
    flipped, same_ids = latents.batch(range(count, 2 * count))
    assert torch.equal(ids, same_ids)
    assert latents.caption(count + 2) == latents.caption(2)
    first = decode_picture(picture(0), SIDE)[:, ::-1].copy()
    expected = encode_moments(parts.vae, as_pixels(first[None]))[0]
    torch.testing.assert_close(flipped[0].float(), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain.flip(-1), flipped, atol=0.01)


def test_batches_are_pure_safe_in_threads_and_quick(whole: Path) -> None:
    latents = LatentCache(whole)
    everything, _ = latents.batch(range(len(latents)))
    draws = [np.random.default_rng(i).integers(0, len(latents), 64).tolist() for i in range(50)]
    with ThreadPoolExecutor(4) as pool:
        for indices, (moments, _) in zip(draws, pool.map(latents.batch, draws), strict=True):
            assert torch.equal(moments, everything[indices])
    begin = time.perf_counter()
    for indices in draws:
        latents.batch(indices)
    assert (time.perf_counter() - begin) / len(draws) < 0.005
    for wrong in (-1, len(latents)):
        with pytest.raises(IndexError):
            latents.batch([wrong])


def test_what_half_precision_cannot_hold_is_left_out() -> None:
    moments = torch.ones(4, 2, 2, 2)
    moments[1, 0, 0, 0], moments[2, 1, 1, 1], moments[3, 0, 0, 0] = 65520.0, float("nan"), 65504.0
    halves, fine = in_half(moments)
    assert fine.tolist() == [True, False, False, True]
    assert halves[3, 0, 0, 0] == 65504.0


def test_an_overflow_is_counted(
    pictures: Path, tmp_path: Path, same_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shards.encode_moments

    def overflowing(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        moments = real(vae, pixels)
        moments[0] *= 1e6
        return moments

    monkeypatch.setattr(shards, "encode_moments", overflowing)
    result = make_cache(pictures, "tiny-random", tmp_path / "out", **{**OPTIONS, "max_bad": 0.5})
    assert result.bad == {"empty": 1, "html": 1, "latent-overflow": 10}
    assert torch.isfinite(LatentCache(tmp_path / "out").batch(range(28))[0]).all()


# --- how it is made -------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(pictures: Path, whole: Path, same_parts: None) -> None:
    before = folder_bytes(whole)
    result = make_cache(pictures, "tiny-random", whole, **OPTIONS)
    assert (result.finished, result.num_encoded, result.num_samples) == (True, 0, COUNT - 2)
    assert folder_bytes(whole) == before


@pytest.mark.parametrize("count", [2, 7])
def test_parts_make_the_same_cache(pictures: Path, whole: Path, tmp_path: Path, same_parts: None, count: int) -> None:
    """As on several machines, in any order; the last completes it."""
    order = list(range(count))[::-1]
    for index in order:
        result = make_cache(pictures, "tiny-random", tmp_path / "out", **OPTIONS, part=(index, count))
        assert result.finished == (index == 0)
        if not result.finished:
            with pytest.raises(DataError, match="not finished"):
                LatentCache(tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(whole)


def test_parts_are_a_partition() -> None:
    for count in (1, 2, 5):
        for workers in (1, 3):
            parts = [Part(i, count).split(w, workers) for i in range(count) for w in range(workers)]
            assert sorted(s for part in parts for s in part.shards(17)) == list(range(17))
    assert [list(r) for r in shard_ranges(5, 2)] == [[0, 1], [2, 3], [4]]


def killed_after(moment: str, pictures: str, out: str, count: int) -> None:
    """Make a cache in this process, which kills itself in the middle."""
    calls = 0
    module: Any = shards if moment == "in a shard" else caching
    name = "encode_moments" if moment == "in a shard" else "finish_cache" if moment == "at the end" else "finish_shard"
    real: Callable[..., Any] = getattr(module, name)

    def last(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(module, name, last)
    make_cache(pictures, "tiny-random", out, **OPTIONS)


@pytest.mark.parametrize(("moment", "count"), [("in a shard", 5), ("after a shard", 3), ("at the end", 1)])
def test_a_killed_run_is_gone_on_with(
    pictures: Path, whole: Path, tmp_path: Path, same_parts: None, moment: str, count: int
) -> None:
    """SIGKILL: the finished shards are not made again, and all bytes are those of a run that nobody disturbed."""
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=killed_after, args=(moment, str(pictures), str(out), count))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "cache.json").exists()
    with pytest.raises(DataError, match=r"not finished[\s\S]*the same unet-surgery cache command again"):
        LatentCache(out)
    shards_before = {
        name: os.stat(out / name).st_mtime_ns for name in SHARDS if (out / f".unfinished/{name}.json").exists()
    }
    assert len(shards_before) == {"in a shard": 1, "after a shard": 2, "at the end": 4}[moment]
    result = make_cache(pictures, "tiny-random", out, **OPTIONS)
    assert result.finished
    assert {name: os.stat(out / name).st_mtime_ns for name in shards_before} == shards_before
    assert folder_bytes(out) == folder_bytes(whole)


def test_a_finished_cache_whose_last_step_was_cut_off(
    pictures: Path, whole: Path, tmp_path: Path, same_parts: None
) -> None:
    out = damaged(whole, tmp_path)
    (out / ".unfinished").mkdir()
    assert make_cache(pictures, "tiny-random", out, **OPTIONS).num_encoded == 0
    assert folder_bytes(out) == folder_bytes(whole)


def test_an_error_leaves_what_is_finished(
    pictures: Path, whole: Path, tmp_path: Path, same_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = shards.encode_moments, 0

    def failing(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(28, "No space left on device")
        return real(vae, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "encode_moments", failing)
        with pytest.raises(OutputError, match="what is finished stays"):
            make_cache(pictures, "tiny-random", tmp_path / "out", **OPTIONS)
    assert entries(tmp_path / "out") == [".unfinished", SHARDS[0]]  # no half-written shard
    make_cache(pictures, "tiny-random", tmp_path / "out", **OPTIONS)
    assert folder_bytes(tmp_path / "out") == folder_bytes(whole)


def test_the_same_part_twice_at_once(
    pictures: Path, tmp_path: Path, same_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    real = shards.encode_moments

    def waiting(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        writing.set()
        assert go_on.wait(30)
        return real(vae, pixels)

    monkeypatch.setattr(shards, "encode_moments", waiting)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(make_cache, pictures, "tiny-random", tmp_path / "out", **OPTIONS)
        assert writing.wait(30)
        with pytest.raises(OutputBusyError, match="another process is writing this part"):
            make_cache(pictures, "tiny-random", tmp_path / "out", **OPTIONS)
        go_on.set()
        assert first.result().finished


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"resolution": 32}, "resolution 16"),
        ({"flip": True}, "flip False"),
        ({"shard_samples": 13}, "shard_samples 12"),
        ({"limit": 30}, "num_samples 40"),
        ({"dtype": "bf16"}, "dtype fp32"),
        ({"caption_column": "file_name"}, "caption_column text"),
    ],
)
def test_other_settings_are_refused_by_key(
    pictures: Path, whole: Path, same_parts: None, changed: dict[str, Any], key: str
) -> None:
    before = folder_bytes(whole)
    with pytest.raises(OutputError, match=f"other settings\n.*\n.*expected: .*{key}"):
        make_cache(pictures, "tiny-random", whole, **{**OPTIONS, **changed})
    assert folder_bytes(whole) == before


def test_a_changed_source_is_refused(whole: Path, tmp_path: Path, same_parts: None) -> None:
    other = write_pictures(tmp_path / "set", {})
    with pytest.raises(OutputError, match="expected: *source "):
        make_cache(other, "tiny-random", whole, **OPTIONS)


def test_too_many_bad_samples_stop_it_early(tmp_path: Path, same_parts: None) -> None:
    """As soon as it is certain, not at the end; and it can be allowed."""
    folder = write_pictures(tmp_path / "set", dict.fromkeys(range(0, 40, 2), (b"", "empty")))
    with pytest.raises(DataError, match=r"at most 5.00% of 40\n.*3 so far: 3 empty\n.*--max-bad"):
        make_cache(folder, "tiny-random", tmp_path / "out", **{**OPTIONS, "max_bad": 0.05})
    with pytest.raises(DataError, match="7 so far"):  # 6 in the first shard, and the next
        make_cache(folder, "tiny-random", tmp_path / "out", **{**OPTIONS, "max_bad": 0.15})
    assert make_cache(folder, "tiny-random", tmp_path / "out", **{**OPTIONS, "max_bad": 0.5}).num_samples == 20


def test_shards_without_a_sample(tmp_path: Path, same_parts: None) -> None:
    import datasets

    folder = write_pictures(tmp_path / "set", dict.fromkeys(range(12, 24), (b"", "empty")))
    result = make_cache(folder, "tiny-random", tmp_path / "out", **{**OPTIONS, "max_bad": 0.5})
    assert (result.num_samples, len(LatentCache(tmp_path / "out"))) == (28, 28)
    assert SHARDS[1] not in entries(tmp_path / "out")
    assert len(datasets.load_from_disk(str(tmp_path / "out"))) == 28
    nothing = write_pictures(tmp_path / "nothing", dict.fromkeys(range(40), (b"", "empty")))
    with pytest.raises(DataError, match="no sample can be used"):
        make_cache(nothing, "tiny-random", tmp_path / "none", **{**OPTIONS, "max_bad": 1.0})


def test_the_resolution_is_the_models_unless_it_is_given(
    pictures: Path, tmp_path: Path, tiny: Path, same_parts: None, caplog: pytest.LogCaptureFixture
) -> None:
    """tiny-random's U-Net is made for 16 latents of 2 pixels."""
    caplog.set_level("INFO", logger="unet_surgery")
    options = {**OPTIONS, "max_bad": 0.2, "limit": 8}
    make_cache(pictures, "tiny-random", tmp_path / "given", **options)
    assert "resolution" not in caplog.text
    del options["resolution"]
    make_cache(pictures, "tiny-random", tmp_path / "own", **options)
    assert caplog.messages.count("resolution 32, the model's") == 1
    settings = LatentCache(tmp_path / "own").facts.settings
    assert (settings.resolution, settings.moments_shape) == (32, (8, 16, 16))
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((model / "unet/config.json").read_text())
    for size in (None, [16, 24], "16", 0):
        (model / "unet/config.json").write_text(json.dumps({**config, "sample_size": size}))
        with pytest.raises(UsageError, match="for which resolution") as caught:
            make_cache(pictures, model, tmp_path / "none", **options)
        assert "--resolution" in (caught.value.hint or "")
    shutil.rmtree(model / "unet")
    with pytest.raises(UsageError, match="no such file"):
        make_cache(pictures, model, tmp_path / "none", **options)
    with pytest.raises(TeacherError, match="U-Net alone"):
        make_cache(pictures, tiny / "unet", tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("resolution", "hint"), [(33, "32 or 34"), (1, "2 is the smallest"), (-5, "2 is the smallest")]
)
def test_a_resolution_that_does_not_fit_brings_those_that_do(
    pictures: Path, tmp_path: Path, same_parts: None, resolution: int, hint: str
) -> None:
    with pytest.raises(UsageError, match="does not fit the VAE") as caught:
        make_cache(pictures, "tiny-random", tmp_path / "out", **{**OPTIONS, "resolution": resolution})
    assert caught.value.hint == hint


def test_outputs_that_are_refused(pictures: Path, tmp_path: Path, same_parts: None, tiny: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "full", tmp_path / "no" / "such", pictures / "in", pictures.parent):
        with pytest.raises(OutputError):
            make_cache(pictures, "tiny-random", out, **OPTIONS)
    assert entries(tmp_path / "full") == ["mine"]
    for wrong in ({"dtype": "fp16"}, {"resolution": 15}, {"batch": 0}, {"part": (2, 2)}, {"device": "warp"}):
        with pytest.raises(UsageError):
            make_cache(pictures, "tiny-random", tmp_path / "out", **{**OPTIONS, **wrong})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", '{"resolution": 16', "[]", "{}"], ids=["empty", "cut", "a list", "no keys"])
def test_damaged_settings_are_not_taken_for_another_process(
    pictures: Path, tmp_path: Path, same_parts: None, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """Unless one holds the lock of that file: then it is waited for, and said to be busy."""
    monkeypatch.setattr(cachefolder, "BUSY_TRIES", 2)
    settings = tmp_path / "out" / cachefolder.UNFINISHED / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(content)
    with pytest.raises(OutputError, match="settings of this unfinished cache are damaged") as caught:
        make_cache(pictures, "tiny-random", tmp_path / "out", **OPTIONS)
    assert caught.value.where == str(settings)
    assert caught.value.found
    settings.unlink()
    with (settings.parent / ".settings.json.unet-surgery").open("w") as staged:
        fcntl.flock(staged, fcntl.LOCK_EX)
        with pytest.raises(OutputBusyError, match="another process"):
            make_cache(pictures, "tiny-random", tmp_path / "out", **OPTIONS)


# --- what it refuses ------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_check_finds_every_flipped_bit(whole: Path, tmp_path: Path) -> None:
    assert check_cache(whole).num_samples == COUNT - 2
    out = damaged(whole, tmp_path)
    flip_a_byte(out / SHARDS[1])
    (out / SHARDS[3]).unlink()
    with pytest.raises(DataError, match=f"2 of 4 shards[\\s\\S]*{SHARDS[1]}, {SHARDS[3]}"):
        check_cache(out)


@pytest.mark.parametrize("harm", ["truncated", "missing", "zeroed", "longer"])
def test_a_damaged_shard_is_named(whole: Path, tmp_path: Path, harm: str) -> None:
    path = damaged(whole, tmp_path) / SHARDS[2]
    size = path.stat().st_size
    if harm == "truncated":
        os.truncate(path, size - 1)
    elif harm == "missing":
        path.unlink()
    elif harm == "zeroed":
        path.write_bytes(bytes(size))
    else:
        path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=f"damaged\n.*{SHARDS[2]}"):
        LatentCache(path.parent)


@pytest.mark.parametrize("at", range(0, 1500, 37))
def test_a_damaged_header_is_refused_or_harmless(whole: Path, tmp_path: Path, at: int) -> None:
    """A bit flipped in Arrow's own structures never ends the process, nor leads out of the file."""
    path = damaged(whole, tmp_path) / SHARDS[0]
    data = bytearray(path.read_bytes())
    data[at] ^= 0x81
    path.write_bytes(data)
    try:
        latents = LatentCache(path.parent)
        latents.batch(range(len(latents)))
    except DataError as error:
        assert SHARDS[0] in str(error)  # noqa: PT017


@pytest.mark.parametrize("column", [2, 3])
def test_text_that_leads_out_of_the_file_is_refused(whole: Path, tmp_path: Path, column: int) -> None:
    """An offset of Arrow's is followed without a question: a wrong one would end the process, or show its memory."""
    path = damaged(whole, tmp_path) / SHARDS[0]
    data = bytearray(path.read_bytes())
    batch = next(iter(pa.ipc.open_stream(bytes(data))))
    offsets = batch.column(column).buffers()[1].to_pybytes()
    at = data.index(offsets[:40])
    data[at + 8 : at + 12] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"damaged\n.*{SHARDS[0]}"):
        LatentCache(path.parent)


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads((folder / "cache.json").read_text())
    edit(facts)
    (folder / "cache.json").write_text(json.dumps(facts))


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no settings": lambda facts: facts.pop("settings"),
    "another version": lambda facts: facts["settings"].update(format=2),
    "a shard outside": lambda facts: facts["shards"].update({"../secret.arrow": facts["shards"].pop(SHARDS[0])}),
    "wrong rows": lambda facts: facts["shards"][SHARDS[0]].update(rows=3),
    "a wrong count": lambda facts: facts.update(count=7),
    "a wrong shape": lambda facts: facts["settings"].update(moments_shape=[8, 8, 4]),
    "text for a number": lambda facts: facts.update(count="many"),
    "a list for a table": lambda facts: facts.update(shards=[]),
    "too few empty ids": lambda facts: facts.update(empty_ids=[1]),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_cache_json_that_lies_is_refused(whole: Path, tmp_path: Path, case: str) -> None:
    out = damaged(whole, tmp_path)
    edited(out, EDITS[case])
    with pytest.raises(DataError):
        LatentCache(out)


def test_what_is_no_cache(tmp_path: Path, tiny: Path) -> None:
    for folder in (tmp_path, tiny, tmp_path / "nothing"):
        with pytest.raises(DataError, match="not a latent cache"):
            LatentCache(folder)


def test_another_vae_or_tokenizer_is_refused(whole: Path, tmp_path: Path, tiny: Path, parts: Parts) -> None:
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    copied = Parts(parts.tokenizer, parts.text_encoder, parts.vae, parts.scheduler_config, other)
    LatentCache(whole, copied)  # a copy is the same
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}))
    LatentCache(whole, copied)  # a remark is none of its values
    with open(other / "tokenizer" / "merges.txt", "a") as file:
        file.write("\na b")
    with pytest.raises(DataError, match="another tokenizer than the model's"):
        LatentCache(whole, copied)
    flip_a_byte(other / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(DataError, match="another VAE than the model's"):
        LatentCache(whole, copied)


def test_a_students_vae_is_its_teachers(whole: Path, tmp_path: Path, parts: Parts) -> None:
    folder = unet_surgery.prune("bk_tiny", "tiny-random", tmp_path / "student").folder
    LatentCache(whole, Parts(parts.tokenizer, parts.text_encoder, parts.vae, parts.scheduler_config, folder))


def test_the_fingerprint_is_of_what_it_holds(whole: Path, tmp_path: Path, same_parts: None) -> None:
    copy = damaged(whole, tmp_path)
    assert LatentCache(copy).fingerprint == LatentCache(whole).fingerprint
    other = write_pictures(tmp_path / "set", {})
    make_cache(other, "tiny-random", tmp_path / "out", **OPTIONS)
    assert LatentCache(tmp_path / "out").fingerprint != LatentCache(whole).fingerprint


# --- the other training sets ----------------------------------------------------------------------------------------


def test_pictures_straight_from_a_source(pictures: Path, parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    """In place of a bad one stands the next, always the same."""
    samples = PictureSet(open_source(pictures), parts.tokenizer, SIDE, max_bad=0.2)
    pixels, ids = samples.batch([2, 3, 4, 17, 39])
    assert pixels.shape == (5, 3, SIDE, SIDE)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[1], pixels[2])
    assert torch.equal(ids[1], ids[2])
    expected = torch.from_numpy(decode_picture(picture(4), SIDE).copy()).permute(2, 0, 1).double() / 127.5 - 1
    torch.testing.assert_close(pixels[2].double(), expected, rtol=0, atol=1e-6)
    assert samples.bad == {"empty": 1, "html": 1}
    samples.batch([3, 17])
    assert samples.bad == {"empty": 1, "html": 1}  # each counts once
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # of the first alone
    assert caplog.messages[0].startswith("003.png (empty) cannot be used: the next sample stands in")
    again = PictureSet(open_source(pictures), parts.tokenizer, SIDE, max_bad=0.2)
    assert torch.equal(again.batch([17, 4])[0][0], pixels[3])
    assert again.fingerprint == samples.fingerprint
    assert PictureSet(open_source(pictures), parts.tokenizer, 32).fingerprint != samples.fingerprint
    assert samples.caption(3) == "picture number 4"


def test_the_last_picture_is_replaced_by_the_first(tmp_path: Path, parts: Parts) -> None:
    samples = PictureSet(
        open_source(write_pictures(tmp_path / "s", {4: (b"", "")}, 5)), parts.tokenizer, SIDE, max_bad=0.2
    )
    assert torch.equal(samples.batch([4])[0], samples.batch([0])[0])


def judged(folder: Path, parts: Parts, max_bad: float, indices: Sequence[int]) -> PictureSet:
    samples = PictureSet(open_source(folder), parts.tokenizer, SIDE, max_bad=max_bad)
    for index in indices:
        samples.batch([index])
    return samples


def test_too_many_bad_pictures_stop_a_run(tmp_path: Path, parts: Parts) -> None:
    bad = write_pictures(tmp_path / "bad", dict.fromkeys(range(0, 300, 5), (b"", "empty")), 300)
    with pytest.raises(DataError, match=r"at most 10\.00% of 1\d\d\n.*found: .* empty"):  # long before all are read
        judged(bad, parts, 0.1, range(300))
    with pytest.raises(DataError, match="of 300"):
        judged(bad, parts, 0.01, range(300))
    assert sum(judged(bad, parts, 0.2, range(300)).bad.values()) == 60
    none = write_pictures(tmp_path / "none", dict.fromkeys(range(5), (b"", "empty")), 5)
    with pytest.raises(DataError, match="no sample can be used"):
        judged(none, parts, 1.0, [0])


def test_a_huge_picture_ends_a_run_in_one_line_that_names_it(
    tmp_path: Path, parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it is decoded (0.4 GB): its header says enough."""
    folder = write_pictures(tmp_path / "set", {}, 1)
    Image.new("1", (12_000, 12_000)).save(folder / "000.png")
    with pytest.raises(DataError, match="too many samples") as caught:
        judged(folder, parts, 0.01, [0])
    assert caught.value.where == (
        "the training pictures, first 000.png (bomb: 12000×12000, more than 67,108,864 pixels)"
    )
    assert caplog.messages == []


def test_moments_in_memory(pictures: Path, parts: Parts) -> None:
    samples = PictureSet(open_source(pictures), parts.tokenizer, SIDE, max_bad=0.2)
    memory = encode_all(samples, parts.vae, batch=7)
    assert len(memory) == COUNT
    assert memory.latents == "moments"
    moments, ids = memory.batch([5, 0, 5])
    assert moments.dtype == torch.float16
    pixels, same_ids = samples.batch([5, 0, 5])
    torch.testing.assert_close(moments.float(), encode_moments(parts.vae, pixels), rtol=1e-3, atol=1e-3)
    assert torch.equal(ids, same_ids)
    assert torch.equal(memory.empty_ids(), samples.empty_ids())
    assert encode_all(samples, parts.vae, batch=16).fingerprint == memory.fingerprint
    with pytest.raises(DataError, match="encoded already"):
        encode_all(memory, parts.vae)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_with_two_processes_makes_the_same_cache(pictures: Path, whole: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "unet_surgery", "cache"]
    options = ["--resolution", "16", "--batch", "4", "--shard-samples", "12", "--max-bad", "0.1", "--device", "cpu"]
    making = [*words, str(pictures), "-m", "tiny-random", "-o", "latents", *options, "--workers", "2"]
    done = subprocess.run(making, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "latents\n"
    assert "38 samples" in done.stderr
    assert "38 encoded now" in done.stderr
    assert "left out 2: 1 empty, 1 html; see quarantine.jsonl" in done.stderr
    assert folder_bytes(tmp_path / "latents") == folder_bytes(whole)
    check = subprocess.run([*words, "--check", "latents"], cwd=tmp_path, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
    assert "as they were written" in check.stdout


def test_parts_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from unet_surgery.cli.processes import part_of_work

    assert [part_of_work(text) for text in (None, "1/1", "1/4", "4/4")] == [(0, 1), (0, 1), (0, 4), (3, 4)]
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert part_of_work(None) == (2, 8)
    assert part_of_work("1/2") == (0, 2)  # what is said outweighs the environment
    for wrong in ("0/4", "5/4", "4", "a/b", "/", "-1/4", "1/0"):
        with pytest.raises(UsageError):
            part_of_work(wrong)


def test_settings_survive_json() -> None:
    settings = CacheSettings(64, True, "bf16", 7, 3, "text", (8, 4, 4), 77, 0.18215, "a", "b", "c")
    assert CacheSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
