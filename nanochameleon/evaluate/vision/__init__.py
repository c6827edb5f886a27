"""Optional. Buys captions and questions about images: COCO, Flickr30k, VQAv2, OK-VQA, VizWiz and the shapes world."""
