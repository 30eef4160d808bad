import copy
import gc
import hashlib
import multiprocessing
import os
import shutil
import tempfile

# nothing here may need a network, nor what the user's folder of Hugging Face has, nor write into it
if of_user := [name for name in os.environ if name.startswith(('HF_', 'HUGGINGFACE_'))]:
    for name in of_user:
        del os.environ[name]
os.environ.update(HF_HUB_OFFLINE='1', HF_HOME=tempfile.mkdtemp(prefix='hf_home_'))
os.environ['XDG_CACHE_HOME'] = os.path.join(os.environ['HF_HOME'], 'cache')  # of what times engines
# servers of the tests are here, whatever proxy the network has
os.environ.update(dict.fromkeys(('no_proxy', 'NO_PROXY'), ','.join(filter(None, [
    os.environ.get('no_proxy') or os.environ.get('NO_PROXY'), '127.0.0.1', 'localhost']))))
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # threads of two workers would wait for each other

import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from forks import Forks

import timm_tmblock  # noqa: F401  registers the models
from export.runtime import RuntimeInputError, query_gpu

# files that take longest, which two workers begin with; one test alone may be most of a file
LONGEST = (
    'test_export', 'test_push', 'test_integrations', 'test_resume', 'test_tensorrt', 'test_distributed', 'test_space',
    'test_timm_suite', 'test_cards', 'test_training', 'test_reproduce', 'test_publish', 'test_bench',
    'test_tensorrt_simulated', 'test_options', 'test_triton')


needs_fork = pytest.mark.skipif(
    multiprocessing.get_context().get_start_method() != 'fork', reason='workers do not see what is replaced')


def can_build_rtx():
    """TensorRT-RTX builds without a GPU, but not beside one before Ampere, nor with a driver that does not start."""
    try:
        gpu = query_gpu()
    except RuntimeInputError:
        return False
    return gpu is None or float(gpu['compute_capability']) >= 8


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_unconfigure():
    shutil.rmtree(os.environ['HF_HOME'], ignore_errors=True)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # a million objects of what was imported, which each full collection would look through


class OneThreadSession(onnxruntime.InferenceSession):
    """onnxruntime's, which heeds no environment variable, on one thread unless the options say how many."""

    def __init__(self, model, sess_options=None, *args, **kwargs):
        sess_options = sess_options or onnxruntime.SessionOptions()
        sess_options.intra_op_num_threads = sess_options.intra_op_num_threads or 1
        super().__init__(model, sess_options, *args, **kwargs)


if 'PYTEST_XDIST_WORKER' in os.environ:
    onnxruntime.InferenceSession = OneThreadSession


def make_trained_like(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give the norms statistics and affine parameters as training leaves them, so that none is an identity."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low
        tensor.copy_(values)

    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                uniform(m.weight, -0.3, 1.5)
                uniform(m.bias, -0.5, 0.5)
                uniform(m.running_mean, -1, 1)
                uniform(m.running_var, 0.3, 3)
    return module


@pytest.fixture(scope='session')
def _trained_like():
    return {}


@pytest.fixture
def trained_like(_trained_like):
    """A function that creates a model with weights as after training."""
    def create(name: str, **kwargs) -> nn.Module:
        key = name, repr(sorted(kwargs.items()))
        if key not in _trained_like:
            torch.manual_seed(0)
            _trained_like[key] = make_trained_like(timm.create_model(name, **kwargs)).eval()
        torch.manual_seed(1)  # of what a test draws itself
        return copy.deepcopy(_trained_like[key])

    return create


@pytest.fixture(scope='session')
def images():
    """A function that gives images of the sample to calibrate and to check an export of a model on."""
    from argparse import ArgumentParser

    from export.images import add_image_options, load_images

    def create(model: nn.Module, calibration: int = 64, check: int = 80, *flags: str):
        parser = ArgumentParser()
        add_image_options(parser)
        counts = ['--calibration-images', str(calibration), '--check-images', str(check)]
        of_sample = model.num_classes == 10 and 'ship' in (model.pretrained_cfg.get('label_names') or ['ship'])
        return load_images(parser.parse_args([*counts, *flags]), model, calibrate=of_sample)

    return create


@pytest.fixture(scope='session')
def _exported():
    return {}


@pytest.fixture(scope='module', autouse=True)
def exporting_once(request, _exported):
    """PyTorch traces a network with the same options once, but where the export itself is tested."""
    import export.onnx
    from export.metadata import hash_weights

    if request.module.__name__ == 'test_export':
        yield
        return
    create_onnx = export.onnx.create_onnx

    def create(model, options, images):
        calibration = (
            hashlib.sha256(images.calibration).hexdigest(), images.calibration_source,
        ) if options.precision == 'int8' else None
        key = hash_weights(model), repr(model), repr(sorted(model.pretrained_cfg.items())), repr(options), calibration
        if key not in _exported:
            _exported[key] = create_onnx(model, options, images)
        return copy.deepcopy(_exported[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.onnx, 'create_onnx', create)
        yield


@pytest.fixture(scope='session')
def write_unchecked(images):
    """A function that writes an ONNX file and its sidecar without comparing it with PyTorch, which takes longer."""
    import export.onnx
    from export.metadata import write_sidecar
    from export.onnx import serialize

    def write(model: nn.Module, path, options) -> None:
        calibration = images(model) if options.precision == 'int8' else None
        proto, metadata = export.onnx.create_onnx(model, options, calibration)
        path.write_bytes(serialize(proto, metadata))
        write_sidecar(path, metadata)

    return write


@pytest.fixture(scope='session')
def forks():
    """Runs training scripts in processes of their own; its `run` takes what comes after `python` in a command."""
    with Forks('train.train', 'train.reproduce', 'datasets', env={**os.environ, 'OMP_NUM_THREADS': '1'}) as server:
        yield server


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps precision and device for the life of a process; each test has its own."""
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
