"""The page: what is asked for on top, pictures side by side, and what they took. Gradio draws it and calls back."""

from __future__ import annotations

import html
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from unet_surgery.app.studio import Drawn, Stopped, Studio
from unet_surgery.app.wish import MAX_GUIDANCE, MAX_PROMPT_CHARS, MAX_SEED, MAX_STEPS, Wish, read_wish
from unet_surgery.errors import SurgeryError, printable
from unet_surgery.sample.schedulers import SCHEDULERS
from unet_surgery.toyworld.grammar import caption, is_held_out, one_object_scenes, two_object_scenes

__all__ = ["CSS", "make_page", "make_theme"]

MAX_WAITING = 16
"""This many wait in the studio, where Stop finds them; as many more in gradio's queue; the next are refused."""

TEMPORARY_SECONDS = 24 * 3600
"""How long a picture can be looked at and downloaded. Then its file goes, while the page may still show it."""

LOOK_SECONDS = 600
OTHERWISE = "ddim"
OWN = "the model's own"

PROMPTS = (
    "a lighthouse on a cliff at dusk, oil painting",
    "a bowl of lemons on a blue table, morning light",
    "a small wooden cabin in a snowy forest",
    "a close photograph of a sleeping fox",
)
"""For models of all the world."""

SMALL_SIDE = 256
"""Pictures of fewer pixels a side are shown larger, pixel by pixel."""

SHOWN_HEIGHT = 340

CSS = """
.gradio-container { max-width: 1000px !important; margin: 0 auto !important; }
.drawn img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
.small img { image-rendering: pixelated; }
#facts table, #facts tr { border: 0 !important; }
#facts table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
#facts th, #facts td { padding: 5px 8px; text-align: right; border: 0; border-bottom: 1px solid #88888866; }
#facts td, #facts th:last-child { white-space: nowrap; }
#facts th { overflow-wrap: anywhere; }
#facts th:first-child, #facts td:first-child { text-align: left; white-space: normal; }
@media (max-width: 500px) {
  #facts th, #facts td { padding: 5px 4px; font-size: 90%; }
  .drawn { height: 190px !important; }
}
"""


def make_theme() -> Any:
    """Return a theme of the system's own letters: the default one asks for others."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"])


def make_page(studio: Studio) -> gr.Blocks:
    """Return the page on which ``studio`` draws."""
    models = studio.models
    title = f"{models.student.name}" + (f" beside {models.teacher.name}" if models.teacher else "")
    with gr.Blocks(
        title=f"unet-surgery: {title}", analytics_enabled=False, delete_cache=(LOOK_SECONDS, TEMPORARY_SECONDS)
    ) as page:
        gr.Markdown(f"# {_plain(title)}")
        gr.Markdown(_introduction(studio))
        prompt, negative, go, stop = _words(studio)
        with gr.Row():
            shown = [_picture(role, drawer, min(studio.own_size)) for role, drawer in _roles(studio)]
        facts = gr.Markdown(elem_id="facts")
        settings = _settings(studio)
        data = gr.JSON(visible=False)

        def draw(
            prompt: str, negative: str, seed: float, anew: bool, steps: float, guidance: float,
            width: float, height: float, scheduler: str, request: gr.Request,
            progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
            """Draw a picture by each model; give (the seed, the pictures, a table, the same as JSON)."""
            values = {
                "prompt": prompt, "negative": negative, "seed": secrets.randbelow(MAX_SEED + 1) if anew else seed,
                "steps": steps, "guidance": guidance, "width": width, "height": height,
                "scheduler": None if scheduler == OWN else scheduler,
            }  # fmt: skip
            yield from _answers(studio, values, progress, _who(request))

        inputs = [prompt, negative, *settings]
        outputs = [settings[0], *shown, facts, data]
        triggers = [go.click, prompt.submit]
        gr.on(
            triggers, draw, inputs, outputs, api_name="draw", concurrency_limit=MAX_WAITING, show_progress_on=shown[:1]
        )

        def give_up(request: gr.Request) -> None:
            """Stop what the same session asked for, drawn or waiting."""
            studio.stop(_who(request))

        stop.click(give_up, None, None, queue=False, api_name="stop")
        page.unload(give_up)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)  # nobody passes those who wait
    return page


def _words(studio: Studio) -> tuple[Any, Any, Any, Any]:
    examples = _examples(studio)
    prompt = gr.Textbox(
        examples[0], label="Prompt", max_lines=4, max_length=MAX_PROMPT_CHARS, elem_id="prompt", autofocus=True
    )
    gr.Examples(list(examples), prompt, label="Prompts to try", cache_examples=False, api_visibility="private")
    with gr.Row(equal_height=True):
        negative = gr.Textbox("", label="Negative prompt", max_length=MAX_PROMPT_CHARS, scale=4, min_width=300)
        go = gr.Button("Draw", variant="primary", elem_id="draw", scale=1, min_width=90)
        stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=90)
    return prompt, negative, go, stop


def _settings(studio: Studio) -> list[Any]:
    """Return seed, whether it is a new one, steps, guidance, width, height and scheduler."""
    height, width = studio.own_size
    sides = {"step": studio.limits.step, "minimum": studio.limits.step, "maximum": studio.limits.most}
    own = studio.own_scheduler()
    schedulers = [*SCHEDULERS] if own is None else [(f"{OWN} ({own})", OWN), *SCHEDULERS]
    with gr.Accordion("How it is drawn", open=True):
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=120)
            anew = gr.Checkbox(value=False, label="A new seed each time", min_width=120)
            scheduler = gr.Dropdown(schedulers, value=OWN if own else OTHERWISE, label="Scheduler", min_width=240)
        with gr.Row():
            steps = gr.Slider(1, MAX_STEPS, 20 if studio.is_toy else 25, step=1, label="Steps", min_width=220)
            guidance = gr.Slider(
                0, MAX_GUIDANCE, 2 if studio.is_toy else 7.5, step=0.1, label="Guidance (1: none)", min_width=220
            )
        with gr.Row():
            wide = gr.Slider(value=width, label="Width", min_width=220, **sides)
            high = gr.Slider(value=height, label="Height", min_width=220, **sides)
    return [seed, anew, steps, guidance, wide, high, scheduler]


def _examples(studio: Studio) -> Sequence[str]:
    """Return prompts that the models know: of the toy world such as no training saw."""
    if not studio.is_toy:
        return PROMPTS
    one = [caption(scene) for scene in one_object_scenes() if is_held_out(scene)]
    two = [caption(scene) for scene in two_object_scenes() if is_held_out(scene)]
    return (one[0], one[len(one) // 2], two[len(two) // 3], two[-1])


def _roles(studio: Studio) -> Iterator[tuple[str, Any]]:
    models = studio.models
    if models.teacher is not None:
        yield "Teacher", models.teacher
    yield ("Model" if models.teacher is None else "Student"), models.student


def _picture(role: str, drawer: Any, side: int) -> Any:
    return gr.Image(
        label=role,
        format="png",
        type="numpy",
        interactive=False,
        height=SHOWN_HEIGHT,
        min_width=140,
        buttons=["download", "fullscreen"],
        elem_id=role.lower(),
        elem_classes=["drawn", "small"] if side < SMALL_SIDE else ["drawn"],
        alt_text=f"drawn by {drawer.name}",
    )


def _introduction(studio: Studio) -> str:
    models = studio.models
    parts = [f"{_plain(d.name)} has {_millions(d.parameters)} parameters" for d in models.drawers]
    device = next(models.student.unet.parameters())
    text = f"{'; '.join(parts)}, on {device.device}, {str(device.dtype).removeprefix('torch.')}."
    if models.teacher is not None:
        text += " Both begin with the same noise."
    if models.no_teacher is not None:
        text += f" No teacher: {_plain(models.no_teacher)}."
    return f"<p>{text}</p>"


def _who(request: Any) -> str:
    return str(request.session_hash)


def _answers(studio: Studio, values: dict[str, Any], progress: Any, who: str) -> Iterator[tuple[Any, ...]]:
    """Yield what the page shows after each picture; raise gr.Error with what is wrong."""
    names = [drawer.name for drawer in studio.models.drawers]

    def tell(number: int, done: int, calls: int) -> None:
        share = (number + done / calls) / len(names)
        progress(share, desc=f"{names[number]}: step {done} of {calls}")

    drawn: list[Drawn] = []
    try:
        wish = read_wish(values, studio.limits)
        unread = studio.unread_words(wish.prompt)
        progress(0, desc="waiting for the models")
        for one in studio.draw(wish, tell, who):
            drawn.append(one)
            pictures: list[NDArray[np.uint8] | None] = [d.picture for d in drawn]
            pictures += [None] * (len(names) - len(drawn))
            yield (wish.seed, *pictures, _table(drawn, unread), _as_data(wish, drawn))
    except Stopped:
        gr.Info("Stopped.")
        yield tuple(gr.skip() for _ in range(len(names) + 3))
    except SurgeryError as error:
        message = "<br>".join(_plain(line) for line in str(error).splitlines())
        raise gr.Error(message, duration=None, title="This cannot be drawn", print_exception=False) from error


def _table(drawn: Sequence[Drawn], unread: str) -> str:
    rows: list[tuple[str, list[str], list[float]]] = [
        ("U-Net's parameters", [_millions(d.parameters) for d in drawn], [d.parameters for d in drawn]),
        ("time for a picture", [f"{d.seconds:.2f} s" for d in drawn], [d.seconds for d in drawn]),
        ("peak memory", [f"{d.peak_bytes / 1e6:,.0f} MB" for d in drawn], [d.peak_bytes for d in drawn]),
    ]
    lines = [_row("th", ["", *(d.name for d in drawn), *(["ratio"] if len(drawn) > 1 else [])])]
    for name, cells, values in rows:
        ratio = [f"{values[1] / values[0]:.2f}"] if len(values) > 1 else []
        lines.append(_row("td", [name, *cells, *ratio]))
    if any(d.verdict is not None for d in drawn):
        lines.append(_row("td", ["as the caption says", *(_judged(d.verdict) for d in drawn), ""][: len(drawn) + 2]))
    note = f"<p>{_plain(unread)}: the rest is not seen.</p>" if unread else ""
    return f"<table>{''.join(lines)}</table>{note}"


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{_plain(cell)}</{tag}>' for cell in cells)}</tr>"


def _judged(verdict: str | None) -> str:
    return "" if verdict is None else f"no: {verdict}" if verdict else "yes"


def _as_data(wish: Wish, drawn: Sequence[Drawn]) -> dict[str, Any]:
    return {
        "seed": wish.seed,
        "models": [
            {
                "name": d.name, "parameters": d.parameters, "seconds": round(d.seconds, 4),
                "peak_bytes": d.peak_bytes, "wrong": d.verdict,
            }
            for d in drawn
        ],
    }  # fmt: skip


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _plain(text: str) -> str:
    """Return text that is shown as it is, wherever it came from: neither markup nor what steers anything."""
    return html.escape(printable(text))
