"""What tools/mutation_check.py plants, one module a subject. A new fault goes where its subject is, by a call of `fault`."""

import importlib
import pkgutil

from faults.table import FAULTS, Fault

__all__ = ["FAULTS", "Fault"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
