"""Work in a child process that is killed at moments drawn at random, until it gets through."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable


def until_it_gets_through(
    work: Callable[[], object], kills: int, seed: int, within: tuple[float, float]
) -> None:
    """Start over after each kill; a child that ends before its kill is started again.

    Args:
        kills: that must have met a child at work.
        within: seconds from a start to its kill, from and to.
    """
    draw = random.Random(seed)
    done = 0
    while True:
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        if done < kills:
            time.sleep(draw.uniform(*within))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            done += 1
        elif done >= kills or os.WEXITSTATUS(status):
            print("kills", done, "status", status)  # noqa: T201
            if os.WEXITSTATUS(status):
                sys.exit(os.WEXITSTATUS(status))
            return
