"""How long the command line takes to answer, beside a bare ``python -c pass``, runs alternating."""

from __future__ import annotations

import os
import sys
import tempfile

from measure import TOOL, Run, machine, median_line, run

ROUNDS = 15

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "unet-surgery --help": [TOOL, "--help"],
    "unet-surgery recipes": [TOOL, "recipes"],
    "plan, SD v1, config and header": [TOOL, "plan", "--recipe", "bk_tiny", "--teacher", "{teacher}"],
    "plan --json": [TOOL, "plan", "--recipe", "bk_tiny", "--teacher", "{teacher}", "--json"],
    "inspect": [TOOL, "inspect", "{teacher}"],
}


def main() -> None:
    print(machine())
    print(f"median of {ROUNDS} alternating runs (range), peak memory, ratio to the first line\n")
    with tempfile.TemporaryDirectory() as folder:
        teacher = f"{folder}/teacher"
        write_header_only_teacher(teacher)
        commands = {label: [word.format(teacher=teacher) for word in words] for label, words in COMMANDS.items()}
        runs: dict[str, list[Run]] = {label: [] for label in commands}
        for command in commands.values():
            run(command)  # warm: bytecode and page cache
        for _ in range(ROUNDS):
            for label, command in commands.items():
                runs[label].append(run(command))
    bare = runs["python -c pass"]
    for label, measured in runs.items():
        print(median_line(label, measured, bare))


def write_header_only_teacher(folder: str) -> None:
    """Write a full-size SD v1 teacher whose data are a hole in the file: a plan reads the header alone."""
    from pathlib import Path

    from unet_surgery.checkpoint.bundled import bundled_folder
    from unet_surgery.checkpoint.header import encode_header
    from unet_surgery.checkpoint.jsonfile import read_object
    from unet_surgery.graph import build, parse_config
    from unet_surgery.lower import count, shapes_of

    source = bundled_folder("sd-v1-random") / "config.json"
    graph = build(parse_config(read_object(source)))
    target = Path(folder)
    target.mkdir()
    (target / "config.json").write_bytes(source.read_bytes())
    header = encode_header([(name, "F32", shape) for name, shape in sorted(shapes_of(graph).items())], {"format": "pt"})
    weights = target / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(header)
    os.truncate(weights, len(header) + 4 * count(graph).params)


if __name__ == "__main__":
    main()
