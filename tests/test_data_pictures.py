"""Pictures and captions as training data: every hostile one gets its reason, every odd one its right colours."""

from __future__ import annotations

import io
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from unet_surgery.data.captions import MAX_CAPTION_CHARS, check_caption
from unet_surgery.data.pictures import PictureLimits, decode_picture
from unet_surgery.data.reasons import REASONS, BadSampleError

SIDE = 64
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Red grows to the right, green downwards: so no turn or mirror image is the same picture."""
    red = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], -1).astype(np.uint8))


def noise(side: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


JPEG, PNG, WEBP = saved(noise(), "JPEG"), saved(noise()), saved(noise(), "WEBP")
ROTTEN = bytearray(PNG)
ROTTEN[1000:1100] = bytes(100)

BAD_PICTURES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "half a PNG": (PNG[: len(PNG) // 2], "truncated"),
    "a TIFF without its end": (saved(noise(), "TIFF")[:5000], "truncated"),
    "half a WebP": (WEBP[: len(WEBP) // 2], "unreadable"),
    "a JPEG's first bytes": (JPEG[:10], "truncated"),
    "a rotten PNG": (bytes(ROTTEN), "unreadable"),
    "zero bytes": (bytes(5000), "unreadable"),
    "random bytes": (np.random.default_rng(1).bytes(5000), "unreadable"),
    "text": (b"not a picture" * 50, "unreadable"),
    "a page": (b"<!DOCTYPE html><html><body>404</body></html>", "html"),
    "a page after white space": (b"\n  <html><body>sign in</body></html>", "html"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "lfs-pointer"),
    "a bomb": (png_header(30000, 30000), "bomb"),
    "a bomb that PIL only warns of": (png_header(10000, 10000), "bomb"),
    "a bomb that PIL lets pass": (png_header(8193, 8193), "bomb"),
    "1×1": (saved(Image.new("RGB", (1, 1))), "too-small"),
    "15 pixels high": (saved(Image.new("RGB", (40, 15))), "too-small"),
    "a ribbon": (saved(Image.new("RGB", (400, 16))), "extreme-aspect"),
    "a pillar": (saved(Image.new("RGB", (20, 161))), "extreme-aspect"),
    "floating point": (saved(Image.fromarray(np.ones((32, 32), np.float32)), "TIFF"), "unreadable"),
    "32 bits": (saved(Image.fromarray(np.full((32, 32), 1 << 20, np.int32)), "TIFF"), "unreadable"),
    "a format that is not for pictures": (saved(Image.new("RGB", (64, 64)), "PCX"), "unreadable"),
    "PostScript, which would start Ghostscript": (saved(Image.new("RGB", (64, 64)), "EPS"), "unreadable"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_bad_picture_gets_its_reason(case: str) -> None:
    data, reason = BAD_PICTURES[case]
    with pytest.raises(BadSampleError) as caught:
        decode_picture(data, 32)
    assert caught.value.reason == reason
    assert reason in REASONS
    assert str(caught.value).isprintable() or "\n" in str(caught.value)
    with pytest.raises(BadSampleError) as again:
        decode_picture(data, 32)
    assert again.value.found == caught.value.found
    assert "object at 0x" not in str(caught.value)


def test_no_decoders_words_have_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(picture: Image.Image) -> Image.Image:
        raise ValueError(f"cannot read {io.BytesIO()!r}")

    monkeypatch.setattr("unet_surgery.data.pictures._as_rgb", refuse)
    with pytest.raises(BadSampleError) as caught:
        decode_picture(PNG, 32)
    assert caught.value.found == "cannot read the data"


@given(cut=st.integers(0, len(JPEG)), at=st.integers(0, len(JPEG) - 1), byte=st.integers(0, 255))
def test_damage_is_refused_or_harmless(cut: int, at: int, byte: int) -> None:
    """Whatever a disk does to a file, it is a picture or a reason, and nothing is printed or warned of."""
    data = bytearray(JPEG[:cut] if cut % 2 else JPEG)
    if at < len(data):
        data[at] = byte
    try:
        assert decode_picture(bytes(data), 16).shape == (16, 16, 3)
    except BadSampleError as error:
        assert error.reason in REASONS  # noqa: PT017


ODD_PICTURES = {
    "palette": saved(Image.new("RGB", (SIDE, SIDE), RED).convert("P", palette=Image.Palette.ADAPTIVE)),
    "palette of a GIF": saved(Image.new("RGB", (SIDE, SIDE), RED), "GIF"),
    "CMYK": saved(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG", quality=100),
    "CMYK TIFF": saved(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "TIFF"),
    "alpha, opaque": saved(Image.new("RGBA", (SIDE, SIDE), (*RED, 255))),
    "RGB, 1:8": saved(Image.new("RGB", (8 * SIDE, SIDE), RED)),
    "WebP": saved(Image.new("RGB", (SIDE, SIDE), RED), "WEBP", lossless=True),
    "BMP": saved(Image.new("RGB", (SIDE, SIDE), RED), "BMP"),
    "animated": saved(
        Image.new("RGB", (SIDE, SIDE), RED),
        "GIF",
        save_all=True,
        append_images=[Image.new("RGB", (SIDE, SIDE), GREEN), Image.new("RGB", (SIDE, SIDE), BLUE)],
    ),
    "animated WebP": saved(
        Image.new("RGB", (SIDE, SIDE), RED),
        "WEBP",
        save_all=True,
        lossless=True,
        append_images=[Image.new("RGB", (SIDE, SIDE), GREEN)],
    ),
}


@pytest.mark.parametrize("case", ODD_PICTURES)
def test_an_odd_picture_keeps_its_colour(case: str) -> None:
    picture = decode_picture(ODD_PICTURES[case], 32)
    assert picture.dtype == np.uint8
    assert picture.shape == (32, 32, 3)
    assert np.abs(picture.astype(int) - RED).max() <= 3


def transparent(mode: str) -> bytes:
    """Left half clear, right half black."""
    rgba = np.zeros((SIDE, SIDE, 4), np.uint8)
    rgba[:, SIDE // 2 :, 3] = 255
    picture = Image.fromarray(rgba)
    if mode == "P":
        palette = Image.new("P", (SIDE, SIDE), 1)
        palette.putpalette([0, 0, 0] * 2)
        palette.paste(0, (0, 0, SIDE // 2, SIDE))
        return saved(palette, transparency=0)
    if mode == "P with bytes":
        palette = Image.new("P", (SIDE, SIDE), 1)
        palette.putpalette([0, 0, 0] * 2)
        palette.paste(0, (0, 0, SIDE // 2, SIDE))
        return saved(palette, transparency=b"\x00\xff")
    if mode == "RGB":
        picture = Image.new("RGB", (SIDE, SIDE), (0, 0, 0))
        picture.paste((1, 2, 3), (0, 0, SIDE // 2, SIDE))
        return saved(picture, transparency=(1, 2, 3))
    return saved(picture.convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P with bytes", "RGB"])
def test_what_is_transparent_stands_over_white(mode: str) -> None:
    picture = decode_picture(transparent(mode), SIDE)
    assert (picture[:, : SIDE // 2 - 2] == 255).all()
    assert (picture[:, SIDE // 2 + 2 :] == 0).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_become_8_by_their_high_byte(kind: str) -> None:
    values = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 16
    picture = decode_picture(saved(Image.fromarray(values), kind), SIDE)
    assert (picture == (values >> 8)[:, :, None]).all()


def test_grey_and_two_colours() -> None:
    assert (decode_picture(saved(Image.new("L", (SIDE, SIDE), 77)), 16) == 77).all()
    assert (decode_picture(saved(Image.new("1", (SIDE, SIDE), 1)), 16) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(orientation: int) -> None:
    """The picture is stored as a camera would store it, by numpy; what comes back is upright."""
    upright = np.asarray(gradient())
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert (decode_picture(data, SIDE) == upright).all()


def test_a_damaged_exif_block_is_no_reason() -> None:
    data = saved(gradient(), "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert decode_picture(data, 32).shape == (32, 32, 3)


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (65, 64), (64, 65), (400, 301)])
def test_the_middle_is_kept(width: int, height: int) -> None:
    """As the field does it: resize the shorter side, crop the middle; here in one step, so rounding may differ."""
    picture = gradient(width, height)
    scale = 32 / min(width, height)
    resized = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32))).astype(int)
    assert np.abs(decode_picture(saved(picture), 32).astype(int) - expected).max() <= 255 / 32 + 1


def test_nothing_is_resampled_at_its_own_size() -> None:
    assert (decode_picture(saved(noise(32)), 32) == np.asarray(noise(32))).all()


def test_limits_are_options() -> None:
    small, ribbon = saved(Image.new("RGB", (4, 4))), saved(Image.new("RGB", (400, 16)))
    assert decode_picture(small, 8, PictureLimits(min_side=4)).shape == (8, 8, 3)
    assert decode_picture(ribbon, 8, PictureLimits(max_aspect=30)).shape == (8, 8, 3)
    with pytest.raises(BadSampleError, match="bomb"):
        decode_picture(ribbon, 8, PictureLimits(max_pixels=6399, max_aspect=30))


def test_threads_see_no_warnings_and_the_filters_stay(recwarn: pytest.WarningsRecorder) -> None:
    """Warning filters belong to the process: while threads decode, PIL's warnings must not come through."""
    before, failures = list(warnings.filters), []

    def decode() -> None:
        for _ in range(20):
            try:
                decode_picture(png_header(10000, 10000), 8)
            except BadSampleError as error:
                if error.reason != "bomb":
                    failures.append(error)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(warnings.filters) == before
    assert not recwarn.list


def test_only_one_thread_at_a_time_changes_the_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, real = 0, 0, Image.open

    def slow(*arguments: object, **options: object) -> Image.Image:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.005)
        inside -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(Image, "open", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: decode_picture(PNG, 16), range(16)))
    assert most == 1


def test_avif_is_read_where_pil_can() -> None:
    if not features.check("avif"):
        pytest.skip("this PIL has no AVIF")
    picture = decode_picture(saved(Image.new("RGB", (SIDE, SIDE), RED), "AVIF"), 32)
    assert np.abs(picture.astype(int) - RED).max() <= 12


BAD_CAPTIONS: dict[str, tuple[object, str]] = {
    "null": (None, "caption-missing"),
    "empty": ("", "caption-empty"),
    "blank": (" \t\n", "caption-empty"),
    "huge": ("a" * (MAX_CAPTION_CHARS + 1), "caption-huge"),
    "a number": (7, "caption-bad-text"),
    "a list": (["a"], "caption-bad-text"),
    "NUL": ("a\0b", "caption-bad-text"),
    "escape": ("a\x1b[31mred", "caption-bad-text"),
    "C1 control": ("a\x9bb", "caption-bad-text"),
    "lone surrogate": ("a\ud800b", "caption-bad-text"),
    "bytes that are no UTF-8": (b"caf\xe9".decode("utf-8", "surrogateescape"), "caption-bad-text"),
}


@pytest.mark.parametrize("case", BAD_CAPTIONS)
def test_a_bad_caption_gets_its_reason(case: str) -> None:
    caption, reason = BAD_CAPTIONS[case]
    with pytest.raises(BadSampleError) as caught:
        check_caption(caption)
    assert caught.value.reason == reason
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "caption", ["a dog", "two\nlines\tand a tab", "ein Häuschen, 犬, 🐕‍🦺", "a" * MAX_CAPTION_CHARS]
)
def test_a_good_caption_stays_as_it_is(caption: str) -> None:
    assert check_caption(caption) == caption
