import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def demo():
    """The model that comes with the package, on the CPU in float32."""
    import cuqwen

    return cuqwen.load("demo", device="cpu")


from emulator import emulated_gpu  # noqa: E402, F401
