"""``accelerate launch -m unet_surgery.distill RUN.yaml``: the command line's ``distill``, in each of many processes."""

from __future__ import annotations

import sys

from unet_surgery.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["distill"]
    main()
