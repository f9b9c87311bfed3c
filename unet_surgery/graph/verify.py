"""``verify``: is this graph one that stock ``UNet2DConditionModel`` can hold, and do the teacher's weights fit it?

The rules, by the numbers that the messages and ARCHITECTURE.md use:

1. An up stage has one layer more than its down stage.
2. The mid is two resnets around an attention, one resnet, or none; its depth is that of the last down
   stage's first layer where that stage has attention.
6. A stage without layers needs equal widths before and behind it.
7. An up stage keeps its first and last layer, unless the recipe allows skip changes.
8. Stages go in pairs, level 0 never, and every kept tensor keeps its shape.

What is left of the list in ARCHITECTURE.md is settled by construction (:func:`remove`) or by
the final comparison in :mod:`unet_surgery.lower.config`.
"""

from __future__ import annotations

from unet_surgery.errors import InexpressibleError
from unet_surgery.graph.nodes import Layer, Stage, UNetGraph

__all__ = ["verify"]


def verify(teacher: UNetGraph, student: UNetGraph, *, allow_skip_change: bool = False) -> None:
    """Check ``student``, what :func:`remove` left of ``teacher``, against the rules above.

    Raises:
        InexpressibleError: a rule is broken; the message has the rule, what was found and what to add.
    """
    _level_zero(teacher, student)
    _partners(teacher, student)
    _layer_counts(teacher, student)
    if not allow_skip_change:
        _outer_up_layers(teacher, student)
    _widths(teacher, student)
    _mid(student)


def _level_zero(teacher: UNetGraph, student: UNetGraph) -> None:
    first, last = teacher.down[0], teacher.up[-1]
    for stage, kept in ((first, student.down[0].index == first.index), (last, student.up[-1].index == last.index)):
        if not kept:
            raise InexpressibleError(
                f"{stage.selector} is level 0, which never goes (rule 8)",
                about=(stage.source,),
                expected="level 0 stays: conv_in, conv_out and the time embedding have its width",
                hint=f"remove layers or attentions of {stage.selector} instead",
            )


def _partners(teacher: UNetGraph, student: UNetGraph) -> None:
    kept = {stage.source for stage in student.stages}
    for down, up in teacher.pairs():
        if (down.source in kept) != (up.source in kept):
            gone, stays = (up, down) if down.source in kept else (down, up)
            raise InexpressibleError(
                f"{gone.selector} goes only together with {stays.selector} (rule 8)",
                about=(gone.source,),
                expected="the two sides of a level go together",
                hint=f'add "{stays.selector}"',
            )


def _layer_counts(teacher: UNetGraph, student: UNetGraph) -> None:
    for down, up in student.pairs():
        num_down, num_up = len(down.layers), len(up.layers)
        if num_up == num_down + 1:
            continue
        if num_up > num_down + 1:
            excess, stage, whole, lost = num_up - num_down - 1, up, teacher.up[up.index], down
        else:
            excess, stage, whole, lost = num_down + 1 - num_up, down, teacher.down[down.index], up
        raise InexpressibleError(
            f"{down.selector} keeps {_layers(num_down)} and {up.selector} {_layers(num_up)} (rule 1)",
            about=(lost.source,),
            expected=f"an up stage has exactly one layer more than its down stage: {num_down} needs {num_down + 1}",
            hint=_layers_to_add(stage, whole, excess),
        )


def _layers_to_add(stage: Stage, whole: Stage, excess: int) -> str:
    """Say which layers to remove as well: middle ones on the up side, the last ones on the down side."""
    numbers = [_number(layer) for layer in stage.layers]
    candidates = numbers[1:-1] if stage.side == "up" else numbers
    if len(candidates) < excess:
        return f"{stage.selector} has no {excess} more layers to give; keep a layer on the other side"
    chosen = candidates[-excess:]
    middle = " (a middle layer: the first and last take skips of other widths)" if stage.side == "up" else ""
    lines = ", ".join(f'"{whole.selector}.layers.{number}"' for number in chosen)
    return f"add {lines}{middle}"


def _mid(student: UNetGraph) -> None:
    mid = student.mid
    if mid is None:
        return
    deepest = student.down[-1]
    if mid.attention is None:
        if len(mid.resnets) != 1:
            raise InexpressibleError(
                "the recipe leaves a mid of two resnets without attention (rule 2)",
                about=("mid_block",),
                expected="two resnets and an attention, one resnet alone, or none",
                hint='add "mid.resnets.1"',
            )
        return
    if not deepest.has_attention:
        return
    first = deepest.layers[0].attention
    assert first is not None
    if first.depth != mid.attention.depth:
        if mid.attention.bypass:
            hint = 'add "mid.resnets.1" for a mid of one resnet, or write "mid"'
        else:
            hint = _even_depths(first.source, mid.attention.blocks, first.blocks)
        raise InexpressibleError(
            f"the mid's attention keeps {mid.attention.depth} transformer blocks and "
            f"{deepest.selector}'s first keeps {first.depth} (rule 2)",
            about=("mid_block", deepest.source),
            expected="the same depth: diffusers has one number for both",
            hint=hint,
        )


def _even_depths(first_path: str, mid_blocks: tuple[int, ...], first_blocks: tuple[int, ...]) -> str:
    """Return the line that brings the deeper of the two down to the other."""
    if len(mid_blocks) > len(first_blocks):
        path, extra = "mid.attentions.0", mid_blocks[len(first_blocks) :]
    else:
        _, number, _, j = first_path.split(".")
        path, extra = f"down.{number}.attentions.{j}", first_blocks[len(mid_blocks) :]
    return f'add "{path}.transformer_blocks.{"|".join(str(k) for k in extra)}"'


def _outer_up_layers(teacher: UNetGraph, student: UNetGraph) -> None:
    for stage in student.up:
        kept = {_number(layer) for layer in stage.layers}
        whole = teacher.up[stage.index]
        for name, number in (("first", 0), ("last", len(whole.layers) - 1)):
            if number in kept:
                continue
            raise InexpressibleError(
                f"{stage.selector}.layers.{number} is the {name} of its stage, which stays (rule 7)",
                about=(f"{stage.source}.resnets.{number}",),
                expected="up stages keep their first and last layer: these take another stage's output or skip, "
                "and weights trained for one skip would get another",
                hint=_instead(whole, number),
            )


def _instead(whole: Stage, number: int) -> str:
    middle = f'remove "{whole.selector}.layers.1" instead, or ' if len(whole.layers) > 2 and number != 1 else ""
    return f"{middle}write allow_skip_change: true if you mean it"


def _widths(teacher: UNetGraph, student: UNetGraph) -> None:
    """Every kept resnet must meet the input widths its weights were made for (rules 6 and 8)."""
    levels = student.down
    kept = {stage.source for stage in student.stages}
    gone = tuple(stage.source for stage in teacher.stages if stage.source not in kept)
    for position, (down, up) in enumerate(student.pairs()):
        before = levels[max(position - 1, 0)].channels
        below = levels[min(position + 1, len(levels) - 1)].channels
        if not down.layers and before != down.channels:
            raise InexpressibleError(
                f"{down.selector} keeps no layer but must widen {before} channels to {down.channels} (rule 6)",
                about=(down.source,),
                expected="a stage without layers has equal widths before and behind it",
                hint=f"keep one layer of {down.selector}",
            )
        for j, layer in enumerate(down.layers):
            _fits(layer, before if j == 0 else down.channels, 0, (*gone, down.source))
        last = len(up.layers) - 1
        for j, layer in enumerate(up.layers):
            _fits(layer, below if j == 0 else up.channels, before if j == last else up.channels, (*gone, up.source))
    if student.mid is not None and student.mid.channels != levels[-1].channels:
        raise InexpressibleError(
            f"the mid has {student.mid.channels} channels and the deepest kept stage {levels[-1].channels} (rule 8)",
            about=gone,
            expected="equal widths",
            hint='add "mid"',
        )


def _fits(layer: Layer, hidden: int, skip: int, about: tuple[str, ...]) -> None:
    resnet = layer.resnet
    if (resnet.hidden_channels, resnet.skip_channels) == (hidden, skip):
        return
    have, need = resnet.hidden_channels + resnet.skip_channels, hidden + skip
    raise InexpressibleError(
        f"{resnet.source}.conv1.weight would get another input than it was trained for (rule 8)",
        about=about,
        expected=f"[{resnet.out_channels}, {have}, 3, 3], for {_split(resnet.hidden_channels, resnet.skip_channels)}",
        found=f"[{resnet.out_channels}, {need}, 3, 3], for {_split(hidden, skip)}",
        hint="keep the layer or stage whose width it expects",
    )


def _split(hidden: int, skip: int) -> str:
    return f"{hidden} hidden + {skip} skip channels" if skip else f"{hidden} channels"


def _layers(number: int) -> str:
    return "1 layer" if number == 1 else f"{number} layers"


def _number(layer: Layer) -> int:
    return int(layer.resnet.source.rpartition(".")[2])
