"""Evaluation of dense CLIP models: mean accuracy of boxes, masks and crops on COCO panoptic."""
