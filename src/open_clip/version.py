"""Version of the package."""

#: The public part is the release of OpenCLIP whose calls these are (``tests/open_clip/test_upstream_surface.py``
#: compares them); the local part is this project's own. Requirements on ``open_clip_torch`` thus mean what they say.
__version__ = "3.3.0+clipself.4.0.0"
