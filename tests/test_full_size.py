"""Full size, in make test-extra only: 3.4 GB of disk, and minutes of two cores."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import unet_surgery
from unet_surgery.checkpoint.bundled import make_bundled
from unet_surgery.recipe import builtin_names, load_recipe
from unet_surgery.runtime import load_unet
from unet_surgery.runtime.verify import forward_once

pytestmark = pytest.mark.extra


def test_sd_v1_random_and_every_student_of_it(tmp_path: Path) -> None:
    import torch

    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("needs 8 GB of disk")
    teacher = tmp_path / "sd-v1-random"
    calls: list[tuple[int, int]] = []
    make_bundled("sd-v1-random", teacher, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (859_520_964 * 4, 859_520_964 * 4)
    output = forward_once(load_unet(teacher))
    assert torch.isfinite(output).all()
    assert output.std() > 0.01
    names = [name for name in builtin_names() if "sd1" in (load_recipe(name).families or ())]
    assert len(names) == 7
    for name in names:
        out = unet_surgery.prune(name, teacher, tmp_path / "out").folder
        report = unet_surgery.verify(out, teacher)
        assert report.check.compared_bytes == report.check.plan.student_bytes
        shutil.rmtree(out)
