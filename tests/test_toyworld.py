"""The toy world: captions and scenes are inverse, pictures are pure, and the checker believes no lies."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

import unet_surgery
from unet_surgery.data.toy import ToyPictures, scenes_of
from unet_surgery.errors import DataError
from unet_surgery.toyworld import draw as drawing
from unet_surgery.toyworld.checker import judge, read
from unet_surgery.toyworld.dice import integers, mixed, uniform
from unet_surgery.toyworld.draw import PALETTE, draw, draw_many
from unet_surgery.toyworld.grammar import (
    BACKGROUNDS,
    COLOURS,
    Scene,
    Thing,
    caption,
    is_held_out,
    one_object_scenes,
    parse,
    two_object_scenes,
    words,
)

PIPELINE = Path(__file__).resolve().parents[1] / "examples" / "toy_world" / "pipeline"
NUM_EACH = 1000
MIRRORED = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

Pictures = np.ndarray[Any, np.dtype[np.uint8]]


@cache
def sample() -> tuple[list[Scene], Pictures]:
    """1,000 pictures of one thing and 1,000 of two, over all scenes."""
    one, two = one_object_scenes(), two_object_scenes()
    numbers = range(NUM_EACH)
    scenes = [one[i] for i in integers(numbers, 0, len(one))] + [two[i] for i in integers(numbers, 1, len(two))]
    return scenes, draw_many(scenes, range(2 * NUM_EACH))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(str(PIPELINE / "tokenizer"))


def other_caption(scene: Scene) -> Scene:
    """The same picture, said from its other thing."""
    if len(scene.things) == 1:
        return scene
    return Scene(scene.things[::-1], MIRRORED[scene.place], scene.background)


# -- grammar ---------------------------------------------------------------------------------------------------------


def test_captions_are_parsed_back_to_their_scenes() -> None:
    scenes = one_object_scenes() + two_object_scenes()
    assert (len(one_object_scenes()), len(two_object_scenes())) == (720, 17_280)
    captions = [caption(scene) for scene in scenes]
    assert len(set(captions)) == len(scenes)
    assert [parse(text) for text in captions] == list(scenes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle at the left on a white background",
        "a small red circle in the left on a white background",
        "a small red circle at the center on a white background",
        "a small white circle at the left on a white background",
        "a small red circle at the left on a red background",
        "a small red circle above a large red square on a white background",
        "a small red circle over a large blue square on a white background",
        "a small red circle at the left on a white background ",
    ],
)
def test_other_text_is_no_caption(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse(text)


def test_scenes_hold_one_or_two_things() -> None:
    thing = Thing("small", "red", "circle")
    for things in ((), (thing, Thing("small", "blue", "circle"), Thing("small", "pink", "circle"))):
        with pytest.raises(ValueError, match="one or two"):
            Scene(things, "left", "white")
    with pytest.raises(ValueError, match="above"):
        Scene((thing,), "above", "white")


@pytest.mark.parametrize("scenes", [one_object_scenes, two_object_scenes], ids=["one", "two"])
def test_a_tenth_is_held_out_with_every_word_in_training(scenes: Callable[[], tuple[Scene, ...]]) -> None:
    held_out = [scene for scene in scenes() if is_held_out(scene)]
    assert 0.08 < len(held_out) / len(scenes()) < 0.12
    assert all(is_held_out(other_caption(scene)) for scene in held_out)
    train = [caption(scene) for scene in scenes() if not is_held_out(scene)]
    assert set(" ".join(train).split()) == set(" ".join(map(caption, scenes())).split())


def test_the_split_never_changes() -> None:
    names = "\n".join(caption(s) for s in one_object_scenes() + two_object_scenes() if is_held_out(s))
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "7d6e92faaba50bed"


# -- dice ------------------------------------------------------------------------------------------------------------


def test_dice_are_golden_uniform_and_independent() -> None:
    assert mixed([0, 1, 2**64 - 1], 0).tolist() == [16294208416658607535, 7960286522194355700, 0]
    numbers = np.stack([uniform(np.arange(20_000), stream) for stream in range(4)])
    assert np.abs(numbers.mean(axis=1) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(numbers) - np.eye(4)).max() < 0.03
    assert np.bincount(integers(np.arange(20_000), 9, 5)).min() > 3_800


# -- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_pure_functions_of_scene_and_seed() -> None:
    scenes, pictures = sample()
    for i in (0, 7, NUM_EACH, 2 * NUM_EACH - 1):
        assert (draw(scenes[i], i) == pictures[i]).all()
        assert (draw(scenes[i], i + 1) != pictures[i]).any()


def test_pictures_never_change() -> None:
    assert hashlib.sha256(sample()[1].tobytes()).hexdigest()[:16] == "bac1d886dad78823"


def test_drawing_is_fast() -> None:
    scenes, _ = sample()
    started = time.process_time()
    draw_many(scenes, range(len(scenes)))
    assert (time.process_time() - started) / len(scenes) < 1e-3  # 0.1 ms on a quiet core


def test_colours_are_far_apart() -> None:
    assert set(PALETTE) == {*COLOURS, *BACKGROUNDS}
    values = np.array(list(PALETTE.values()), dtype=float)
    distances = np.linalg.norm(values[:, None] - values, axis=2) + 1e9 * np.eye(len(values))
    assert distances.min() > 100


def test_large_is_much_larger_and_things_stay_inside() -> None:
    assert drawing.RADII["large"] / drawing.RADII["small"] * 0.97 / 1.03 > 1.3
    scenes, pictures = sample()
    for scene, picture in zip(scenes, pictures, strict=True):
        corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == PALETTE[scene.background]).all()


def test_one_seed_a_scene() -> None:
    with pytest.raises(ValueError, match="1 scenes and 2 seeds"):
        draw_many(one_object_scenes()[:1], [0, 1])


# -- checker ---------------------------------------------------------------------------------------------------------


def blurred(pictures: Pictures, weight: float, noise: float) -> Pictures:
    """Each pixel mixed with its neighbours, and grain: more than a VAE of 30 dB does."""
    out = pictures.astype(np.float64)
    for axis in (1, 2):
        before, after = np.roll(out, 1, axis), np.roll(out, -1, axis)
        for moved, edge in ((before, 0), (after, -1)):
            where: list[Any] = [slice(None)] * 4
            where[axis] = edge
            moved[tuple(where)] = out[tuple(where)]
        out = out * (1 - 2 * weight) + weight * (before + after)
    out += np.random.default_rng(0).normal(0, noise, out.shape)
    return out.clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize(("weight", "noise", "share"), [(0, 0, 0.995), (0.15, 5, 0.99)], ids=["real", "round-trip"])
def test_the_checker_passes_real_pictures(weight: float, noise: float, share: float) -> None:
    scenes, pictures = sample()
    shown = blurred(pictures, weight, noise) if weight else pictures
    started = time.process_time()
    right = [judge(picture, caption(scene)).right for scene, picture in zip(scenes, shown, strict=True)]
    assert (time.process_time() - started) / len(scenes) < 10e-3  # 1.5 ms on a quiet core
    assert np.mean(right[:NUM_EACH]) >= share
    assert np.mean(right[NUM_EACH:]) >= share


def test_the_checker_passes_no_other_caption() -> None:
    scenes, pictures = sample()
    for i, picture in enumerate(pictures):
        other = scenes[(i + (1 if i % 2 else NUM_EACH)) % len(scenes)]
        if scenes[i] not in {other, other_caption(other)}:
            assert not judge(picture, caption(other)).right, (caption(scenes[i]), caption(other))


@given(st.integers(0, 719), st.integers(0, 17_279), st.integers(0, 2**64 - 1), st.data())
def test_one_wrong_word_is_found_and_named(one: int, two: int, seed: int, data: st.DataObject) -> None:
    scene = data.draw(st.sampled_from([one_object_scenes()[one], two_object_scenes()[two]]))
    attribute = data.draw(st.sampled_from(["background", "size", "shape", "place", "colour"]))
    text = caption(scene)
    choices = [
        other
        for other in (one_object_scenes() if len(scene.things) == 1 else two_object_scenes()[::7])
        if differing(scene, other) == {attribute}
    ]
    picture = draw(scene, seed)
    assert judge(picture, text).right
    if choices:
        verdict = judge(picture, caption(data.draw(st.sampled_from(choices))))
        assert {name for name, right in verdict.attributes.items() if not right} == {attribute}


def differing(scene: Scene, other: Scene) -> set[str]:
    kinds = {"background": scene.background != other.background, "place": scene.place != other.place}
    for kind in ("size", "colour", "shape"):
        kinds[kind] = [getattr(t, kind) for t in scene.things] != [getattr(t, kind) for t in other.things]
    return {kind for kind, differs in kinds.items() if differs}


def test_both_captions_of_a_picture_are_right() -> None:
    scenes, pictures = sample()
    for scene, picture in list(zip(scenes, pictures, strict=True))[NUM_EACH : NUM_EACH + 100]:
        assert judge(picture, caption(other_caption(scene))).right


def mush(seed: int) -> Pictures:
    """Smooth random colours, as an untrained network gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)


def test_noise_blanks_and_mush_are_no_pictures() -> None:
    rng = np.random.default_rng(0)
    texts = [caption(scene) for scene in sample()[0][::67]]
    pictures = [rng.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(20)]
    pictures += [mush(seed) for seed in range(20)]
    pictures += [np.full((32, 32, 3), value, dtype=np.uint8) for value in PALETTE.values()]
    pictures += [(sample()[1][i] // 2 + sample()[1][i + NUM_EACH] // 2) for i in range(20)]  # two pictures in one
    assert not any(judge(picture, text).right for picture in pictures for text in texts)


def test_a_blank_says_what_it_is() -> None:
    reading = read(np.full((32, 32, 3), PALETTE["navy"], dtype=np.uint8))
    assert (reading.background, reading.things, reading.mess) == ("navy", (), 0.0)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_half_a_thing_is_not_its_shape(shape: str) -> None:
    text = f"a large red {shape} in the center on a white background"
    picture = draw(parse(text), 0)
    picture[:, 16:] = PALETTE["white"]
    verdict = judge(picture, text)
    assert not verdict.right
    assert not verdict.attributes["shape"] or not verdict.attributes["place"]


def test_a_stain_is_seen() -> None:
    text = "a small red circle at the left on a white background"
    picture = draw(parse(text), 0)
    picture[20:27, 20:27] = (0, 220, 220)  # no colour of the palette
    assert [name for name, right in judge(picture, text).attributes.items() if not right] == ["clean"]


def test_a_picture_has_one_shape_and_type() -> None:
    for picture in (np.zeros((16, 16, 3), np.uint8), np.zeros((32, 32, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            read(picture)  # type: ignore[arg-type]


# -- as training data ------------------------------------------------------------------------------------------------


def test_toy_pictures_are_pure_functions_of_seed_and_number(tokenizer: Any) -> None:
    pictures = ToyPictures(tokenizer, 1000, 5)
    pixels, ids = pictures.batch([3, 999, 3])
    assert (pixels.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert (tuple(pixels.shape), tuple(ids.shape)) == ((3, 3, 32, 32), (3, 24))
    assert torch.equal(pixels[0], pixels[2])
    longer = ToyPictures(tokenizer, 2000, 5)
    assert torch.equal(longer.batch([999])[0][0], pixels[1])
    assert not torch.equal(ToyPictures(tokenizer, 1000, 6).batch([3])[0][0], pixels[0])
    for index in (-1, 1000):
        with pytest.raises(IndexError):
            pictures.batch([index])


def test_toy_pictures_show_what_their_captions_say(tokenizer: Any) -> None:
    pictures = ToyPictures(tokenizer, 200, 0)
    numbers = range(200)
    pixels, ids = pictures.batch(numbers)
    assert -1 <= float(pixels.min()) < float(pixels.max()) <= 1
    shown = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    captions = pictures.captions(numbers)
    assert all(judge(picture, text).right for picture, text in zip(shown, captions, strict=True))
    assert [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids] == captions
    assert tokenizer.decode(pictures.empty_ids(), skip_special_tokens=True) == ""


@pytest.mark.parametrize(("objects", "share"), [("one", 0.0), ("two", 1.0), ("both", 0.5)])
def test_the_share_of_pairs(tokenizer: Any, objects: Any, share: float) -> None:
    scenes = ToyPictures(tokenizer, 2000, 1, objects=objects).scenes(range(2000))
    assert abs(np.mean([len(scene.things) == 2 for scene in scenes]) - share) < 0.05
    assert not any(is_held_out(scene) for scene in scenes)


def test_splits_are_apart_and_whole(tokenizer: Any) -> None:
    assert all(is_held_out(s) for s in ToyPictures(tokenizer, 500, 0, split="held_out").scenes(range(500)))
    for objects in ("one", "two"):
        parts = [scenes_of(objects, split) for split in ("train", "held_out")]  # type: ignore[arg-type]
        assert not set(parts[0]) & set(parts[1])
        assert set(parts[0]) | set(parts[1]) == set(scenes_of(objects, "all"))  # type: ignore[arg-type]


def test_the_fingerprint_tells_sets_apart(tokenizer: Any) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"count": 11},
        {"objects": "one"},
        {"split": "all"},
        {"two_share": 0.25},
    ]
    prints = [ToyPictures(**({"tokenizer": tokenizer, "count": 10, "seed": 0} | kind)).fingerprint for kind in kinds]
    assert len(set(prints)) == len(kinds)
    assert ToyPictures(tokenizer, 10, 0).fingerprint == prints[0]


def test_threads_get_the_same(tokenizer: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    pictures = ToyPictures(tokenizer, 4000, 2)
    with ThreadPoolExecutor(4) as threads:
        batches = list(threads.map(lambda k: pictures.batch(range(k, 4000, 8)), range(8)))
    for k in (0, 5):
        pixels, ids = ToyPictures(tokenizer, 4000, 2).batch(range(k, 4000, 8))
        assert torch.equal(batches[k][0], pixels)
        assert torch.equal(batches[k][1], ids)


def test_short_tokenizers_and_wrong_counts_are_refused(tokenizer: Any) -> None:
    short = CLIPTokenizer.from_pretrained(str(PIPELINE / "tokenizer"), model_max_length=12)
    with pytest.raises(DataError, match="do not fit"):
        ToyPictures(short, 10, 0)
    with pytest.raises(DataError, match="counted from 1"):
        ToyPictures(tokenizer, 0, 0)


# -- the pipeline's configs ------------------------------------------------------------------------------------------


def test_every_word_is_one_token_in_both_forms(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((PIPELINE / "tokenizer" / name).read_bytes())
    old = CLIPTokenizer.from_pretrained(str(tmp_path))  # as older readers, which know these two files only
    for word in words():
        assert len(tokenizer(word).input_ids) == 3
        assert old(word).input_ids == tokenizer(word).input_ids
    texts = [caption(scene) for scene in sample()[0][::100]]
    assert [len(row) for row in tokenizer(texts).input_ids] == [len(text.split()) + 2 for text in texts]
    assert old("snow, 3 Cats!").input_ids == tokenizer("snow, 3 Cats!").input_ids


@pytest.mark.parametrize(
    "recipe", ["bk_base", "bk_small", "bk_tiny", "ofa_small", "segmind_small", "segmind_tiny", "sdxs_512"]
)
def test_every_recipe_for_sd1_applies(recipe: str) -> None:
    plan = unet_surgery.plan(recipe, str(PIPELINE))
    assert plan.student.params < plan.teacher.params == 8_605_284


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.fspath(PIPELINE.parent))


@pytest.mark.usefixtures("examples")
def test_scores_are_counted_with_their_interval() -> None:
    from score import captions_of, score, wilson

    captions = captions_of("one", 80) + captions_of("two", 20)
    assert len(set(captions)) == 92  # all 72 held-out scenes of one thing before any again
    assert all(is_held_out(parse(text)) for text in captions)

    def drawn(texts: Sequence[str], seed: int) -> Pictures:  # whatever the caption says of sizes, small
        return np.stack([draw(parse(text.replace("large", "small")), seed) for text in texts])

    found = score(drawn, captions, [0, 1])
    small = ["large" not in text for text in captions]
    for kind, part, num in (("all", small, 200), ("one", small[:80], 160), ("two", small[80:], 40)):
        assert found[kind]["pictures"] == num
        assert found[kind]["right"] == found[kind]["attributes"]["size"] == np.mean(part)
        assert found[kind]["attributes"]["shape"] == found[kind]["attributes"]["place"] == 1
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.usefixtures("examples")
def test_centering_the_latents_changes_no_picture() -> None:
    import train_parts
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(str(PIPELINE / "vae")))
    pictures = torch.from_numpy(sample()[1][::250].copy()).permute(0, 3, 1, 2)
    with torch.no_grad():
        vae.quant_conv.bias[:4] += torch.tensor([0.5, -1.0, 2.0, 0.0])
        vae.quant_conv.weight[:4] *= torch.tensor([1.0, 2.0, 3.0, 0.5])[:, None, None, None]
        mean, logvar = train_parts.moments(vae, train_parts.scaled(pictures))
        before = train_parts.decoded(vae, mean + torch.exp(0.5 * logvar))
        train_parts.center_and_balance(vae, pictures)
        mean, logvar = train_parts.moments(vae, train_parts.scaled(pictures))
        after = train_parts.decoded(vae, mean + torch.exp(0.5 * logvar))
        latents = train_parts.sampled(vae, pictures)
    assert torch.allclose(before, after, atol=1e-4)
    assert float(latents.mean(dim=(0, 2, 3)).abs().max()) < 0.1
    stds = latents.std(dim=(0, 2, 3))
    assert float(stds.max() / stds.min()) < 1.1
