"""What trained models read: places in the image, or entries of a learnable bank."""
