"""Lookup of the standards in methods/parity/formulas/ by name."""

import importlib
import pkgutil

from kilobatch.data.errors import UserError, choices
from kilobatch.methods.parity import formulas
from kilobatch.methods.parity.standard import Standard


def known() -> list[str]:
    """The names of the methods, and of forms of them, that have a standard."""
    return [module.name for module in pkgutil.iter_modules(formulas.__path__)]


def standard(method: str) -> Standard:
    """The standard of a method, by its name or that of a module with a STANDARD. Raises UserError if it has none."""
    if "." in method:
        return importlib.import_module(method).STANDARD
    if method not in known():
        raise UserError(f"there is no parity table for '{method}'{choices(method, known())}")
    return importlib.import_module(f"kilobatch.methods.parity.formulas.{method}").STANDARD
