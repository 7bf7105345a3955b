"""A CUDA graph's stand-in for the emulator: launches are noted while `work` runs and started again at each replay.

As on a GPU, a recorded launch holds bare pointers. Memory allocated while recording stays with the recording; of all other
memory only a weak reference is kept, and a replay that would touch memory which has been freed meanwhile is an error.
"""

import weakref

import numpy as np


class Recorder:
    def __init__(self, load_function, empty):
        self._load_function, self._empty = load_function, empty
        self._calls, self._pool = None, None
        self._counters = None

    def load_function(self, file, entry, defines):
        start = self._load_function(file, entry, defines)

        def launch(grid, block, args, shared_bytes=0, dependent=False):
            if self._calls is None:
                start(grid, block, args, shared_bytes)
            else:
                self._calls.append((start, grid, block, [pointer(arg) for arg in args], shared_bytes, dependent))

        return launch

    def empty(self, shape, dtype):
        array = self._empty(shape, dtype)
        if self._pool is not None:
            self._pool.append(_owner(array))
        return array

    def workspace(self):
        if self._counters is None:
            self._counters = self._empty((4096,), np.int32)
            self._counters[:] = 0
        assert not self._counters.any(), "a kernel left its counters in launch.workspace() behind"
        return self._counters

    def record(self, work):
        self._calls, self._pool = [], []
        self._counters, outside = None, self._counters
        result = work()
        calls, pool, counters = self._calls, self._pool, self._counters
        self._calls = self._pool = None
        self._counters = outside

        def replay(keep=pool):
            written = set()  # arrays, by the first byte of their owners
            for start, grid, block, pointers, shared_bytes, dependent in calls:
                args = tuple(_array(pointer) for pointer in pointers)
                owners = {
                    i: _owner(behind(arg)).ctypes.data for i, arg in enumerate(args) if isinstance(arg, np.ndarray)
                }
                late = tuple(i for i, owner in owners.items() if owner in written)
                start(grid, block, args, shared_bytes, dependent, late if dependent else ())
                written |= {owners[i] for i in start.writes if i in owners}
                assert counters is None or not counters.any(), "a kernel left its counters in launch.workspace() behind"

        return replay, result

    @staticmethod
    def copy(target, source):
        target[...] = source


class TensorMap(np.ndarray):
    """A structure that names a matrix, kept as `pointer` gives it."""


def pointer(arg):
    if not isinstance(arg, np.ndarray) or arg.dtype.type is np.void:  # structures go by value
        return arg
    owner = _owner(arg)
    return weakref.ref(owner), arg.ctypes.data - owner.ctypes.data, arg.shape, arg.dtype


def behind(arg):
    """The array that a launch reads through an argument."""
    return _array(arg.matrix) if isinstance(arg, TensorMap) else arg


def _owner(array):
    while array.base is not None:
        array = array.base
    return array


def _array(pointer):
    if not isinstance(pointer, tuple):
        return pointer
    reference, offset, shape, dtype = pointer
    owner = reference()
    assert owner is not None, f"a recorded launch reads or writes freed memory, once {shape} of {dtype}"
    return np.ndarray(shape, dtype, owner, offset)
