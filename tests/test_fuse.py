"""Fused networks: equal to the unfused ones, and without the norms that follow a convolution."""
import copy
from functools import partial

import pytest
import timm
import torch
from conftest import make_trained_like
from test_models import MODELS
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from timm.models import save_for_hf
from timm.utils import reparameterize_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured

from timm_tmblock import TemplateMatchingTask
from timm_tmblock.checkpoint import load_pretrained
from timm_tmblock.errors import InputError
from timm_tmblock.layers import TemplateMatching
from timm_tmblock.models.tm_resnet import PreActBasic, PreActBottleneck, PreActResNet

# those that follow an addition or a concatenation: the first of each block and the last of the network, but for the
# ResNets' first, which follows the stem alone; in the DenseNets also those of the transitions
NORMS_LEFT = {
    'rn20': 6, 'rn20_tm': 6, 'rn26': 8, 'rn26_tm': 8, 'rn38': 12, 'rn38_tm': 12, 'wrn16': 8, 'wrn16_tm': 8,
    'dn100': 64 + 2 + 1, 'dn100_tm': 64 + 2 + 1, 'dn100_tm_cat': 64 + 2 + 1,
}


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def outputs(model, x):
    with torch.no_grad():
        if model.has_template_matching:
            return (model(x), model.forward_features(x), *model.forward_patch_logits(x))
        return model(x), model.forward_features(x)


def test_network_with_a_wrapped_first_block_fuses_to_the_same_outputs(trained_like):
    model = trained_like('rn26_tm')
    x = torch.randn(3, 3, 32, 32)
    expected = outputs(model, x)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, PreActBottleneck))
    assert_equal(outputs(model.fuse(), x), expected)


@pytest.mark.parametrize('kwargs', [{}, dict(img_size=84, num_classes=100)])
@pytest.mark.parametrize('name', MODELS)
def test_fused_network_equals_the_unfused(trained_like, name, kwargs):
    model = trained_like(name, **kwargs)
    fused = copy.deepcopy(model).fuse()
    for batch_size in (1, 2, 5) if not kwargs else (2,):
        x = torch.randn(batch_size, 3, *model.img_size, generator=torch.Generator().manual_seed(batch_size))
        assert_equal(outputs(fused, x), outputs(model, x))


def test_norm_whose_input_is_needed_too_is_not_folded_into_the_stem():
    torch.manual_seed(0)
    model = PreActResNet(block=PreActBasic, channels=(16, 64, 128, 256), template_matching=True)
    model = make_trained_like(model).eval()
    assert model.layer1.blocks[0].shortcut is None
    x = torch.randn(3, 3, 32, 32)
    assert_equal(outputs(copy.deepcopy(model).fuse(), x), outputs(model, x))


def test_epsilon_of_each_norm_is_its_own(trained_like):
    model = trained_like('rn26_tm')
    for norm in (m for m in model.modules() if isinstance(m, BatchNormAct2d)):
        norm.eps = 0.1
    x = torch.randn(3, 3, 32, 32)
    assert_equal(outputs(copy.deepcopy(model).fuse(), x), outputs(model, x))


def test_pretrained_network_equals_the_unfused():
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert_equal(outputs(copy.deepcopy(model).fuse(), x), outputs(model, x))


@pytest.mark.parametrize('name', MODELS)
def test_no_norm_follows_a_convolution(trained_like, name):
    fused = trained_like(name).fuse()
    graph = torch.fx.symbolic_trace(fused).graph
    modules = dict(fused.named_modules())
    norms = [n for n in graph.nodes if n.target is torch.nn.functional.batch_norm]
    for node in norms:
        source = node.args[0]
        alone = len(source.users) == 1  # otherwise what the convolution gives is needed before the norm too
        assert not (alone and isinstance(modules.get(source.target), torch.nn.Conv2d)), source
    assert len(norms) == NORMS_LEFT[name]


def test_matching_and_shortcut_are_one_convolution(trained_like):
    block = trained_like('rn26_tm').tm
    fused = block.fuse()
    graph = torch.fx.symbolic_trace(fused, concrete_args=dict(return_patch_logits=False)).graph
    modules = dict(fused.named_modules())
    inputs = [n.args[0].op for n in graph.nodes if isinstance(modules.get(n.target), torch.nn.Conv2d)]
    assert inputs == ['placeholder', 'call_module']  # of f, and the values of the mixing coefficients
    assert not any(n.target is torch.nn.functional.batch_norm for n in graph.nodes)


@pytest.mark.parametrize('name', MODELS)
def test_reparameterize_model_fuses_all_but_the_stem(trained_like, name):
    model = trained_like(name)
    fused = reparameterize_model(model)
    x = torch.randn(3, 3, 32, 32)
    assert_equal(outputs(fused, x), outputs(model, x))
    norms = sum(isinstance(m, BatchNormAct2d) for m in fused.modules())
    assert norms == NORMS_LEFT[name] + (not name.startswith('dn'))
    assert isinstance(getattr(model, 'tm', None), TemplateMatching) == name.count('_tm')  # a copy was fused
    assert_equal(outputs(reparameterize_model(torch.nn.Sequential(model))[0], x), outputs(model, x))


def test_networks_without_data_are_counted_fused_too():
    fused = timm.create_model('rn26_tm', device='meta').eval().fuse()
    expected = timm.create_model('rn26_tm').eval().fuse()
    assert {k: v.shape for k, v in fused.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()}
    assert all(v.is_meta for v in fused.state_dict().values())


def test_templates_more_than_channels(trained_like):
    model = trained_like('rn26_tm', num_classes=200)
    x = torch.randn(2, 3, 32, 32)
    assert_equal(outputs(copy.deepcopy(model).fuse(), x), outputs(model, x))


@pytest.mark.parametrize('kwargs', [dict(act_layer='silu'), dict(maximizer='softmax'), dict(norm_layer='groupnorm1')])
def test_other_layers_fuse_or_stay(trained_like, kwargs):
    model = trained_like('rn26_tm', **kwargs)
    x = torch.randn(2, 3, 32, 32)
    assert_equal(outputs(copy.deepcopy(model).fuse(), x), outputs(model, x))


@pytest.mark.parametrize('name', ['rn26_tm', 'dn100_tm'])
@pytest.mark.parametrize('change', [partial(l1_unstructured, name='weight', amount=0.2), weight_norm])
def test_convolutions_whose_weights_are_computed_stay(trained_like, name, change):
    model = trained_like(name)
    for m in list(model.modules()):
        if isinstance(m, torch.nn.Conv2d):
            change(m)
    x = torch.randn(2, 3, 32, 32)
    expected = outputs(model, x)
    fused = reparameterize_model(model, inplace=True)
    assert_equal(outputs(fused, x), expected)
    assert sum(isinstance(m, BatchNormAct2d) for m in fused.modules()) > NORMS_LEFT[name]


def test_block_whose_shortcut_alone_is_computed_stays(trained_like):
    model = trained_like('rn26_tm')
    l1_unstructured(model.tm.shortcut, 'weight', 0.5)  # a step of the optimizer is in `weight` with the next forward
    assert model.tm.fuse() is model.tm and model.fuse().tm is model.tm


def test_frozen_norms_fuse(trained_like):
    model = freeze_batch_norm_2d(trained_like('rn26_tm'))
    fused = copy.deepcopy(model).fuse()
    x = torch.randn(2, 3, 32, 32)
    assert_equal(outputs(fused, x), outputs(model, x))
    assert isinstance(fused.layer1.blocks[0].norm2, torch.nn.ReLU)


def test_fused_network_works_wherever_others_do(trained_like):
    model = trained_like('rn26_tm').fuse()
    x = torch.randn(3, 3, 32, 32)
    expected = model(x)
    for other in (torch.jit.script(model), torch.compile(model, fullgraph=True, backend='eager'),
                  torch.fx.symbolic_trace(model), torch.export.export(model, (x,)).module(), model.fuse(),
                  copy.deepcopy(model).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_frozen_networks_stay_frozen(trained_like):
    model = trained_like('rn26_tm').requires_grad_(False).fuse()
    assert not any(p.requires_grad for p in model.parameters())


def test_templates_of_a_fused_network_stay():
    with pytest.raises(ValueError, match='before fuse'):
        timm.create_model('rn26_tm').fuse().reset_templates(3)


class SoftMixing(TemplateMatching):
    def mix(self, patch_logits):
        return patch_logits.softmax(1)


def test_block_that_overrides_something_keeps_it():
    block = make_trained_like(SoftMixing(8, 5, 4)).eval()
    x = torch.randn(3, 8, 6, 7)
    expected = block.shortcut(x) + block.value(block.patch_logits(x).softmax(1))
    torch.testing.assert_close(reparameterize_model(torch.nn.Sequential(block))(x), expected)


@pytest.mark.parametrize('fuse', [lambda model: model.fuse(), partial(reparameterize_model, inplace=True)])
def test_network_fused_in_training_is_not_supervised_any_more(fuse):
    model = timm.create_model('rn20_tm')
    task = TemplateMatchingTask(model, verbose=False)
    batch = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    task.train()(*batch)
    fuse(model)
    with pytest.raises(RuntimeError, match='A fused model is for inference; train it before fuse'):
        task(*batch)


def test_network_whose_block_does_not_fuse_is_supervised_on():
    model = timm.create_model('rn20_tm')
    model.tm = SoftMixing(model.tm.dim, 10, model.patch_size)
    task = TemplateMatchingTask(model, verbose=False)
    model.fuse()
    assert task.train()(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))['patch_loss'] > 0


def test_patches_of_a_fused_network_are_not_supervised():
    model = timm.create_model('rn26_tm').fuse()
    with pytest.raises(ValueError, match='A fused model is for inference; train it before fuse'):
        TemplateMatchingTask(model, verbose=False)
    model.set_patch_supervision(False)  # which it is already


@pytest.mark.parametrize('name', MODELS)
def test_weights_of_a_fused_network_are_refused_in_one_sentence(tmp_path, name):
    model = timm.create_model(name).fuse()
    model.load_state_dict(model.state_dict())
    save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(InputError, match=r'\(the weights are of a fused model; save them before fuse\(\)\.\); name'):
        load_pretrained(f'local-dir:{tmp_path}')
