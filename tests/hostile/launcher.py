"""Runs command lines for its parent, one JSON line each way: a small process, so that what it measures is the child's.

The kernel counts a child's peak memory from before it becomes the new program; forked from pytest, every child would
seem to take what pytest takes. With a folder as its argument, that of tests/warm.py, it imports the command line once,
and a child is not a new program but goes on from there: a third of the time.
"""

import json
import os
import signal
import sys
import time

IS_WARM = len(sys.argv) > 1


def run(job):
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.chdir(job["cwd"])
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666), fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if IS_WARM:
            import warm

            warm.become(job["argv"][3:], job["cwd"], job["env"])
            os._exit(warm.run_main())
        os.execve(job["argv"][0], job["argv"], job["env"])
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, job["timeout"])
    _, status, usage = os.wait4(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


if __name__ == "__main__":
    if IS_WARM:
        import gc

        sys.path.insert(1, sys.argv[1])
        import warm  # noqa: F401

        import unet_surgery.api
        import unet_surgery.cli.main  # noqa: F401

        gc.freeze()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
