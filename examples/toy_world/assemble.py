"""Put what ``train_parts.py`` wrote together with a U-Net's config: the pipeline that ``teacher.yaml`` trains.

    python examples/toy_world/assemble.py PARTS OUT

The U-Net has no weights here: the run begins with random ones (``init: random``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from unet_surgery.errors import SurgeryError
from unet_surgery.runtime.parts import load_parts

__all__ = ["assemble"]

PIPELINE = Path(__file__).resolve().parent / "pipeline"
FROM_PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")
GATE = "gate.json"
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [unet-surgery]
---

# The toy world's pipeline

Pictures of 32 pixels of one or two coloured shapes, from captions of one small grammar. Every part was trained from
random weights by the scripts in `examples/toy_world`, on pictures that they draw themselves.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("parts", type=Path, help="a folder that train_parts.py wrote")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    options = parser.parse_args()
    try:
        assemble(options.parts, options.out)
    except (SurgeryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not gate_passed(options.parts):
        print(
            "note: the gate of train_parts.py was not passed: no U-Net can draw better than this VAE", file=sys.stderr
        )
    print(options.out)
    return 0


def assemble(parts: Path, out: Path, pipeline: Path = PIPELINE) -> Path:
    """Write the pipeline ``out``, all but the U-Net's weights, and load its parts strictly.

    ``pipeline`` has model_index.json and the U-Net's config.

    Raises:
        OSError: a part is missing, or ``out`` exists.
        SurgeryError: a part is not whole.
    """
    out.mkdir(parents=True)
    for name in FROM_PARTS:
        shutil.copytree(parts / name, out / name)
    shutil.copytree(pipeline / "unet", out / "unet")
    shutil.copy(pipeline / "model_index.json", out)
    (out / "README.md").write_text(CARD, "utf-8")
    load_parts(out)
    return out


def gate_passed(parts: Path) -> bool:
    """True if the VAE and the text encoder are good enough; without a report, nobody knows."""
    report = parts / GATE
    return report.is_file() and json.loads(report.read_text("utf-8"))["passed"] is True


if __name__ == "__main__":
    raise SystemExit(main())
