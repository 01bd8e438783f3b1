"""Data of GLIP: detection, grounding and caption sets as images with texts whose phrases have boxes."""
