"""What trained networks make of the regions of images: the pictures of section 4.3, measured."""
