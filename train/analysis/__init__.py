"""What trained networks make of the regions of images: the pictures of section 4.3, measured."""

FILLS = {'mean': 'the mean colour', 'blur': 'the same image, blurred'}  # in place of masked parts
