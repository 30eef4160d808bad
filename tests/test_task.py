"""Equation 3.1 against a loop over images and regions."""
import math

import pytest
import timm
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.task import ClassificationTask
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from timm_tmblock import TemplateMatchingTask
from timm_tmblock.layers import TemplateMatching


def cross_entropy(scores, target) -> float:
    """l(scores, y) of one soft-maxed vector of scores, in Python floats."""
    top = max(scores)
    log_sum = top + math.log(sum(math.exp(s - top) for s in scores))
    return -sum(t * (s - log_sum) for s, t in zip(scores, target))


def equation_3_1(logits, patch_logits, targets, weight: float) -> float:
    b, k, h, w = patch_logits.shape
    total = 0.
    for n in range(b):
        target = targets[n].tolist()
        regions = sum(
            weight * cross_entropy(patch_logits[n, :, i, j].tolist(), target) for i in range(h) for j in range(w))
        total += (1 - weight) * cross_entropy(logits[n].tolist(), target) + regions / (w * h)
    return total / b


class Fixed(nn.Module):
    """A model whose outputs are given."""
    num_classes = 5

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs
        self.tm = nn.Module()
        self.tm.num_templates = 5

    def set_patch_supervision(self, enable):
        self.enabled = enable

    def get_patch_classifier(self):
        return self.tm

    def forward(self, x):
        assert self.enabled
        return self.outputs


def test_norms_that_lost_their_activation_are_refused():
    TemplateMatchingTask(convert_sync_batchnorm(timm.create_model('rn26_tm')))
    with pytest.raises(ValueError, match='use timm.layers.convert_sync_batchnorm'):
        TemplateMatchingTask(nn.SyncBatchNorm.convert_sync_batchnorm(timm.create_model('rn26_tm')))


def test_network_of_ones_own_is_told_what_it_can_mend():
    network = Fixed()
    network.tm.num_templates = 7
    with pytest.raises(ValueError, match='7 templates and 5 classes; create its patch classifier with 5 templates'):
        TemplateMatchingTask(network)


@pytest.mark.parametrize('batch_size', [1, 2, 3])
@pytest.mark.parametrize('weight', [0., 0.3, 0.5, 1.])
def test_loss_equals_equation_3_1(weight, batch_size):
    logits = torch.randn(batch_size, 5, dtype=torch.float64) * 4
    patch_logits = torch.randn(batch_size, 5, 3, 4, dtype=torch.float64) * 4
    model = Fixed(logits, patch_logits)
    index = torch.randint(0, 5, (batch_size,))
    one_hot = nn.functional.one_hot(index, 5).double()
    soft = torch.rand(batch_size, 5, dtype=torch.float64).softmax(1)
    for target, reference, kwargs in (
            (index, one_hot, {}),
            (index, 0.8 * one_hot + 0.2 / 5, dict(smoothing=0.2)),
            (soft, soft, dict(soft_targets=True)),
    ):
        task = TemplateMatchingTask(model, criterion_kwargs=kwargs, patch_loss_weight=weight, verbose=False)
        result = task(None, target)
        assert result['loss'].item() == pytest.approx(equation_3_1(logits, patch_logits, reference, weight), rel=1e-12)
        assert result['class_loss'].item() == pytest.approx(equation_3_1(logits, patch_logits, reference, 0), rel=1e-12)
        assert result['patch_loss'].item() == pytest.approx(equation_3_1(logits, patch_logits, reference, 1), rel=1e-12)
        assert result['output'] is logits


def test_model_that_is_refused_is_as_it_was():
    model = timm.create_model('rn26_tm', pretrained=True, num_classes=5)  # with the 10 templates of its weights
    with pytest.raises(ValueError, match='one template per class'):
        TemplateMatchingTask(model, verbose=False)
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 4])
    assert ClassificationTask(model, verbose=False)(images, targets)['output'].shape == (2, 5)


def test_default_weight_is_one_half():
    assert TemplateMatchingTask(timm.create_model('rn26_tm'), verbose=False).patch_loss_weight == 0.5


def test_patch_loss_alone_trains_nothing_behind_the_templates():
    model = timm.create_model('rn26_tm').train()
    task = TemplateMatchingTask(model, patch_loss_weight=1., verbose=False)
    task(torch.randn(2, 3, 32, 32), torch.tensor([3, 7]))['loss'].backward()
    assert model.tm.match.weight.grad.abs().sum() > 0 and model.conv1.weight.grad.abs().sum() > 0
    for module in (model.tm.value, model.layer4, model.fc):
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_mixup_targets_train():
    model = timm.create_model('rn26_tm').train()
    task = TemplateMatchingTask(model, criterion_kwargs=dict(soft_targets=True), verbose=False)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1., num_classes=10)
    images, targets = mixup(torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 5, 9]))
    result = task(images, targets)
    result['loss'].backward()
    assert result['loss'].isfinite()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('model, message', [
    (lambda: timm.create_model('rn26'), 'no template matching block.*wrap it in PatchSupervised'),
    (lambda: timm.create_model('test_resnet'), 'no patch logits'),
    (lambda: timm.create_model('rn26_tm', num_classes=7, num_templates=10), r'reset_templates\(7\)'),
    (lambda: timm.create_model('rn26_tm', num_classes=0, num_templates=10), r'reset_classifier\(10\)'),
])
def test_models_without_a_patch_loss_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        TemplateMatchingTask(model(), verbose=False)


def test_block_that_is_wrapped_is_trained():
    model = timm.create_model('rn26_tm')
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, TemplateMatching))
    assert not isinstance(model.tm, TemplateMatching)
    TemplateMatchingTask(model, verbose=False)(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))['loss'].backward()
    assert model.tm.match.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('weight', [-0.1, 1.1, math.nan])
def test_weights_out_of_range_are_refused(weight):
    with pytest.raises(ValueError, match='patch_loss_weight'):
        TemplateMatchingTask(timm.create_model('rn26_tm'), patch_loss_weight=weight, verbose=False)


def test_loss_of_a_model_in_evaluation_mode_is_one_sentence():
    task = TemplateMatchingTask(timm.create_model('rn20_tm'))
    task.eval()
    with pytest.raises(RuntimeError, match='needs patch logits, which the model returns only in training'):
        task(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
