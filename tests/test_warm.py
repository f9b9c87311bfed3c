"""The process that runs the other tests' commands: what one test leaves behind is not another's answer."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from warm import start_tool


def test_a_command_that_was_left_running_is_no_others_answer() -> None:
    left = start_tool(("doctor",), env=os.environ)  # and its test fails
    done = start_tool(("plan", "-r", "nothing"), env=os.environ).ended()
    assert done.returncode == 2
    assert "nothing" in done.stderr
    assert not Path(f"/proc/{left.pid}").exists()


def test_a_signal_after_the_end_is_for_nobody() -> None:
    command = start_tool(("--version",), env=os.environ)
    while not command.is_over():
        time.sleep(0.01)
    command.send_signal(signal.SIGKILL)
    assert command.ended().returncode == 0
