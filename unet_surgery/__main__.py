"""``python -m unet_surgery``."""

from unet_surgery.cli.main import main

main()
