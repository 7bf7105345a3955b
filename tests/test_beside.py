"""Threads beside the caller: what they return and raise, and that an interrupt leaves none of them waiting."""

import subprocess
import sys
import threading
import time

import pytest

from cuqwen.beside import Beside

# An interrupt that comes when a thread has done its work, and the next lock of `threading` that Python code enters has just been
# taken: where KeyboardInterrupt may come.
INTERRUPTED = """
import sys, threading
from cuqwen.beside import Beside

entered = threading.Condition.__enter__
def interrupted(condition):
    result = entered(condition)
    if armed and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
    return result

threading.Condition.__enter__ = interrupted
armed = False
try:
    with Beside() as beside:
        go = threading.Lock()
        go.acquire()
        first = beside.submit(go.acquire)
        armed = True
        go.release()
        first.result()
        beside.submit(bool)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_results_and_errors():
    with Beside() as beside:
        good, bad = beside.submit(divmod, 7, 3), beside.submit(divmod, 1, 0)
        assert good.result() == good.result() == (2, 1)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                bad.result()


def test_all_have_ended_after_the_block():
    go, ended = threading.Event(), []

    def slow():
        go.wait()
        time.sleep(0.05)
        ended.append(True)

    with pytest.raises(KeyError), Beside() as beside:
        beside.submit(slow)
        threading.Timer(0.05, go.set).start()
        raise KeyError
    assert ended


def test_an_interrupt_inside_a_lock_ends():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, timeout=60, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # no such lock is entered
