"""The safetensors container: the teacher's own file with one thing wrong in its header or its length."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.judge import ACCEPTED, PRUNE, Case
from hostile.templates import WEIGHTS, Build, unet

NAME = "conv_in.bias"
MIB = 1 << 20

Entries = dict[str, Any]


def read_container(path: Path) -> tuple[Entries, bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def container(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def write_container(path: Path, entries: Entries, data: bytes) -> None:
    path.write_bytes(container(json.dumps(entries).encode(), data))


def entries(change: Callable[[Entries], object]) -> Build:
    """Change the parsed header, leave the data."""

    def build(teacher: Path) -> None:
        header, data = read_container(teacher / WEIGHTS)
        change(header)
        write_container(teacher / WEIGHTS, header, data)

    return unet(build)


def entry(**fields: Any) -> Build:
    """Change fields of one tensor's entry."""
    return entries(lambda header: header[NAME].update(fields))


def text(change: Callable[[bytes], bytes]) -> Build:
    """Change the header's text, leave the data."""

    def build(teacher: Path) -> None:
        header, data = read_container(teacher / WEIGHTS)
        (teacher / WEIGHTS).write_bytes(container(change(json.dumps(header).encode()), data))

    return unet(build)


def content(data: bytes) -> Build:
    """Replace the file."""
    return unet(lambda teacher: (teacher / WEIGHTS).write_bytes(data))


def raw(change: Callable[[bytes], bytes]) -> Build:
    """Change the file's bytes."""
    return unet(lambda teacher: (teacher / WEIGHTS).write_bytes(change((teacher / WEIGHTS).read_bytes())))


def sparse(length: int, file_bytes: int) -> Build:
    """A file that says its header has ``length`` bytes, with as many there, all zero and on no disk."""

    def build(teacher: Path) -> None:
        (teacher / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{")
        os.truncate(teacher / WEIGHTS, file_bytes)

    return unet(build)


def rename(new: str) -> Build:
    return entries(lambda header: header.update({new: header.pop(NAME)}))


def move(header: Entries, by: int) -> None:
    """Move the tensor that lies last."""
    last = max((e for k, e in header.items() if k != "__metadata__"), key=lambda e: e["data_offsets"][1])
    last["data_offsets"] = [offset + by for offset in last["data_offsets"]]


def start_late(header: Entries) -> None:
    for fields in header.values():
        if "data_offsets" in fields:
            fields["data_offsets"] = [offset + 4 for offset in fields["data_offsets"]]


def overlap(header: Entries) -> None:
    first, second = [k for k in sorted(header) if header[k].get("shape") == [8]][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


class Payload:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ('touch "$CANARY"',)


def torch_zip(teacher: Path) -> None:
    with zipfile.ZipFile(teacher / WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload()))


def many_tensors(number: int, *, name_chars: int) -> Build:
    """A valid header of ``number`` tensors of a byte each, and then a byte too many: found last of all."""

    def build(teacher: Path) -> None:
        lines = (
            f'"t{i:0{name_chars}d}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(number)
        )
        write_raw(teacher, "{" + ",".join(lines) + "}", number + 1)

    return unet(build)


def bulk(piece: str, number: int) -> Build:
    """A header that holds one list of ``number`` pieces."""
    return unet(lambda teacher: write_raw(teacher, '{"a":[' + ",".join([piece] * number) + "]}", 0))


def write_raw(teacher: Path, header: str, data_bytes: int) -> None:
    (teacher / WEIGHTS).write_bytes(container(header.encode(), bytes(data_bytes)))


def permuted(teacher: Path) -> None:
    """The same tensors, laid out by descending name, names in random-looking order in the header."""
    header, data = read_container(teacher / WEIGHTS)
    result: Entries = {}
    pieces = []
    position = 0
    for name in sorted((n for n in header if n != "__metadata__"), reverse=True):
        begin, end = header[name]["data_offsets"]
        pieces.append(data[begin:end])
        result[name] = {**header[name], "data_offsets": [position, position + end - begin]}
        position += end - begin
    write_container(teacher / WEIGHTS, dict(sorted(result.items(), key=lambda kv: kv[0][::-1])), b"".join(pieces))


def refused(name: str, build: Build, *says: str, argv: tuple[str, ...] = PRUNE) -> Case:
    return Case("container", name, build, (*says, WEIGHTS), argv=argv)


def accepted(name: str, build: Build, argv: tuple[str, ...] = PRUNE) -> Case:
    return Case("container", name, build, code=ACCEPTED, argv=argv)


CONTAINER_CASES = (
    # --- not this format ---
    refused("empty", content(b""), "too short"),
    refused("seven bytes", content(b"1234567"), "too short"),
    refused("pickle that runs a command", content(pickle.dumps(Payload(), 2)), "a pickle"),
    *(refused(f"pickle, protocol {p}", content(pickle.dumps([1] * 99, p)), "a pickle") for p in (2, 3, 4, 5)),
    refused("torch.save's zip", unet(torch_zip), "a zip archive"),
    refused("HTML", content(b"<!DOCTYPE html><html>Sign in" + b" " * 500), "an HTML or XML page"),
    refused("HTML after blank lines", content(b"\n\n  <html>" + b" " * 500), "an HTML or XML page"),
    refused("HTML with a byte order mark", content(b"\xef\xbb\xbf<html>" + b" " * 500), "an HTML or XML page"),
    refused("Git LFS pointer", content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "LFS pointer"),
    refused("GGUF", content(b"GGUF\x03\0\0\0" + bytes(500)), "GGUF"),
    refused("HDF5", content(b"\x89HDF\r\n\x1a\n" + bytes(500)), "HDF5"),
    refused("gzip", content(b"\x1f\x8b\x08\0" + bytes(500)), "gzip"),
    refused("zeros", content(bytes(4096)), "not a JSON object"),
    # --- its length ---
    refused("length beyond the file", content((1 << 40).to_bytes(8, "little") + b"{}"), "cut short"),
    refused("length of 2^63", content((1 << 63).to_bytes(8, "little") + b"{}"), "cut short"),
    refused("length of 2^64 - 1", content(b"\xff" * 8 + b"{}"), "cut short"),
    refused("length one more than the header", raw(lambda b: bytes([b[0] ^ 1]) + b[1:]), "header"),
    refused("header above 8 MiB", sparse(9 * MIB, 10 * MIB), "implausibly large", "--max-header 9437184"),
    refused(
        "header above 100 MB, whatever is allowed",
        sparse(101_000_000, 102_000_000),
        "at most 100000000 bytes",
        argv=(*PRUNE, "--max-header", "1GB"),
    ),
    refused("file cut by a byte", raw(lambda b: b[:-1]), "cut short"),
    refused("file cut in half", raw(lambda b: b[: len(b) // 2]), "cut short"),
    refused("file cut in its header", raw(lambda b: b[:1000]), "cut short"),
    refused("a byte behind", raw(lambda b: b + b"\0"), "bytes behind the last tensor"),
    refused("itself twice", raw(lambda b: b + b), "bytes behind the last tensor"),
    # --- its JSON ---
    refused("list", text(lambda t: b"[" + t + b"]"), "not a JSON object"),
    refused("leading space", text(lambda t: b" " + t), "not a JSON object"),
    refused("byte order mark", text(lambda t: b"\xef\xbb\xbf" + t), "not a JSON object"),
    refused("not JSON", text(lambda t: b"{" + t), "not valid JSON"),
    refused("JSON and more", text(lambda t: t + b"{}"), "not valid JSON"),
    refused("padded with NUL", text(lambda t: t + bytes(8)), "not valid JSON"),
    refused("not UTF-8", text(lambda t: t.replace(b"conv_in.bias", b"conv_in.b\xffas")), "not UTF-8"),
    refused("deep nesting", text(lambda t: b'{"a":' + b"[" * 80_000), "not valid JSON"),
    refused("deep nesting of objects", text(lambda t: b'{"a":' * 80_000), "not valid JSON"),
    refused("NaN", entry(shape=[float("nan")]), "NaN is not JSON"),
    refused("Infinity", entry(shape=[float("inf")]), "Infinity is not JSON"),
    refused("1e999", text(lambda t: t.replace(b'"shape": [8]', b'"shape": [1e999]', 1)), "beyond what a float holds"),
    refused("an integer of 5000 digits", text(lambda t: t.replace(b"[8]", b"[" + b"9" * 5000 + b"]", 1)), "digits"),
    refused("one tensor twice", text(lambda t: t[:-1] + b',"conv_in.bias":' + b"{}}"), "'conv_in.bias' stands twice"),
    refused("one field twice", text(lambda t: t.replace(b'{"dtype"', b'{"dtype": "F32", "dtype"')), "stands twice"),
    refused("half a character", rename("conv_in.\ud800bias"), "lone surrogate"),
    # --- its metadata ---
    refused("metadata of numbers", entries(lambda h: h.update(__metadata__={"a": 1})), "__metadata__"),
    refused("metadata that is a list", entries(lambda h: h.update(__metadata__=["pt"])), "__metadata__"),
    refused("nested metadata", entries(lambda h: h.update(__metadata__={"a": {"b": "c"}})), "__metadata__"),
    # --- its tensors ---
    refused("empty name", rename(""), "impossible name"),
    refused("terminal codes in a name", rename("\x1b[2J\x1b[31m"), "impossible name", "\\u001b"),
    refused("a new line in a name", rename("a\nerror: b"), "impossible name"),
    refused("a right-to-left mark in a name", rename("a\u202eb"), "impossible name"),
    refused("a name of 600 characters", rename("a" * 600), "impossible name"),
    refused("entry that is a number", entries(lambda h: h.update({NAME: 3})), "malformed", NAME),
    refused("entry that is null", entries(lambda h: h.update({NAME: None})), "malformed", NAME),
    refused("entry without offsets", entries(lambda h: h[NAME].pop("data_offsets")), "malformed", NAME),
    refused("entry with more", entry(device="cuda"), "malformed", NAME),
    refused("unknown dtype", entry(dtype="F12"), "unknown dtype", NAME),
    refused("dtype in torch's words", entry(dtype="float32"), "unknown dtype", NAME),
    refused("dtype that is a list", entry(dtype=["F32"]), "unknown dtype", NAME),
    refused("negative sizes", entry(shape=[-2, -4]), "impossible shape", NAME),
    refused("a fractional size", entry(shape=[8.0]), "impossible shape", NAME),
    refused("a size that is true", entry(shape=[True, 8]), "impossible shape", NAME),
    refused("a size that is text", entry(shape=["8"]), "impossible shape", NAME),
    refused("a shape that is text", entry(shape="8"), "impossible shape", NAME),
    refused("a shape that is null", entry(shape=None), "impossible shape", NAME),
    refused("a size of 10^30", entry(shape=[10**30]), "more bytes than a file can have", NAME),
    refused("sizes that overflow 64 bits", entry(shape=[2**33, 2**33]), "more bytes than a file can have", NAME),
    refused("sizes that wrap around to the right number", entry(shape=[2**62 + 2, 4]), "more bytes", NAME),
    refused("sizes that overflow, times none", entry(shape=[2**40, 2**40, 0]), "more bytes", NAME),
    refused("370,000 sizes of 20 digits", entry(shape=[10**19] * 370_000), "more bytes than a file", NAME),
    refused("half a byte", entry(dtype="F4", shape=[63]), "no whole number", NAME),
    refused("offsets in reverse", entry(data_offsets=[32, 0]), "impossible data_offsets", NAME),
    refused("three offsets", entry(data_offsets=[0, 16, 32]), "impossible data_offsets", NAME),
    refused("one offset", entry(data_offsets=[0]), "impossible data_offsets", NAME),
    refused("negative offsets", entry(data_offsets=[-32, 0]), "impossible data_offsets", NAME),
    refused("fractional offsets", entry(data_offsets=[0.0, 32.0]), "impossible data_offsets", NAME),
    refused("offsets beyond 64 bits", entry(data_offsets=[2**64, 2**64 + 32]), "hole"),
    refused("too few bytes for the shape", entry(shape=[9]), "36 bytes for F32", "found:    32 bytes", NAME),
    refused("another dtype of another size", entry(dtype="F16"), "16 bytes for F16", NAME),
    refused("a hole", entries(lambda h: move(h, 8)), "leave a hole"),
    refused("an overlap", entries(lambda h: move(h, -8)), "overlap"),
    refused("one range for two tensors", entries(overlap), "overlap"),
    refused("data that starts late", entries(start_late), "leave a hole"),
    # --- its size ---
    refused("two million empty lists", bulk("[]", 2_000_000), "implausibly many lists"),
    refused("a million short texts", bulk('"ab"', 1_100_000), "implausibly many values"),
    refused("a million floats", bulk("1e0", 1_500_000), "implausibly many values"),
    refused("120,000 tensors", many_tensors(120_000, name_chars=6), "implausibly many lists"),
    refused("29,000 tensors, and the last byte wrong", many_tensors(29_000, name_chars=200), "bytes behind the last"),
    refused("15,000 long names", many_tensors(15_000, name_chars=480), "bytes behind the last tensor"),
    refused(
        "a metadata text of 8 MB", entries(lambda h: h.update(__metadata__={"a": "b" * 8_300_000}, x=1)), "tensor x"
    ),
    # --- what is legal ---
    accepted("no metadata", entries(lambda h: h.pop("__metadata__"))),
    accepted("metadata with anything in it", entries(lambda h: h.update(__metadata__={"\x1b[31m": "<b>\n---\n"}))),
    accepted(
        "metadata with 5 MB of a trainer's tags",
        entries(lambda h: h.update(__metadata__={"tags": '"a cat": 12, ' * 400_000})),
    ),
    accepted("padding", text(lambda t: t + b" " * 4096)),
    accepted("unaligned data", text(lambda t: t + b" " * (7 - len(t) % 8))),
    accepted("any order", unet(permuted)),
    accepted(
        "a header above 8 MiB, allowed",
        entries(lambda h: h.update(__metadata__={"a": "b" * 9_000_000})),
        argv=(*PRUNE, "--max-header", "16MiB"),
    ),
)
