"""What can go wrong between a Hub and its client, to be put into a stand-in's list ``faults``.

    hub.faults.append(Fault("cut", "*/diffusion_pytorch_model.safetensors", parameter=1000))

| kind       | what the client meets                                                    | parameter                    |
|------------|--------------------------------------------------------------------------|------------------------------|
| `status`   | this answer in place of the right one; nothing is done                   | the status                   |
| `reset`    | the connection is reset before any answer; nothing is done               |                              |
| `cut`      | the connection is closed in the body, whose whole length was announced   | bytes that are sent          |
| `short`    | a body with too few bytes, and a Content-Length that fits them           | bytes that are missing (1)   |
| `range`    | a 206 of another range than was asked for, and it says so                | by how much it is moved (1)  |
| `etag`     | another ETag                                                             |                              |
| `flip`     | one bit of the body is wrong                                             | which byte (0)               |
| `no-range` | Range is ignored: 200 and the whole                                      |                              |
| `slow`     | a pause before every 16 KiB                                              | its seconds                  |
| `stall`    | not a byte more until the client gives up                                | bytes of the body before it; |
|            |                                                                          | None: not even a status      |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

Kind = Literal["status", "reset", "cut", "short", "range", "etag", "flip", "no-range", "slow", "stall"]
Host = Literal["hub", "cdn"]
ALWAYS = 1 << 30


@dataclass
class Fault:
    """A fault of the requests whose path (as in the request, without its query) ``path`` fits, as a glob.

    It is used up after ``times`` requests, the first ``after`` of which are answered well. Only requests that fit
    ``host`` and ``method`` count, where these are given. ``headers`` go with a ``status``.
    """

    kind: Kind
    path: str = "*"
    host: Host | None = None
    times: int = 1
    parameter: float | None = None
    method: str | None = None
    after: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.kind in get_args(Kind), self.kind

    def fits(self, method: str, host: str, path: str) -> bool:
        return fnmatchcase(path, self.path) and self.host in (None, host) and self.method in (None, method)

    def number(self, default: int = 0) -> int:
        return default if self.parameter is None else int(self.parameter)


def take(faults: list[Fault], method: str, host: str, path: str) -> Fault | None:
    """Return the first fault that this request meets, and count it as used."""
    for fault in faults:
        if fault.times > 0 and fault.fits(method, host, path):
            if fault.after > 0:
                fault.after -= 1
                continue
            fault.times -= 1
            return fault
    return None
