"""The student's model card (README.md), written from its plan: what it is, what was done, and what one may do."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from math import prod
from typing import Any

import yaml

from unet_surgery.checkpoint.licence import Licence
from unet_surgery.checkpoint.teacher import LOCAL, is_hub_id
from unet_surgery.errors import escaped
from unet_surgery.graph import build, parse_config
from unet_surgery.lower import SurgeryPlan, quantity, shapes_of

__all__ = ["PICTURE", "CardFacts", "TrainingFacts", "trained_card", "write_card"]

PICTURE = "architecture.svg"
TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "unet-surgery"]
PROJECT = "[unet-surgery](https://pypi.org/project/unet-surgery/)"
UNTRAINED_LIMIT = "Untrained, as said above; nothing was measured on pictures."
REBUILT = "this writes the same bytes."
REBUILT_UNTRAINED = (
    "this writes the same files without the training; the run in `training.json` makes the rest, "
    "up to what hardware and versions round."
)
_URL = re.compile(r"https://[A-Za-z0-9][\w./~%+-]*")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card says besides the plan: version of this package, kind of folder, licence, options of the run.

    ``options`` are those that, with recipe and teacher, make the same files again; ``address`` is how to name that
    teacher where its id does not say all. ``base`` is the pipeline that the other parts are of, if not the teacher's,
    except the weights of ``own_parts``. ``assumed`` is what the teacher's file does not say of its config. Without
    ``compared`` the card says that only parts of the teacher's file were fetched.
    """

    version: str
    pipeline: bool
    licence: Licence
    options: tuple[str, ...] = ()
    normalized: tuple[str, ...] = ()
    address: str | None = None
    base: str | None = None
    own_parts: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    compared: bool = True


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """What the card says of a training run. Text in it is this package's own, or the user's run file's.

    ``stages`` are (name, steps, batch, teacher, rate and schedule, terms with their weights); ``losses`` rows of the
    loss at some steps, under ``loss_columns``; ``pictures`` names files of the folder: title → file.
    """

    version: str
    weights: str
    data: str
    images: int
    stages: tuple[tuple[str, int, int, str, str, str], ...]
    loss_columns: tuple[str, ...]
    losses: tuple[tuple[str, ...], ...]
    pictures: tuple[tuple[str, str], ...]


def trained_card(card: str, plan: SurgeryPlan | None, facts: TrainingFacts) -> str:
    """Return the card of a student that was trained: ``card``, its section on training, and no claim that it was not.

    What somebody has written into the card since stays as it is.
    """
    section = "## Training\n\n" + _training(facts)
    if plan is not None:
        card = card.replace(_untrained(plan), _now_trained(facts))
        card = card.replace(f"- {UNTRAINED_LIMIT}\n", "- What was measured on it is said above; nothing else was.\n")
        card = card.replace(REBUILT, REBUILT_UNTRAINED)
    head, heading, rest = card.partition("\n## Recipe\n")
    if not heading:
        return f"{card.rstrip()}\n\n{section}\n"
    return f"{head.rstrip()}\n\n{section}\n{heading}{rest}"


def _now_trained(facts: TrainingFacts) -> str:
    steps = sum(stage[1] for stage in facts.stages)
    return f"> **Trained** for {steps:,} steps on {facts.images:,} samples after the surgery; see below."


def _training(facts: TrainingFacts) -> str:
    lines = [
        f"{facts.data} {facts.weights} By {PROJECT} {facts.version}; `training.json` holds the whole run file.",
        "",
        "| stage | steps | batch | teacher | learning rate | loss |",
        "|---|---:|---:|---|---|---|",
    ]
    lines += [
        "| " + " | ".join(_cell(value) for value in (name, f"{steps:,}", f"{batch:,}", teacher, rate, terms)) + " |"
        for name, steps, batch, teacher, rate, terms in facts.stages
    ]
    if facts.losses:
        lines += ["", "| " + " | ".join(map(_cell, facts.loss_columns)) + " |"]
        lines += ["|" + "---:|" * len(facts.loss_columns)]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in facts.losses]
    lines += [f"\n![{title}]({file})" for title, file in facts.pictures]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return text that stays one cell of a table, and is shown as it is."""
    return re.sub(r"([\\|`*_\[\]<>])", r"\\\1", escaped(text))


def write_card(plan: SurgeryPlan, facts: CardFacts) -> str:
    """Return the card as Markdown with the Hub's YAML metadata in front.

    Text that comes from files stands in YAML that a dumper wrote, in a fenced code block, or has a checked form.
    """
    sections = [
        _front(plan, facts),
        _opening(plan),
        "## Sizes\n\n" + _sizes(plan),
        "## What was removed\n\n" + _removed(plan),
        "## Recipe\n\n" + _fenced("yaml", _recipe(plan)),
        "## Loading\n\n" + _loading(plan, facts),
        "## Making it again\n\n" + _rebuild(plan, facts),
        "## Limits\n\n" + _limits(plan, facts),
        "## Licence\n\n" + _licence(plan, facts),
    ]
    citation = plan.recipe.get("citation")
    if citation:
        text = escaped(str(citation), keep="\n")
        sections.append("## Citation\n\nThe recipe is from:\n\n" + _fenced("text", text))
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def _recipe(plan: SurgeryPlan) -> str:
    """Return the recipe as YAML; what is not printable in it (a mark that turns text around) as YAML's escapes."""
    text = yaml.safe_dump(dict(plan.recipe), sort_keys=False, allow_unicode=True)
    if escaped(text, keep="\n") == text:
        return text
    return yaml.safe_dump(dict(plan.recipe), sort_keys=False)


def _front(plan: SurgeryPlan, facts: CardFacts) -> str:
    tags = [*TAGS, "stable-diffusion-xl"] if plan.family == "sdxl" else TAGS
    licence = facts.licence
    metadata: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": licence.task or "text-to-image",
        "tags": tags,
    }
    if is_hub_id(plan.teacher_id):
        metadata |= {"base_model": plan.teacher_id, "base_model_relation": "finetune"}
    named = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
    if licence.id is not None:
        metadata |= {key: value for key, value in named.items() if value is not None}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)}---"


def _opening(plan: SurgeryPlan) -> str:
    recipe, before, after = plan.recipe["name"], plan.teacher, plan.student
    return f"""# {recipe} of {plan.teacher_id}

A smaller Stable Diffusion U-Net: {_teacher(plan)} without the layers that the recipe `{recipe}` names,
{quantity(before.params)} parameters brought down to {quantity(after.params)}. Made by {PROJECT}.

{_untrained(plan)}

![The U-Net of {recipe}: what was kept, and what was removed]({PICTURE})"""


def _untrained(plan: SurgeryPlan) -> str:
    return (
        f"> **Not trained yet.** {_origin(plan)}, and no layer has learned to do without its removed\n"
        "> neighbours. As it is, this model draws broken pictures: distil it from its teacher before you use it."
    )


def _origin(plan: SurgeryPlan) -> str:
    text = "Every weight here is the teacher's own"
    if plan.dtype is not None:
        text += f", converted to {plan.dtype}"
    if plan.bypassed:
        text += ", or zero where an attention was taken out of a stage that keeps others"
    return text


def _teacher(plan: SurgeryPlan) -> str:
    if plan.teacher_id == LOCAL:
        return "a local model"
    link = f"https://huggingface.co/{plan.teacher_id}"
    return f"[{plan.teacher_id}]({link})" if is_hub_id(plan.teacher_id) else f"`{plan.teacher_id}`"


def _sizes(plan: SurgeryPlan) -> str:
    before, after = plan.teacher, plan.student
    rows = [
        ("parameters", before.params, after.params),
        ("MACs, convolutions and linear layers", before.macs, after.macs),
        ("MACs, with the attention products", before.macs_all, after.macs_all),
    ]
    lines = ["| | teacher | student | |", "|---|---:|---:|---:|"]
    lines += [f"| {label} | {quantity(b)} | {quantity(a)} | {a / b - 1:+.1%} |" for label, b, a in rows]
    lines += ["", "| stage of the teacher | parameters | kept |", "|---|---:|---:|"]
    for part in plan.parts:
        kept = quantity(part.student.params) if part.student.tensors else "removed"
        lines.append(f"| `{part.name}` | {quantity(part.teacher.params)} | {kept} |")
    side = build(parse_config(plan.student_config)).latent_size
    stored = f"converted to {plan.dtype}" if plan.dtype else "in the teacher's dtype"
    macs = f"MACs are of one forward of the U-Net at batch 1 and a latent of {side[0]}×{side[1]}."
    return "\n".join([*lines, "", f"{macs} Its weights take {plan.student_bytes:,} bytes, {stored}."])


def _removed(plan: SurgeryPlan) -> str:
    sizes = {name: prod(shape) for name, shape in shapes_of(build(parse_config(plan.teacher_config))).items()}
    lines = ["| selector, in the teacher's numbering | tensors | parameters |", "|---|---:|---:|"]
    for selector, names in plan.unused.items():
        cell = selector.replace("|", "\\|")
        lines.append(f"| `{cell}` | {len(names)} | {quantity(sum(sizes[name] for name in names))} |")
    for bypassed in plan.bypassed:
        shell = f"{bypassed.params_left:,} parameters stay, its last projection zero."
        lines += ["", f"`{bypassed.attention}` adds nothing any more, but stock diffusers must hold its shell: {shell}"]
    if plan.changed_skips:
        lines += ["", "Skip connections that begin elsewhere than in the teacher:", ""]
        lines += [
            f"- `{skip.layer}` takes `{skip.student_skip}`, in the teacher `{skip.teacher_skip}`"
            for skip in plan.changed_skips
        ]
    lines += ["", "`plan.json` holds the whole surgery: both configs, and for every tensor the one it comes from."]
    return "\n".join(lines)


def _loading(plan: SurgeryPlan, facts: CardFacts) -> str:
    teacher = plan.teacher_id if is_hub_id(plan.teacher_id) else "the/teacher"
    swap = f"""from diffusers import DiffusionPipeline, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("this/model"{', subfolder="unet"' if facts.pipeline else ""})
pipeline = DiffusionPipeline.from_pretrained("{teacher}", unet=unet)
"""
    if not facts.pipeline:
        return (
            "This is the U-Net alone. It takes the place of the teacher's in the teacher's pipeline:\n\n"
            + _fenced("python", swap)
            + "\nUse one dtype for both: pass `torch_dtype` twice."
        )
    whole = """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this/model", torch_dtype=torch.float32)  # on a GPU: torch.float16
image = pipeline("a small red house by a lake").images[0]
"""
    return (
        "The whole pipeline:\n\n"
        + _fenced("python", whole)
        + "\nOr its U-Net alone, in the place of the teacher's:\n\n"
        + _fenced("python", swap)
        + "\nUse one dtype for both: pass `torch_dtype` twice."
    )


def _rebuild(plan: SurgeryPlan, facts: CardFacts) -> str:
    teacher = facts.address or (plan.teacher_id if plan.teacher_id != LOCAL else "path/to/the/teacher")
    words = ["unet-surgery", "prune", "--recipe", "recipe.yaml", "--teacher", teacher, *facts.options]
    text = _fenced("console", f"$ {shlex.join(words)}\n")
    text += f"\nWith unet-surgery {facts.version} and the same teacher {REBUILT}"
    if plan.teacher_weights is not None:
        files = "\n".join(
            f"- `{file.name}`, {file.bytes:,} bytes, sha256 of its header `{file.header_sha256}`"
            for file in plan.teacher_weights.files
            if "`" not in file.name
        )
        text += f" The teacher's weights were read from:\n\n{files}"
    if not facts.compared:
        text += (
            "\n\nOnly the parts that the student keeps were fetched from the Hub, so the whole file could not be "
            "compared with its checksum there; `prune --full` does that."
        )
    return text


def _limits(plan: SurgeryPlan, facts: CardFacts) -> str:
    items = [
        UNTRAINED_LIMIT,
        "What the teacher does badly or must not be used for, the student inherits; see the teacher's own card.",
        "It is a stock `UNet2DConditionModel` and loads in diffusers. Other runtimes often know published shapes only.",
    ]
    if not facts.pipeline:
        items.append("Text encoder, VAE, tokenizer and scheduler are not here: they are the teacher's.")
    if facts.normalized:
        items.append(
            "Stored in the layout that every version of transformers reads, where the teacher's was not: "
            + ", ".join(f"`{name}`" for name in facts.normalized)
            + ". No value was changed."
        )
    if facts.assumed:
        items.append(
            "The teacher was a single file. What its weights do not say was taken as follows: "
            + "; ".join(facts.assumed)
            + "."
        )
    if plan.teacher_id == LOCAL:
        kind = "file" if facts.assumed else "folder"
        items.append(f"The teacher was a local {kind}; this card cannot say which model it was.")
    return "\n".join(f"- {item}" for item in items)


def _licence(plan: SurgeryPlan, facts: CardFacts) -> str:
    licence = facts.licence
    texts = ", ".join(f"[{name}]({name.replace(' ', '%20')})" for name in licence.files)
    if licence.id is None and not texts:
        return (
            "Unknown: the teacher's card names no licence that could be read. This model is a derivative of its "
            "teacher, whose licence applies to it. Add it, here and in the metadata above, before you publish.\n\n"
            + _notice(plan, facts)
        )
    name = f", `{licence.id}`" if licence.id else ""
    if licence.name is not None and re.fullmatch(r"[\w .+-]{1,80}", licence.name):
        name += f" ({licence.name})"
    text = f"This model is a derivative of its teacher and stays under the teacher's licence{name}"
    text += f"; its text is in {texts}." if texts else "; the teacher's folder held no text of it."
    if not texts and licence.link is not None and _URL.fullmatch(licence.link):
        text += f" See <{licence.link}>."
    text += "\n\n" + _notice(plan, facts)
    if licence.restrictions is not None:
        if licence.is_known:
            quoted = "\n".join(f"> {line}".rstrip() for line in licence.restrictions.splitlines())
        else:  # a stranger's text is shown, not rendered
            quoted = _fenced("text", escaped(licence.restrictions.replace("\r\n", "\n"), keep="\n\t"))
        text += (
            "\n\n### Use restrictions\n\nThey bind whoever uses this model, and must be passed on with it and with "
            f"whatever is made of it:\n\n{quoted}"
        )
    return text


def _notice(plan: SurgeryPlan, facts: CardFacts) -> str:
    mended = ", ".join(f"`{name}`" for name in facts.normalized)
    whose = "the teacher's" if facts.base is None else f"those of `{facts.base}`, under its licence"
    if facts.own_parts:
        own = ", ".join(f"`{name}`" for name in facts.own_parts)
        whose += f"; the weights of {own} are the teacher's own"
    rest = f" except {mended}, which store the same values in another layout" if mended else ""
    dtype = f", its weights converted to {plan.dtype}" if plan.dtype is not None else ""
    return (
        f"**Notice of modification.** The U-Net's config and weights are not the teacher's files: layers of "
        f"{_teacher(plan)} were removed and the remaining ones renumbered with unet-surgery{dtype}, as listed under "
        f"“What was removed”. The other parts of the pipeline, if they are here, are {whose}{rest}."
    )


def _fenced(language: str, text: str) -> str:
    """Return a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"
