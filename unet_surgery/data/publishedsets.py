"""The published sets that ``unet-surgery data get`` fetches: what they are, where they lie, what is known of them.

A size or hash that nobody published is None, and then it is not checked. Plain http is used only where the hash is
known. Sources of the facts:

- LAION subsets, captions and FID statistics: Nota-NetsPresso/BK-SDM, scripts/get_laion_data.sh, get_mscoco_files.sh,
  src/get_stat_mscoco_val2014.py (sizes to two digits, counts exactly); the statistics are of all of MS-COCO val2014,
  each picture squeezed to 256 pixels and stored as JPEG, which the file itself does not say;
- MS-COCO: sizes and hashes as tensorflow/datasets pins them (url_checksums/coco.txt); that of captions_val2017.json as
  several evaluation suites pin it;
- HPSv2: files of zhwang/HPDv2 at a commit, with their sizes and hashes.
"""

from __future__ import annotations

import difflib
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

from unet_surgery.data.statisticsnote import StatisticsNote
from unet_surgery.errors import UsageError, printable

__all__ = ["COCO_STATISTICS", "SETS", "Archive", "Piece", "PublishedSet", "find_set"]

_BK_SDM = "https://netspresso-research-code-release.s3.us-east-2.amazonaws.com/data"
_COCO = "http://images.cocodataset.org"
_HPD = "zhwang/HPDv2"
_HPD_COMMIT = "b9517430f34b1080d4f741118d2440a155a165cd"
GIGA = 10**9

_LAION_LICENCE = (
    "captions and addresses: LAION, CC-BY-4.0; the pictures belong to their owners, and come from the open web"
)
_COCO_LICENCE = "captions: COCO Consortium, CC-BY-4.0; pictures: Flickr's terms, each with a licence of its own"


@dataclass(frozen=True, slots=True)
class Archive:
    """How a piece is packed. ``top`` is a folder that its files lie in, and that is not made; ``only`` what is taken.

    ``unpacked_bytes`` and ``max_files`` are about what comes out: room is asked for, and bombs are bounded, by them.
    """

    kind: str
    unpacked_bytes: int
    max_files: int
    top: str = ""
    only: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A file to fetch; ``address`` is a URL, or ``hub:org/name@commit/path`` for a dataset's file on the Hub.

    ``about_bytes`` is the published size where the exact one, ``size``, is not known; None: nobody says. ``name`` is
    what it is called here, and at a mirror. ``note`` is what is known of FID statistics beside what they hold.
    """

    address: str
    about_bytes: int | None = None
    size: int | None = None
    sha256: str | None = None
    archive: Archive | None = None
    note: StatisticsNote | None = None

    @property
    def name(self) -> str:
        return PurePosixPath(self.address).name

    @property
    def num_bytes(self) -> int | None:
        return self.size or self.about_bytes


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """A set by its name. ``num_pictures`` is how many its publisher counts in it."""

    name: str
    what: str
    pieces: tuple[Piece, ...]
    licence: str
    source: str
    use: str
    """A command that takes it, with ``{folder}`` in place of the folder it lies in."""
    num_pictures: int | None = None
    captions: str | None = None
    """COCO's captions among what is unpacked, of which metadata.csv is made."""

    def use_in(self, folder: str) -> str:
        """Return a command that takes the set from ``folder``, as a shell reads it."""
        return self.use.format(folder=shlex.quote(folder))

    @property
    def num_bytes(self) -> int | None:
        """How much is fetched; None where nobody says."""
        sizes = [piece.num_bytes for piece in self.pieces]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def unpacked_bytes(self) -> int:
        """How much room the set takes, as far as that is known."""
        return sum(p.archive.unpacked_bytes if p.archive else p.num_bytes or 0 for p in self.pieces)

    @property
    def is_checked(self) -> bool:
        """True if the hash of every piece is known."""
        return all(piece.sha256 for piece in self.pieces)


def _laion(name: str, count: int, score: str, packed: float, unpacked: float) -> PublishedSet:
    top = f"preprocessed_{name}"
    archive = Archive("tar.gz", int(unpacked * GIGA), 2 * count + 1000, top=top)
    return PublishedSet(
        name=f"laion-{name}",
        what=f"{count:,} pictures with captions, of LAION-Aesthetics {score} and above: what BK-SDM trained on",
        pieces=(Piece(f"{_BK_SDM}/improved_aesthetics_{score}plus/{top}.tar.gz", int(packed * GIGA), archive=archive),),
        licence=_LAION_LICENCE,
        source="Nota-NetsPresso/BK-SDM: scripts/get_laion_data.sh",
        use="unet-surgery cache {folder} --model MODEL --out latents",
        num_pictures=count,
    )


def _coco_annotations(year: int, size: int, sha256: str) -> Piece:
    return Piece(
        f"{_COCO}/annotations/annotations_trainval{year}.zip",
        size,
        size,
        sha256,
        Archive("zip", 50_000_000, 1, top="annotations", only=f"annotations/captions_val{year}.json"),
    )


def _hpd(style: str, size: int, sha256: str) -> Piece:
    return Piece(f"hub:{_HPD}@{_HPD_COMMIT}/benchmark/{style}.json", size, size, sha256)


COCO_STATISTICS = StatisticsNote(
    "MS-COCO val2014 (BK-SDM)", 40_504, (256, 256), "bicubic to 256×256, JPEG of quality 75"
)
"""What BK-SDM's FID compares with."""

SETS = {
    published.name: published
    for published in (
        _laion("11k", 10_274, "6.5", 1.7, 1.8),
        _laion("212k", 212_776, "6.5", 18, 20),
        _laion("2256k", 2_256_472, "6.25", 182, 204),
        PublishedSet(
            name="mscoco30k",
            what="30,000 captions of MS-COCO val2014, and the FID statistics of its 41k pictures at 256 pixels",
            pieces=(
                Piece(f"{_BK_SDM}/mscoco_val2014_30k/metadata.csv"),
                Piece(
                    f"{_BK_SDM}/mscoco_val2014_41k_full/real_im256.npz",
                    note=COCO_STATISTICS,
                ),
            ),
            licence=_COCO_LICENCE,
            source="Nota-NetsPresso/BK-SDM: scripts/get_mscoco_files.sh",
            use="unet-surgery generate MODEL --preset mscoco30k --prompts {folder}/metadata.csv --out pictures",
        ),
        PublishedSet(
            name="mscoco-val2014",
            what="the 40,504 pictures of MS-COCO val2014, the real ones of FID, and their captions",
            pieces=(
                Piece(
                    f"{_COCO}/zips/val2014.zip",
                    6_645_013_297,
                    6_645_013_297,
                    "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
                    Archive("zip", 6_700_000_000, 41_000, top="val2014"),
                ),
                _coco_annotations(
                    2014, 252_872_794, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"
                ),
            ),
            licence=_COCO_LICENCE,
            source="cocodataset.org; Nota-NetsPresso/BK-SDM: src/get_stat_mscoco_val2014.py",
            use="unet-surgery stats {folder} --resize 256 --jpeg 75 --out coco256.npz",
            num_pictures=40_504,
            captions="captions_val2014.json",
        ),
        PublishedSet(
            name="mscoco5k",
            what="the captions of MS-COCO val2017's 5,000 pictures",
            pieces=(
                _coco_annotations(
                    2017, 252_907_541, "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"
                ),
            ),
            licence=_COCO_LICENCE,
            source="cocodataset.org",
            use="unet-surgery generate MODEL --preset mscoco5k --prompts {folder}/captions_val2017.json --out pictures",
        ),
        PublishedSet(
            name="hpsv2",
            what="the prompts of the HPSv2 benchmark: 800 each of anime, concept-art, paintings, photo",
            pieces=(
                _hpd("anime", 62_816, "6b38a479cc6f899866e9b7a8bf91f096b4afc6883b95275a61891327182b14ae"),
                _hpd("concept-art", 85_787, "530d057deafcb82c581e9d1be2ffcb98828fe99f0b54257414d2ab8a5cf2b83e"),
                _hpd("paintings", 81_338, "6570d39467e08b24b64e5b8a4177b0f61c525631121dc5a91fe2ab956eab4d5f"),
                _hpd("photo", 44_606, "92a3c9a0f743f66eb87bd112cdda830d6bdb4c073c86021d53b74001fcb18052"),
            ),
            licence="Apache-2.0, as the card of ymhao/HPDv2 says; that of zhwang/HPDv2 says nothing",
            source=f"huggingface.co/datasets/{_HPD}; tgxs002/HPSv2",
            use="unet-surgery generate MODEL --preset hpsv2 --prompts {folder}/photo.json --out pictures",
        ),
    )
}


def find_set(name: str) -> PublishedSet:
    """Return a set by its name.

    Raises:
        UsageError: there is none of that name; offers the nearest.
    """
    if name in SETS:
        return SETS[name]
    close = difflib.get_close_matches(name, SETS, n=1)
    raise UsageError(
        f"there is no published set {printable(name)} here",
        expected=", ".join(SETS),
        hint=f"did you mean {close[0]}?" if close else "unet-surgery data ls",
    )
