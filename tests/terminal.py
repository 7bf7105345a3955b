"""A command in a terminal of its own (a pseudo-terminal), driven key by key; and the same without one.

Where there are no pseudo-terminals (Windows) importing this module skips the test file.
"""

import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))

ROOT = Path(__file__).resolve().parents[1]
CUQWEN = (sys.executable, "-m", "cuqwen")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def environment(**changes):
    """The caller's environment without what could change the outcome: no GPU, no network, no Python settings.

    One BLAS thread, since these models are so small that more of them wait for each other on a busy machine.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LC_", "HF_", "COV_"))}
    env = {key: value for key, value in env.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "INPUTRC")}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}
    return env | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | changes


class Terminal:
    """with Terminal(command) as t: t.until("> "); t.type("text\\r"); status = t.end()

    `shown` is all that the terminal has shown, as it came; `text` the same without escape sequences.
    """

    def __init__(self, command, *, width=80, **env):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, width, 0, 0))
        self.before = termios.tcgetattr(self.master)
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment(TERM="xterm") | env,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.bytes = b""
        self.deadline = time.monotonic() + 60

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)

    @property
    def shown(self):
        return self.bytes.decode("utf-8", "replace").replace("\r\n", "\n")

    @property
    def text(self):
        return ESCAPES.sub("", self.shown)

    def type(self, keys):
        os.write(self.master, keys.encode())

    def interrupt(self):
        """Ctrl-C."""
        self.type("\x03")

    def interrupt_until(self, text):
        """Ctrl-C at the prompt, again where `text` is not shown within three seconds: readline notices one that comes between
        two keys only with the next key."""
        while text not in self.text:
            assert time.monotonic() < self.deadline, f"{text!r} was not shown in {self.shown!r}"
            self.interrupt()
            patience = time.monotonic() + 3
            while text not in self.text and time.monotonic() < patience and self._read():
                pass

    def end_by_interrupt(self):
        """Ctrl-C at the prompt, again where the program goes on for a second: it wants two. The exit status."""
        while time.monotonic() < self.deadline:
            self.interrupt()
            patience = time.monotonic() + 1
            while time.monotonic() < patience:
                if not self._read():
                    return self.process.wait(timeout=10)
        raise AssertionError(f"still going on: {self.shown!r}")

    def until(self, text, count=1):
        """Wait until the terminal has shown `text` so many times."""
        while self.text.count(text) < count:
            if not self._read() or time.monotonic() > self.deadline:
                raise AssertionError(f"{text!r} was not shown {count} times in {self.shown!r}")

    def end(self):
        """Wait for the end; the exit status."""
        while self._read():
            if time.monotonic() > self.deadline:
                raise AssertionError(f"still going on: {self.shown!r}")
        return self.process.wait(timeout=10)

    def settings_are_as_before(self):
        return termios.tcgetattr(self.master) == self.before

    def _read(self):
        if not select.select([self.master], [], [], 1)[0]:
            return True
        try:
            piece = os.read(self.master, 4096)
        except OSError:  # Linux's way to say that the other side is gone
            return False
        self.bytes += piece
        return bool(piece)


def in_terminal(command, keys=None, after="", **env):
    """Run a command to its end and press `keys` once `after` was shown (nothing: at once).

    Returns (status, what the terminal showed, whether its settings are as before).
    """
    with Terminal(command, **env) as terminal:
        if keys is not None:
            terminal.until(after)
            terminal.type(keys)
        status = terminal.end()
        return status, terminal.shown, terminal.settings_are_as_before()


def interrupted_at_import(module, *arguments):
    """Run `cuqwen` with these arguments, which gets SIGINT when it begins to import `module`: always at the same place.

    On a busy machine one in some hundred has hung; where is not known. So it is tried again, three times at most, and what all
    threads did is told as a warning.
    """
    command = _interrupt_at_import(module, *arguments)
    for _ in range(3):
        done = subprocess.run(command, input=b"", capture_output=True, env=environment(), timeout=60)
        if b"Timeout (" not in done.stderr:
            break
        warnings.warn(
            f"{arguments[0]}, interrupted at the import of {module}, hung:\n{done.stderr.decode()}", stacklevel=2
        )
    return done


def _interrupt_at_import(module, *arguments):
    code = f"""
import faulthandler, os, signal, sys
faulthandler.dump_traceback_later(20, exit=True)
class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {signal.SIGINT.value})
sys.meta_path.insert(0, Interrupt)
from cuqwen.cli import main
sys.exit(main({list(arguments)!r}))
"""
    return [sys.executable, "-c", code]
