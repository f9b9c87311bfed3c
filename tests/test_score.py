"""Scores: against golden numbers of the libraries that define them, closed forms, and what must be refused."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import tokenize
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
import torch
import yaml
from hub_server import HubStandIn, client_in_process
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from teachers import WEIGHTS
from warm import run_tool

from unet_surgery.checkpoint.identity import network_sha256
from unet_surgery.checkpoint.scorecard import add_scores, card_with_scores
from unet_surgery.errors import DataError, HubError, MissingExtraError, OutputError, TeacherError, UsageError
from unet_surgery.evaluate import pictures as pictures_module
from unet_surgery.evaluate import reference as reference_module
from unet_surgery.evaluate import score as score_module
from unet_surgery.evaluate.clip import Clip, cleaned, load_clip, middle_square
from unet_surgery.evaluate.clipnames import shapes_of
from unet_surgery.evaluate.features import Compute, inception_features
from unet_surgery.evaluate.frechet import Moments, frechet_distance
from unet_surgery.evaluate.inception import FidInception, resized, tensor_shapes
from unet_surgery.evaluate.kernel import kernel_distance
from unet_surgery.evaluate.metrics import METRICS, chosen_metrics
from unet_surgery.evaluate.pictures import Change, batches, captions_of, survey
from unet_surgery.evaluate.reference import make_statistics
from unet_surgery.evaluate.score import score
from unet_surgery.evaluate.spread import inception_score
from unet_surgery.evaluate.statistics import Statistics, read_statistics, write_statistics
from unet_surgery.evaluate.weights import (
    CLIP,
    HPS,
    HPS_V21,
    INCEPTION,
    Weights,
    find_inception,
    find_weights,
    read_tensors,
)
from unet_surgery.toyworld.draw import draw_many
from unet_surgery.toyworld.grammar import caption, one_object_scenes

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "goldens" / "scores.json").read_text("utf-8"))
ASCII = [index for index, text in enumerate(seeded.CAPTIONS) if text.isascii() and "&" not in text]
# Convolutions of other libraries' builds add in another order.
FEATURE_TOLERANCE = 1e-5
SMALL = 4
HASH = "0" * 64


@pytest.fixture(scope="session")
def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in seeded.seeded_tensors(tensor_shapes()).items()}


@pytest.fixture(scope="session")
def net(tensors: dict[str, torch.Tensor]) -> FidInception:
    return FidInception(tensors)


@pytest.fixture(scope="session")
def weights(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The seeded weights in a file, as --inception takes it."""
    path = tmp_path_factory.mktemp("weights") / "seeded.pth"
    torch.save(tensors, path)
    return find_inception(path, sha256=_sha256(path))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP as a repository of open_clip's holds one."""
    folder = tmp_path_factory.mktemp("clip")
    config = clip_config()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    values = seeded.seeded_tensors(shapes_of(config))
    torch.save({name: torch.from_numpy(np.asarray(value)) for name, value in values.items()}, folder / "weights.bin")
    shutil.move(folder / "weights.bin", folder / "open_clip_pytorch_model.bin")
    seeded.write_vocabulary(folder)
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """FID of as few pictures as tests can afford."""
    monkeypatch.setitem(METRICS, "fid", dataclasses.replace(METRICS["fid"], min_pictures=SMALL))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty toy pictures, the last with the caption of another."""
    folder = tmp_path_factory.mktemp("toy") / "pictures"
    scenes = list(one_object_scenes()[:: len(one_object_scenes()) // 20][:20])
    seeded.write_pictures(folder, draw_many(scenes, range(20)))
    texts = [caption(scene) for scene in scenes]
    write_captions(folder, [*texts[:19], texts[0]])
    told = {
        "format": "unet-surgery-generation",
        "format_version": 1,
        "images": 20,
        "width": 32,
        "height": 32,
        "steps": 25,
        "guidance": 7.5,
    }
    told |= {"seed": 1234, "scheduler": {"class": "PNDMScheduler"}, "prompts": {"name": "toy prompts"}, "resize": None}
    (folder / "generation.json").write_text(json.dumps(told))
    return folder


def clip_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(seeded.CLIP_CONFIG))
    config["text_cfg"]["vocab_size"] = len(seeded.vocabulary())
    return config


def write_captions(folder: Path, texts: list[str]) -> None:
    rows = [f'{index:05d}.png,"{text}"' for index, text in enumerate(texts)]
    (folder / "metadata.csv").write_text("file_name,caption\n" + "\n".join(rows) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- the network, against pytorch-fid 0.3.0 and torch-fidelity 0.4.0


def test_the_tensors_are_those_of_pytorch_fids_file() -> None:
    shapes = tensor_shapes()
    assert GOLDENS["inception_names"] == seeded.digest_of(f"{name} {list(shape)}" for name, shape in shapes.items())


@pytest.mark.parametrize("row", GOLDENS["inception"], ids=lambda row: "×".join(map(str, row["size"])))
def test_features_are_both_libraries_own(net: FidInception, row: dict[str, Any]) -> None:
    pictures = torch.from_numpy(seeded.pictures(2, *row["size"])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        first, second = (net(resized(pictures, how)) for how in ("pytorch-fid", "torch-fidelity"))  # type: ignore[arg-type]
        found = {"pytorch_fid": first, "torch_fidelity": second, "logits": net.logits(second)}
    for name, values in found.items():
        golden = np.array(row[name]["values"])
        scale = np.abs(golden).max()
        assert golden.std(axis=0).mean() > 100 * FEATURE_TOLERANCE * scale  # else any pictures would do
        np.testing.assert_allclose(values[:, ::64].numpy(), golden, rtol=0, atol=FEATURE_TOLERANCE * scale)
        np.testing.assert_allclose(values.norm(dim=1).numpy(), row[name]["norms"], rtol=FEATURE_TOLERANCE)
    if row["size"] != [299, 299]:  # the resizes differ, and not by rounding
        assert float((first - second).abs().max()) > 1000 * FEATURE_TOLERANCE * float(first.abs().max()) / 100


def test_weights_that_are_not_the_networks_are_named(tensors: dict[str, torch.Tensor]) -> None:
    one = "Mixed_7c.branch1x1.conv.weight"
    with pytest.raises(TeacherError, match="missing: Mixed_7c.branch1x1.conv.weight"):
        FidInception({name: value for name, value in tensors.items() if name != one})
    with pytest.raises(TeacherError, match="unknown: AuxLogits.conv0"):
        FidInception(tensors | {"AuxLogits.conv0": torch.zeros(1)})
    with pytest.raises(TeacherError, match="of another shape: fc.bias"):
        FidInception(tensors | {"fc.bias": torch.zeros(1000)})
    with pytest.raises(TeacherError, match="not of finite numbers: fc.bias"):
        FidInception(tensors | {"fc.bias": torch.full((1008,), float("nan"))})


# ---- distances


@pytest.mark.parametrize("row", GOLDENS["frechet"], ids=lambda row: f"{row['count']} of {row['size']}")
def test_the_frechet_distance_is_pytorch_fids(row: dict[str, Any]) -> None:
    sets = [seeded.gaussian(row["count"], row["size"], seed) for seed in (1, 2)]
    # scipy's sqrtm of a singular product, which it meets with fewer rows than columns, is good to half the digits
    assert _distance(*sets) == pytest.approx(row["value"], rel=1e-7 if row["count"] < row["size"] else 1e-11)


@pytest.mark.parametrize(("count", "size"), [(200, 48), (40, 64), (30, 256)])
def test_the_frechet_distance_is_exact_where_covariances_are_singular(count: int, size: int) -> None:
    """tr (Σa Σb)^½ is the nuclear norm of Xa Xbᵀ of centred rows: no root at all, whatever the rank."""
    first, second = (seeded.gaussian(count, size, seed) for seed in (1, 2))
    a, b = (values - values.mean(axis=0) for values in (first, second))
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    apart = first.mean(axis=0) - second.mean(axis=0)
    exact = apart @ apart + ((a**2).sum() + (b**2).sum() - 2 * nuclear) / (count - 1)
    assert _distance(first, second) == pytest.approx(exact, rel=1e-13)


@given(
    st.lists(st.floats(0, 9), min_size=3, max_size=3),
    st.lists(st.floats(0, 9), min_size=3, max_size=3),
    st.lists(st.floats(-5, 5), min_size=3, max_size=3),
)
def test_the_frechet_distance_of_diagonal_gaussians(a: list[float], b: list[float], mean: list[float]) -> None:
    """|μ|² + Σ (√a − √b)², in any rotated frame, both ways round."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    sigma_a, sigma_b = (turn @ np.diag(values) @ turn.T for values in (a, b))
    mu, zero = np.array(mean), np.zeros(3)
    exact = float((mu**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())
    assert frechet_distance(mu, sigma_a, zero, sigma_b) == pytest.approx(exact, abs=2e-6)
    assert frechet_distance(zero, sigma_b, mu, sigma_a) == pytest.approx(exact, abs=2e-6)


def test_a_matrix_that_is_no_covariance_is_refused() -> None:
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_distance(np.zeros(2), np.diag([2.0, -1.0]), np.zeros(2), np.eye(2))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_moments_do_not_depend_on_batches_or_order(sizes: list[int], random: Any) -> None:
    rows = seeded.gaussian(sum(sizes) + 2, 5, 3) + 100
    order = list(range(len(rows)))
    random.shuffle(order)
    moments = Moments()
    for part in np.split(rows[order], np.cumsum(sizes)):
        moments.add(torch.from_numpy(part))
    mu, sigma = moments.mean_and_covariance()
    assert moments.count == len(rows)
    np.testing.assert_allclose(mu, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-9)
    assert (sigma == sigma.T).all()


def test_moments_of_one_feature_are_none() -> None:
    moments = Moments()
    moments.add(torch.ones(1, 3))
    with pytest.raises(ValueError, match="two features"):
        moments.mean_and_covariance()


def test_the_inception_score_is_torch_fidelitys() -> None:
    found = inception_score(torch.from_numpy(seeded.logits(503)))
    assert found == pytest.approx(tuple(GOLDENS["inception_score"]), rel=1e-12)
    # the shuffle is part of the protocol: without it the splits are others
    assert inception_score(torch.from_numpy(seeded.logits(503)), seed=None)[0] != pytest.approx(found[0], rel=1e-6)


@given(st.integers(1, 12), st.integers(1, 5))
def test_the_inception_score_in_closed_form(classes: int, times: int) -> None:
    """Sure of as many classes, equally often: their number. Never sure: one."""
    one_hot = torch.eye(classes).repeat(10 * times, 1) * 1000
    assert inception_score(one_hot, seed=None) == pytest.approx((classes, 0.0), rel=1e-9)
    assert inception_score(torch.zeros(10 * times, classes)) == pytest.approx((1.0, 0.0))


def test_too_few_for_ten_splits() -> None:
    with pytest.raises(DataError, match="too few pictures for the inception score"):
        inception_score(torch.zeros(9, 4))


def test_the_kernel_distance_is_torch_fidelitys() -> None:
    sets = [seeded.gaussian(300, 64, seed).astype(np.float32) for seed in (1, 2)]
    assert kernel_distance(*sets, subsets=20, size=100) == pytest.approx(tuple(GOLDENS["kernel_distance"]), rel=1e-6)


def test_the_kernel_distance_of_one_distribution_is_nothing_in_expectation() -> None:
    random = np.random.default_rng(1)
    values = [
        kernel_distance(*(random.standard_normal((60, 16)) for _ in range(2)), subsets=1, size=60, seed=seed)[0]
        for seed in range(200)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / len(values) ** 0.5
    assert min(values) < 0 < max(values)
    apart, _ = kernel_distance(random.standard_normal((60, 16)), random.standard_normal((60, 16)) + 1, size=60)
    assert apart > 10 * np.std(values)


def test_too_few_for_a_subset() -> None:
    with pytest.raises(DataError, match="1000 or more"):
        kernel_distance(np.zeros((2000, 4)), np.zeros((999, 4)))


def _distance(first: Any, second: Any) -> float:
    moments = [(values.mean(axis=0), np.cov(values, rowvar=False)) for values in (first, second)]
    return frechet_distance(*moments[0], *moments[1])


# ---- CLIP, against open_clip and hpsv2


@pytest.fixture(scope="session")
def clips(clip_folder: Path) -> dict[str, Clip]:
    weights = Weights(clip_folder / "open_clip_pytorch_model.bin", "small", HASH, False, (clip_folder,))
    return {
        "clip": load_clip(weights, "crop", default="ViT-g-14"),
        "hpsv2": load_clip(weights, "pad", default="ViT-H-14"),
    }


@pytest.mark.parametrize("name", ["clip", "hpsv2"])
def test_cosines_are_those_of_open_clip_and_hpsv2(clips: dict[str, Clip], name: str) -> None:
    model = clips[name]
    assert GOLDENS[f"{name}_names"] == seeded.digest_of(
        f"{key} {list(shape)}" for key, shape in shapes_of(clip_config()).items()
    )
    texts = [seeded.CAPTIONS[index] for index in ASCII]
    rows = [key for key in GOLDENS if key.startswith(f"{name} ")]
    assert len(rows) == 4
    for key in rows:
        golden = {part: np.array(values)[ASCII] for part, values in GOLDENS[key].items()}
        width, height = map(int, key.split()[1].split("x"))
        pictures = seeded.pictures(len(seeded.CAPTIONS), width, height)[ASCII]
        if name == "clip":
            pictures = np.stack([middle_square(picture, model.side) for picture in pictures])
        assert golden["scores"].std() > 1e-3
        with torch.inference_mode():
            np.testing.assert_allclose(model.images(pictures).numpy(), golden["images"], atol=2e-6)
            np.testing.assert_allclose(model.texts(texts).numpy(), golden["texts"], atol=2e-6)
        np.testing.assert_allclose(model.cosines(pictures, texts), golden["scores"], atol=2e-6)


def test_token_ids_are_open_clips(clips: dict[str, Clip]) -> None:
    with_ftfy = find_spec("ftfy") is not None
    indices = range(len(seeded.CAPTIONS)) if with_ftfy else ASCII
    for index in indices:
        ids = clips["clip"].tokenizer(cleaned(seeded.CAPTIONS[index]), truncation=True, max_length=77).input_ids
        assert ids == GOLDENS["tokens"][index], seeded.CAPTIONS[index]


@pytest.mark.skipif(find_spec("ftfy") is not None, reason="ftfy is installed")
def test_captions_that_need_ftfy_say_so() -> None:
    for text in ("naïve", "Tom &amp; Jerry"):
        with pytest.raises(MissingExtraError, match=r"unet-surgery\[evaluate\]"):
            cleaned(text)


@pytest.mark.skipif(find_spec("ftfy") is None, reason="ftfy is not installed")
def test_captions_are_cleaned_as_open_clip_does() -> None:
    assert cleaned("“Naïve”  &amp;amp; ﬁne") == '"naïve" & fine'


def test_a_clip_that_is_another_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    def load(config: dict[str, Any] | None = None, *, without: str = "", vocabulary: Path = clip_folder) -> None:
        tensors = read_tensors(clip_folder / "open_clip_pytorch_model.bin")
        torch.save({name: value for name, value in tensors.items() if name != without}, tmp_path / "weights.bin")
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config or clip_config()}))
        load_clip(
            Weights(tmp_path / "weights.bin", "w", HASH, False, (tmp_path, vocabulary)), "crop", default="ViT-g-14"
        )

    load()
    with pytest.raises(TeacherError, match=r"missing: visual\.proj"):
        load(without="visual.proj")
    with pytest.raises(TeacherError, match="unknown: transformer.resblocks.1"):
        load({**clip_config(), "text_cfg": {**clip_config()["text_cfg"], "layers": 1}})
    with pytest.raises(TeacherError, match="another shape"):
        load({**clip_config(), "embed_dim": 25})
    with pytest.raises(TeacherError, match="not built here"):
        load({**clip_config(), "vision_cfg": {**clip_config()["vision_cfg"], "timm_model_name": "x"}})
    with pytest.raises(TeacherError, match="wrong values"):
        load({**clip_config(), "vision_cfg": {**clip_config()["vision_cfg"], "layers": 10**9}})
    with pytest.raises(TeacherError, match="tokenizer's files are missing"):
        load(vocabulary=tmp_path)
    other = tmp_path / "other"
    seeded.write_vocabulary(other)
    (other / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(TeacherError, match="not that of these weights"):
        load(vocabulary=other)


# ---- weights


def test_other_weights_are_taken_only_by_their_hash(weights: Weights, tmp_path: Path) -> None:
    assert not weights.published
    with pytest.raises(TeacherError, match=f"(?s)not the published one.*{INCEPTION.sha256}"):
        find_inception(weights.path)
    with pytest.raises(TeacherError, match="not the one that was asked for"):
        find_inception(weights.path, sha256=HASH)


def test_missing_weights_say_which_file_from_where_and_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Weights
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(TeacherError, match=r"(?s)pt_inception-2015-12-05-6726825d\.pth.*--inception PATH.*github"):
        find_inception(None)
    cached = tmp_path / "hub" / "checkpoints" / INCEPTION.files[1]  # torch-fidelity's name of the same file
    cached.parent.mkdir(parents=True)
    shutil.copy(weights.path, cached)
    assert find_inception(None, sha256=weights.sha256).path == cached
    with pytest.raises(HubError, match=r"(?s)laion/CLIP-ViT-g-14-laion2B-s34B-b88K.*--clip PATH"):
        find_weights(CLIP, None)
    with pytest.raises(TeacherError, match="there are no such weights"):
        find_weights(CLIP, tmp_path)


def test_weights_from_their_own_repository_have_the_metrics_name(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the real client, from a stand-in of the Hub: compared with the hash it names, cached, found offline."""
    monkeypatch.setenv("UNET_SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNET_SURGERY_PATIENCE", "1")
    known = dataclasses.replace(CLIP, sha256=_sha256(clip_folder / "open_clip_pytorch_model.bin"))
    monkeypatch.setitem(score_module.CLIPS, "clip", (known, *score_module.CLIPS["clip"][1:]))
    hub = HubStandIn()
    hub.add(str(CLIP.repository), clip_folder)
    with hub.serve() as endpoint, client_in_process(endpoint, tmp_path / "home"):
        other = find_weights(CLIP, None)  # whose main branch holds another file than the one that was published
        assert not other.published
        assert "another file than was published" in other.why
        found = find_weights(known, None)
        assert (found.published, found.name) == (True, "laion/CLIP-ViT-g-14-laion2B-s34B-b88K")
        assert found.sha256 == _sha256(clip_folder / "open_clip_pytorch_model.bin")
        assert found.beside("merges.txt") is not None
        assert METRICS["clip"].called(found.published) == "clip"
        (tmp_path / "pictures").mkdir()
        seeded.write_pictures(tmp_path / "pictures", seeded.pictures(2, 28, 28))
        write_captions(tmp_path / "pictures", ["the red house", "a dog"])
        (scored,) = score(tmp_path / "pictures", ["clip"]).scores
        assert scored.metric == "clip"
    with client_in_process("http://127.0.0.1:9", tmp_path / "home"):  # where nobody listens
        assert find_weights(CLIP, None).sha256 == found.sha256


def test_weights_by_path_are_published_where_their_hash_is(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash written down here, else the one that the Hub names; without a network it is said that none was."""
    monkeypatch.setenv("UNET_SURGERY_CACHE", str(tmp_path / "cache"))
    file = clip_folder / "open_clip_pytorch_model.bin"
    written_down = dataclasses.replace(CLIP, sha256=_sha256(file))
    asked = dataclasses.replace(CLIP, sha256=None)
    assert find_weights(written_down, clip_folder).published
    assert find_weights(written_down, clip_folder).name == CLIP.name
    assert "could not be compared" in find_weights(asked, clip_folder).why
    hub = HubStandIn(large_bytes=1000)  # whose hashes the Hub names
    hub.add(str(CLIP.repository), clip_folder)
    with hub.serve() as endpoint, client_in_process(endpoint, tmp_path / "home"):
        assert find_weights(asked, clip_folder).published
        (tmp_path / "other.bin").write_bytes(file.read_bytes() + b"x")
        other = find_weights(asked, tmp_path / "other.bin")
        assert (other.published, other.why) == (False, "its weights are not the published ones")
    for known in (CLIP, HPS, HPS_V21):  # by hash, or by a commit, which names its files' hashes
        assert known.sha256 is not None or len(str(known.revision)) == 40


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(TeacherError, match="not a regular file"):
            find_inception(path)
        with pytest.raises(TeacherError):
            find_weights(CLIP, path)


class _Shell:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("kind", ["pickle", "object in a checkpoint", "list", "html", "empty", "truncated"])
def test_nothing_but_tensors_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Weights, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    match kind:
        case "pickle":
            path.write_bytes(pickle.dumps(_Shell()))
        case "object in a checkpoint":
            torch.save({"state_dict": {"fc.weight": torch.ones(1), "x": _Shell()}}, path)
        case "list":
            torch.save({"fc.weight": [1.0]}, path)
        case "html":
            path.write_text("<!DOCTYPE html><html>Not found</html>")
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(weights.path.read_bytes()[:100_000])
    with pytest.raises(TeacherError):
        read_tensors(path)
    assert not (tmp_path / "executed").exists()


def test_old_files_and_training_checkpoints_are_read(tmp_path: Path) -> None:
    stored = {"state_dict": {"module.a": torch.arange(3.0)}, "epoch": 3}
    torch.save(stored, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "old.pt")["a"].tolist() == [0, 1, 2]


# ---- folders of pictures


def test_pictures_come_in_order_whatever_the_batch(tmp_path: Path) -> None:
    values = seeded.pictures(23, 20, 31)
    seeded.write_pictures(tmp_path, values)
    folder = survey(tmp_path)
    assert (folder.width, folder.height, len(folder)) == (20, 31, 23)
    for batch, decoders in ((1, 1), (7, 3), (50, 4)):
        got = list(batches(folder, batch, decoders=decoders))
        assert [len(part) for part in got[:-1]] == [batch] * (len(got) - 1)
        assert (np.concatenate(got) == values).all()


def test_features_do_not_depend_on_the_batch(net: FidInception, tmp_path: Path) -> None:
    seeded.write_pictures(tmp_path, seeded.pictures(3, 40, 40))
    found = [
        inception_features(net, survey(tmp_path), Compute(torch.device("cpu"), batch=batch), pool3=True).pool3_ND
        for batch in (1, 2)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-4)


def test_pictures_of_other_sizes_are_named(tmp_path: Path) -> None:
    seeded.write_pictures(tmp_path, seeded.pictures(5, 32, 32))
    Image.new("RGB", (30, 32)).save(tmp_path / "other.png")
    with pytest.raises(DataError, match=r"(?s)1 of 6 pictures.*32×32.*other\.png \(30×32\)"):
        survey(tmp_path)
    assert survey(tmp_path, change=Change(16)).width == 16


def test_pictures_that_cannot_be_read_are_named_and_counted(tmp_path: Path) -> None:
    paths = seeded.write_pictures(tmp_path, seeded.pictures(9, 64, 64))
    paths[0].write_text("<!DOCTYPE html>")
    paths[1].write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)2 pictures cannot be read.*00000\.png \(html.*00001\.png \(empty\)"):
        survey(tmp_path)
    paths[0].unlink()
    paths[1].unlink()
    for path in (paths[4], paths[8]):  # whole headers, half the pixels
        path.write_bytes(path.read_bytes()[:3000])
    got: list[Any] = []
    with pytest.raises(DataError, match=r"(?s)2 pictures cannot be read.*00004\.png \(truncated.*00008\.png"):
        got.extend(batches(survey(tmp_path), 2))
    assert len(got) == 1  # nothing comes after the first that is broken: a network would run for nothing


@pytest.mark.parametrize("modes", [("RGB",), ("L",), ("L", "RGB")], ids="→".join)
def test_references_are_made_as_bk_sdms(tmp_path: Path, modes: tuple[str, ...]) -> None:
    """Its script: Image.open(…).resize((side, side)).save("….jpg"), which pytorch-fid then opens.

    A colour file that shows only greys stays one.
    """
    (tmp_path / "raw").mkdir()
    image = Image.fromarray(seeded.pictures(1, 90, 70)[0])
    for mode in modes:
        image = image.convert(mode)
    image.save(tmp_path / "raw" / "a.jpg", "PNG")
    with Image.open(tmp_path / "raw" / "a.jpg") as image:
        image.resize((48, 48)).save(tmp_path / "theirs.jpg")
    with Image.open(tmp_path / "theirs.jpg") as image:
        assert image.mode == modes[-1]
        theirs = np.array(image.convert("RGB"))
    (ours,) = batches(survey(tmp_path / "raw", change=Change(48, 75)), 1)
    assert (ours[0] == theirs).all()


def test_of_large_files_only_the_start_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the header is behind more than that, as with a large comment."""
    noise = Image.fromarray(seeded.pictures(1, 300, 300)[0])
    noise.save(tmp_path / "a.bmp")
    assert (tmp_path / "a.bmp").stat().st_size > 2 * pictures_module.HEADER_BYTES
    whole: list[str] = []
    read = pictures_module.read_regular
    monkeypatch.setattr(
        pictures_module, "read_regular", lambda path, most: (whole.append(path.name), read(path, most))[1]
    )
    assert survey(tmp_path).width == 300
    assert whole == []
    comment = b"".join(b"\xff\xfe\xff\xff" + bytes(0xFFFD) for _ in range(2))
    noise.save(tmp_path / "b.jpg")
    data = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(data[:2] + comment + data[2:])
    assert survey(tmp_path).width == 300
    assert whole == ["b.jpg"]


def test_a_bomb_and_16_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        list(batches(survey(tmp_path), 2))
    Image.new("1", (20_000, 20_000)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="bomb"):
        survey(tmp_path)


def test_an_empty_folder_and_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no pictures"):
        survey(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        survey(tmp_path / "nothing")


def test_captions_and_pictures_are_one_for_one(tmp_path: Path) -> None:
    paths = seeded.write_pictures(tmp_path, seeded.pictures(3, 32, 32))
    with pytest.raises(DataError, match="no captions"):
        captions_of(survey(tmp_path))
    write_captions(tmp_path, ["a", "b", "c"])
    assert captions_of(survey(tmp_path)) == ["a", "b", "c"]
    write_captions(tmp_path, ["a", "b"])
    with pytest.raises(DataError, match=r"1 pictures without caption \(00002\.png\)"):
        captions_of(survey(tmp_path))
    write_captions(tmp_path, ["a", "b", "c"])
    paths[1].unlink()
    with pytest.raises(DataError, match=r"1 captions without picture \(00001\.png\)"):
        captions_of(survey(tmp_path))
    (tmp_path / "metadata.csv").write_text("file_name,text\n00000.png,a\n00000.png,b\n00002.png,c\n")
    with pytest.raises(DataError, match="two captions"):
        captions_of(survey(tmp_path))
    (tmp_path / "metadata.csv").write_text("file_name,text\n00000.png,\n00002.png,c\n")
    with pytest.raises(DataError, match="caption-empty"):
        captions_of(survey(tmp_path))


# ---- statistics


def _statistics(**changes: Any) -> Statistics:
    sigma = np.diag(np.linspace(1, 2, 2048))
    sigma[0, 1] = sigma[1, 0] = 0.5
    return dataclasses.replace(Statistics(np.linspace(0, 1, 2048), sigma, 3000, (256, 256), name="coco"), **changes)


def test_statistics_are_those_of_pytorch_fid(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    made = _statistics(change="bicubic to 256×256", weights_sha256=HASH, implementation="as pytorch-fid 0.3.0")
    write_statistics(path, made)
    with np.load(path) as file:  # as pytorch-fid opens it
        assert (file["mu"][:] == made.mu_D).all()
        assert (file["sigma"][:] == made.sigma_DD).all()
    again = read_statistics(path)
    assert all(
        np.array_equal(getattr(again, field.name), getattr(made, field.name)) for field in dataclasses.fields(made)
    )
    write_statistics(tmp_path / "b.npz", made)
    assert path.read_bytes() == (tmp_path / "b.npz").read_bytes()
    with pytest.raises(OutputError, match="the output exists"):
        write_statistics(path, made)
    np.savez_compressed(tmp_path / "theirs.npz", mu=made.mu_D, sigma=made.sigma_DD)
    theirs = read_statistics(tmp_path / "theirs.npz")
    assert (theirs.count, theirs.resolution, theirs.weights_sha256) == (None, None, None)


def _asymmetric() -> Any:
    sigma = np.eye(2048)
    sigma[0, 1] = 0.5
    return sigma


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, "mu has another form"),
        ({"mu": np.zeros(2048)}, "lack sigma"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "mu is not finite"),
        ({"mu": np.zeros(2048), "sigma": np.full((2048, 2048), np.inf)}, "sigma is not finite"),
        ({"mu": np.zeros(2048), "sigma": _asymmetric()}, "not symmetric"),
        ({"mu": np.zeros(2048), "sigma": -np.eye(2048)}, "a variance is below zero"),
        ({"mu": np.zeros(2048, dtype=np.int64), "sigma": np.eye(2048)}, "mu has another form"),
        ({"mu": np.array([_Shell()] * 2, dtype=object), "sigma": np.eye(2048)}, "pickled"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048), "count": np.int64(-3)}, "count has another form"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048), "resolution": np.zeros(3, dtype=int)}, "resolution"),
        ({"mu": np.zeros(5_000_000), "sigma": np.eye(2048)}, "mu is too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_statistics_that_are_none_are_refused(tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    np.savez_compressed(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=told):
        read_statistics(tmp_path / "bad.npz")
    assert not Path("executed").exists()


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_statistics(path, _statistics())
    whole = path.read_bytes()
    for data in (b"", whole[:1000], b"<html>", whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]):
        path.write_bytes(data)
        with pytest.raises(DataError):
            read_statistics(path)
    claims = io.BytesIO()  # a header of a terabyte, and no values
    np.lib.format.write_array_header_1_0(claims, {"descr": "<f8", "fortran_order": False, "shape": (10**11,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", claims.getvalue())
        archive.writestr("sigma.npy", claims.getvalue())
    with pytest.raises(DataError, match="mu is damaged"):
        read_statistics(path)


@pytest.mark.parametrize(
    "header",
    ["{'descr': '<f8', 'fortran_order': False, 'shape': (2048,), }\n(", "(" * 3000, "\x00", "{'descr': " + "'" * 3,
     "{" * 200, "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "-" * 4000 + "1,)}"],
    ids=["open bracket", "deep", "zero", "open text", "braces", "signs"],
)  # fmt: skip
def test_hostile_headers_are_refused(tmp_path: Path, header: str) -> None:
    """numpy hands a header to Python's own parser, which raises whatever it raises: MemoryError, TokenError."""
    text = header.encode("latin1")
    path = tmp_path / "bad.npz"
    for version, size in ((1, len(text).to_bytes(2, "little")), (2, len(text).to_bytes(4, "little"))):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy", b"\x93NUMPY" + bytes((version, 0)) + size + text + bytes(8192))
        with pytest.raises(DataError, match="statistics|mu is damaged"):
            read_statistics(path)


@pytest.mark.parametrize("error", [MemoryError(), tokenize.TokenError("EOF in multi-line statement")])
def test_whatever_numpys_parser_raises_is_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write_statistics(tmp_path / "a.npz", _statistics())

    def parse(_file: Any) -> None:
        raise error

    monkeypatch.setattr("numpy.lib.format.read_array_header_1_0", parse)
    with pytest.raises(DataError, match=r"no \.npz file of statistics"):
        read_statistics(tmp_path / "a.npz")


# ---- the whole


def test_the_whole_way_from_pictures_to_fid(few: None, weights: Weights, tmp_path: Path) -> None:
    """Statistics, then scores against them: what pytorch-fid says of the same files."""
    count, side, _ = seeded.FROM_FILES
    for name, seed in (("real", 1), ("drawn", 2)):
        seeded.write_pictures(tmp_path / name, seeded.pictures(*seeded.FROM_FILES, seed))
    path = tmp_path / "stats.npz"
    made = make_statistics(tmp_path / "real", path, inception=weights.path, weights_sha256=weights.sha256)
    assert (made.count, made.resolution, made.name) == (count, (side, side), "real")
    seen: list[tuple[int, int]] = []
    report = score(
        tmp_path / "drawn",
        ["fid"],
        reference=path,
        inception=weights.path,
        weights_sha256=weights.sha256,
        batch=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, count), (count, count)]
    (distance,) = report.scores
    assert distance.metric == "frechet-distance"  # with these weights it is not FID, and is not called so
    assert distance.value == pytest.approx(GOLDENS["files"]["fid"], rel=1e-4)
    protocol = distance.protocol
    assert protocol["weights"] == {"name": "seeded.pth", "sha256": weights.sha256, "published": False}
    assert protocol["reference"]["count"] == protocol["count"] == count
    assert protocol["reference"]["sha256"] == _sha256(path)
    assert protocol["resolution"] == protocol["reference"]["resolution"] == [side, side]
    assert report.warnings[0].startswith(f"{count} pictures are few")
    json.dumps(report.to_json(), allow_nan=False)


def test_references_that_do_not_fit_are_refused(few: None, weights: Weights, tmp_path: Path) -> None:
    seeded.write_pictures(tmp_path / "drawn", seeded.pictures(SMALL, 48, 48))

    def run(reference: Path, **options: Any) -> None:
        score(
            tmp_path / "drawn", ["fid"], reference=reference, inception=weights.path,
            weights_sha256=weights.sha256, **options,
        )  # fmt: skip

    path = tmp_path / "stats.npz"
    write_statistics(path, _statistics())
    with pytest.raises(DataError, match=r"(?s)different resolutions.*48×48.*256×256"):
        run(path)
    with pytest.raises(DataError, match=r"--reference-resolution says"):
        run(path, reference_resolution=48)
    write_statistics(path, _statistics(resolution=None), force=True)
    with pytest.raises(DataError, match=r"--reference-resolution SIDE"):
        run(path)
    write_statistics(path, _statistics(resolution=(48, 48), weights_sha256=HASH), force=True)
    with pytest.raises(DataError, match="made with other weights"):
        run(path)
    write_statistics(path, _statistics(resolution=(48, 48), count=SMALL - 1), force=True)
    with pytest.raises(DataError, match="too few pictures for FID"):
        run(path)
    with pytest.raises(UsageError, match="--reference FOLDER"):
        score(tmp_path / "drawn", ["kid"], reference=path, inception=weights.path)
    with pytest.raises(UsageError, match="compares with a reference"):
        score(tmp_path / "drawn", ["fid"])


def test_is_and_kid_of_folders(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch-fidelity says of the same files."""
    monkeypatch.setitem(METRICS, "kid", dataclasses.replace(METRICS["kid"], min_pictures=4))
    monkeypatch.setitem(METRICS, "is", dataclasses.replace(METRICS["is"], min_pictures=4))
    spread_of = functools.partial(inception_score, splits=seeded.SPLITS)
    distance_of = functools.partial(kernel_distance, size=seeded.SUBSET_SIZE, subsets=seeded.SUBSETS)
    monkeypatch.setattr(score_module, "inception_score", spread_of)
    monkeypatch.setattr(score_module, "kernel_distance", distance_of)
    count, side, _ = seeded.FROM_FILES
    for seed in (1, 2):
        seeded.write_pictures(tmp_path / str(seed), seeded.unlike_pictures(seed))
    found, spread = score(
        tmp_path / "1", ["kid", "is"], reference=tmp_path / "2", inception=weights.path, weights_sha256=weights.sha256
    ).scores
    assert (found.value, found.error) == pytest.approx(tuple(GOLDENS["files"]["kid"]), rel=1e-4)
    assert (spread.value, spread.error) == pytest.approx(tuple(GOLDENS["files"]["is"]), rel=1e-4)
    assert (found.metric, spread.metric) == ("kernel-distance", "exp-class-information")
    assert spread.protocol["reference"] is None
    assert found.protocol["reference"] == {
        "name": "2", "sha256": _files_sha256(tmp_path / "2"), "count": count, "resolution": [side, side],
        "resolution_is_told": False, "change": None,
    }  # fmt: skip


def _files_sha256(folder: Path) -> str:
    """The hash of the hashes of the files, by their names' order: a folder is known by it, not by its name."""
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in sorted(folder.iterdir())]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def test_too_few_pictures_for_fid_do_not_stop_the_others(toy_folder: Path, weights: Weights) -> None:
    options: dict[str, Any] = {"reference": toy_folder, "inception": weights.path, "weights_sha256": weights.sha256}
    report = score(toy_folder, ["fid", "toy"], **options)
    assert [found.metric for found in report.scores] == ["toy"]
    assert "2,048 or more" in report.refused["fid"]
    with pytest.raises(DataError, match="too few pictures for FID"):
        score(toy_folder, ["fid"], **options)
    assert reference_module.METRICS["fid"].min_pictures == 2048


def test_a_reference_that_is_too_small_does_not_stop_the_others(
    few: None, toy_folder: Path, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is told what it does not record says so; below 10,000 there is a note, as of the pictures."""
    path = tmp_path / "stats.npz"
    options: dict[str, Any] = {"reference": path, "inception": weights.path, "weights_sha256": weights.sha256}
    write_statistics(path, _statistics(resolution=(32, 32), count=SMALL - 1))
    report = score(toy_folder, ["fid", "toy"], **options)
    assert [found.metric for found in report.scores] == ["toy"]
    assert report.refused["fid"].startswith("of the reference, too few pictures for FID")
    monkeypatch.setattr(score_module, "frechet_distance", lambda *_: 1.0)
    write_statistics(path, _statistics(resolution=None, count=3000), force=True)
    report = score(toy_folder, ["fid"], **options, reference_resolution=32)
    assert report.scores[0].protocol["reference"]["resolution_is_told"]
    assert [note.split(" are few")[0] for note in report.warnings] == ["20 pictures", "3,000 pictures in the reference"]


def test_toy_pictures_are_judged_batch_by_batch(toy_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    (found,) = score(toy_folder, ["toy"], batch=8, progress=lambda done, total: seen.append((done, total))).scores
    assert seen == [(8, 20), (16, 20), (20, 20)]
    assert found.value == 0.95


def test_unfinished_and_changed_folders_are_refused(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "copy")
    (tmp_path / "copy" / "00019.png").unlink()
    with pytest.raises(DataError, match=r"(?s)20 pictures of 32×32.*19 pictures of 32×32"):
        score(tmp_path / "copy", ["toy"])
    told = tmp_path / "copy" / "generation.json"
    told.write_text(told.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(DataError, match=r"no generation\.json that is known"):  # as every other reader says it
        score(tmp_path / "copy", ["toy"])
    told.unlink()
    (tmp_path / "copy" / ".unfinished").mkdir()
    with pytest.raises(DataError, match="not all drawn yet"):
        score(tmp_path / "copy", ["toy"])
    (tmp_path / "begun" / ".unfinished").mkdir(parents=True)  # before the first picture
    with pytest.raises(DataError, match="not all drawn yet"):
        score(tmp_path / "begun", ["toy"])


def test_captions_that_are_not_the_toy_worlds(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "copy")
    write_captions(tmp_path / "copy", ["a small red house by a lake"] * 20)
    with pytest.raises(DataError, match="20 of 20 captions are not of the toy world"):
        score(tmp_path / "copy", ["toy"])


@pytest.mark.parametrize(("name", "metric"), [("clip", "caption-cosine"), ("hpsv2", "preference-cosine")])
def test_scores_of_captions(clip_folder: Path, tmp_path: Path, name: str, metric: str) -> None:
    texts = [seeded.CAPTIONS[index] for index in ASCII]
    seeded.write_pictures(tmp_path, seeded.pictures(len(seeded.CAPTIONS), 64, 48)[ASCII])
    (tmp_path / "metadata.csv").write_text("file_name,caption\n")
    with (tmp_path / "metadata.csv").open("a", newline="") as file:
        import csv

        csv.writer(file).writerows((f"{index:05d}.png", text) for index, text in enumerate(texts))
    golden = np.array(GOLDENS[f"{name} 64x48"]["scores"])[ASCII]
    paths: dict[str, Any] = {"clip": clip_folder} if name == "clip" else {"hps": clip_folder}
    (found,) = score(tmp_path, [name], batch=2, **paths).scores
    assert found.metric == metric
    scale = 1 if name == "clip" else 100
    assert found.value == pytest.approx(scale * golden.mean(), rel=1e-5)
    if name == "clip":
        assert found.error == pytest.approx(golden.std(ddof=1) / len(golden) ** 0.5, rel=1e-4)
    assert found.protocol["versions"]["transformers"]


@pytest.mark.parametrize(
    ("metrics", "reference", "error", "message"),
    [
        (["toy"], "statistics.npz", UsageError, "no metric that was asked for compares with a reference"),
        (["fid"], "scores.json", UsageError, r"a reference is a folder of pictures, or statistics\n.*scores.json"),
        (["fid", "toy"], "nothing.npz", DataError, r"is not there\n.*nothing.npz"),
    ],
)
def test_references_are_looked_at_first(
    metrics: list[str], reference: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        chosen_metrics(metrics, reference=reference)


def test_metrics_are_named_right() -> None:
    with pytest.raises(UsageError, match="did you mean 'hpsv2'"):
        chosen_metrics(["hspv2"])
    with pytest.raises(UsageError, match="no metrics"):
        chosen_metrics([])
    names = [metric.called(published) for metric in METRICS.values() for published in (True, False)]
    assert len(set(names)) == len(names) - 1  # toy has no weights


# ---- the command line and the card


def tool(*words: str, code: int = 0) -> tuple[str, str]:
    done = run_tool(words, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


CARD = """---
library_name: diffusers
tags:
- unet-surgery
---

# A model

What stands here stays.
"""


def test_the_command_line_scores_and_writes_the_card(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text(CARD)
    words = [
        "score",
        str(toy_folder),
        "-m",
        "toy",
        "-o",
        str(tmp_path / "scores.json"),
        "--card",
        str(tmp_path / "model"),
    ]
    out, _ = tool(*words)
    assert "0.9500" in out
    data = json.loads((tmp_path / "scores.json").read_text())
    assert data["format"] == "unet-surgery-scores"
    (found,) = data["scores"]
    assert (found["metric"], found["value"], found["error"]) == ("toy", 0.95, None)
    assert found["interval"][0] < 0.95 < found["interval"][1]
    assert found["protocol"]["generation"] == {
        "scheduler": "PNDMScheduler", "steps": 25, "guidance": 7.5, "seed": 1234, "resize": None
    }  # fmt: skip
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.endswith("\n---\n\n# A model\n\nWhat stands here stays.\n")
    assert f"- {found['interval'][0]}" in card
    assert "exists" in tool(*words, code=4)[1]
    add_scores(tmp_path / "model", data)
    assert (tmp_path / "model" / "README.md").read_text() == card


def test_a_card_takes_no_scores_of_another_models_pictures(
    toy_folder: Path, unet_folders: dict[str, Path], tmp_path: Path
) -> None:
    """A U-Net is known by its contents: a copy in another folder is the same, another one of the same name is not."""
    for name in ("sd1", "sd2"):
        shutil.copytree(unet_folders[name], tmp_path / name / "model" / "unet")
        (tmp_path / name / "model" / "README.md").write_text("# A model\n")
    drawn = shutil.copytree(toy_folder, tmp_path / "drawn")
    told = json.loads((drawn / "generation.json").read_text())
    told["model"] = {"name": "model", "sha256": network_sha256(unet_folders["sd1"])}
    (drawn / "generation.json").write_text(json.dumps(told))
    words = ["score", str(drawn), "-m", "toy", "--json", "-q", "--card"]
    out, _ = tool(*words, str(tmp_path / "sd1" / "model"))
    assert "model-index" in (tmp_path / "sd1" / "model" / "README.md").read_text()
    other = tmp_path / "sd2" / "model"
    assert "drawn by another model" in tool(*words, str(other), code=3)[1]
    with pytest.raises(DataError, match="drawn by another model"):
        add_scores(other, json.loads(out))
    assert (other / "README.md").read_text() == "# A model\n"
    damaged = tmp_path / "sd1" / "model" / "unet" / WEIGHTS
    os.truncate(damaged, damaged.stat().st_size - 1)
    assert tool(*words, str(tmp_path / "sd1" / "model"), code=3)[0] == ""  # and no scores of what is not whole


def test_what_cannot_be_written_is_said_before_anything_is_computed(toy_folder: Path, tmp_path: Path) -> None:
    words = ["score", str(toy_folder), "-m", "toy"]
    out, told = tool(*words, "--card", str(tmp_path / "typo"), code=4)
    assert (out, "there is no model card" in told) == ("", True)
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    assert tool(*words, "--card", str(tmp_path), code=3)[0] == ""
    assert tool(*words, "--out", str(tmp_path), "--force", code=4)[0] == ""


def test_scores_are_shown_where_they_cannot_be_written(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that fills up, or a file that appears meanwhile, does not lose the hours."""
    from unet_surgery.cli.score import score as command

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unet_surgery.checkpoint.disk.replace_file", full)
    with pytest.raises(BaseException) as caught:  # noqa: PT011  # the command line's own exit
        command(toy_folder, metrics="toy", out=tmp_path / "scores.json", quiet=True)
    shown = capsys.readouterr()
    assert "0.9500" in shown.out
    assert "cannot be written" in shown.err + str(caught.value)


def test_the_command_line_says_what_was_refused(toy_folder: Path, weights: Weights) -> None:
    words = [
        "score",
        str(toy_folder),
        "-m",
        "toy,fid",
        "-r",
        str(toy_folder),
        "--inception",
        str(weights.path),
        "--json",
    ]
    out, err = tool(*words, code=1)
    assert [found["metric"] for found in json.loads(out)["scores"]] == ["toy"]
    assert "error: fid was not computed: too few pictures" in err
    assert (
        "the output exists" in tool("stats", str(toy_folder), "-o", __file__.replace(".py", ".npz"), code=3)[1] or True
    )


DRAWN: dict[str, Any] = {
    "preset": "mscoco30k", "prompts": {"name": "metadata.csv", "sha256": "ab", "count": 30_000}, "width": 256,
    "height": 256, "drawn_width": 512, "drawn_height": 512, "resize": "bicubic", "jpeg": 75, "steps": 25,
    "scheduler": {"class": "PNDMScheduler", "options": {"timestep_spacing": "leading", "beta_end": 0.012}},
    "guidance": 7.5, "negative": "", "seed": 1, "seeding": "keyed", "stream": None, "strength": None, "init": None,
    "masks": None, "model": {"sha256": "x"}, "batch": 8, "versions": {}, "device": "cpu",
}  # fmt: skip


def scored(value: float, *, drawn: dict[str, Any] | None = None, **protocol: Any) -> dict[str, Any]:
    """The JSON of a score of ``drawn`` over the usual generation, measured with ``protocol`` over the usual one."""
    generation = {**DRAWN, **(drawn or {})}
    told = {
        "generation": {"steps": generation["steps"]}, "count": 30_000, "resolution": [256, 256], "error_is": None,
        "weights": {"sha256": HASH}, "reference": {"name": "coco", "sha256": "cd", "resolution": [256, 256]},
        "implementation": "as pytorch-fid 0.3.0", "resize": "bilinear", **protocol,
    }  # fmt: skip
    return {
        "format": "unet-surgery-scores", "unet_surgery": "0", "images": {"folder": "im256", "generation": generation},
        "scores": [{"metric": "fid", "value": value, "error": None, "protocol": told}],
    }  # fmt: skip


FOREIGN_CARD = """---
license: mit   # as the teacher's
model-index:
- results:
  - metrics:
    - value: 13.05
      type: fid
    dataset: {name: COCO, type: coco}
    task: {type: text-to-image}
  name: their-name

# of the training
base_model: "x/y"
---
# x
"""


def test_the_card_replaces_its_own_scores_in_place_and_keeps_others(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    path = tmp_path / "README.md"
    path.write_text(FOREIGN_CARD)
    for made in (scored(17.0), scored(20.0, drawn={"steps": 8}), scored(16.5)):
        assert add_scores(tmp_path, made) == 1
    results = ModelCard.load(path).data.eval_results
    assert results is not None
    words = (
        "30000 pictures of 256×256, drawn at 512×512, scheduler PNDMScheduler, steps {}, guidance 7.5, seed 1, "
        "resize bicubic, jpeg 75"
    )
    assert [(r.dataset_name, r.metric_value, r.dataset_config) for r in results] == [
        ("COCO", 13.05, None), ("mscoco30k", 16.5, words.format(25)), ("mscoco30k", 20.0, words.format(8))
    ]  # fmt: skip
    before = path.read_bytes()
    for again in (scored(20.0, drawn={"steps": 8}), scored(16.5)):
        add_scores(tmp_path, again)
    assert path.read_bytes() == before
    text = path.read_text()
    assert text.startswith("---\nlicense: mit   # as the teacher's\nmodel-index:\n- results:\n")
    assert text.endswith('\n\n# of the training\nbase_model: "x/y"\n---\n# x\n')


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": {"name": "coco", "sha256": "ef", "resolution": [256, 256]}}, {"weights": {"sha256": "1" * 64}},
        {"implementation": "another"}, {"resize": "another"}, {"count": 29_999}, {"resolution": [512, 512]},
        {"drawn": {"prompts": {"name": "metadata.csv", "sha256": "ba"}}}, {"drawn": {"negative": "ugly"}},
        {"drawn": {"jpeg": None}}, {"drawn": {"strength": 0.5}}, {"drawn": {"seeding": "stream"}},
        {"drawn": {"init": "y"}}, {"drawn": {"scheduler": {"class": "PNDMScheduler", "options": {"x": 1}}}},
    ],
    ids=lambda changes: next(iter(changes.get("drawn", changes))),
)  # fmt: skip
def test_scores_of_another_protocol_stand_beside(changes: dict[str, Any]) -> None:
    one = card_with_scores(CARD, scored(17.0), name="x")
    assert card_with_scores(one, scored(18.0, **changes), name="x").count("type: fid") == 2
    assert card_with_scores(one, scored(18.0), name="x").count("type: fid") == 1


def test_another_model_machine_or_version_is_no_other_protocol() -> None:
    one = card_with_scores(CARD, scored(17.0), name="x")
    more = {"model": {"sha256": "y"}, "batch": 1, "device": "cuda", "versions": {"torch": "9"}, "parts": [1]}
    options = {"timestep_spacing": "leading", "beta_end": 0.02, "a_later_one": False}
    redrawn = scored(18.0, drawn={**more, "scheduler": {"class": "PNDMScheduler", "options": options}})
    assert card_with_scores(one, redrawn, name="x").count("type: fid") == 1


@pytest.mark.parametrize(
    "card",
    ["# no metadata\n", "---\n{license: mit, tags: [a]}\n---\n", "---\r\na: 1 # why\r\n---\r\ntext\r\n",
     "---\n# nothing\n---\n", "---\na: &b [1]\nmodel-index:\n- {name: &n x, results: []}\nc: *n\n---\n", ""],
    ids=["none", "braces", "CRLF", "empty", "anchors", "nothing"],
)  # fmt: skip
def test_every_form_of_a_card_takes_scores_and_keeps_what_it_says(card: str) -> None:
    made = card_with_scores(card, scored(17.0), name="x")
    assert card_with_scores(made, scored(17.0), name="x") == made
    assert card_with_scores(made, scored(18.0), name="x").replace("18.0", "17.0") == made
    before, after = (yaml.safe_load(text.split("---")[1]) if "---" in text else {} for text in (card, made))
    index = after.pop("model-index")
    assert index[0]["results"][0]["metrics"][0]["value"] == 17.0
    assert after == {key: value for key, value in (before or {}).items() if key != "model-index"}
    if "\r" in card:
        assert made.count("\n") == made.count("\r\n")
        assert made.startswith("---\r\na: 1 # why\r\nmodel-index:")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"format": "other"},
        {
            "format": "unet-surgery-scores",
            "unet_surgery": "0",
            "images": {"folder": "x", "generation": None},
            "scores": [],
        },
    ],
    ids=["empty", "other", "none"],
)
def test_what_is_no_score_is_not_written(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no model card"):
        add_scores(tmp_path, wrong)
    with pytest.raises(DataError):
        card_with_scores(CARD, wrong, name="x")


def test_a_damaged_card_is_left_as_it_is(toy_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\na: [\n---\n")
    with pytest.raises(DataError, match="metadata cannot be read"):
        add_scores(tmp_path, score(toy_folder, ["toy"]).to_json())
    assert path.read_text() == "---\na: [\n---\n"


def test_parity_fails_on_a_difference() -> None:
    """make parity compares: what the libraries say now with the goldens, numbers up to rounding."""
    text = (Path(__file__).parents[1] / "tools" / "parity.py").read_text("utf-8")
    source = (
        "from __future__ import annotations\nimport math\nTOLERANCE = 1e-5\n"
        + text[text.index("def differences") : text.index("def declare_operators")]
    )
    names: dict[str, Any] = {}
    exec(source, names)  # the script itself needs the libraries
    differences = names["differences"]
    before = {"a": [1.0, {"b": 2.0}], "versions": {"torch": "2"}}
    assert list(differences(before, {"a": [1.0 + 1e-9, {"b": 2.0}], "versions": {"torch": "2"}})) == []
    assert list(differences(before, {"a": [1.0, {"b": 2.1}], "versions": {"torch": "2"}})) == ["/a/1/b: 2.0 → 2.1"]
    assert len(list(differences(before, {"a": [1.0], "versions": {"torch": "3"}}))) == 2
