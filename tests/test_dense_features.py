"""Dense stages over a shared buffer are the plain layers, and keep less for the backward."""
import copy
import gc

import pytest
import timm
import torch
import torch.nn as nn
from conftest import make_trained_like
from timm.utils import reparameterize_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.multiprocessing.reductions import StorageWeakRef

from timm_tmblock.layers import dense_features
from timm_tmblock.layers.dense_features import can_share_features
from timm_tmblock.models import tm_densenet
from timm_tmblock.models.tm_densenet import DenseLayer, DenseStage


class PlainStage(nn.ModuleList):
    def forward(self, x):
        for layer in self:
            new = layer.conv2(layer.norm2(layer.conv1(layer.norm1(x))))
            x = torch.cat([x, new], dim=1)
        return x


def make_stages(dtype=torch.float64, depth=4):
    """A stage and the plain layers of the same weights, in training."""
    torch.manual_seed(0)
    stage = make_trained_like(DenseStage(10, 8, 6, depth)).to(dtype).train()
    return stage, PlainStage(copy.deepcopy(stage.blocks))


def run(module, x, grad=None):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype) if grad is None else grad
    out.backward(grad)
    return out.detach(), x.grad, [p.grad for p in module.parameters()], list(module.buffers())


@pytest.mark.parametrize('batch_size', [1, 2, 5])
@pytest.mark.parametrize('depth', [1, 4])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_shared_features_equal_the_plain_layers(memory_format, depth, batch_size):
    """Output, gradients of input and parameters, and running statistics, over two steps."""
    stage, blocks = make_stages(depth=depth)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        x = torch.randn(batch_size, 10, 6, 5, generator=generator).double() * 2 + 1
        x = x.contiguous(memory_format=memory_format)
        assert can_share_features(stage.blocks, x, DenseLayer)
        got, expected = run(stage, x), run(blocks, x)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert got[0].is_contiguous(memory_format=memory_format)


def test_whole_networks_train_the_same(monkeypatch):
    forward_shared, calls = tm_densenet.forward_shared, []

    def count(*args):
        calls.append(1)
        return forward_shared(*args)

    for name in ('dn100', 'dn100_tm_cat'):
        torch.manual_seed(0)
        model = timm.create_model(name).double()
        x = torch.randn(3, 3, 32, 32).double()
        results = []
        calls.clear()
        monkeypatch.setattr(tm_densenet, 'forward_shared', count)
        for shared in (True, False):
            copied = copy.deepcopy(model)
            if not shared:
                monkeypatch.setattr('timm_tmblock.models.tm_densenet.can_share_features', lambda *args: False)
            results.append(run(copied, x))
        monkeypatch.undo()
        assert len(calls) == 4  # the stages of the first
        torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_as_close_to_float64_as_the_plain_layers(dtype):
    stage, blocks = make_stages(torch.float32)
    exact, _ = make_stages()
    x = torch.randn(4, 10, 6, 5)
    expected = exact(x.double())
    errors = []
    for module in (stage, blocks):
        with torch.autocast('cpu', dtype):
            out = module(x.to(dtype))
        assert out.dtype == dtype
        out.float().sum().backward()
        errors.append((out - expected).abs().mean().item())
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())
    assert errors[0] < 1.2 * errors[1]


def test_backward_can_be_repeated():
    stage, blocks = make_stages()
    gradients = []
    for module in (stage, blocks):
        x = torch.randn(2, 10, 6, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        out = module(x).square().sum()
        out.backward(retain_graph=True)
        out.backward()
        gradients.append([x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('frozen', [
    [], ['0.conv1.weight', '1.norm1.weight'], ['0.norm1.weight', '0.norm1.bias', '0.conv1.weight'],
    ['3.norm1.bias', '3.conv1.weight', '3.conv2.weight']])
@pytest.mark.parametrize('input_requires_grad', [True, False])
def test_frozen_parameters_get_no_gradient_and_change_no_other(frozen, input_requires_grad):
    gradients = []
    for module, prefix in zip(make_stages(), ('blocks.', '')):
        x = torch.randn(2, 10, 6, 5, generator=torch.Generator().manual_seed(0)).double()
        x.requires_grad_(input_requires_grad)
        parameters = dict(module.named_parameters())
        for name in frozen:
            parameters[prefix + name].requires_grad_(False)
        module(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_less_than_two_thirds_is_kept_for_the_backward():
    kept = []
    for module in make_stages(torch.float32, depth=16):
        storages = {}

        def pack(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = module(torch.randn(4, 10, 8, 8, requires_grad=True))
        kept.append(sum(storages.values()))
        del out
    assert kept[0] < 2 / 3 * kept[1]


def test_checkpointed_stage_keeps_only_what_each_layer_adds():
    def find_storages():
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    stage = make_stages(torch.float32, depth=16)[0].train()
    stage.grad_checkpointing = True
    x = torch.randn(4, 10, 8, 8, requires_grad=True)
    before = find_storages()
    out = stage(x)
    kept = sum(size for place, size in find_storages().items() if place not in before)
    assert out.nbytes <= kept < 3 * out.nbytes  # all concatenations would be eight times as much


@pytest.mark.parametrize('backward', [True, False])
def test_buffer_lives_no_longer_than_it_is_needed(backward, monkeypatch):
    """It goes with the backward although the loss stays, or with the output, and not when garbage is collected."""
    storages = []
    init = dense_features._Features.__init__

    def record(self, *args):
        init(self, *args)
        storages.append(StorageWeakRef(self.buffer.untyped_storage()))

    monkeypatch.setattr(dense_features._Features, '__init__', record)
    stage, _ = make_stages()
    gc.disable()
    try:
        loss = stage(torch.randn(2, 10, 6, 5).double()).sum()
        assert len(storages) == 1 and not storages[0].expired()
        if backward:
            loss.backward()
        else:
            del loss
        assert storages[0].expired()
    finally:
        gc.enable()


@pytest.mark.parametrize('change', [
    lambda stage: stage.eval(),
    lambda stage: stage.blocks[1].norm1.eval(),
    lambda stage: stage.blocks[1].conv1.register_forward_hook(lambda *args: None),
    lambda stage: stage.blocks[2].register_forward_hook(lambda *args: None),
    lambda stage: stage.blocks[1].conv1.register_forward_pre_hook(lambda *args: None),
    lambda stage: stage.blocks[1].conv1.register_full_backward_hook(lambda *args: None),
    lambda stage: stage.blocks[1].conv1.register_full_backward_pre_hook(lambda *args: None),
    lambda stage: stage.blocks[1].conv2.register_forward_hook(lambda *args: None),
    lambda stage: stage.blocks[1].norm2.act.register_forward_hook(lambda *args: None),
    lambda stage: stage.blocks.__setitem__(1, checkpoint_wrapper(stage.blocks[1])),
    lambda stage: stage.blocks[1].__setattr__('__class__', type('Other', (DenseLayer,), {})),
    lambda stage: stage.blocks[1].compile(backend='eager'),
    lambda stage: stage.blocks[1].conv1.__setattr__('forward', stage.blocks[1].conv1.forward),  # as Accelerate does
    lambda stage: stage.blocks[1].norm1.register_parameter('weight', None),
    lambda stage: nn.utils.parametrizations.weight_norm(stage.blocks[0].conv1),
    lambda stage: stage.blocks[0].norm1.__setattr__('act', nn.SiLU()),
    lambda stage: stage.blocks[0].norm1.__setattr__('drop', nn.Dropout()),
    lambda stage: stage.blocks[0].norm1.__setattr__('eps', 1.),
    lambda stage: stage.blocks[-1].__setattr__('norm1', nn.Sequential(nn.InstanceNorm2d(22), nn.ReLU())),
    lambda stage: stage.blocks[0].__setattr__('conv1', nn.Conv2d(10, 16, 3, padding=1, bias=False)),
    lambda stage: stage.blocks[0].__setattr__('conv1', nn.Conv2d(10, 16, 1, groups=2, bias=False)),
    lambda stage: timm.utils.reparameterize_model(stage, inplace=True),
    lambda stage: stage.blocks[0].norm1.__setattr__('momentum', None),
    lambda stage: stage.bfloat16(),
    lambda stage: stage.to('meta'),
    lambda stage: nn.SyncBatchNorm.convert_sync_batchnorm(stage),
    lambda stage: timm.layers.convert_sync_batchnorm(stage),
    lambda stage: timm.layers.freeze_batch_norm_2d(stage),
])
def test_layers_that_are_not_plain_are_run_as_they_are(change):
    stage, _ = make_stages(torch.float32)
    assert can_share_features(stage.blocks, torch.randn(2, 10, 6, 5), DenseLayer)
    result = change(stage)
    stage = result if isinstance(result, DenseStage) else stage
    x = torch.randn(2, 10, 6, 5, dtype=stage.blocks[0].conv2.weight.dtype, device=stage.blocks[0].conv2.weight.device)
    assert not can_share_features(stage.blocks, x, DenseLayer)


@pytest.mark.parametrize('owner, name', [
    (torch._C, '_are_functorch_transforms_active'), (torch.autograd.forward_ad, '_current_level'),
    (torch.nn.modules.module, '_has_any_global_hook')])
def test_layers_are_run_as_they_are_where_torch_does_not_tell_who_looks_on(owner, name, monkeypatch):
    stage, _ = make_stages(torch.float32)
    monkeypatch.delattr(owner, name)
    assert not can_share_features(stage.blocks, torch.randn(2, 10, 6, 5), DenseLayer)


@pytest.mark.parametrize('ablate', [0, 1, 3])
def test_features_that_a_hook_takes_or_replaces_have_their_gradients(ablate):
    gradients = []
    for memory_efficient in (True, False):
        stage, _ = make_stages()
        stage.memory_efficient = memory_efficient
        stage.blocks[ablate].conv2.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        gradients.append(run(stage, torch.randn(2, 10, 6, 5, generator=torch.Generator().manual_seed(0)).double())[1:3])
    torch.testing.assert_close(*gradients)


def test_fused_layers_train_the_biases_they_were_given():
    stage, _ = make_stages()
    reparameterize_model(stage, inplace=True)
    run(stage.train(), torch.randn(2, 10, 6, 5).double())
    biases = [m.bias for m in stage.modules() if isinstance(m, torch.nn.Conv2d) and m.bias is not None]
    assert len(biases) == len(stage.blocks) and all(bias.grad.any() for bias in biases)


def test_empty_stages_batches_and_mixed_types_are_run_as_they_are():
    x = torch.randn(2, 10, 6, 5)
    assert torch.equal(DenseStage(10, 8, 6, 0)(x), x)
    stage, _ = make_stages(torch.float32)
    assert stage(torch.zeros(0, 10, 6, 5)).shape == (0, 34, 6, 5)
    with torch.autocast('cpu', torch.bfloat16):  # features of float32, as of a stem kept out of autocast
        stage(torch.randn(2, 10, 6, 5)).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in stage.parameters())


def test_hooks_of_all_modules_see_every_layer():
    stage, _ = make_stages(torch.float32)
    seen = set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.add(module))
    try:
        stage(torch.randn(2, 10, 6, 5))
    finally:
        hook.remove()
    assert {layer.conv1 for layer in stage.blocks} <= seen


def test_second_derivatives_need_the_plain_layers():
    stage, _ = make_stages()
    for memory_efficient in (True, False):
        stage.memory_efficient = memory_efficient
        x = torch.randn(2, 10, 6, 5).double().requires_grad_()

        def loss(x):
            return stage(x).square().sum()

        if memory_efficient:
            with pytest.raises(RuntimeError, match='create the model with memory_efficient=False'):
                torch.autograd.grad(loss(x), x, create_graph=True)
            with pytest.raises(RuntimeError, match='create the model with memory_efficient=False'):
                torch.autograd.functional.hvp(loss, x.detach(), torch.ones_like(x))
        else:
            v, step = torch.randn_like(x), 1e-6
            grads = [torch.autograd.functional.jacobian(loss, x.detach() + sign * step * v) for sign in (1, -1)]
            torch.testing.assert_close(
                torch.autograd.functional.hvp(loss, x.detach(), v)[1], (grads[0] - grads[1]) / (2 * step),
                rtol=1e-4, atol=1e-4)
    assert not timm.create_model('dn100', memory_efficient=False, device='meta').layer4.memory_efficient


@pytest.mark.parametrize(
    'memory_efficient, device, shared',
    [(None, 'cpu', True), (None, 'meta', False), (True, 'meta', True), (False, 'cpu', False)])
def test_features_are_shared_by_default_on_a_cpu_alone(monkeypatch, memory_efficient, device, shared):
    """Another device stands in for a GPU."""
    monkeypatch.setattr('timm_tmblock.models.tm_densenet.can_share_features', lambda *args: True)
    monkeypatch.setattr('timm_tmblock.models.tm_densenet.forward_shared', lambda layers, x: 'shared')
    stage = DenseStage(10, 8, 6, 2, memory_efficient, device=device)
    assert (stage(torch.randn(2, 10, 6, 5, device=device)) == 'shared') is shared


def test_one_pixel_is_refused_as_by_the_plain_layers():
    for module in make_stages():
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            module(torch.randn(1, 10, 1, 1).double())


def test_transforms_of_functions_see_the_plain_layers():
    stage, _ = make_stages()
    parameters = dict(stage.named_parameters())
    buffers = dict(stage.named_buffers())

    def loss(parameters, buffers, x):
        return torch.func.functional_call(stage, (parameters, buffers), x).square().sum()

    x = torch.randn(2, 10, 6, 5).double()
    got = torch.func.grad(loss)(parameters, {k: v.clone() for k, v in buffers.items()}, x)
    loss(parameters, buffers, x).backward()
    for name, p in stage.named_parameters():
        torch.testing.assert_close(got[name], p.grad)


def test_forward_mode_sees_the_plain_layers():
    stage, blocks = make_stages()
    x, v = torch.randn(2, 2, 10, 6, 5).double()
    found = []
    for module in (stage, blocks):
        with torch.autograd.forward_ad.dual_level():
            out = module(torch.autograd.forward_ad.make_dual(x, v))
            found.append(torch.autograd.forward_ad.unpack_dual(out).tangent.clone())
    torch.testing.assert_close(*found)


def test_traces_and_graphs_are_of_the_plain_layers():
    stage, blocks = make_stages()
    traced = torch.jit.trace(stage, torch.randn(2, 10, 6, 5).double(), check_trace=False)
    compiled = torch.compile(copy.deepcopy(stage), backend='eager', fullgraph=True)
    x = torch.randn(3, 10, 5, 4).double()
    expected = blocks(x)
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(compiled(x), expected)
