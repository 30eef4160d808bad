"""RN26-aux: the paper's baseline with auxiliary supervision."""
import pytest
import timm
import torch
import torch.nn as nn
from conftest import make_trained_like
from timm.models import load_checkpoint

from timm_tmblock import PatchSupervised, TemplateMatchingTask


@pytest.fixture
def supervised():
    torch.manual_seed(0)
    return PatchSupervised(make_trained_like(timm.create_model('rn26')))


@pytest.mark.parametrize('num_classes', [1, 10, 100])
def test_parameter_count_is_the_papers(num_classes):
    model = PatchSupervised(timm.create_model('rn26', num_classes=num_classes))
    assert sum(p.numel() for p in model.parameters()) == 961_488 + 386 * num_classes


def test_head_is_where_the_model_is():
    model = timm.create_model('rn26', device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in PatchSupervised(model).parameters()} == {('meta', torch.bfloat16)}


def test_preprocessing_is_the_models():
    model = timm.create_model('rn26', in_chans=1, img_size=48)
    expected = timm.data.resolve_input_data_config(model)
    assert timm.data.resolve_input_data_config(PatchSupervised(model)) == expected
    assert expected['input_size'] == (1, 48, 48)


def test_model_that_is_compiled_or_distributed_already_is_refused():
    for wrapped in (torch.compile(timm.create_model('rn26')), nn.DataParallel(timm.create_model('rn26'))):
        with pytest.raises(ValueError, match='compiled or distributed; wrap it in PatchSupervised before'):
            PatchSupervised(wrapped)


@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_patch_logits_are_those_of_stage_3(supervised, batch_size):
    x = torch.randn(batch_size, 3, 32, 32)
    supervised.train()
    for m in supervised.modules():  # statistics of the batch would differ between the two passes below
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    logits, patch_logits = supervised(x)
    model = supervised.model
    features = model.layer3(model.layer2(model.layer1(model.conv1(x)))).double()
    weight, bias = supervised.aux.match.weight.double(), supervised.aux.match.bias.double()
    for i, j in ((0, 0), (3, 4), (7, 7)):
        patch = features[:, :, max(i - 1, 0):i + 3, max(j - 1, 0):j + 3].mean((2, 3))  # offsets -1 ... 2
        expected = patch @ weight[:, :, 0, 0].T + bias
        torch.testing.assert_close(patch_logits[:, :, i, j].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, model(x))


def test_evaluation_is_the_baseline(supervised):
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(supervised.eval()(x), supervised.model(x))
    assert torch.is_tensor(supervised.train()(x)) is False
    supervised.set_patch_supervision(False)
    assert torch.is_tensor(supervised(x))


def test_head_reaches_the_trunk_and_leaves_no_trace(supervised):
    task = TemplateMatchingTask(supervised, patch_loss_weight=1.)
    task(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)))['loss'].backward()
    gradients = {n: p.grad for n, p in supervised.model.named_parameters()}
    assert gradients['layer3.blocks.1.conv3.weight'].abs().sum() > 0
    assert gradients['layer4.blocks.0.conv1.weight'].abs().sum() == 0  # the loss of the patches stops before
    plain = timm.create_model('rn26')
    assert supervised.model.state_dict().keys() == plain.state_dict().keys()
    assert type(supervised.model) is type(plain) and len(list(supervised.model.modules())) == len(list(plain.modules()))


@pytest.mark.parametrize('name, message', [('rn26_tm', 'patch logits of its own'), ('test_resnet', 'use rn26')])
def test_models_it_does_not_fit_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        PatchSupervised(timm.create_model(name))


def test_fused_model_is_refused():
    with pytest.raises(ValueError, match='fused, which is for inference; wrap it before fuse'):
        PatchSupervised(timm.create_model('rn26').eval().fuse())


def test_model_without_classes_is_refused():
    with pytest.raises(ValueError, match='has no classes to tell patches apart by'):
        PatchSupervised(timm.create_model('rn26', num_classes=0))


def test_head_of_other_classes_than_the_model_is_not_trained():
    supervised = PatchSupervised(timm.create_model('rn26'))
    supervised.model.reset_classifier(5)
    with pytest.raises(ValueError, match='10 templates and 5 classes; wrap it in PatchSupervised again'):
        TemplateMatchingTask(supervised, verbose=False)


def test_classifier_is_the_models(supervised):
    assert supervised.get_classifier() is supervised.model.fc
    supervised.set_grad_checkpointing()
    assert supervised.model.layer4.grad_checkpointing


def test_compiled_baseline_is_what_is_evaluated(supervised):
    task = TemplateMatchingTask(supervised)
    x, targets = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 2])
    state = supervised.state_dict()
    loss = task.train()(x, targets)['loss']
    supervised.load_state_dict(state)
    compiled = task.compile(backend='eager')
    assert task.get_eval_model() is compiled and timm.utils.unwrap_model(compiled) is supervised.model
    assert set(task.get_checkpoint_state()['state_dict']) == set(supervised.model.state_dict())
    torch.testing.assert_close(task.train()(x, targets)['loss'], loss)
    torch.testing.assert_close(compiled.eval()(x), supervised.model.eval()(x))


def test_compiled_average_is_what_is_evaluated(supervised):
    task = TemplateMatchingTask(supervised)
    task.setup_ema()
    compiled = task.compile_ema(backend='eager')
    assert compiled is not None and task.get_eval_model(ema=True) is compiled
    assert set(task.get_checkpoint_state(ema=True)['state_dict_ema']) == set(supervised.model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(compiled(x), task.get_trainable_module(ema=True).module.eval().model(x))


@pytest.mark.parametrize('ema', [False, True])
def test_checkpoints_of_the_task_are_those_of_the_baseline(supervised, tmp_path, ema):
    task = TemplateMatchingTask(supervised)
    if ema:
        task.setup_ema()
    state = task.get_checkpoint_state(ema=ema)
    suffix = '_ema' if ema else ''
    torch.save({k: v for k, v in state.items() if 'task' not in k}, tmp_path / 'checkpoint.pth')
    plain = timm.create_model('rn26', num_classes=10)
    load_checkpoint(plain, tmp_path / 'checkpoint.pth', use_ema=ema)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in supervised.model.state_dict().items())

    other = TemplateMatchingTask(PatchSupervised(timm.create_model('rn26', num_classes=10)))
    other.load_checkpoint_state(state[f'state_dict{suffix}'], state[f'task_state{suffix}'])
    theirs = other.trainable_module.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in supervised.state_dict().items())


def test_gradients_of_all_but_the_head_are_clipped(supervised):
    task = TemplateMatchingTask(supervised)
    assert set(task.get_clip_parameters()) == set(supervised.parameters())
    clipped = set(task.get_clip_parameters(exclude_head=True))
    assert set(supervised.parameters()) - clipped == set(supervised.model.fc.parameters())
