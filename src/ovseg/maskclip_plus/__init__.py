"""MaskCLIP+ (ECCV 2022): a segmentation network taught by dense labels of CLIP, or by its own beside annotations."""
