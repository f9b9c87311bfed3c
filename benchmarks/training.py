"""How fast students are trained: our trainer beside a plain loop that works as BK-SDM's, on the same networks.

    python benchmarks/training.py --size tiny --device cpu
    python benchmarks/training.py --size sd1 --device cuda --suite h200 --json rows.jsonl

Both compute the same losses and gradients (tests/test_benchmarks.py). On a CPU runs alternate, each in a
process of its own; on CUDA rows follow each other in one process, each printed as it is done, the most telling first,
and one that runs out of memory is passed over. Times are of whole optimizer steps after a warm-up, medians; MFU counts
what the model needs (teacher forward, student forward and backward), not what a loop does beside that.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from gradients import agreement
from measure import machine
from our_loop import LOG_EVERY, Choices, OurLoop
from plain_loop import PlainLoop
from step_parts import (
    Loop,
    bf16_tflops,
    breakdown,
    cuda_waits,
    datasheet_tflops,
    refuses_to_wait,
    step_seconds,
    top_kernels,
)
from training_sizes import Size, size_named

NUM_FIRST = 4  # of the undone choices, before what else CUDA can tell
WARM_STEPS, LEAST_STEPS, PARTS_STEPS = 3, 4, 3
H200_SECONDS = 510.0  # since torch was imported; a row begins only if it will be done by then
COMPILED_SECONDS, EAGER_SECONDS = 170.0, 35.0  # what a row may need
PLAIN = "plain loop"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. Of ``choices`` the plain loop has dtype and checkpointing."""

    name: str
    loop: Literal["ours", "plain"]
    batch: int
    micro_batch: int
    choices: Choices
    seconds: float
    autotune: bool = True
    """Let cuDNN try its algorithms on the first steps."""
    parts: bool = False
    gradients: bool = False


@dataclass(slots=True)
class Result:
    """What a row measured. ``device_bytes`` is CUDA's peak, ``process_bytes`` the process's."""

    name: str
    batch: int = 0
    images_per_second: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    device_bytes: int = 0
    process_bytes: int = 0
    mfu: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    wait_refused: str | None = None
    gradients: dict[str, float] = field(default_factory=dict)
    warm_seconds: float = 0.0
    error: str | None = None


def main() -> None:
    options = _options()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    size, device = size_named(options.size, options.recipe), torch.device(options.device)
    if options.one is not None:
        row = json.loads(options.one)
        row["choices"] = Choices(**row["choices"])
        print(json.dumps(asdict(_measured(Row(**row), size, device, options))))
        return
    _head(size, device)
    rows = _suite(options) if options.suite else _pair(options)
    if device.type == "cuda":
        _on_cuda(rows, size, device, options)
    else:
        _on_cpu(rows, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "toy", "sd1"), default="tiny")
    parser.add_argument("--recipe", default="bk_base")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suite", choices=("ablations", "h200"), help="more rows than the two loops")
    parser.add_argument("--batch", type=int, help="images a step (8; on CUDA 64)")
    parser.add_argument("--micro-batch", type=int, help="images at once (the batch)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="fp32 on a CPU, else bf16")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true", help="ours compiled; on CUDA only")
    parser.add_argument("--seconds", type=float, help="of timed steps a row (3; on CUDA 15)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs on a CPU")
    parser.add_argument("--parts", action="store_true", help="where the time of a step goes")
    parser.add_argument("--profile", metavar="PREFIX", help="tables of the top kernels, PREFIX.NAME.txt; on CUDA only")
    parser.add_argument("--json", metavar="FILE", help="append each row's result as a line")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    is_cuda = options.device == "cuda"
    if not is_cuda and (options.compile or options.profile or options.suite == "h200"):
        parser.error("--compile, --profile and --suite h200 need --device cuda")  # inductor's CPU gradients are wrong
    options.batch = options.batch or (64 if is_cuda else 8)
    options.micro_batch = options.micro_batch or options.batch
    if options.batch % options.micro_batch:
        parser.error("--micro-batch must divide --batch")
    options.dtype = options.dtype or ("bf16" if is_cuda else "fp32")
    options.seconds = options.seconds or (12.0 if is_cuda else 3.0)
    return options


def _pair(options: argparse.Namespace) -> list[Row]:
    """Return the two loops."""
    choices = Choices(dtype=options.dtype, channels_last=options.channels_last, compile=options.compile)
    row = Row(
        "ours, compiled" if options.compile else "ours",
        "ours",
        options.batch,
        options.micro_batch,
        choices,
        options.seconds,
        parts=options.parts,
        gradients=options.compile,
    )
    return [replace(row, name=PLAIN, loop="plain", choices=_plain(choices), gradients=False), row]


def _plain(choices: Choices) -> Choices:
    return Choices(dtype=choices.dtype, channels_last=False, checkpointing="full")


def _suite(options: argparse.Namespace) -> list[Row]:
    """Return the two loops, then ours with each choice undone in turn, the most telling first."""
    plain, ours = _pair(options)
    rows = [replace(plain, parts=True), replace(ours, parts=True)]
    if options.suite == "h200":
        compiled = replace(ours.choices, compile=True)
        rows.append(replace(ours, name="ours, compiled", choices=compiled, parts=True, gradients=True))
    undone = [replace(ours, name=name, choices=replace(ours.choices, **change)) for name, change in _undone(ours)]
    if options.suite != "h200":
        return rows + undone
    return rows + undone[:NUM_FIRST] + _more(plain, ours) + undone[NUM_FIRST:]


def _undone(ours: Row) -> list[tuple[str, dict[str, Any]]]:
    """Return what is changed of our choices, one at a time."""
    found: list[tuple[str, dict[str, Any]]] = [
        ("VAE online", {"latents": "pixels"}),
        ("checkpointing full", {"checkpointing": "full"}),
        ("channels_last off", {"channels_last": False}),
        ("autocast of fp32 weights", {"autocast": True}),
        ("AdamW not fused", {"fused": False}),
        ("average each step", {"ema_every": 1}),
        ("losses read each step", {"log_every": 1}),
        ("checkpointing high_resolution", {"checkpointing": "high_resolution"}),
    ]
    return [(name, undone) for name, undone in found if ours.choices.dtype != "fp32" or "autocast" not in undone]


def _more(plain: Row, ours: Row) -> list[Row]:
    """Return rows that only CUDA can tell about."""
    compiled = replace(ours.choices, compile=True)
    twice = replace(ours, batch=2 * ours.batch, micro_batch=2 * ours.batch)
    return [
        replace(ours, name="cuDNN not autotuned", autotune=False),
        replace(twice, name="twice the batch, compiled", choices=compiled),
        replace(twice, name="twice the batch"),
        replace(ours, name="four micro-batches a step", batch=4 * ours.micro_batch, seconds=4.0, parts=True),
        replace(ours, name="launches alone: batch 2", batch=2, micro_batch=2, seconds=4.0),
        replace(plain, name="plain loop, fp16", choices=replace(plain.choices, dtype="fp16")),
        replace(plain, name="plain loop, no checkpointing", choices=replace(plain.choices, checkpointing="none")),
    ]


def _on_cuda(rows: Sequence[Row], size: Size, device: torch.device, options: argparse.Namespace) -> None:
    """Measure one row after the other, in this process."""
    began = time.monotonic()
    peak = bf16_tflops(device)
    sheet = datasheet_tflops()
    told = "" if sheet is None else f", {peak / sheet:.0%} of the datasheet's {sheet:.0f}"
    print(f"bf16 peak, product of two 8192 × 8192: {peak:.0f} TFLOP/s{told}\n", flush=True)
    _write(options, {"name": "bf16 peak", "tflops": peak, "datasheet_tflops": sheet})
    reference = 0.0
    for row in rows:
        needs = COMPILED_SECONDS if row.choices.compile else EAGER_SECONDS
        if options.suite == "h200" and time.monotonic() - began + needs > H200_SECONDS:
            print(f"{row.name:<40} not measured: no time left", flush=True)
            continue
        result = _measured(row, size, device, options)
        if row.choices.dtype != "fp32":
            result.mfu = result.images_per_second * size.flops / (peak * 1e12)
        reference = reference or (result.images_per_second if row.name == PLAIN else 0.0)
        _say(result, reference)
        _write(options, {**asdict(row), **asdict(result)})


def _on_cpu(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Measure every row in a process of its own, in turns; print medians over the rounds, in the last."""
    results: dict[str, list[Result]] = {row.name: [] for row in rows}
    reference = 0.0
    for number in range(options.rounds):
        for row in rows:
            command = [sys.executable, __file__, "--size", options.size, "--recipe", options.recipe]
            done = subprocess.run(
                [*command, "--device", "cpu", "--one", json.dumps(asdict(row))], stdout=subprocess.PIPE, check=True
            )
            results[row.name].append(Result(**json.loads(done.stdout)))
            if number == options.rounds - 1:
                middle, spread = _middle(results[row.name])
                reference = reference or middle.images_per_second
                _say(middle, reference, spread)
                _write(options, {**asdict(row), **asdict(middle)})


def _middle(results: Sequence[Result]) -> tuple[Result, str]:
    """Return the median run with the highest peak of all, and the range of rates as text."""
    found = sorted(results, key=lambda result: result.images_per_second)
    middle = replace(found[len(found) // 2], process_bytes=max(result.process_bytes for result in found))
    return middle, f"  ({found[0].images_per_second:.2f}–{found[-1].images_per_second:.2f})"


def _measured(row: Row, size: Size, device: torch.device, options: argparse.Namespace) -> Result:
    """Return what the row measures, or why it could not; nothing of it stays on the device."""
    result = Result(row.name, row.batch)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = row.autotune and row.loop == "ours"  # as ``speed.autotune`` does
        torch.cuda.reset_peak_memory_stats()
    try:
        _measure(row, size, device, options, result)
    except torch.OutOfMemoryError:
        result.error = "out of memory"
    except Exception as error:  # the other rows are still worth their time
        if device.type != "cuda":
            raise
        result.error = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
    result.process_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def _measure(row: Row, size: Size, device: torch.device, options: argparse.Namespace, result: Result) -> None:
    begin = time.perf_counter()
    loop = _made(row, size, device)
    try:
        for _ in range(WARM_STEPS):
            loop.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        result.warm_seconds = time.perf_counter() - begin
        result.step_seconds = step_seconds(loop, device, seconds=row.seconds, least=LEAST_STEPS)
        result.images_per_second = row.batch / statistics.median(result.step_seconds)
        if row.parts:
            result.parts = breakdown(loop, device, PARTS_STEPS)
        if device.type == "cuda":
            result.device_bytes = torch.cuda.max_memory_allocated()
            _look_at_cuda(row, loop, options, result)
    finally:
        loop.close()


def _look_at_cuda(row: Row, loop: Loop, options: argparse.Namespace, result: Result) -> None:
    if isinstance(loop, OurLoop) and row.choices.log_every == LOG_EVERY:
        loop.number = 1  # so that no look, which waits, falls into what follows
    if row.parts:
        result.waits = dict(cuda_waits(loop, PARTS_STEPS))
        if row.loop == "ours":
            result.wait_refused = refuses_to_wait(loop, PARTS_STEPS) or "no step waited"
        if options.profile:
            name = "".join(c if c.isalnum() else "-" for c in row.name)
            with open(f"{options.profile}.{name}.txt", "w", encoding="utf-8") as file:
                file.write(top_kernels(loop, PARTS_STEPS))
    if row.gradients:
        assert isinstance(loop, OurLoop)
        result.gradients = asdict(agreement(loop))


def _made(row: Row, size: Size, device: torch.device) -> Loop:
    if row.loop == "ours":
        return OurLoop(size, device, batch=row.batch, micro_batch=row.micro_batch, choices=row.choices)
    return PlainLoop(
        size,
        device,
        batch=row.batch,
        micro_batch=row.micro_batch,
        dtype=row.choices.dtype,
        checkpointing=row.choices.checkpointing != "none",
    )


def _head(size: Size, device: torch.device) -> None:
    import diffusers

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{machine()}\n{where}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    plan, (_, side, _) = size.plan, size.latent_shape
    print(
        f"{size.name}: teacher {plan.teacher.params / 1e6:.0f} M, student {plan.student.params / 1e6:.0f} M parameters,"
    )
    print(f"latents {side} × {side}, {size.flops / 1e12:.4g} TFLOP an image\n", flush=True)


def _say(result: Result, reference: float, spread: str = "") -> None:
    if result.error is not None:
        print(f"{result.name:<40} {result.error}", flush=True)
        return
    ratio = f"{result.images_per_second / reference:6.2f} x" if reference else " " * 8
    memory = result.device_bytes or result.process_bytes
    line = f"{result.name:<40}{result.images_per_second:9.2f} images/s{ratio}{memory / 1e9:8.2f} GB peak"
    line += "" if result.mfu is None else f"  MFU {result.mfu:.1%}"
    print(line + spread, flush=True)
    for label, milliseconds in result.parts.items():
        print(f"    {label:<26}{milliseconds:10.2f} ms")
    if result.waits:
        print(f"    waits for CUDA in {PARTS_STEPS} steps: {sum(result.waits.values())}, at {result.waits}")
    if result.wait_refused is not None:
        print(f"    with waiting forbidden: {result.wait_refused}")
    for name, distance in result.gradients.items():
        print(f"    gradient, {name.replace('_', ' ')}: {distance:.2e}")


def _write(options: argparse.Namespace, values: dict[str, Any]) -> None:
    if options.json:
        with open(options.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
