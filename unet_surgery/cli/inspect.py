"""``unet-surgery inspect``."""

from __future__ import annotations

from unet_surgery.cli.options import DEFAULT_MAX_HEADER, Config, Json, MaxHeader, TeacherArgument, Variant
from unet_surgery.cli.sink import command, show, show_json, table

__all__ = ["inspect"]


@command
def inspect(
    teacher: TeacherArgument,
    variant: Variant = None,
    config: Config = None,
    max_header: MaxHeader = DEFAULT_MAX_HEADER,
    as_json: Json = False,
) -> None:
    """Show what a U-Net consists of, and which of it a recipe may remove.

    Reads the config and, where there are weights, their header. MACs are of one forward at batch 1 and the
    native latent size: convolutions and linear layers, and with the attention products.

    Example: unet-surgery inspect sd-v1-random
    """
    from dataclasses import asdict

    from unet_surgery import inspect_model
    from unet_surgery.cli.format import share, weights_line
    from unet_surgery.errors import first_few
    from unet_surgery.lower import quantity

    report = inspect_model(teacher, variant=variant, config=config, max_header=max_header)
    if as_json:
        show_json(asdict(report))
        return
    height, width = report.latent_size
    whole = report.counts
    show(f"{teacher}: {report.description}")
    show(
        f"{whole.params:,} parameters in {whole.tensors} tensors; {quantity(whole.macs)} MACs "
        f"(conv + linear), {quantity(whole.macs_all)} (all) at {height}x{width}"
    )
    show(weights_line(report.weights))
    if report.unknown_keys:
        show(f"config keys that diffusers does not know, carried along: {first_few(report.unknown_keys)}")
    indent = {"layer": 1, "attention": 2, "sampler": 1}
    rows = []
    for node in report.nodes:
        depth = indent.get(node.kind, 0) if not node.selector.startswith("mid") else int(node.kind != "mid")
        how = {"alone": "yes", "with": "with " + ", ".join(node.together), "no": "no"}[node.removable]
        rows.append(
            (
                "  " * depth + node.selector,
                f"{node.channels}",
                quantity(node.counts.params),
                share(node.counts.params, whole.params),
                quantity(node.counts.macs),
                quantity(node.counts.macs_all),
                share(node.counts.macs_all, whole.macs_all),
                f"{how}: {node.note}" if node.note else how,
            )
        )
    columns = ("node", "width", "params", "share", "MACs", "all", "share", "a recipe may remove it")
    show(table(columns, rows, right=range(1, 7)))
