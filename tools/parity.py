"""Golden numbers of the libraries that published scores came from, on seeded random weights and pictures.

    make parity

runs this in an environment of its own, where torch, torchvision, pytorch-fid, torch-fidelity, open_clip and hpsv2 are
(parity-constraints.txt), and compares what they say with tests/goldens/scores.json: exit status 1 if a number differs
by more than rounding. ``--write`` rewrites that file. The tests compare this package with it. What the seeds make is in
tests/seeded.py, which both sides use.

torchvision's compiled operators do not load beside a CPU build of torch; two are declared, none is called: what is
used of it (its Inception, its transforms) is Python. hpsv2's wheel lacks the vocabulary that it reads when it is
imported; open_clip's wheel has the same file, and lends it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import seeded  # noqa: E402

LIBRARIES = (
    "torch",
    "torchvision",
    "pytorch-fid",
    "torch-fidelity",
    "open_clip_torch",
    "hpsv2",
    "scipy",
    "numpy",
    "pillow",
    "ftfy",
)
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
TOLERANCE = 1e-5
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    operators = declare_operators()  # which end with what declared them
    _lend_vocabulary()
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        os.environ["TORCH_HOME"] = str(folder)
        goldens = {"versions": {library: importlib.metadata.version(library) for library in LIBRARIES}}
        goldens |= inception(folder) | files(folder) | distances() | clip(folder)
    del operators
    path = ROOT / "tests" / "goldens" / "scores.json"
    if "--write" in sys.argv[1:]:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(goldens, indent=1) + "\n", "utf-8")
        sys.stdout.write(f"{path}\n")
        return
    differ = list(differences(json.loads(path.read_text("utf-8")), json.loads(json.dumps(goldens))))
    sys.stdout.write("\n".join(differ or ["no difference"]) + "\n")
    sys.exit(1 if differ else 0)


def differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """Yield in words where two goldens differ: numbers by more than another machine's rounding, all else at all."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from differences(before.get(key), now.get(key), f"{place}/{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{place}/{index}")
    elif type(before) is float and type(now) is float:
        if not math.isclose(before, now, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{place}: {before} → {now}"
    elif before != now:
        yield f"{place}: {before!r} → {now!r}"


def declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _lend_vocabulary() -> None:
    lender, borrower = (Path(str(find_spec(name).origin)).parent for name in ("open_clip", "hpsv2"))  # type: ignore[union-attr]
    if not (borrower / "src" / "open_clip" / VOCABULARY).exists():
        shutil.copy(lender / VOCABULARY, borrower / "src" / "open_clip" / VOCABULARY)


def inception(folder: Path) -> dict[str, Any]:
    from pytorch_fid import fid_score
    from pytorch_fid.inception import InceptionV3, _inception_v3
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    shapes = {
        name: tuple(value.shape)
        for name, value in _inception_v3(num_classes=1008, aux_logits=False, weights=None).state_dict().items()
    }
    counted = [name for name in shapes if name.endswith("num_batches_tracked")]
    shapes = {name: shape for name, shape in shapes.items() if name not in counted}
    tensors = {name: torch.from_numpy(value) for name, value in seeded.seeded_tensors(shapes).items()}
    tensors |= {name: torch.zeros((), dtype=torch.int64) for name in counted}
    weights = folder / "hub" / "checkpoints" / INCEPTION_FILE
    weights.parent.mkdir(parents=True)
    torch.save(tensors, weights)

    theirs = InceptionV3([3])
    other = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    rows = []
    for width, height in seeded.SIZES:
        values = seeded.pictures(2, width, height)
        paths = seeded.write_pictures(folder / f"{width}x{height}", values)
        pool3_first = fid_score.get_activations(paths, theirs.eval(), 2, 2048, "cpu", 0)
        pool3_second, class_scores = other(torch.from_numpy(values).permute(0, 3, 1, 2))
        rows.append({
            "size": [width, height],
            "pytorch_fid": _thinned(pool3_first),
            "torch_fidelity": _thinned(pool3_second.numpy()),
            "logits": _thinned(class_scores.numpy()),
        })  # fmt: skip
    return {
        "inception_names": seeded.digest_of(f"{name} {list(shape)}" for name, shape in shapes.items()),
        "inception": rows,
    }


def files(folder: Path) -> dict[str, Any]:
    """From two folders to the numbers, by what the libraries' commands call; after :func:`inception`, whose weights."""
    from pytorch_fid.fid_score import calculate_fid_given_paths
    from torch_fidelity import calculate_metrics

    for seed in (1, 2):
        seeded.write_pictures(folder / f"alike {seed}", seeded.pictures(*seeded.FROM_FILES, seed))
        seeded.write_pictures(folder / f"unlike {seed}", seeded.unlike_pictures(seed))
    alike = [str(folder / f"alike {seed}") for seed in (1, 2)]  # of others so few, its root is not real
    found = calculate_metrics(
        input1=str(folder / "unlike 1"),
        input2=str(folder / "unlike 2"),
        cuda=False,
        isc=True,
        kid=True,
        isc_splits=seeded.SPLITS,
        kid_subset_size=seeded.SUBSET_SIZE,
        kid_subsets=seeded.SUBSETS,
        feature_extractor_weights_path=str(folder / "hub" / "checkpoints" / INCEPTION_FILE),
        cache=False,
        verbose=False,
    )
    return {
        "files": {
            "fid": float(calculate_fid_given_paths(alike, 2, "cpu", 2048, 0)),
            "is": [found[f"inception_score_{part}"] for part in ("mean", "std")],
            "kid": [found[f"kernel_inception_distance_{part}"] for part in ("mean", "std")],
        }
    }


def _thinned(values: Any) -> dict[str, Any]:
    """Every 64th feature, and what all of them add up to."""
    return {
        "values": np.asarray(values, dtype=np.float64)[:, ::64].tolist(),
        "norms": np.linalg.norm(values, axis=1).tolist(),
    }


def distances() -> dict[str, Any]:
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    frechet = []
    for count, size in ((200, 48), (40, 64), (30, 256)):
        first, second = (seeded.gaussian(count, size, seed) for seed in (1, 2))
        moments = [(f.mean(axis=0), np.cov(f, rowvar=False)) for f in (first, second)]
        value = calculate_frechet_distance(*moments[0], *moments[1])
        frechet.append({"count": count, "size": size, "value": float(value)})
    spread = isc_features_to_metric(torch.from_numpy(seeded.logits(503)))
    sets = [torch.from_numpy(seeded.gaussian(300, 64, seed).astype(np.float32)) for seed in (1, 2)]
    kernel = kid_features_to_metric(*sets, kid_subsets=20, kid_subset_size=100, verbose=False)
    return {"frechet": frechet, "inception_score": list(spread.values()), "kernel_distance": list(kernel.values())}


def clip(folder: Path) -> dict[str, Any]:
    import hpsv2.src.open_clip as old
    import open_clip
    from hpsv2.src.open_clip.transform import image_transform as old_transform
    from open_clip.transform import image_transform
    from PIL import Image

    config = json.loads(json.dumps(seeded.CLIP_CONFIG))
    config["text_cfg"]["vocab_size"] = len(seeded.vocabulary())
    (folder / VOCABULARY).write_bytes(seeded.gzipped_vocabulary())
    tokens = open_clip.SimpleTokenizer(bpe_path=str(folder / VOCABULARY))(list(seeded.CAPTIONS))
    side = config["vision_cfg"]["image_size"]
    found: dict[str, Any] = {"tokens": [[t for t in row if t] for row in tokens.tolist()]}
    for name, library, transform in (
        ("clip", open_clip, image_transform(side, is_train=False)),
        ("hpsv2", old, old_transform(side, is_train=False, resize_longest_max=True)),
    ):
        model = library.CLIP(**config, output_dict=True).eval()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(
            {key: torch.from_numpy(np.asarray(value)) for key, value in seeded.seeded_tensors(shapes).items()}
        )
        found[f"{name}_names"] = seeded.digest_of(f"{key} {list(shape)}" for key, shape in shapes.items())
        for width, height in ((64, 48), (28, 28), (20, 31), (256, 256)):
            drawn = [Image.fromarray(value) for value in seeded.pictures(len(seeded.CAPTIONS), width, height)]
            out = model(torch.stack([transform(image) for image in drawn]), tokens)
            images, texts = (out[key].double().numpy() for key in ("image_features", "text_features"))
            found[f"{name} {width}x{height}"] = {
                "images": images.tolist(),
                "texts": texts.tolist(),
                "scores": (images * texts).sum(axis=1).tolist(),
            }
    return found


if __name__ == "__main__":
    main()
