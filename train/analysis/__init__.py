"""What trained networks make of the regions of images: the pictures of section 4.3, measured."""
from pathlib import Path

FILLS = {'mean': 'the mean colour', 'blur': 'the same image, blurred'}  # in place of masked parts


def name_network(name: str) -> str:
    """A network as pictures and files call it: a weight file by its run, a folder or repository by its name."""
    path = Path(name.split(':')[-1])
    return '.'.join(filter(None, (path.parent.name, path.stem))) if path.suffix == '.safetensors' else path.name
