"""The networks in what timm's users put them into: compilers, exporters, half precision and other libraries."""
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from test_models import MODELS
from timm.models._hub import save_for_hf
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperModel

BATCHES = [1, 2, 5]


def close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def create(trained_like, name):
    """A network whose dense stages, but for one in full, have two layers, which have all the operators of sixteen."""
    return trained_like(name, **dict(layers=(2, 2, 2, 2)) if name in ('dn100', 'dn100_tm') else {})


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize('name', MODELS)
def test_training_compiles_into_one_graph(trained_like, name):
    model, reference = (create(trained_like, name).train() for _ in range(2))
    if model.has_template_matching:
        for m in (model, reference):
            m.set_patch_supervision()
    x = torch.randn(3, 3, 32, 32)
    got, expected = torch.compile(model, fullgraph=True, backend='eager')(x), reference(x)
    for a, b in zip(got, expected):
        close(a, b, 1e-4)


@pytest.mark.parametrize('name', ['rn26_tm', 'wrn16'])
def test_evaluation_compiles_into_one_graph(trained_like, name):
    model = trained_like(name)
    compiled = torch.compile(model, fullgraph=True, backend='eager', dynamic=True)
    for batch_size in BATCHES:
        x = torch.randn(batch_size, 3, 32, 32)
        close(compiled(x), model(x), 1e-4)


def test_compiled_gradients_are_the_same(trained_like):
    models = [trained_like('rn26_tm').train() for _ in range(2)]
    x = torch.randn(3, 3, 32, 32)
    for model in models:
        run = torch.compile(model, fullgraph=True, backend='aot_eager') if model is models[0] else model
        run(x).square().sum().backward()
    for p, q in zip(*(m.parameters() for m in models)):
        close(p.grad, q.grad, 1e-3)


HAS_COMPILER = shutil.which('g++') or shutil.which('clang++')


@pytest.mark.skipif(
    not (HAS_COMPILER and Path(sysconfig.get_path('include'), 'Python.h').is_file()), reason='no compiler or Python.h')
def test_inductor_gives_the_same_logits(trained_like):
    model = trained_like('rn26_tm', layers=(1, 1, 1, 1))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        close(compiled(x), model(x), 1e-4)


class AllOutputs(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.forward_patch_logits(x) if self.model.has_template_matching else (self.model(x),)


@pytest.mark.parametrize('name', ['rn20_tm', 'rn26', 'wrn16_tm', 'dn100_tm_cat'])  # test_tensorrt exports all
def test_exports_with_a_dynamic_batch(trained_like, name):
    model = AllOutputs(trained_like(name, **dict(layers=(2, 2, 2, 2)) if name.startswith('dn') else {}))
    program = torch.export.export(
        model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
    for batch_size in BATCHES:
        x = torch.randn(batch_size, 3, 32, 32)
        for got, expected in zip(program(x), model(x)):
            close(got, expected)


@pytest.mark.parametrize('name', MODELS)
def test_channels_last_gives_the_same(trained_like, name):
    model, other = create(trained_like, name), create(trained_like, name).to(memory_format=torch.channels_last)
    for batch_size in BATCHES:
        x = torch.randn(batch_size, 3, 32, 32)
        features = other.forward_features(x.to(memory_format=torch.channels_last))
        assert features.is_contiguous(memory_format=torch.channels_last)
        close(features, model.forward_features(x), 1e-4)


@pytest.mark.parametrize('name', MODELS)
def test_bfloat16_trains_and_predicts(trained_like, name):
    layers = dict(layers=(2, 2, 2, 2)) if name.startswith('dn') else {}
    model, reference = (trained_like(name, **layers) for _ in range(2))
    model.bfloat16()
    for batch_size in BATCHES:
        x = torch.randn(batch_size, 3, 32, 32)
        got = model(x.bfloat16())
        assert got.dtype == torch.bfloat16
        close(got.float(), reference(x), 0.1)
    model.train()(x.bfloat16()).sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', ['rn20_tm', 'rn26', 'dn100_tm_cat'])  # test_models looks at the features of all
def test_segmentation_models_pytorch_takes_it_as_encoder(name):
    model = smp.Unet(f'tu-{name}', encoder_depth=2, encoder_weights=None, decoder_channels=(32, 16), classes=4).eval()
    assert model(torch.randn(2, 3, 64, 48)).shape == (2, 4, 64, 48)
    model = smp.Unet(f'tu-{name}.mini_imagenet', encoder_depth=3, encoder_weights=None, decoder_channels=(32, 16, 8))
    assert model.eval()(torch.randn(2, 3, 64, 96)).shape == (2, 1, 64, 96)


@pytest.mark.parametrize('name', ['rn26_tm', 'dn100_tm_cat'])
def test_transformers_timm_wrapper_gives_the_same_logits(trained_like, tmp_path, name):
    model = trained_like(name, num_classes=7)
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['model_args'].pop('num_classes', None)  # transformers passes it a second time
    (tmp_path / 'config.json').write_text(json.dumps(config))
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(wrapped(x).logits, model(x))
    headless = TimmWrapperModel(TimmWrapperConfig(architecture=name)).eval()
    assert headless(x).last_hidden_state.shape == model.forward_features(x).shape


def test_import_brings_in_no_more_than_timm_does():
    """What timm needs is there already; a library more would be time on every start."""
    code = ('import sys, timm, timm.task; before = set(sys.modules); import timm_tmblock; '
            'print(*sorted(m for m in set(sys.modules) - before if not m.startswith("timm_tmblock")))')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == '', run.stdout + run.stderr


def test_create_model_is_timms():
    import timm_tmblock
    assert timm_tmblock.create_model is timm.create_model
