"""Training and evaluation of dense CLIP models (``python -m training.main``)."""
