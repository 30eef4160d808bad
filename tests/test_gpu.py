"""What is computed on a GPU is what is computed on the CPU."""
import copy
import shutil

import pytest
import timm
import torch
from conftest import make_trained_like
from test_models import MODELS
from test_template_matching import patch_mean_loop

from timm_tmblock.auxiliary import PatchSupervised
from timm_tmblock.layers import PatchMean
from timm_tmblock.task import TemplateMatchingTask
from train.graph import WARMUP_STEPS
from train.train import main

DEVICE = torch.device('cuda')
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('patch_size', range(1, 9))
def test_gradient_of_patch_mean_is_that_of_the_loop(patch_size, memory_format):
    x, weight = torch.randn(2, 3, 6, 8, 8, dtype=torch.float64).unbind()
    expected = x.clone().requires_grad_()
    (patch_mean_loop(expected, patch_size) * weight).sum().backward()
    y = x.to(DEVICE).contiguous(memory_format=memory_format).requires_grad_()
    (PatchMean(patch_size)(y) * weight.to(DEVICE)).sum().backward()
    torch.testing.assert_close(y.grad.cpu(), expected.grad, rtol=0, atol=1e-12)


def gradients(model, device, memory_format, x, y):
    model = copy.deepcopy(model).train()
    if not getattr(model, 'has_template_matching', False):
        torch.manual_seed(1)  # of the auxiliary classifier, made where the model is: devices draw other numbers
        model = PatchSupervised(model).double()
    model = model.to(device).to(memory_format=memory_format)
    task = TemplateMatchingTask(model, device=device, verbose=False)
    x = x.to(device).contiguous(memory_format=memory_format)
    task(x, y.to(device))['loss'].backward()
    return {k: p.grad.cpu() for k, p in model.named_parameters()}


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('name, kwargs', [*((name, {}) for name in MODELS), ('dn100_tm', dict(memory_efficient=True))])
def test_gradients_of_a_network_are_those_on_the_cpu(name, kwargs, memory_format):
    torch.manual_seed(0)
    model = make_trained_like(timm.create_model(name, num_classes=10, **kwargs)).double()
    x, y = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (3,))
    expected = gradients(model, torch.device('cpu'), torch.contiguous_format, x, y)
    actual = gradients(model, DEVICE, memory_format, x, y)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=1e-9 * value.abs().max().item(), msg=key)


@pytest.mark.parametrize('flags', [
    ['--opt', 'muon', '--warmup-epochs', '1'],
    ['--opt', 'nadamw', '--clip-grad', '1', '--cutmix', '1', '--model-ema', '--mixed-precision', 'bf16'],
    ['--opt', 'adam', '--torchcompile', '--model', 'rn26', '--aux-head'],
])
def test_steps_of_a_graph_are_those_without_one(tmp_path, monkeypatch, flags, fresh_accelerate):
    def train(folder, *more):
        return main([
            '--train-split', 'train[:600]', '--val-split', 'test[:100]', '--batch-size', '64', '--epochs', '3',
            '--report-to', 'none', '--experiment', folder, '--output', str(tmp_path), *flags, *more])

    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, 'replay', lambda graph: (replays.append(graph), replay(graph)))
    plain, graphed = train('plain'), train('graphed', '--cuda-graph')
    assert len(replays) == 27 - WARMUP_STEPS and len(set(replays)) == 1
    for key, atol in dict(lr=1e-12, train_loss=2e-2, train_top1=2., eval_loss=5e-2).items():
        expected, actual = (torch.tensor([epoch[key] for epoch in run['history']]) for run in (plain, graphed))
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    for start, flag in (('plain', '--cuda-graph'), ('graphed', '--cuda-graph'), ('graphed', '--no-cuda-graph')):
        shutil.copytree(tmp_path / start, tmp_path / f'{start}{flag}')
        resumed = main(['--resume', str(tmp_path / f'{start}{flag}'), '--epochs', '4', flag])
        assert len(resumed['history']) == 4
        assert resumed['history'][-1]['train_loss'] == pytest.approx(plain['history'][-1]['train_loss'], abs=0.3)
