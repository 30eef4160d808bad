#!/usr/bin/env python3
"""Classify images with an exported network, and say which class each region matched. Without PyTorch.

    python runtime.py run rn26_tm.onnx photo.jpg folder/ --explain explained
    python runtime.py run rn26_tm.engine folder/ --json

    runner = load('rn26_tm.onnx')                        # or an engine, a folder, a Hub repository
    for prediction in runner(['a.jpg', 'b.jpg']):        # paths, bytes, PIL images, uint8 arrays (RGB), any size
        print(prediction.top(3))                         # [('ship', 0.98), ...]
        prediction.patch_probabilities                   # (templates, H/r, W/r), None if the file has no patch scores

This file stands alone, so that it can be copied beside a model: it needs Python ≥ 3.10, numpy, Pillow ≥ 10.1, and
onnxruntime (on a GPU 1.18 or newer) for .onnx files or tensorrt (tensorrt-rtx) and cuda-bindings for engines.
Everything else it reads from the file's metadata: one JSON object, in an ONNX file a property for each key (structured
values as JSON), and as it is in a sidecar FILE.json.

metadata_version: 2.
model: name registered with timm.
weights_sha256: of safetensors.torch.save(model.state_dict()) before anything was folded or rounded.
versions: of timm_tmblock, timm, torch, onnx, onnxscript and onnxruntime.
license: SPDX identifier of the weights, null if unknown.
class_names: in the order of the class scores.
template_names: in the order of the patch scores; only with patch scores.
input: name, dtype, layout ('NCHW' or 'NHWC'), shape (axes that may vary by name) and range of values:
    'normalized' floats, (pixel / 255 - mean) / std by channel; or 'pixels', uint8 from 0 to 255, normalised inside.
preprocessing: how pixels are made of an image that is upright, and on white where it is transparent: input_size (C, H,
    W), color ('RGB' or 'L'), interpolation and crop_pct: resize until it covers floor(size / crop_pct), keeping its
    proportions, and crop the centre; with crop_mode 'squash' resize to floor(size / crop_pct) and crop. By Pillow's
    resize, which antialiases; OpenCV's interpolations (other than INTER_AREA) and a browser's canvas do not, so larger
    images come out different. For the rounding see resize_and_crop in runtime.py. mean and std are of pixels in [0, 1],
    for 'normalized' inputs.
outputs: for each its name, dtype, shape (an axis that varies with the input by name or formula) and meaning ('class
    scores', 'class probabilities', 'patch scores', 'patch probabilities'); of patches also stride, in pixels of the
    input between neighbouring regions, and method 'cam' where they are class activation maps, and not of template
    matching. To show a map, stretch it over the whole input.
opset: of the ONNX operators.
precision: 'fp32', 'fp16', 'bf16' or 'int8'.
quantization: null, or target ('cpu': uint8 activations; 'tensorrt': int8, symmetric), method, images (how many) and
    images_of (of what set), and float_nodes, the names of nodes kept in floating point that the target would quantize.
parity: comparison with PyTorch in float32, see export/parity.py; an engine's sidecar has none.

Only in the sidecar: file_sha256 and file_bytes of the file beside it, and for an engine `engine`, see
export/tensorrt.py.
"""
import argparse
import codecs
import colorsys
import contextlib
import ctypes
import errno
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Callable, Deque, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

ImageSource = Union[str, Path, bytes, Image.Image, np.ndarray]
METADATA_VERSION = 2  # of what is described above
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.jfif', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm')
ENGINE_SUFFIXES = ('.engine', '.plan')
MAX_PIXELS = 1 << 26  # of an image that is resized before it is cropped
DEVICES = ('auto', 'cpu', 'cuda')
TENSORRT_MODULES = ('tensorrt', 'tensorrt_rtx')
BUILT = ('backend', 'version', 'version_compatible', 'gpu', 'hardware_compatibility', 'profiles', 'command', 'options',
         'onnx', 'onnx_sha256')
NO_REASON = 'it gives no reason'
# float32 of ONNX Runtime on a GPU would be rounded to 10 bits of mantissa before each convolution
CUDA_OPTIONS = {'use_tf32': '0'}
# what the message of ONNX Runtime says of the GPU, after signatures and places in its source
_GPU_FAILURE = re.compile(r'(CUDA|CUDNN|CUBLAS)\S* (failure|error)[^;\n]*|Failed to allocate memory[^;\n]*')
_preloading = threading.Lock()


class RuntimeInputError(ValueError):
    """Input that cannot be used. The message is one sentence: what is wrong, and what to do."""


class NotInstalledError(RuntimeInputError):
    """A library that would be needed is not there."""


class _NoMemoryError(RuntimeInputError):
    """The GPU has no memory left."""


class EngineMismatchError(RuntimeInputError):
    """The engine was built for another GPU or another version of TensorRT, or is not the file that was built."""


def _tell(error: BaseException) -> str:
    """One line of another library's error: the GPU's part if it has one, the second of the Hub's, else the first."""
    of_gpu = _GPU_FAILURE.search(str(error))
    if of_gpu:
        return of_gpu[0].strip()[:200]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1 if lines[1:] and getattr(error, 'response', None) is not None else 0][:200]


# Images

def read_image(source: ImageSource, mode: str = 'RGB') -> Image.Image:
    """Read an image in 8 bits, upright, and on white where it is transparent.

    Args:
        source: Path, open file or its bytes, PIL image, or uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), grey
            or RGB(A); OpenCV's are BGR, so give `array[..., ::-1]`.
        mode: 'RGB' or 'L'.

    Raises:
        RuntimeInputError: If it cannot be read.
    """
    name = str(source) if isinstance(source, (str, Path)) else 'The image'
    if not hasattr(Image.Image, 'has_transparency_data'):
        raise NotInstalledError('Images are read with Pillow 10.1 or newer; pip install --upgrade pillow.')
    if isinstance(source, (bytes, bytearray)):
        source = io.BytesIO(source)  # type: ignore[assignment]
    try:
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8:
                raise RuntimeInputError(f'The image array has dtype {source.dtype}; give uint8 values from 0 to 255.')
            if source.ndim == 3 and source.shape[2] == 1:
                source = source[..., 0]
            if source.ndim != 2 and (source.ndim != 3 or source.shape[2] not in (3, 4)):
                raise RuntimeInputError(
                    f'The image array has shape {source.shape}; give (H, W), (H, W, 3) or (H, W, 4).')
            source = Image.fromarray(source)
        if not isinstance(source, (str, Path, Image.Image)) and not hasattr(source, 'read'):
            raise RuntimeInputError(
                f'{type(source).__name__} is not an image; give a path, bytes, PIL image or uint8 array.')
        if inspect.iscoroutinefunction(getattr(source, 'read', None)):  # FastAPI's UploadFile
            raise RuntimeInputError(f'{type(source).__name__} is read asynchronously; give its .file or its bytes.')
        image = source if isinstance(source, Image.Image) else Image.open(source)
        file_format = image.format
        if file_format == 'EPS':
            raise RuntimeInputError(f'{name} is PostScript, a program; give a PNG, JPEG or WebP file.')
        image = _turn_upright(image)
        if 0 in image.size:
            raise RuntimeInputError(f'{name} has no pixels.')
        if image.mode.startswith('I;16') or (image.mode == 'I' and file_format in ('PNG', 'PPM')):
            # 16 bits, which Pillow would clip at 255
            values = np.asarray(image).clip(0, 65535)
            pixels = (values >> 8).astype(np.uint8)
            pixels[values == image.info.get('transparency', -1)] = 255
            image = Image.fromarray(pixels)
        if image.mode in ('I', 'F'):
            kind = 'floating-point' if image.mode == 'F' else '32-bit'
            raise RuntimeInputError(f'{name} has {kind} pixels of unknown range; convert it to 8 bits.')
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        image = image.convert(mode)  # a copy
        image.info.clear()  # of EXIF data too, by which the next reader would turn it again
        return image
    except FileNotFoundError as e:
        raise RuntimeInputError(f'There is no image {name}.') from e
    except IsADirectoryError as e:
        raise RuntimeInputError(f'{name} is a folder; name the images in it.') from e
    except PermissionError as e:
        raise RuntimeInputError(f'{name} cannot be read: permission denied.') from e
    except UnidentifiedImageError as e:
        raise RuntimeInputError(
            f'{name} is empty or not an image Pillow can read; give a PNG, JPEG or WebP file.') from e
    except (RuntimeInputError, MemoryError):
        raise
    except Image.DecompressionBombError as e:
        raise RuntimeInputError(f'{name} has too many pixels ({e}); scale it down.') from e
    except Exception as e:  # Pillow has a kind of error for each way in which a file can be broken
        raise RuntimeInputError(f'{name} cannot be decoded ({e}); it may be cut short.') from e


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


def resize_and_crop(image: Image.Image, preprocessing: Dict[str, Any]) -> Image.Image:
    """Resize, the shorter side or both, and crop the centre, pixel for pixel as timm's evaluation transform does.

    Raises:
        RuntimeInputError: For an image so long that resizing it would fill the memory.
    """
    _, height, width = preprocessing['input_size']
    scaled = [math.floor(size / preprocessing['crop_pct']) for size in (height, width)]
    w, h = image.size
    if preprocessing.get('crop_mode') == 'squash':
        size = scaled[1], scaled[0]
    elif scaled[0] == scaled[1]:  # torchvision's Resize cuts off, timm's ResizeKeepRatio rounds
        size = (scaled[0], int(scaled[0] * h / w)) if w <= h else (int(scaled[0] * w / h), scaled[0])
    else:
        ratio = min(h / scaled[0], w / scaled[1])
        size = (round(w / ratio), round(h / ratio))
    if size[0] * size[1] > MAX_PIXELS:  # Pillow's own limit is on what is resized: a few bytes may ask for gigabytes
        raise RuntimeInputError(f'An image of {w}×{h} pixels is too long and narrow; crop it first.')
    image = image.resize(size, getattr(Image.Resampling, preprocessing['interpolation'].upper()))
    # as torchvision crops; where the image is smaller, it has the larger part of the padding on the right and below
    left, top = (
        round((have - want) / 2) if have >= want else -((want - have) // 2)
        for have, want in zip(size, (width, height)))
    return image.crop((left, top, left + width, top + height))


@dataclass
class Prediction:
    """What the network says of an image."""
    image: Image.Image  # as the network saw it
    probabilities: np.ndarray  # (num_classes,)
    patch_probabilities: Optional[np.ndarray]  # (num_templates, H/r, W/r), sums to 1 over templates
    class_names: Sequence[str]
    template_names: Sequence[str]
    activations: Optional[np.ndarray] = None  # of class activation maps, (num_classes, H/r, W/r): the scores themselves

    @property
    def label(self) -> str:
        """Name of the most probable class."""
        return self.top(1)[0][0]

    def top(self, k: int = 3) -> List[Tuple[str, float]]:
        """The k most probable classes with their probabilities."""
        order = (-self.probabilities).argsort(kind='stable')[:k]  # of equals the first, as argmax
        return [(self.class_names[i], float(self.probabilities[i])) for i in order]

    def evidence(self, index: int) -> np.ndarray:
        """How much each region speaks for a template or class, (H/r, W/r) in [0, 1].

        The probability that it matches. Of class activation maps the score divided by the largest score of any class
        and region, 0 where it is negative; of a file with a softmax the probability.

        Raises:
            RuntimeInputError: If the file has no patch scores.
        """
        if self.patch_probabilities is None:
            raise RuntimeInputError('The file has no patch scores; export it again with --patch-logits.')
        if self.activations is None:
            return self.patch_probabilities[index]
        return (self.activations[index] / max(self.activations.max(), 1e-6)).clip(0, 1)

    def picture(self, size: int = 256) -> Image.Image:
        """The image, what each region matched, and where the predicted class was matched, side by side.

        Args:
            size: Width of each of the three panels, in pixels.

        Raises:
            RuntimeInputError: If the file has no patch scores.
        """
        if self.patch_probabilities is None:
            raise RuntimeInputError('The file has no patch scores; export it again with --patch-logits.')
        templates, label = list(self.template_names), self.label
        if templates == list(self.class_names):  # two of which may have one name
            shown = int(self.probabilities.argmax())
        elif label in templates:
            shown = templates.index(label)
        else:
            shown = int(self.patch_probabilities.mean((1, 2)).argmax())
        classes = self.patch_probabilities.argmax(axis=0)
        palette = np.array([_color(i) for i in range(len(templates))], dtype=np.uint8)
        height = max(1, round(size * self.image.height / self.image.width))
        base = self.image.convert('RGB').resize((size, height), Image.Resampling.BICUBIC)
        grey = base.convert('L').convert('RGB')
        regions = Image.fromarray(palette[classes]).resize((size, height), Image.Resampling.NEAREST)
        heat = Image.fromarray(np.uint8(255 * self.evidence(shown).clip(0, 1)))
        heat = heat.resize((size, height), Image.Resampling.BILINEAR)
        gold = Image.composite(Image.new('RGB', heat.size, 'gold'), grey, heat)
        present, counts = np.unique(classes, return_counts=True)
        legend = [present[i] for i in counts.argsort()[::-1][:4]]
        canvas = Image.new('RGB', (3 * size + 40, height + 70), 'white')
        draw = ImageDraw.Draw(canvas)
        best = ', '.join(f'{name} {100 * p:.0f} %' for name, p in self.top(2))
        where = 'match with' if self.activations is None else 'class activation of'
        titles = (best, 'class of each region', f'{where} {templates[shown]}')

        def write(place: Tuple[int, int], text: str, width: int, after: str = '') -> None:
            text = ' '.join(text.split())
            while text != '...' and draw.textlength(text + after, font_size=13) > width:
                text = text.removesuffix('...')[:-1] + '...'
            draw.text(place, text + after, fill='black', font_size=13)

        for i, (panel, title) in enumerate(zip((base, Image.blend(grey, regions, 0.5), gold), titles)):
            canvas.paste(panel, (10 + i * (size + 10), 30))
            write((10 + i * (size + 10), 8), title, size)
        for i, k in enumerate(legend):
            x, y = 20 + size + (i % 2) * size // 2, height + 36 + (i // 2) * 16
            others = ', others' if i == 3 and len(present) > 4 else ''
            draw.rectangle((x, y, x + 10, y + 10), fill=_color(int(k)))
            write((x + 15, y - 3), templates[k], size // 2 - 18, others)
        return canvas


def _color(index: int) -> Tuple[int, int, int]:
    """Hues a golden angle apart, in shades, as those of many classes come close."""
    r, g, b = colorsys.hsv_to_rgb(
        (0.6 + index * 0.618034) % 1, 0.55 + 0.4 * (index % 2), 0.9 - 0.3 * (index % 3 == 0))
    return round(255 * r), round(255 * g), round(255 * b)


# Sessions: arrays in, arrays out

class OnnxSession:
    """An ONNX file in ONNX Runtime. Threads may share it."""

    def __init__(
            self,
            path: Path,
            device: str = 'auto',
            allow_fallback: bool = False,
            threads: Optional[int] = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise RuntimeInputError(f'The threads of ONNX Runtime must be at least 1, not {threads}.')
        self.path = path
        ort = import_onnxruntime()
        content = read_file(path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or _count_allowed_cores()
        # onnxruntime's own fallback prints into what --json prints, and takes the session from threads that run it
        start = functools.partial(ort.InferenceSession, content, options, enable_fallback=0)
        start_on_cpu = functools.partial(start, providers=['CPUExecutionProvider'])
        if device == 'auto':
            device = _pick_device(device, allow_fallback)
            if device == 'cuda' and _is_for_cpu(path, start_on_cpu):
                device = 'cpu'
        wanted = {'cuda': 'CUDAExecutionProvider', 'cpu': 'CPUExecutionProvider'}[device]
        if wanted not in ort.get_available_providers():
            if not allow_fallback:
                raise RuntimeInputError(
                    f'This onnxruntime has no {wanted}; run "pip uninstall -y onnxruntime", then "pip install '
                    f'onnxruntime-gpu[cuda,cudnn]", or use --device cpu or, with run, --allow-fallback.')
            warnings.warn(f'ONNX Runtime runs on the CPU: this onnxruntime has no {wanted}.', stacklevel=3)
        providers: List[Any] = ['CPUExecutionProvider'] if device == 'cpu' or allow_fallback else []
        if device == 'cuda' and wanted in ort.get_available_providers():
            # the default times every algorithm of every convolution, for each batch size anew
            providers.insert(0, (wanted, dict(CUDA_OPTIONS, cudnn_conv_algo_search='HEURISTIC')))
            _preload(ort)
        self.start_on_cpu = start_on_cpu if allow_fallback else None
        self.lock = threading.Lock()
        fell_back = False
        try:
            try:
                self.session = start(providers=providers)
            except Exception as e:
                if self.start_on_cpu is None or device == 'cpu' or not _is_of_gpu(e):
                    raise
                self.session, fell_back = self._fall_back(e), True
        except Exception as e:  # onnxruntime's errors share no public base class
            reason = _tell(e)
            advice = 'export it again'
            if device == 'cuda' and _is_of_gpu(e):
                advice = 'look at the driver, CUDA and cuDNN, or allow the CPU with --allow-fallback'
            if 'NOT_IMPLEMENTED' in reason:
                advice = 'it has no kernels for this precision here (bf16?), so export it in fp32 or fp16'
            raise RuntimeInputError(f'ONNX Runtime cannot load {path}: {reason}; {advice}.') from e
        if self.provider != wanted and not fell_back and wanted in ort.get_available_providers():
            # onnxruntime itself only prints a warning
            if not allow_fallback:
                raise RuntimeInputError(
                    f'ONNX Runtime fell back to {self.provider} as {wanted} did not start; look at the driver, CUDA '
                    f'and cuDNN, or allow it with --allow-fallback.')
            warnings.warn(f'ONNX Runtime runs on the CPU: {wanted} did not start.', stacklevel=3)
        self.metadata = parse_properties(self.session.get_modelmeta().custom_metadata_map)
        if 'metadata_version' not in self.metadata and sidecar(path).is_file():
            self.metadata = read_sidecar(path)
        check_metadata(self.metadata, path)
        self.metadata['input']['shape'] = self.session.get_inputs()[0].shape  # another tool may have fixed the batch
        if 'file_sha256' in self.metadata and not is_described(content, self.metadata):
            warnings.warn(
                f'{path} was changed after {sidecar(path).name} was written, or is not its file; if it is of another '
                f'network, class names and preprocessing are wrong.', stacklevel=2)

    @property
    def provider(self) -> str:
        """What runs the file."""
        return self.session.get_providers()[0]

    def run(self, batch: np.ndarray) -> List[np.ndarray]:
        """Input of the file to its outputs, in their order in the metadata."""
        names = [output['name'] for output in self.metadata['outputs']]
        inputs = {self.metadata['input']['name']: batch}
        session = self._get_session()
        try:
            try:
                return session.run(names, inputs)
            except Exception as e:
                on_cpu = session.get_providers()[0] == 'CPUExecutionProvider'  # not self.session, which may be new
                if self.start_on_cpu is None or on_cpu or not _is_of_gpu(e):
                    raise
                with self.lock:
                    if self.session is session:  # no other thread has met it before
                        self.session = self._fall_back(e)
            return self._get_session().run(names, inputs)
        except RuntimeInputError:
            raise
        except Exception as e:
            raise RuntimeInputError(f'ONNX Runtime failed: {_tell(e)}') from e

    def close(self) -> None:
        """Free everything, once the batches that run are through."""
        self.session = None

    def _get_session(self) -> Any:
        session = self.session  # which another thread may close
        if session is None:
            raise RuntimeInputError(f'{self.path} was closed; load it again.')
        return session

    def _fall_back(self, error: Exception) -> Any:
        warnings.warn(f'ONNX Runtime continues on the CPU: {_tell(error)}.', stacklevel=3)
        assert self.start_on_cpu is not None
        return self.start_on_cpu()


def _count_allowed_cores() -> int:
    """Threads for a process that may not use all cores, as in many containers, where ONNX Runtime would start one for
    each; else 0, which leaves the number to it.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 0
    return allowed if allowed < (os.cpu_count() or 1) else 0


def _is_for_cpu(path: Path, start_on_cpu: Callable[[], Any]) -> bool:
    """Whether a file is int8 for CPUs, as its sidecar says, or it itself."""
    with contextlib.suppress(Exception):  # what is wrong with it is told where it is loaded
        if sidecar(path).is_file():
            metadata = read_sidecar(path)
        else:
            metadata = parse_properties(start_on_cpu().get_modelmeta().custom_metadata_map)
        return metadata['quantization']['target'] == 'cpu'
    return False


def _is_of_gpu(error: Exception) -> bool:
    """Whether an error of ONNX Runtime is of a provider, by its type or, where that says nothing, by its text."""
    name = type(error).__name__
    by_text = name in ('Fail', 'RuntimeException') and _GPU_FAILURE.search(str(error)) is not None
    return type(error) is RuntimeError or name in ('EPFail', 'DeviceReset') or by_text


def _preload(ort: Any) -> None:
    """Load CUDA and cuDNN, which the loader does not find where pip installs them."""
    if hasattr(ort, 'preload_dlls'):
        # it prints what it misses; of two threads one would take the other's silence for standard output
        with _preloading, contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


class TensorRTSession:
    """A TensorRT engine on the first GPU of CUDA_VISIBLE_DEVICES. Threads may share it; their batches take turns.

    Each batch size has an execution context with scratch memory for the engine's largest batch, pinned buffers and,
    from its second batch on, a CUDA graph of copy, inference and copy back (of inference alone with TensorRT-RTX, which
    captures by itself); the `max_shapes` used last are kept. `close` frees everything, as does the end of the session's
    life.
    """

    def __init__(self, path: Path, cuda_graphs: bool = True, max_shapes: int = 16) -> None:
        self.path = path
        self.metadata = read_sidecar(path)
        check_metadata(self.metadata, path)
        plan = read_file(path)
        check_engine(path, self.metadata, plan)
        trt = import_tensorrt(self.metadata['engine']['backend'])
        self.cudart = import_library('cuda.bindings.runtime')
        if self.cudart is None:
            raise RuntimeInputError('Engines need cuda-bindings; pip install cuda-bindings.')
        self.provider = f'{trt.__name__} {trt.__version__}'
        self.trt = trt
        self.logger = get_logger(trt)
        self.runtime = start_tensorrt(trt.Runtime, trt, self.logger)
        if self.metadata['engine']['version_compatible']:
            self.runtime.engine_host_code_allowed = True
        with on_first_gpu(self.cudart):
            self.engine = self.runtime.deserialize_cuda_engine(plan)
            if self.engine is None:
                reason = f'{trt.__name__} cannot load {path}: {self.logger.last}'
                if trt.__name__ == 'tensorrt_rtx':  # another build would be the same
                    raise RuntimeInputError(f'{reason}; build an engine with --backend tensorrt.')
                engine, gpu = self.metadata['engine'], query_gpu()
                if engine['version'] == trt.__version__ and gpu and engine['gpu']['name'] == gpu['name']:
                    raise RuntimeInputError(
                        f'{reason}; look at what else uses the GPU, or {_rebuild(self.metadata, path)}.')
                raise EngineMismatchError(f'{reason}; {_rebuild(self.metadata, path)}.')
            # not the default kind: what others do on the legacy stream would break a capture
            self.stream = _check_cuda(self.cudart.cudaStreamCreateWithFlags(self.cudart.cudaStreamNonBlocking))
        self.cuda_graphs = cuda_graphs
        self.max_shapes = max_shapes
        self.bindings: OrderedDict[Tuple[int, ...], _Binding] = OrderedDict()
        self.lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close, self.cudart, self.stream, self.bindings)

    def close(self) -> None:
        """Free everything, once the batch that runs is through."""
        with self.lock:
            self._finalizer()
            self.engine = self.runtime = None  # in this order: the weights on the GPU, and what they came from

    def run(self, batch: np.ndarray) -> List[np.ndarray]:
        """Input of the file to its outputs, in their order in the metadata."""
        with self.lock, on_first_gpu(self.cudart):
            if not self._finalizer.alive:
                raise RuntimeInputError(f'{self.path} was closed; load it again.')
            self.logger.last = NO_REASON
            binding = self.bindings.pop(batch.shape, None) or self._bind(batch.shape)
            self.bindings[batch.shape] = binding  # the last is the newest
            while len(self.bindings) > self.max_shapes:
                self.bindings.popitem(last=False)[1].memory.free()
            return binding.run(self, batch)

    def _bind(self, shape: Tuple[int, ...]) -> '_Binding':
        """A new one, for which those used longest ago go where memory is short."""
        while True:
            try:
                return _Binding(self, shape)
            except _NoMemoryError:
                if not self.bindings:
                    raise
                self.bindings.popitem(last=False)[1].memory.free()


def _check_cuda(result: Tuple[Any, ...]) -> Any:
    error, *values = result
    if int(error) != 0:
        name = str(getattr(error, 'name', error))
        if name == 'cudaErrorMemoryAllocation':
            raise _NoMemoryError(f'CUDA failed with {name}; see what else uses the GPU.')
        advice = dict(
            cudaErrorInsufficientDriver='; update the driver, or install cuda-bindings of the CUDA version it has')
        raise RuntimeInputError(f'CUDA failed with {name}{advice.get(name, "")}.')
    return values[0] if values else None


@contextlib.contextmanager
def on_first_gpu(cudart: Any) -> Iterator[None]:
    """Run on GPU 0, whatever device the thread has chosen, and give that back afterwards."""
    chosen = _check_cuda(cudart.cudaGetDevice())
    _check_cuda(cudart.cudaSetDevice(0))
    try:
        yield
    finally:
        cudart.cudaSetDevice(chosen)


def _close(cudart: Any, stream: Any, bindings: Dict[Tuple[int, ...], '_Binding']) -> None:
    for binding in bindings.values():
        binding.memory.free()
    bindings.clear()
    cudart.cudaStreamDestroy(stream)


class _Memory:
    """Pinned buffers, those on the GPU, and a CUDA graph; to be freed by hand."""

    def __init__(self, cudart: Any) -> None:
        self.cudart = cudart
        self.host: List[Any] = []
        self.device: List[Any] = []
        self.graph: Any = None

    def allocate(self, size: int) -> None:
        self.host.append(_check_cuda(self.cudart.cudaHostAlloc(size, self.cudart.cudaHostAllocDefault)))
        self.device.append(_check_cuda(self.cudart.cudaMalloc(size)))

    def free(self) -> None:
        if self.graph is not None:
            self.cudart.cudaGraphExecDestroy(self.graph)
        for buffer in self.host:
            self.cudart.cudaFreeHost(buffer)
        for buffer in self.device:
            self.cudart.cudaFree(buffer)
        self.host, self.device, self.graph = [], [], None


class _Binding:
    """Execution context, buffers and CUDA graph of one input shape."""

    def __init__(self, session: TensorRTSession, shape: Tuple[int, ...]) -> None:
        engine = session.engine
        name = session.metadata['input']['name']
        ranges = [engine.get_tensor_profile_shape(name, i) for i in range(engine.num_optimization_profiles)]
        fitting = [i for i, profile in enumerate(ranges) if _fits(shape, profile)]
        if not fitting:
            known = ' or '.join(f'{tuple(low)} to {tuple(high)}' for low, _, high in ranges)
            raise RuntimeInputError(
                f'The engine takes inputs of {known}, not {shape}; use another --batch-size, or '
                f'{_rebuild(session.metadata, session.path)}.')
        # the one whose preferred shape is nearest, as Triton does
        profile = min(fitting, key=lambda i: sum(abs(a - b) for a, b in zip(ranges[i][1], shape)))
        self.captures = session.cuda_graphs
        if session.trt.__name__ == 'tensorrt_rtx':  # its kernels change as it runs, so it captures by itself
            settings = engine.create_runtime_config()
            if session.cuda_graphs:
                settings.cuda_graph_strategy = session.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.context = engine.create_execution_context(settings)
            self.captures = False
        else:
            self.context = engine.create_execution_context()
        if self.context is None:
            raise _NoMemoryError(
                f'TensorRT cannot run inputs of {shape} ({session.logger.last}); if the GPU has no memory left, use '
                f'smaller batches.')
        self.memory = _Memory(session.cudart)
        self.arrays: List[np.ndarray] = []  # pinned
        self.warm = False
        try:
            self._bind(session, shape, profile)
        except BaseException:
            self.memory.free()
            raise

    def _bind(self, session: TensorRTSession, shape: Tuple[int, ...], profile: int) -> None:
        try:
            accepted = (
                self.context.set_optimization_profile_async(profile, int(session.stream))
                and self.context.set_input_shape(session.metadata['input']['name'], shape)  # which others follow from
                and all(map(self._bind_tensor, (session.metadata['input'], *session.metadata['outputs']))))
        except RuntimeError:  # as the bindings have it where a profile is refused; the reason is in the log
            accepted = False
        if not accepted:
            raise RuntimeInputError(f'TensorRT does not take inputs of {shape}: {session.logger.last}.')

    def _bind_tensor(self, described: Dict[str, Any]) -> bool:
        shape, dtype = tuple(self.context.get_tensor_shape(described['name'])), np.dtype(described['dtype'])
        size = math.prod(shape) * dtype.itemsize
        self.memory.allocate(size)
        raw = (ctypes.c_ubyte * size).from_address(int(self.memory.host[-1]))
        self.arrays.append(np.frombuffer(raw, dtype).reshape(shape))
        return self.context.set_tensor_address(described['name'], int(self.memory.device[-1]))

    def run(self, session: TensorRTSession, batch: np.ndarray) -> List[np.ndarray]:
        if batch.dtype != self.arrays[0].dtype:
            raise RuntimeInputError(f'The engine takes {self.arrays[0].dtype}, not {batch.dtype}.')
        cudart, memory = session.cudart, self.memory
        self.arrays[0][...] = batch
        if memory.graph is None and self.warm and self.captures:
            self._capture(session)
        if memory.graph is None:
            self._enqueue(session)
        else:
            _check_cuda(cudart.cudaGraphLaunch(memory.graph, session.stream))
        _check_cuda(cudart.cudaStreamSynchronize(session.stream))
        self.warm = True
        return [array.copy() for array in self.arrays[1:]]

    def _capture(self, session: TensorRTSession) -> None:
        cudart = session.cudart
        _check_cuda(cudart.cudaStreamBeginCapture(
            session.stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        try:
            self._enqueue(session)
        except RuntimeInputError:  # not every engine can be captured
            self.captures = False
        error, captured = cudart.cudaStreamEndCapture(session.stream)  # in any case, or the stream is of no more use
        if self.captures and int(error) == 0:
            error, self.memory.graph = cudart.cudaGraphInstantiate(captured, 0)
        if int(error) != 0:
            self.captures, self.memory.graph = False, None
        if not self.captures:
            cudart.cudaGetLastError()  # which would be taken for one of what runs next
        if captured:
            cudart.cudaGraphDestroy(captured)

    def _enqueue(self, session: TensorRTSession) -> None:
        memory, copy, kinds = self.memory, session.cudart.cudaMemcpyAsync, session.cudart.cudaMemcpyKind
        size = self.arrays[0].nbytes
        _check_cuda(copy(memory.device[0], memory.host[0], size, kinds.cudaMemcpyHostToDevice, session.stream))
        if not self.context.execute_async_v3(int(session.stream)):
            raise RuntimeInputError(f'TensorRT refused to run the engine: {session.logger.last}.')
        for host, device, array in zip(memory.host[1:], memory.device[1:], self.arrays[1:]):
            _check_cuda(copy(host, device, array.nbytes, kinds.cudaMemcpyDeviceToHost, session.stream))


def _fits(shape: Sequence[int], profile: Sequence[Sequence[int]]) -> bool:
    low, _, high = profile
    return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high))


# What the machine has

def query_gpu() -> Optional[Dict[str, Any]]:
    """Name, compute capability and driver of the first GPU, from the driver alone; None if there is none.

    Asked before TensorRT is touched: without a GPU some of its versions end the process.

    Raises:
        RuntimeInputError: If the driver does not start.
    """
    try:
        cuda = ctypes.CDLL('nvcuda.dll' if sys.platform == 'win32' else 'libcuda.so.1')
    except OSError:
        return None
    count, version, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    major, minor = ctypes.c_int(), ctypes.c_int()
    code = cuda.cuInit(0)
    if code == 3:  # CUDA_ERROR_NOT_INITIALIZED
        raise RuntimeInputError(
            'CUDA was started before this process was forked, so the GPU cannot be used here; load nothing before the '
            'fork, or start workers with spawn.')
    if code not in (0, 34, 100):  # CUDA_ERROR_STUB_LIBRARY, CUDA_ERROR_NO_DEVICE
        raise RuntimeInputError(f'The NVIDIA driver does not start (CUDA error {code}); see what nvidia-smi says.')
    if code or cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return None
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # compute capability
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return dict(
        name=name.value.decode(), compute_capability=f'{major.value}.{minor.value}',
        cuda_driver=f'{version.value // 1000}.{version.value % 1000 // 10}')


def _pick_device(device: str, allow_fallback: bool = False, tell: bool = True) -> str:
    """What 'auto' means for ONNX Runtime: the GPU, where there is one and the package installed can use it."""
    if device != 'auto':
        return device
    has_provider = 'CUDAExecutionProvider' in import_onnxruntime().get_available_providers()
    try:
        return 'cuda' if has_provider and query_gpu() else 'cpu'
    except RuntimeInputError as e:
        if not allow_fallback:
            raise RuntimeInputError(f'{str(e).rstrip(".")}, or use the CPU with --device cpu.') from e
        if tell:
            warnings.warn(f'ONNX Runtime runs on the CPU: {e}', stacklevel=4)
        return 'cpu'


def import_tensorrt(backend: str = 'auto') -> Any:
    """The module 'tensorrt' or 'tensorrt_rtx', the first that is installed for 'auto'.

    Raises:
        NotInstalledError: If it is not installed.
        RuntimeInputError: If it is broken, or older than 10.
    """
    for name in TENSORRT_MODULES if backend == 'auto' else (backend,):
        trt = import_library(name)
        if trt is None:
            continue
        major = int(trt.__version__.split('.')[0])
        if name == 'tensorrt' and major < 10:
            raise RuntimeInputError(
                f'TensorRT {trt.__version__} is too old: it misreads how ONNX pools since opset 18 and has no strong '
                f'typing; install TensorRT 10 or newer.')
        return trt
    wanted = 'TensorRT' if backend == 'auto' else backend
    package = dict(tensorrt='tensorrt-cu13', tensorrt_rtx='tensorrt-rtx').get(backend, 'tensorrt-cu13, or tensorrt-rtx')
    raise NotInstalledError(f'{wanted} is not installed; pip install {package}.')


def get_logger(trt: Any) -> Any:
    """One logger for the whole process, never freed: TensorRT keeps the first it is given.

    Its `last` is the latest error, which TensorRT reports nowhere else, as a part of a sentence.
    """
    logger = _create_logger(trt)
    logger.last = logger.warning = NO_REASON
    return logger


def start_tensorrt(kind: Callable[[Any], Any], trt: Any, logger: Any) -> Any:
    """A builder or runtime of TensorRT, which begin with CUDA.

    Raises:
        RuntimeInputError: If it cannot start.
    """
    try:
        return kind(logger)
    except TypeError as e:  # of pybind11, for the nothing that it was given; the reason is logged as a warning
        reason = logger.warning if logger.last == NO_REASON else logger.last
        raise RuntimeInputError(
            f'{trt.__name__} {trt.__version__} cannot start ({reason}); update the driver of the GPU, or see what else '
            f'uses it.') from e


@functools.cache
def _create_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = self.warning = ''

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and 'cudaError' not in message:
                self.last = shorten_message(message)
            elif severity == trt.ILogger.WARNING:
                self.warning = shorten_message(message)

    return Logger()


def shorten_message(message: str) -> str:
    """The line of a message of TensorRT that says something, without its place in the source."""
    lines = [line for line in message.strip().splitlines() if 'checkMacros' not in line]
    line = re.sub(r'\s*In \S+ at \S+|Error Code \d+: |\[\S+::?\S*( \w+)?\]\s*', '', lines[-1] if lines else message)
    return line.strip().rstrip('.').replace('( ', '(')[:300]


def import_onnxruntime() -> Any:
    """The module of ONNX Runtime.

    Raises:
        NotInstalledError: If it is not installed.
        RuntimeInputError: If it is broken, or installed twice.
    """
    installed = []
    for name in ('onnxruntime', 'onnxruntime-gpu'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution(name)
            installed.append(name)
    if len(installed) == 2:
        raise RuntimeInputError(
            'Both onnxruntime and onnxruntime-gpu are installed and overwrite each other; run "pip uninstall -y '
            'onnxruntime onnxruntime-gpu", then "pip install onnxruntime-gpu[cuda,cudnn]" (or onnxruntime).')
    ort = import_library('onnxruntime')
    if ort is None:
        raise NotInstalledError('ONNX files need ONNX Runtime; pip install onnxruntime, or onnxruntime-gpu.')
    return ort


def import_library(name: str) -> Any:
    """The module, None if it is not installed; installed but broken is something else."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as e:  # the latter of a DLL that TensorRT does not find
        if isinstance(e, ModuleNotFoundError) and e.name and name.startswith(e.name):
            return None
        raise RuntimeInputError(f'{name} is installed but cannot be imported ({_tell(e)}); install it again.') from e


def read_file(path: Path) -> bytes:
    """
    Raises:
        RuntimeInputError: If it cannot be read, or is what git leaves in its place where Git LFS is not installed.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        raise RuntimeInputError(f'{path} cannot be read: {e.strerror or e}.') from e
    if content.startswith(b'version https://git-lfs'):
        raise RuntimeInputError(
            f'{path} is a Git LFS pointer, not the file itself; install git-lfs and run git lfs pull, or use hf '
            f'download.')
    return content


def check_engine(path: Path, metadata: Dict[str, Any], plan: bytes) -> None:
    """Compare an engine's sidecar with the file's content and this machine, before TensorRT sees it.

    Raises:
        EngineMismatchError: If the engine was built for another GPU or version, or is not the file that was built.
        RuntimeInputError: If there is no GPU, or no TensorRT.
    """
    check_built(metadata, path)
    if not is_described(plan, metadata):
        raise EngineMismatchError(f'{path} does not match its sidecar: another file, or cut short; '
            f'{_rebuild(metadata, path)}.')
    mismatch = _find_mismatch(metadata)
    if mismatch:
        raise EngineMismatchError(f'{path} was built {mismatch}; {_rebuild(metadata, path)}.')
    on, gpu = metadata['engine']['gpu'], check_gpu()
    if on and metadata['engine']['hardware_compatibility'] == 'none' and on['name'] != gpu['name']:
        warnings.warn(
            f'{path} was built on {on["name"]} and may be slow or fail on {gpu["name"]}, though both have compute '
            f'capability {gpu["compute_capability"]}; {_rebuild(metadata, path)}, or with --hardware-compatibility '
            f'same-cc.', stacklevel=2)


def _find_mismatch(metadata: Dict[str, Any]) -> str:
    """How this machine differs from what the engine was built by or for, '' if it can run here.

    Raises:
        RuntimeInputError: If there is no GPU, or no TensorRT.
    """
    built = metadata['engine']
    gpu = check_gpu()
    trt = import_tensorrt(built['backend'])
    same = trt.__version__ == built['version']
    later = parse_version(trt.__version__) >= parse_version(built['version'])  # what a compatible engine asks for
    if not same and not (built['version_compatible'] and later):
        return f'by {built["backend"]} {built["version"]}, here is {trt.__version__}'
    if built.get('platform') not in (None, tell_platform()):
        return f'on {built["platform"]}, here is {tell_platform()}'
    on, kind, own = built['gpu'], built['hardware_compatibility'], gpu['compute_capability']
    if on and kind in ('none', 'same-cc') and on['compute_capability'] != own:
        return f'for compute capability {on["compute_capability"]} ({on["name"]}), this GPU, {gpu["name"]}, has {own}'
    on_ampere = kind == 'ampere+' if on else built['backend'] == 'tensorrt_rtx'
    if on_ampere and int(own.split('.')[0]) < 8:
        return f'for Ampere and later, this GPU, {gpu["name"]}, has compute capability {own}'
    return ''


def check_gpu() -> Dict[str, Any]:
    """What `query_gpu` tells.

    Raises:
        RuntimeInputError: If there is no GPU.
    """
    gpu = query_gpu()
    if gpu is None:
        raise RuntimeInputError('TensorRT engines run on NVIDIA GPUs and there is none here; use the ONNX file.')
    return gpu


def tell_platform() -> str:
    """Operating system and processor, which an engine runs on alone."""
    return f'{platform.system()} {platform.machine()}'.lower()


def parse_version(version: str) -> List[int]:
    return [int(n) for n in re.findall(r'\d+', version)]


def _rebuild(metadata: Dict[str, Any], path: Path) -> str:
    """What to do: the command of the sidecar, whose files are relative to the engine's folder, with whole paths.

    A file that is a link, as in the Hub's cache, keeps its name.
    """
    try:
        command = shlex.split(str(metadata['engine']['command']))
        for word in ('tensorrt', '--output'):
            i = command.index(word) + 1
            command[i] = os.path.normpath(path.parent.resolve() / command[i])
    except (ValueError, IndexError):
        command = []
    if command[:4] != ['python', '-m', 'export', 'tensorrt']:  # not advice of ours
        return 'build it again with python -m export tensorrt'
    fetch = '' if Path(command[4]).is_file() else f'put {Path(command[4]).name} back (of the Hub: by hf download), and '
    line = subprocess.list2cmdline(command) if os.name == 'nt' else shlex.join(command)
    return f'{fetch}in a checkout of timm-tmblock build it again with "{line}"'


# Metadata

def sidecar(path: Path) -> Path:
    """The file beside `path` that holds its metadata."""
    return path.with_name(f'{path.name}.json')


def is_described(content: bytes, metadata: Dict[str, Any]) -> bool:
    """Whether the metadata of a sidecar are of this content of a file."""
    return hashlib.sha256(content).hexdigest() == metadata.get('file_sha256')


def read_sidecar(path: Path) -> Dict[str, Any]:
    """The metadata beside a file.

    Raises:
        RuntimeInputError: If they cannot be read, or are none.
    """
    try:
        metadata = json.loads(sidecar(path).read_text(encoding='utf-8'))
    except FileNotFoundError as e:
        raise RuntimeInputError(
            f'There is no {sidecar(path)}, which holds the input format and classes of {path.name}; put it beside the '
            f'file, or make that with python -m export tensorrt.') from e
    except OSError as e:
        raise RuntimeInputError(f'Cannot read {sidecar(path)}: {e.strerror}.') from e
    except ValueError as e:
        raise RuntimeInputError(f'{sidecar(path)} is not JSON ({e}); export the file again.') from e
    if not isinstance(metadata, dict):
        raise RuntimeInputError(f'{sidecar(path)} is not a JSON object; export the file again.')
    return metadata


def parse_properties(properties: Dict[str, str]) -> Dict[str, Any]:
    """Metadata of the properties of an ONNX file, whose structured values are JSON."""
    metadata = {}
    for key, value in properties.items():
        try:
            metadata[key] = json.loads(value)
        except ValueError:
            metadata[key] = value
    return metadata


def check_metadata(metadata: Dict[str, Any], path: Path) -> None:
    """
    Raises:
        RuntimeInputError: For metadata of another version, or that are not whole.
    """
    again = f'make it again with python -m export {"tensorrt" if path.suffix in ENGINE_SUFFIXES else "onnx"}'
    version = metadata.get('metadata_version')
    if version != METADATA_VERSION:
        found = f'has metadata of version {version}' if version else 'does not say its classes and preprocessing'
        raise RuntimeInputError(f'{path} {found}; {again}.')
    try:
        complete = _is_whole(metadata)
        scores, names = metadata['outputs'][0]['shape'][1], metadata['class_names']
    except (AttributeError, KeyError, IndexError, TypeError):
        complete = False
    if not complete:
        raise RuntimeInputError(f'{path} lacks a part of its metadata; {again}.')
    if scores != len(names):
        raise RuntimeInputError(f'{path} names {len(names)} classes but gives scores of {scores}; {again}.')


def _is_whole(metadata: Dict[str, Any]) -> bool:
    """Whether what is needed to use a file is there, of the kinds it should be."""
    preprocessing, tensors = metadata['preprocessing'], [metadata['input'], *metadata['outputs']]
    size = preprocessing['input_size']
    names = [metadata['class_names'], *([metadata['template_names']] if len(tensors) > 2 else [])]
    return (
        len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)
        and len(preprocessing['mean']) == len(preprocessing['std']) == size[0]
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in preprocessing['mean'])
        and all(0 < v < math.inf for v in preprocessing['std'])
        and 0 < preprocessing['crop_pct'] <= min(size[1:])  # what is larger leaves no pixel of an image
        and preprocessing['color'] in ('RGB', 'L') and preprocessing.get('crop_mode', 'squash') == 'squash'
        and preprocessing['interpolation'].upper() in Image.Resampling.__members__
        and all(isinstance(kinds, list) and all(isinstance(name, str) for name in kinds) for kinds in names)
        and all(isinstance(one['shape'], list) and {'name', 'dtype'} <= one.keys() for one in tensors)
        and {'layout', 'range'} <= tensors[0].keys() and all('meaning' in output for output in tensors[1:]))


def check_built(metadata: Dict[str, Any], path: Path) -> None:
    built = metadata.get('engine')
    if not isinstance(built, dict):
        raise RuntimeInputError(f'{sidecar(path)} is not of an engine; build it with python -m export tensorrt.')
    gpu = built.get('gpu')
    profiles = built.get('profiles')
    complete = all(key in built for key in BUILT) and built['backend'] in TENSORRT_MODULES
    complete = complete and isinstance(profiles, list) and all(isinstance(p, list) and len(p) == 3 for p in profiles)
    if not complete or not (gpu is None or isinstance(gpu, dict) and {'name', 'compute_capability'} <= gpu.keys()):
        raise RuntimeInputError(f'{sidecar(path)} lacks a part of its metadata; build the engine again.')


# Runner: images in, predictions out

class Runner:
    """Classifies images by one file, until it is closed. Threads may share it."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.metadata: Dict[str, Any] = session.metadata
        self.preprocessing = self.metadata['preprocessing']
        mean, std = (np.array(self.preprocessing[k], dtype=np.float64) for k in ('mean', 'std'))
        self._scale, self._shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        self._pid = os.getpid()
        batch = self.metadata['input']['shape'][0]
        profiles = (self.metadata.get('engine') or {}).get('profiles', [])
        # smallest and largest batch of each profile, empty if the file takes any
        fixed = [(batch, batch)] if isinstance(batch, int) else []
        self._batches = [(low[0], high[0]) for low, _, high in profiles] or fixed

    @property
    def class_names(self) -> List[str]:
        return self.metadata['class_names']

    def close(self) -> None:
        """Free everything, once the batch that runs is through."""
        self.session.close()

    def __enter__(self) -> 'Runner':
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()

    def __call__(self, images: Union[ImageSource, Sequence[ImageSource]], batch_size: int = 64) -> Any:
        """Classify images.

        Args:
            images: A path, open file or its bytes, PIL image or uint8 array (H, W, 3) in RGB, or a sequence (or uint8
                array (N, H, W, 3)) of them.
            batch_size: Images at a time.

        Returns:
            A Prediction for one image, a list of them for a sequence.

        Raises:
            RuntimeInputError: If an image cannot be read.
        """
        if _is_single(images):
            batch: List[Any] = [images]
            return next(self._finish(self._prepare_all(batch), None))[1]  # no thread to hand it to and fro
        return [prediction for _, prediction in self.stream(images, batch_size)]

    def stream(
            self,
            images: Union[ImageSource, Iterable[ImageSource]],
            batch_size: int = 64,
            on_error: Optional[Callable[[ImageSource, RuntimeInputError], None]] = None,
    ) -> Iterator[Tuple[ImageSource, Prediction]]:
        """Classify images one after the other; the next batch is read while one runs.

        Args:
            images: As for a call, or an iterator of any length, which may reuse an array or close a file it has given.
                Up to two batches of it are asked for before the first prediction; for live images call the runner.
            batch_size: Images at a time.
            on_error: Called with each image that cannot be read and its error; the image is left out. If None, raises.

        Yields:
            Each image with its prediction; of an iterator's array or PIL image a copy, of its open file the bytes.

        Raises:
            RuntimeInputError: If `batch_size` is not positive, an image cannot be read or the file cannot be run.
        """
        if batch_size < 1:
            raise RuntimeInputError(f'The batch size is {batch_size}; it must be at least 1.')
        sources: Iterable[Any] = [images] if _is_single(images) else images  # type: ignore[assignment]
        if not isinstance(sources, (list, tuple, np.ndarray)):
            sources = map(_copy, sources)
        with ThreadPoolExecutor(1) as pool:
            pending: Deque[Future] = deque()
            items = iter(sources)
            for batch in iter(lambda: list(itertools.islice(items, batch_size)), []):
                pending.append(pool.submit(self._prepare_all, batch))
                if len(pending) > 1:
                    yield from self._finish(pending.popleft().result(), on_error)
            while pending:
                yield from self._finish(pending.popleft().result(), on_error)

    def prepare(self, image: ImageSource) -> Tuple[Image.Image, np.ndarray]:
        """The image as the network sees it, and the same as the file's input without the batch axis."""
        seen = resize_and_crop(read_image(image, self.preprocessing['color']), self.preprocessing)
        pixels = np.asarray(seen)
        return seen, pixels[..., None] if pixels.ndim == 2 else pixels

    def to_input(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (B, H, W, C), uint8, as the file's input."""
        if self.metadata['input']['range'] == 'normalized':
            pixels = pixels * self._scale + self._shift
        if self.metadata['input']['layout'] == 'NCHW':
            pixels = pixels.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(pixels)

    def run(self, batch: np.ndarray) -> List[np.ndarray]:
        """Input of the file to its outputs, in their order in the metadata, for any number of images.

        To a file that takes some batch sizes alone they go in several batches, the last filled up with its last image;
        to an engine in powers of two, as it has buffers and a CUDA graph for each size.

        Raises:
            RuntimeInputError: In a process that was forked after the file was loaded, where neither the threads of ONNX
                Runtime nor the GPU are.
        """
        if os.getpid() != self._pid:
            raise RuntimeInputError('The file was loaded before this process was forked; load it in each worker.')
        if not self._batches:
            return self.session.run(batch)
        if not len(batch):
            return [
                np.zeros((0, *(n if isinstance(n, int) else 0 for n in output['shape'][1:])), output['dtype'])
                for output in self.metadata['outputs']]
        largest = max(high for _, high in self._batches)
        parts = []
        for start in range(0, len(batch), largest):
            part = batch[start:start + largest]
            rounded = 1 << (len(part) - 1).bit_length()
            size = min(min(max(low, rounded), high) for low, high in self._batches if high >= len(part))
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            parts.append([y[:len(part)] for y in self.session.run(filled)])
        return [np.concatenate(ys) for ys in zip(*parts)]

    def _prepare_all(self, images: List[ImageSource]) -> Tuple[List[Tuple[ImageSource, Any]], Optional[np.ndarray]]:
        seen: List[Tuple[ImageSource, Any]] = []
        pixels = []
        for image in images:
            try:
                picture, array = self.prepare(image)
                pixels.append(array)
                seen.append((image, picture))
            except RuntimeInputError as e:
                seen.append((image, e))
        return seen, self.to_input(np.stack(pixels)) if pixels else None

    def _finish(
            self,
            prepared: Tuple[List[Tuple[ImageSource, Any]], Optional[np.ndarray]],
            on_error: Optional[Callable[[ImageSource, RuntimeInputError], None]],
    ) -> Iterator[Tuple[ImageSource, Prediction]]:
        seen, batch = prepared
        outputs = [] if batch is None else self.run(batch)
        described = self.metadata['outputs']
        results = iter(zip(*(
            y if 'probabilities' in d['meaning'] else _softmax(y) for y, d in zip(outputs, described))))
        scored = [d.get('method') == 'cam' and 'probabilities' not in d['meaning'] for d in described[1:]]
        activations = iter(outputs[1]) if outputs and any(scored) else itertools.repeat(None)
        names = self.class_names, self.metadata.get('template_names', ())
        for image, picture in seen:
            if isinstance(picture, RuntimeInputError):
                if on_error is None:
                    raise picture
                on_error(image, picture)
                continue
            # copies, as views would keep the whole batch for as long as one prediction is kept
            probabilities, *patches = (array.copy() for array in next(results))
            activation = next(activations)
            yield image, Prediction(
                picture, probabilities, patches[0] if patches else None, *names,
                None if activation is None else activation.copy())


def _is_single(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    kinds = str, Path, bytes, bytearray, Image.Image
    return images is None or isinstance(images, kinds) or hasattr(images, 'read')  # an open file


def _copy(image: ImageSource) -> ImageSource:
    """What an iterator gave, before it goes on and writes over it or closes it."""
    if isinstance(image, np.ndarray):
        return image.copy()
    if isinstance(image, bytearray):
        return bytes(image)
    file: Any = image
    if hasattr(file, 'read') and not inspect.iscoroutinefunction(file.read):
        with contextlib.suppress(Exception):  # what is wrong with it is told where it is read
            with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # as Pillow
                file.seek(0)
            return file.read()
    if isinstance(image, Image.Image):
        with contextlib.suppress(Exception):  # what is wrong with it is told where it is read
            copy = image.copy()
            copy.format = image.format  # tells 16 bits
            return copy
    return image


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def load(
        source: Union[str, Path],
        device: str = 'auto',
        allow_fallback: bool = False,
        threads: Optional[int] = None,
        cuda_graphs: bool = True,
        rebuild: bool = False,
        revision: Optional[str] = None,
        engine: bool = False,
) -> Runner:
    """Open an exported network.

    Args:
        source: .onnx file or TensorRT engine with its sidecar, a folder of ONNX files, or a Hub repository 'user/name'.
        device: 'cpu', 'cuda', or 'auto': the GPU if there is one, but the CPU for its int8 files; engines are always
            on the GPU.
        allow_fallback: Let ONNX Runtime use the CPU where the GPU was asked for, from its first failure on (as of a
            batch too large for its memory) until the file is loaded again.
        threads: Threads of ONNX Runtime, its own choice if None.
        cuda_graphs: Replay a CUDA graph for each batch size of an engine.
        rebuild: Build an engine again from the ONNX file beside it if it is of another GPU or version.
        revision: Branch, tag or commit of a Hub repository.
        engine: From a folder or Hub repository, take the engine built for this GPU and TensorRT instead of an ONNX
            file. An engine is code: ask for one only of a publisher you trust.

    Raises:
        RuntimeInputError: If it cannot be found or fetched, or cannot run here.
    """
    if device not in DEVICES:
        raise RuntimeInputError(
            f'There is no device {device!r}; take one of {", ".join(DEVICES)}, and set CUDA_VISIBLE_DEVICES to choose '
            f'among GPUs.')
    path = _find(source, device, revision, engine, rebuild, allow_fallback)
    if path.suffix not in ENGINE_SUFFIXES:
        if rebuild:
            raise RuntimeInputError(
                f'{path} is not an engine, and only engines are built again; name one, use --engine with a folder, or '
                f'leave out --rebuild.')
        return Runner(OnnxSession(path, device, allow_fallback, threads))
    if device == 'cpu' or allow_fallback:
        raise RuntimeInputError(
            f'Engines run only on NVIDIA GPUs; {"leave out --allow-fallback, or " if allow_fallback else ""}give the '
            f'ONNX file for the CPU.')
    if threads is not None:
        raise RuntimeInputError("--threads sets ONNX Runtime's threads; leave it out for an engine.")
    try:
        return Runner(TensorRTSession(path, cuda_graphs))
    except EngineMismatchError:
        if not rebuild:
            raise
    return _build_again(path, cuda_graphs)


def _build_again(path: Path, cuda_graphs: bool) -> Runner:
    """Build an engine for this machine, by one process at a time, and open it."""
    if not (Path(__file__).parent / 'tensorrt.py').is_file():
        raise RuntimeInputError('Building needs a checkout of timm-tmblock; run python -m export run --rebuild there.')
    try:
        from filelock import FileLock

        from export.tensorrt import rebuild_engine
        with FileLock(path.with_name(f'.{path.name}.lock')):  # the workers of a server begin at once
            with contextlib.suppress(EngineMismatchError):
                return Runner(TensorRTSession(path, cuda_graphs))  # another has built it meanwhile
            rebuild_engine(path)
    except OSError as e:
        raise RuntimeInputError(f'{path} cannot be built again: {e.strerror or e}.') from e
    except RuntimeInputError:
        raise
    except ImportError as e:
        raise RuntimeInputError(
            f'Building an engine needs {e.name or _tell(e)}; pip install -e ".[export,tensorrt]".') from e
    except ValueError as e:
        raise RuntimeInputError(str(e)) from e
    return Runner(TensorRTSession(path, cuda_graphs))


def _find(
        source: Union[str, Path],
        device: str,
        revision: Optional[str],
        engine: bool = False,
        rebuild: bool = False,
        allow_fallback: bool = False,
) -> Path:
    path = Path(source)
    find_onnx = functools.partial(_find_onnx, device=device, allow_fallback=allow_fallback)
    if revision and os.path.exists(path):
        raise RuntimeInputError(f'{path} is a local path, which has no revisions; leave the revision out.')
    if os.path.isfile(path):
        if path.suffix not in ('.onnx', *ENGINE_SUFFIXES):
            raise RuntimeInputError(f'{path} is neither an .onnx file nor an .engine or .plan.')
        if engine and path.suffix == '.onnx':
            raise RuntimeInputError(f'{path} is not an engine; name one, or a folder or repository that holds some.')
        return path
    if os.path.isdir(path):
        return _find_engine(path, source, rebuild) if engine else find_onnx(path, source)
    is_name = re.fullmatch(r'\w[\w.-]*/[\w.-]+', str(source))
    if path.suffix in ('.onnx', *ENGINE_SUFFIXES) or not is_name:
        raise RuntimeInputError(f'There is no file or folder {source}, or none that may be read.')
    if os.path.isdir(path.parent):  # a path with a mistake in it, most likely
        raise RuntimeInputError(
            f'There is no file or folder {source}; as the folder {path.parent} is here, it is not looked for on the '
            f'Hub.')
    # the chosen file alone, as they are large, and of the sidecars' commit, in case a newer one appears
    kinds = ENGINE_SUFFIXES if engine else ['.onnx']
    sidecars = _download(str(source), revision, [f'*{kind}.json' for kind in kinds])
    found = _find_engine(sidecars, source, remote=True) if engine else find_onnx(sidecars, source, remote=True)
    name = found.relative_to(sidecars)
    file = _download(str(source), sidecars.name, [name.as_posix(), f'{name.as_posix()}.json']) / name
    if not file.is_file():
        raise RuntimeInputError(f'{source} cannot be fetched from the Hub: it has no {name.as_posix()}.')
    return file


def _find_onnx(
        folder: Path,
        source: Union[str, Path],
        device: str,
        allow_fallback: bool = False,
        remote: bool = False,
) -> Path:
    """The ONNX file of a folder, or of a repository's sidecars, for a device."""
    files = [f for f in _list_files(folder, ('*', 'onnx/*'), ('.onnx',), remote) if not f.name.endswith('.failed.onnx')]
    if not files:
        raise RuntimeInputError(
            f'{source} holds no ONNX file with its .json beside it; download the file and name it.' if remote else
            f'{source} holds no ONNX file.')
    on_gpu = _pick_device(device, allow_fallback, tell=False) == 'cuda'  # the session will tell
    if on_gpu and allow_fallback:
        on_gpu = 'CUDAExecutionProvider' in import_onnxruntime().get_available_providers()
    order = ['fp16', 'fp32', 'int8'] if on_gpu else ['fp32', 'fp16', 'int8']
    order += ['', 'bf16']  # it does not say; ONNX Runtime cannot run it
    said: Dict[Path, Dict[str, Any]] = {}
    for file in files:
        with contextlib.suppress(RuntimeInputError):  # no sidecar, or a bad one: the file says itself what it is
            said[file] = read_sidecar(file)
    _refuse_several_networks(said, source)
    precisions = {file: str(said.get(file, {}).get('precision')) for file in files}
    return min(files, key=lambda file: order.index(precisions[file] if precisions[file] in order else ''))


def _refuse_several_networks(said: Dict[Path, Dict[str, Any]], source: Union[str, Path]) -> None:
    if len({metadata['weights_sha256'] for metadata in said.values() if 'weights_sha256' in metadata}) > 1:
        raise RuntimeInputError(f'{source} holds files of several networks; name one: {next(iter(said)).name}, say.')


def _find_engine(folder: Path, source: Union[str, Path], rebuild: bool = False, remote: bool = False) -> Path:
    """The engine of a folder, or of a repository's sidecars, that is best for this machine.

    That is one built on a GPU of this name before others it can run too, of this version before a compatible one, fp16
    before others; if there is none and `rebuild` is set, one that can be built again.
    """
    order = ['fp16', 'bf16', 'fp32', 'int8']
    fitting: List[Tuple[Any, Path]] = []
    other: Optional[Path] = None
    reasons: List[str] = []
    said: Dict[Path, Dict[str, Any]] = {}
    for path in _list_files(folder, ('*', 'engines/*/*'), ENGINE_SUFFIXES, remote):
        try:
            metadata = read_sidecar(path)
            check_metadata(metadata, path)
            check_built(metadata, path)
        except RuntimeInputError as e:  # not one of ours
            reasons.append(str(e).rstrip('.'))
            continue
        built, said[path] = metadata['engine'], metadata
        gpu = check_gpu()
        try:
            mismatch = _find_mismatch(metadata)
        except RuntimeInputError as e:  # its TensorRT is not installed, broken or too old, and another may be there
            reasons.append(f'{path.name} was built by {built["backend"]}: {str(e).rstrip(".")}')
            continue
        if mismatch:
            if other is None:  # the first of them is what is told
                other = path
                reasons.insert(0, f'{path.name} was built {mismatch}')
            continue
        place = (
            not built['gpu'] or built['gpu']['name'] != gpu['name'],
            built['version'] != import_tensorrt(built['backend']).__version__,
            order.index(metadata['precision']) if metadata.get('precision') in order else len(order))
        fitting.append((place, path))
    _refuse_several_networks(said, source)
    if fitting:
        return min(fitting)[1]
    if other is not None and rebuild:
        return other
    if other is not None:
        fetch = f'"hf download {source} --local-dir FOLDER", then name FOLDER and ' if remote else ''
        reasons[0] += f'; to build it again, {fetch}use --rebuild'
    if not reasons:
        raise RuntimeInputError(f'{source} holds no engine; build one with python -m export tensorrt.')
    raise RuntimeInputError(f'{source} holds no engine for this machine: {reasons[0]}.')


def _list_files(folder: Path, patterns: Sequence[str], suffixes: Sequence[str], remote: bool) -> List[Path]:
    """Files by place and name; of a repository, those whose sidecars are there."""
    end = '.json' if remote else ''
    found = [path for pattern in patterns for suffix in suffixes for path in folder.glob(f'{pattern}{suffix}{end}')]
    return sorted((p.with_suffix('') if remote else p for p in found), key=lambda path: (len(path.parts), path))


def _download(repo: str, revision: Optional[str], patterns: List[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise RuntimeInputError('Hub repositories need huggingface_hub; pip install huggingface_hub.') from e
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as e:  # of the client, of HTTP, of the disk
        raise RuntimeInputError(f'{repo} cannot be fetched from the Hub: {_tell(e)}') from e


# Command line

def list_images(paths: Sequence[str]) -> List[Path]:
    """Files, and the images in folders and the folders in those, sorted, but no explanations.

    Raises:
        RuntimeInputError: If there are none.
    """
    found: List[Path] = []
    for path in map(Path, paths):
        if os.path.isdir(path):  # unlike Path's, no error where nobody may look
            found += sorted(
                f for f in path.rglob('*')
                if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.endswith('.explained.png')
                and not any(part.startswith('.') for part in f.relative_to(path).parts) and os.path.isfile(f))
        else:
            found.append(path)
    if not found:
        raise RuntimeInputError(f'There are no images in {", ".join(paths)}.')
    return found


def add_run(commands: Any) -> None:
    """Add the command to a parser's."""
    command = commands.add_parser('run', help='classify images')
    command.add_argument('file', help='.onnx file, engine, folder of ONNX files, or Hub repository')
    command.add_argument('images', nargs='+', metavar='IMAGE', help='images, or folders of them')
    command.add_argument('--explain', type=Path, metavar='PATH', help=(
        'write a picture of what each region matched: a .png for one image, a folder for several'))
    command.add_argument('--json', action='store_true', help=(
        'print one JSON object per line, with the class of each region'))
    command.add_argument('--top', type=int, default=3, help='classes to print (default: %(default)s)')
    command.add_argument('--batch-size', type=int, default=64, help='images per batch (default: %(default)s)')
    command.add_argument('--device', choices=DEVICES, default='auto', help=(
        'where an ONNX file runs (default: %(default)s)'))
    command.add_argument('--threads', type=int, help='threads of ONNX Runtime')
    command.add_argument('--allow-fallback', action='store_true', help='use the CPU if the GPU does not start')
    command.add_argument(
        '--engine', action='store_true', help=(
            'from a folder or repository, take the engine built for this GPU and TensorRT; engines are code, so use '
            'only those of a publisher you trust'))
    command.add_argument('--revision', help='branch, tag or commit of a Hub repository')
    command.add_argument('--rebuild', action='store_true', help='rebuild an engine of another GPU or version')
    command.set_defaults(run=run)


def main(argv: Optional[List[str]] = None) -> None:
    """Run the command line.

    Raises:
        RuntimeInputError: If the file cannot be used, or an image could not be read.
    """
    in_checkout = __name__ != '__main__' and __package__ == 'export'
    arguments = argparse.ArgumentParser(
        prog='python -m export' if in_checkout else 'runtime.py', description='Run an exported network.')
    add_run(arguments.add_subparsers(required=True, metavar='COMMAND'))
    args = arguments.parse_args(argv)
    args.run(args)


def run(args: argparse.Namespace) -> None:
    if args.batch_size < 1 or args.top < 1:
        raise RuntimeInputError('--batch-size and --top must be at least 1.')
    if args.explain and args.explain.suffix.lower() in IMAGE_SUFFIXES and args.explain.suffix.lower() != '.png':
        raise RuntimeInputError(f'--explain writes PNG files, not {args.explain.suffix}; name a .png, or a folder.')
    paths = list_images(args.images)
    if args.explain and args.explain.suffix.lower() == '.png' and len(paths) > 1:
        raise RuntimeInputError(f'{args.explain} is one picture, for {len(paths)} images; name a folder.')
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is not a result
        _run(args, paths, out)


def _run(args: argparse.Namespace, paths: List[Path], out: IO[str]) -> None:
    runner = load(
        args.file, args.device, args.allow_fallback, args.threads, rebuild=args.rebuild, revision=args.revision,
        engine=args.engine)
    failed: List[ImageSource] = []

    def skip(image: ImageSource, error: RuntimeInputError) -> None:
        failed.append(image)
        print(f'error: {error}', file=sys.stderr)

    progress = sys.stderr.isatty() and not out.isatty()
    for done, (path, prediction) in enumerate(runner.stream(paths, args.batch_size, skip), 1):
        result: Dict[str, Any] = dict(image=str(path), top=prediction.top(args.top))
        if args.json and prediction.patch_probabilities is not None:
            result['regions'] = [
                [prediction.template_names[k] for k in row] for row in prediction.patch_probabilities.argmax(axis=0)]
        if args.explain:
            result['picture'] = str(_write_picture(prediction, path, args.explain))
        if args.json:
            print(json.dumps(result), file=out)
        else:
            print(f'{result["image"]}: ' + ', '.join(f'{name} {100 * p:.1f} %' for name, p in result['top']), file=out)
        if progress:
            print(f'\r{done + len(failed)}/{len(paths)} images', end='', file=sys.stderr)
    if progress:
        print(file=sys.stderr)
    if failed:
        raise RuntimeInputError(f'{len(failed)} of {len(paths)} images could not be read.')


def _write_picture(prediction: Prediction, path: Any, target: Path) -> Path:
    if target.suffix.lower() != '.png':
        target = target / f'{path.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}.explained.png'
    picture = prediction.picture()
    tmp = target.with_name(f'.{target.name}.tmp')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp, format='PNG')
        tmp.replace(target)
    except OSError as e:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise RuntimeInputError(f'Cannot write {target}: {e.strerror or e}.') from e
    return target


def run_command_line() -> None:
    """Run the command line and end the process, with code 2 for input that cannot be used."""
    if (Path(__file__).parent / '__main__.py').is_file():  # in a checkout, where a module beside this is tensorrt.py
        sys.path[0] = str(Path(__file__).resolve().parent.parent)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names of files that are not UTF-8 come out as they are, and what another encoding lacks is written as its code
        is_utf8 = codecs.lookup(sys.stdout.encoding).name == 'utf-8'
        sys.stdout.reconfigure(errors='surrogateescape' if is_utf8 else 'backslashreplace')
    code = 0
    try:
        try:
            main(sys.argv[1:])
        except RuntimeInputError as e:
            print(f'error: {e}', file=sys.stderr)
            code = 2
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f'error: The output cannot be written: {e.strerror}.', file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == '__main__':
    run_command_line()
