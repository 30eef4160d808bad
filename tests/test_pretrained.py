"""The weights in the package: load with no network, and have the accuracy that is stated."""
import json
import socket
from pathlib import Path

import pytest
import timm
import torch

import timm_tmblock
from train.data import DataConfig, decode, open_dataset

ROOT = Path(__file__).parent.parent
TAGS = [t for t in timm.list_pretrained() if timm.model_entrypoint(t).__module__.startswith('timm_tmblock.')]


def read_top1(tag):
    return json.loads((ROOT / 'train' / 'results' / tag / 'evaluation.json').read_text())['top1']


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('this must work without a network')

    monkeypatch.setattr(socket.socket, 'connect', refuse)


def test_every_pretrained_tag_loads_without_network(no_network):
    assert 'rn26_tm.cifar10' in TAGS
    for tag in TAGS:
        model = timm.create_model(tag, pretrained=True)
        assert len(model.pretrained_cfg['label_names']) == model.num_classes


@pytest.mark.parametrize('tag', [t for t in TAGS if t.endswith('cifar10')])
def test_accuracy_on_the_sample_is_that_of_the_result(tag):
    """Of the 10,000 test images 500, of dense networks, which take six times as long, 150: within three errors."""
    stated = read_top1(tag) / 100
    model = timm.create_model(tag, pretrained=True).eval().to(memory_format=torch.channels_last)  # faster on CPUs
    cfg = model.pretrained_cfg
    config = DataConfig(cfg['input_size'], cfg['mean'], cfg['std'])
    split = 'test[:150]' if tag.startswith('dn100') else 'test'  # stored in an order without classes
    data = decode(open_dataset('sample', split), config, progress=False)
    mean, std = (torch.tensor(cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    assert list(cfg['label_names']) == data.class_names
    images = data.images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        predicted = torch.cat([model((x / 255 - mean) / std).argmax(1) for x in images.split(100)])
    accuracy = (predicted == data.targets).double().mean().item()
    assert abs(accuracy - stated) < 3 * (stated * (1 - stated) / len(data)) ** 0.5


def test_pretrained_model_explains_a_test_image_by_its_class():
    images = ROOT / 'train' / 'sample' / 'images'
    explanation = timm_tmblock.explain('rn26_tm', images / 'ship.png')
    assert explanation.top(1)[0][0] == 'ship'
    assert explanation.patch_probabilities.shape == (10, 8, 8)
