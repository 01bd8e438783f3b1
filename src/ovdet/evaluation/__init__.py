"""AP of detections on COCO, LVIS and VOC."""
