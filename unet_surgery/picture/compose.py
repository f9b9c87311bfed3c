"""``draw``: from a plan to its picture."""

from __future__ import annotations

from unet_surgery.errors import first_few
from unet_surgery.lower import SurgeryPlan, quantity
from unet_surgery.picture.fate import Surgery, read_surgery
from unet_surgery.picture.frame import HEADER_HEIGHT, draw_header, draw_legend, subject
from unet_surgery.picture.layout import MARGIN, WIDTH, draw_u
from unet_surgery.picture.scene import Scene
from unet_surgery.picture.svg import to_svg

__all__ = ["draw", "lay_out"]

SPACE_BELOW = 26.0


def draw(plan: SurgeryPlan) -> str:
    """Return a standalone SVG of the plan's teacher, with what the plan removes drawn as ghosts.

    The same text for the same plan, in ASCII, so that no page's encoding can spoil it; light or dark as the reader
    prefers.

    Raises:
        ConfigError, InexpressibleError, VerificationError: the plan is not one that :func:`unet_surgery.plan` makes.
    """
    return to_svg(lay_out(plan))


def lay_out(plan: SurgeryPlan) -> Scene:
    """Return what :func:`draw` draws, as values."""
    surgery = read_surgery(plan)
    header = draw_header(plan, surgery)
    u = draw_u(surgery, HEADER_HEIGHT)
    legend = draw_legend(surgery, u.boxes, u.bottom + SPACE_BELOW)
    return Scene(
        width=WIDTH,
        height=legend.bottom + MARGIN,
        title=_title(plan),
        words=_words(plan, surgery),
        cards=u.cards,
        lines=u.lines + legend.lines,
        boxes=u.boxes + legend.boxes,
        gauges=header.gauges,
        texts=header.texts + u.texts + legend.texts,
    )


def _title(plan: SurgeryPlan) -> str:
    recipe, teacher = subject(plan)
    before, after = plan.teacher.params, plan.student.params
    if before == after:
        return f"{recipe or teacher}: {quantity(before)} parameters"
    return f"{recipe} of {teacher}: {quantity(before)} → {quantity(after)} parameters"


def _words(plan: SurgeryPlan, surgery: Surgery) -> str:
    """Return the picture in words, for those who do not see it."""
    teacher = subject(plan)[1]
    mid = "no mid" if surgery.mid is None else "the mid at the bottom"
    skips = [skip.fate for skip in surgery.skips]
    shape = f"{len(surgery.down)} down stages descend on the left, {len(surgery.up)} up stages rise on the right, {mid}"
    across = f"{skips.count('kept') + skips.count('removed')} skip connections run across"
    words = [f"The U-Net of {teacher}, drawn as a U: {shape}; {across}."]
    if plan.removed:
        selectors = list(dict.fromkeys(plan.removed.values()))
        words.append(f"Removed: {first_few(selectors)}.")
        words.append(f"{skips.count('kept')} skips stay, {skips.count('moved')} come from another layer than before.")
    if plan.bypassed:
        words.append(f"Bypassed: {first_few([bypassed.attention for bypassed in plan.bypassed])}.")
    return " ".join(words)
