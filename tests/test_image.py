"""Images of every mode become 8-bit RGB; what is no image is named."""
import re
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from export import runtime
from timm_tmblock.errors import InputError
from timm_tmblock.image import read_image

GREY = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)


def save(image: Image.Image, path) -> str:
    image.save(path)
    return str(path)


@pytest.mark.parametrize('mode', ['L', 'P', 'RGB', 'RGBA', 'LA', 'CMYK'])
def test_modes_keep_the_pixels(tmp_path, mode):
    image = Image.fromarray(GREY).convert(mode)
    suffix = 'tiff' if mode == 'CMYK' else 'png'
    pixels = np.asarray(read_image(save(image, tmp_path / f'x.{suffix}')))
    assert pixels.shape == (3, 4, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, GREY[..., None].repeat(3, -1), atol=1)


@pytest.mark.parametrize('suffix', ['png', 'pgm', 'tiff'])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    path = save(Image.fromarray(GREY.astype(np.uint16) << 8), tmp_path / f'x.{suffix}')
    assert Image.open(path).mode.startswith('I')
    np.testing.assert_array_equal(np.asarray(read_image(path))[..., 0], GREY)


def test_transparency_shows_white(tmp_path):
    image = Image.new('RGBA', (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(read_image(save(image, tmp_path / 'x.png'))).tolist() == [[[200, 0, 0], [255, 255, 255]]]
    palette = image.quantize()
    assert np.asarray(read_image(save(palette, tmp_path / 'p.png')))[0, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize('read', [read_image, runtime.read_image])
@pytest.mark.parametrize('orientation', range(10))  # of which 0 and 9 are none
def test_exif_orientation_is_applied(tmp_path, read, orientation):
    image = Image.fromarray(GREY)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / 'x.png', exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / 'x.png')))
    assert np.array_equal(expected, GREY) == (orientation in (0, 1, 9))
    found = read(tmp_path / 'x.png', 'L')
    np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(np.asarray(read(found, 'L')), expected)  # which is upright already


@pytest.mark.parametrize('read', [read_image, runtime.read_image])
def test_orientation_is_applied_where_other_exif_data_are_not_as_they_should_be(tmp_path, read):
    entries = ((0x0112, 3, 1, struct.pack('<HH', 6, 0)), (0x011A, 2, 3, b'72\0\0'))  # a resolution that is a text
    directory = b''.join(struct.pack('<HHI', tag, kind, count) + value for tag, kind, count, value in entries)
    Image.fromarray(GREY).save(
        tmp_path / 'x.png', exif=b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<H', 2) + directory + b'\0' * 4)
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(tmp_path / 'x.png'))
    np.testing.assert_array_equal(np.asarray(read(tmp_path / 'x.png', 'L')), np.rot90(GREY, -1))


@pytest.mark.parametrize('read', [read_image, runtime.read_image])
@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_exif_data_that_cannot_be_read_are_left_out(tmp_path, read, suffix):
    image = Image.fromarray(GREY)
    density = {} if suffix == 'png' else dict(dpi=(1, 1))
    image.save(tmp_path / f'x.{suffix}', exif=b'Exif\0\0no TIFF header', **density)
    with pytest.raises(SyntaxError):
        Image.open(tmp_path / f'x.{suffix}').getexif()
    np.testing.assert_array_equal(
        np.asarray(read(tmp_path / f'x.{suffix}', 'L')), np.asarray(Image.open(tmp_path / f'x.{suffix}')))


def test_arrays_and_pil_images_are_taken():
    np.testing.assert_array_equal(np.asarray(read_image(GREY, 'L')), GREY)
    np.testing.assert_array_equal(np.asarray(read_image(Image.fromarray(GREY), 'L')), GREY)


@pytest.mark.parametrize('read', [read_image, runtime.read_image])
def test_arrays_of_one_channel_are_grey(read):
    np.testing.assert_array_equal(np.asarray(read(GREY[..., None], 'L')), GREY)


@pytest.mark.parametrize('shape', [(2, 3, 4, 1), (5, 3, 32), (3, 4, 2), (4,)])
@pytest.mark.parametrize('read, error', [(read_image, InputError), (runtime.read_image, runtime.RuntimeInputError)])
def test_arrays_of_another_shape_are_refused(read, error, shape):
    with pytest.raises(error, match=re.escape(f'has shape {shape}; give (H, W), (H, W, 3) or (H, W, 4).')):
        read(np.zeros(shape, dtype=np.uint8))


def test_old_pillow_is_named(monkeypatch):
    monkeypatch.delattr(Image.Image, 'has_transparency_data')
    with pytest.raises(runtime.RuntimeInputError, match='Pillow 10.1 or newer; pip install --upgrade pillow'):
        runtime.read_image(GREY)


def make_bad(tmp_path, kind):
    path = tmp_path / 'bad.png'
    if kind == 'empty':
        path.touch()
    elif kind == 'text':
        path.write_text('not an image')
    elif kind == 'truncated':
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == 'folder':
        path.mkdir()
    elif kind in ('float', 'integers'):
        path = path.with_suffix('.tiff')
        Image.fromarray(GREY.astype(np.float32 if kind == 'float' else np.int32)).save(path)
    return path


both = pytest.mark.parametrize(
    'read, error', [(read_image, InputError), (runtime.read_image, runtime.RuntimeInputError)])


@pytest.mark.parametrize('kind, message', [
    ('missing', 'There is no image'), ('empty', 'empty or not an image'), ('text', 'empty or not an image'),
    ('truncated', 'cannot be decoded'), ('folder', 'is a folder'), ('float', 'floating-point'),
    ('integers', '32-bit pixels of unknown range'),
])
@both
def test_what_is_no_image_is_named(tmp_path, kind, message, read, error):
    path = make_bad(tmp_path, kind)
    with pytest.raises(error, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value)


@both
def test_file_that_is_read_asynchronously_is_refused_and_says_what_to_give(read, error):
    class UploadFile:
        async def read(self, size=-1):
            return b''

    with pytest.raises(error, match='^UploadFile is read asynchronously; give its .file or its bytes.$'):
        read(UploadFile())


@both
def test_transparent_value_of_16_bits_is_white(tmp_path, read, error):
    values = np.array([[0, 0x8000], [0x1200, 0xffff]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / 'x.png', transparency=0x1200)
    assert np.asarray(read(tmp_path / 'x.png', 'L')).tolist() == [[0, 0x80], [255, 0xff]]


@both
def test_postscript_is_not_run(tmp_path, monkeypatch, read, error):
    Image.new('RGB', (4, 4)).save(tmp_path / 'x.eps')
    path = (tmp_path / 'x.eps').rename(tmp_path / 'x.png')
    monkeypatch.setattr('PIL.EpsImagePlugin.Ghostscript', lambda *args, **kwargs: pytest.fail('Ghostscript was run'))
    with pytest.raises(error, match='x.png is PostScript, a program; give a PNG'):
        read(path)


@pytest.mark.parametrize('read, error', [(read_image, InputError), (runtime.read_image, runtime.RuntimeInputError)])
@pytest.mark.parametrize('raised', [struct.error('unpack'), NotImplementedError('DDS'), IndexError('bytes')])
def test_whatever_a_broken_file_makes_pillow_raise_is_one_sentence(tmp_path, monkeypatch, read, error, raised):
    def fail(image):
        raise raised

    Image.new('RGB', (4, 4)).save(tmp_path / 'x.png')
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', fail)
    with pytest.raises(error, match='x.png cannot be decoded'):
        read(tmp_path / 'x.png')


@pytest.mark.parametrize('read, error', [(read_image, InputError), (runtime.read_image, runtime.RuntimeInputError)])
def test_image_beyond_the_limit_of_pillow_is_called_too_large(tmp_path, monkeypatch, read, error):
    path = save(Image.new('1', (30, 30)), tmp_path / 'x.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 400)
    with pytest.raises(error, match=r'x.png has too many pixels \(.*900 pixels.*\); scale it down'):
        read(path)


@pytest.mark.parametrize('read', [read_image, runtime.read_image])
def test_memory_that_runs_out_is_no_broken_file(tmp_path, monkeypatch, read):
    def fail(image):
        raise MemoryError

    Image.new('RGB', (4, 4)).save(tmp_path / 'x.png')
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', fail)
    with pytest.raises(MemoryError):
        read(tmp_path / 'x.png')


def test_arrays_of_another_dtype_are_refused():
    with pytest.raises(InputError, match='float64'):
        read_image(np.zeros((4, 4, 3)))
