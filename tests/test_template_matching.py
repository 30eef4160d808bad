"""The block against float64 loops written from section 3.3 of the paper."""
import itertools

import pytest
import torch
import torch.nn as nn
from conftest import make_trained_like
from timm.layers import SyncBatchNormAct, convert_sync_batchnorm

from timm_tmblock.layers import PatchMean, TemplateMatching

MAPS = [(1, 1), (1, 5), (4, 3), (8, 8), (17, 13)]


def patch_mean_loop(f: torch.Tensor, p: int) -> torch.Tensor:
    """x_g = 1 / |x_box| * sum of x in x_box, the window of offsets -(p - 1) // 2 ... p // 2 cut at the border."""
    out = torch.empty_like(f, dtype=torch.float64)
    h, w = f.shape[-2:]
    before, after = (p - 1) // 2, p // 2
    for i, j in itertools.product(range(h), range(w)):
        window = f.double()[:, :, max(i - before, 0):i + after + 1, max(j - before, 0):j + after + 1]
        out[:, :, i, j] = window.sum(dim=(2, 3)) / (window.shape[2] * window.shape[3])
    return out


def block_loop(block: TemplateMatching, f: torch.Tensor, p: int) -> tuple:
    """(a, f_out), pixel by pixel and template by template."""
    weights = {k: v.double() for k, v in block.state_dict().items()}
    alpha, beta = weights['match.weight'][:, :, 0, 0], weights['match.bias']
    x_g = patch_mean_loop(f, p)
    b, d, h, w = f.shape
    k = len(alpha)
    a = torch.empty(b, k, h, w, dtype=torch.float64)
    f_out = torch.empty(b, block.out_dim, h, w, dtype=torch.float64)
    for n, i, j in itertools.product(range(b), range(h), range(w)):
        x, mean = f[n, :, i, j].double(), x_g[n, :, i, j]
        value = torch.zeros(weights['value.weight'].shape[0], dtype=torch.float64)
        for t in range(k):
            a[n, t, i, j] = alpha[t] @ mean + beta[t]
            normalized = (a[n, t, i, j] - weights['norm.running_mean'][t]) \
                / (weights['norm.running_var'][t] + block.norm.eps).sqrt()
            p_hat = (normalized * weights['norm.weight'][t] + weights['norm.bias'][t]).clamp(min=0)
            value += p_hat * weights['value.weight'][:, t, 0, 0]
        f_out[n, :, i, j] = torch.cat([x, value]) if block.shortcut is None \
            else weights['shortcut.weight'][:, :, 0, 0] @ x + value
    return a, f_out


@pytest.mark.parametrize('size', MAPS)
@pytest.mark.parametrize('patch_size', range(1, 9))
def test_patch_mean_equals_loop(patch_size, size):
    for batch_size in (1, 2, 3):
        x = torch.randn(batch_size, 3, *size, dtype=torch.float64)
        expected = patch_mean_loop(x, patch_size)
        torch.testing.assert_close(PatchMean(patch_size)(x), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(PatchMean(patch_size)(x.float()).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('patch_size', [3, 4])
def test_gradient_of_patch_mean_is_pooled_channels_first_off_the_cpu(patch_size):
    x = torch.empty(2, 6, 8, 8, device='meta', requires_grad=True).to(memory_format=torch.channels_last)
    node = PatchMean(patch_size)(x).grad_fn
    while type(node).__name__ != 'AvgPool2DBackward0':
        node = node.next_functions[0][0]
    assert node._saved_self.is_contiguous()
    pooled = PatchMean(3)(x.detach())  # where no gradient is asked for, as it comes
    assert pooled.is_contiguous(memory_format=torch.channels_last)


def test_even_patch_reaches_right_and_down():
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 3, 3] = 12.
    reached = PatchMean(4)(x)[0, 0].nonzero().tolist()
    assert reached == [[i, j] for i in (1, 2, 3, 4) for j in (1, 2, 3, 4)]


@pytest.mark.parametrize('size', MAPS)
@pytest.mark.parametrize('patch_size', [1, 4, 5])
@pytest.mark.parametrize('concat, num_templates', [(False, 3), (True, 3), (False, 9)], ids=['add', 'concat', 'K>D'])
def test_block_equals_loop(concat, num_templates, patch_size, size):
    torch.manual_seed(patch_size)
    block = TemplateMatching(
        5, num_templates, patch_size, value_dim=7 if concat else None, concat=concat, dtype=torch.float64)
    make_trained_like(block).eval()
    f = torch.randn(2 if size == (4, 3) else 1, 5, *size, dtype=torch.float64)
    a, f_out = block_loop(block, f, patch_size)
    torch.testing.assert_close(block.patch_logits(f), a, rtol=0, atol=1e-12)
    torch.testing.assert_close(block(f), f_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(block(f, return_patch_logits=True), (f_out, a), rtol=0, atol=1e-12)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        block.to(dtype)
        for output, expected in ((block.patch_logits(f.to(dtype)), a), (block(f.to(dtype)), f_out)):
            tolerance = 40 * torch.finfo(dtype).eps * max(1., expected.abs().max().item())
            torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('patch_size', [3, 4])
@pytest.mark.parametrize('num_templates', [3, 9])
def test_matching_before_and_after_the_mean_agree(num_templates, patch_size):
    block = make_trained_like(TemplateMatching(5, num_templates, patch_size, dtype=torch.float64))
    f = torch.randn(3, 5, 6, 7, dtype=torch.float64)
    mean_first = block.match(block.patch_mean(f))
    match_first = block.patch_mean(block.match(f))
    torch.testing.assert_close(mean_first, match_first, rtol=0, atol=1e-12)
    torch.testing.assert_close(block.patch_logits(f), mean_first, rtol=0, atol=1e-12)


@pytest.mark.parametrize('num_templates', [3, 9])
def test_mean_is_taken_of_fewer_channels(num_templates):
    block = TemplateMatching(5, num_templates)
    seen = []
    block.patch_mean.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    block(torch.randn(1, 5, 8, 8))
    assert seen == [min(5, num_templates)]


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('concat', [False, True], ids=['add', 'concat'])
@pytest.mark.parametrize('patch_size', [1, 4, 5])
def test_gradients_equal_finite_differences(patch_size, concat, training):
    torch.manual_seed(0)
    block = make_trained_like(TemplateMatching(3, 2, patch_size, concat=concat, dtype=torch.float64)).train(training)
    block.norm.track_running_stats = not training  # finite differences need the same statistics at each call
    names = [n for n, _ in block.named_parameters()]
    f = torch.randn(3, 3, 4, 3, dtype=torch.float64, requires_grad=True)

    def function(f, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters)), f)

    assert torch.autograd.gradcheck(function, (f, *block.parameters()), atol=1e-7)


def test_concat_keeps_the_input_first():
    block = TemplateMatching(5, 3, value_dim=7, concat=True)
    f = torch.randn(2, 5, 4, 4)
    out = block(f)
    assert out.shape == (2, 12, 4, 4) and block.out_dim == 12
    assert torch.equal(out[:, :5], f)


def test_factory_device_and_dtype_reach_every_tensor():
    block = TemplateMatching(5, 3, device='meta', dtype=torch.float16)
    floating = [t for t in block.state_dict().values() if t.is_floating_point()]
    assert all(t.dtype == torch.float16 for t in floating)
    assert all(t.device.type == 'meta' for t in block.state_dict().values())


def test_reset_templates_keeps_device_dtype_and_mode_and_is_to_be_trained():
    block = TemplateMatching(5, 3, device='meta', dtype=torch.float64).eval().requires_grad_(False)
    with pytest.raises(ValueError, match='at least 1, got 0'):
        block.reset_templates(0)
    assert block.num_templates == 3
    block.reset_templates(4)
    assert block.match.out_channels == block.value.in_channels == block.norm.num_features == 4
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {('meta', torch.float64)}
    frozen = {name for name, p in block.named_parameters() if not p.requires_grad}
    assert frozen == {'shortcut.weight'}  # as timm's reset_classifier leaves the rest frozen
    assert not any(m.training for m in block.modules())


def test_new_templates_of_a_synchronized_norm_are_synchronized():
    block = convert_sync_batchnorm(TemplateMatching(5, 3), process_group='group').eval()
    block.reset_templates(4)
    assert isinstance(block.norm, SyncBatchNormAct) and block.norm.num_features == 4
    assert block.norm.process_group == 'group' and not block.norm.training and isinstance(block.norm.act, nn.ReLU)


@pytest.mark.parametrize('arguments', [
    dict(dim=5, num_templates=0), dict(dim=5, num_templates=3, patch_size=0), dict(dim=5, num_templates=3, value_dim=6),
])
def test_impossible_blocks_are_refused(arguments):
    with pytest.raises(ValueError, match='must'):
        TemplateMatching(**arguments)
