"""Dense prediction on images of rooms: segmentation, depth, surface normals, keypoints."""
