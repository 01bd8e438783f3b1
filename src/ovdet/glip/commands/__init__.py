"""The programs of the folder ``GLIP``; each module has a ``main``."""
