"""Training methods: each is a module that owns student, teachers and losses, and declares itself in one file."""

from training.methods.base import Method, RegionMethod
from training.methods.registry import Entry, Setting, find_method, find_recipe, list_methods, make_method

__all__ = [
    "Entry", "Method", "RegionMethod", "Setting", "find_method", "find_recipe", "list_methods",
    "make_method",
]
