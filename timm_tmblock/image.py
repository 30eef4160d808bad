"""Reading images of any size and mode."""
import inspect
import io
import os
from pathlib import Path
from typing import IO, List, Sequence, Union

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import InputError

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.jfif', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm')


def list_images(paths: Sequence[Union[str, Path]]) -> List[Path]:
    """Files as named, and images in folders and their subfolders, sorted, without our own *.explained.png.

    Raises:
        InputError: If there are none.
    """
    found: List[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(
                f for f in path.rglob('*')
                if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.endswith('.explained.png')
                and not any(part.startswith('.') for part in f.relative_to(path).parts) and os.path.isfile(f))
        else:
            found.append(path)
    if not found:
        raise InputError(f'There are no images in {", ".join(map(str, paths))}.')
    return found


_UPRIGHT = {  # by the orientation of EXIF data
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


def _turn_upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF data turn it, as it is where they cannot be read."""
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # of many kinds; Pillow, too, goes on without such data where it can
        return image
    # Pillow's exif_transpose writes all the data anew, which fails where one of them is not as it should be
    return image if turn is None else image.transpose(turn)


def read_image(source: Union[str, Path, bytes, IO[bytes], Image.Image, np.ndarray], mode: str = 'RGB') -> Image.Image:
    """Read an image and convert it to 8 bits in `mode`, upright and on white where it is transparent.

    Args:
        source: Path, open file or its bytes, PIL image, or uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), grey
            or RGB(A).
        mode: 'RGB' or 'L'.

    Raises:
        InputError: If the source is missing, empty, damaged, or no image.
    """
    name = str(source) if isinstance(source, (str, Path)) else getattr(source, 'name', 'The image')
    file_format = None
    if isinstance(source, (bytes, bytearray)):
        source = io.BytesIO(source)
    try:
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8:
                raise InputError(f'The image array has dtype {source.dtype}; give uint8 values from 0 to 255.')
            if source.ndim == 3 and source.shape[2] == 1:
                source = source[..., 0]
            if source.ndim != 2 and (source.ndim != 3 or source.shape[2] not in (3, 4)):
                raise InputError(f'The image array has shape {source.shape}; give (H, W), (H, W, 3) or (H, W, 4).')
            image = Image.fromarray(source)
        elif not isinstance(source, (str, Path, Image.Image)) and not hasattr(source, 'read'):
            raise InputError(f'{type(source).__name__} is not an image; give a path, bytes, PIL image or uint8 array.')
        elif inspect.iscoroutinefunction(getattr(source, 'read', None)):  # FastAPI's UploadFile
            raise InputError(f'{type(source).__name__} is read asynchronously; give its .file or its bytes.')
        else:
            image = source if isinstance(source, Image.Image) else Image.open(source)
            file_format = image.format
            if file_format == 'EPS':  # Pillow has Ghostscript run it
                raise InputError(f'{name} is PostScript, a program; give a PNG, JPEG or WebP file.')
            image = _turn_upright(image)
        if 0 in image.size:
            raise InputError(f'{name} has no pixels.')
    except FileNotFoundError as e:
        raise InputError(f'There is no image {name}.') from e
    except IsADirectoryError as e:
        raise InputError(f'{name} is a folder; name the images in it.') from e
    except PermissionError as e:
        raise InputError(f'{name} cannot be read: permission denied.') from e
    except UnidentifiedImageError as e:
        raise InputError(f'{name} is empty or not an image Pillow can read; give a PNG, JPEG or WebP file.') from e
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as e:
        raise InputError(f'{name} has too many pixels ({e}); scale it down.') from e
    except Exception as e:  # Pillow has a kind of error for each way in which a file can be broken
        raise InputError(f'{name} cannot be decoded ({e}); it may be cut short.') from e
    if image.mode.startswith('I;16') or (image.mode == 'I' and file_format in ('PNG', 'PPM')):
        # 16-bit grey; Pillow's own conversion clips it at 255
        values = np.asarray(image).clip(0, 65535)
        pixels = (values >> 8).astype(np.uint8)
        pixels[values == image.info.get('transparency', -1)] = 255
        image = Image.fromarray(pixels)
    if image.mode in ('I', 'F'):
        kind = 'floating-point' if image.mode == 'F' else '32-bit'
        raise InputError(f'{name} has {kind} pixels of unknown range; convert it to 8 bits.')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    image = image.convert(mode)  # a copy
    image.info.clear()  # of EXIF data too, by which the next reader would turn it again
    return image
