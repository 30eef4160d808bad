"""BN-ReLU as a soft maximizer: the identity of section 3.2, and mu and eta of section 4.1."""
import copy

import numpy as np
import pytest
import timm
import torch

from timm_tmblock.analysis import match_threshold, measure_maximizer, split_activations


def convolutions_after(model, x):
    """Input, activations a, output and norm of each 3x3-BN-ReLU-1x1 chain of the network, in float64."""
    records, hooks = [], []
    for block in (b for n in ('layer1', 'layer2', 'layer3', 'layer4') for b in getattr(model, n).blocks):
        hooks.append(block.conv2.register_forward_hook(
            lambda m, args, out, block=block: records.append([block, out.clone()])))
        hooks.append(block.conv3.register_forward_hook(lambda m, args, out: records[-1].append(out.clone())))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return records


@pytest.mark.parametrize('batch_size', [1, 2, 3])
def test_output_of_a_chain_is_a_scaled_mixture_of_value_vectors(trained_like, batch_size):
    """x' = eta * sum of p*_k nu_k, with p* feasible for (P1), at every pixel of every block (section 3.2)."""
    model = trained_like('rn26').double()
    records = convolutions_after(model, torch.randn(batch_size, 3, 32, 32).double())
    assert len(records) == 8
    for block, a, x_prime in records:
        mean, var = block.norm3.running_mean, block.norm3.running_var
        a_hat = (a - mean[:, None, None]) / (var + block.norm3.eps).sqrt()[:, None, None]
        p = (block.norm3.weight[:, None, None] * a_hat + block.norm3.bias[:, None, None]).clamp(min=0)
        p_star, eta = split_activations(p)
        assert (p_star >= 0).all() and eta.shape == (batch_size, 1, *p.shape[2:])
        torch.testing.assert_close(p_star.sum(1), (p > 0).any(1).double())
        values = block.conv3.weight[:, :, 0, 0]  # nu_k is column k
        torch.testing.assert_close(x_prime, eta * torch.einsum('bkhw,vk->bvhw', p_star, values))


def test_mixture_of_no_activation_is_nothing():
    p_star, eta = split_activations(torch.tensor([[[[0., 3.]], [[0., 1.]]]], dtype=torch.float16))
    assert p_star.tolist() == [[[[0., 0.75]], [[0., 0.25]]]] and eta.tolist() == [[[[0., 4.]]]]


def test_no_activation_above_its_threshold_is_the_optimum_of_p1():
    """Where all a_k are below mu_k, BN-ReLU gives 0, the solution of (P1) with these thresholds."""
    norm = timm.layers.BatchNormAct2d(6).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6, generator=generator) + 0.1)
        norm.bias.copy_(torch.randn(6, generator=generator))
        norm.running_mean.copy_(torch.randn(6, generator=generator))
        norm.running_var.copy_(torch.rand(6, generator=generator) + 0.5)
    mu = match_threshold(norm)[:, None, None]
    offsets = torch.rand(3, 6, 4, 4, generator=generator).double() + 1e-6
    with torch.no_grad():
        assert not norm(mu - offsets).any()
        assert (norm(mu + offsets) > 0).all()


@pytest.mark.parametrize('name, blocks', [('rn20', 6), ('wrn16_tm', 8)])
def test_constants_equal_loops_over_layers_and_pixels(trained_like, name, blocks):
    model = trained_like(name).train()
    batches = [torch.randn(n, 3, 32, 32) for n in (2, 1, 3)]
    constants = measure_maximizer(model, batches)
    assert model.training and len(constants.layer_mu) == len(constants.layer_eta) == blocks
    model.eval()
    modules = dict(model.named_modules())
    all_mu, all_sums = [], []
    for layer in constants.layer_mu:
        norm, seen = modules[layer], []
        norm.register_forward_hook(lambda m, args, out, seen=seen: seen.extend(out.permute(0, 2, 3, 1).flatten(0, 2)))
        model(torch.cat(batches))
        sums = [pixel.double().sum().item() for pixel in seen]
        assert constants.layer_eta[layer] == pytest.approx(np.mean(sums), rel=1e-5)
        mu = [
            mean - beta * (var + norm.eps) ** 0.5 / gamma
            for mean, beta, var, gamma in zip(*(t.tolist() for t in (
                norm.running_mean, norm.bias, norm.running_var, norm.weight)))]
        assert constants.layer_mu[layer] == pytest.approx(np.mean(mu), rel=1e-6)
        all_mu, all_sums = all_mu + mu, all_sums + sums
    assert constants.mu == pytest.approx(np.mean(all_mu)) and constants.eta == pytest.approx(np.mean(all_sums))


def test_thresholds_of_zero_and_of_dead_kernels_are_left_out(trained_like):
    model = trained_like('rn20')
    norm = model.layer1.blocks[0].norm3
    with torch.no_grad():
        norm.weight.fill_(1.)
        norm.bias.fill_(0.)
        norm.running_mean.fill_(0.)
        norm.running_mean[0], norm.running_mean[1] = 3., 5.
        norm.weight[2], norm.bias[2] = 0., 1.
    constants = measure_maximizer(model, [torch.randn(1, 3, 32, 32)])
    assert constants.layer_mu['layer1.blocks.0.norm3'] == pytest.approx(4.)


def test_constants_of_compiled_networks_and_of_frozen_and_synchronized_norms_are_the_same(trained_like):
    model, images = trained_like('rn20'), [torch.randn(2, 3, 32, 32)]
    expected = measure_maximizer(model, images)
    compiled = torch.compile(copy.deepcopy(model), backend='eager')
    with torch.inference_mode():
        compiled.eval()(images[0])
    assert measure_maximizer(compiled, images) == expected
    for change in (timm.layers.convert_sync_batchnorm, timm.layers.freeze_batch_norm_2d):
        assert measure_maximizer(change(copy.deepcopy(model)), images).layer_mu == expected.layer_mu


@pytest.mark.parametrize('name, kwargs, batches, message', [
    ('dn100', {}, 1, 'no BN-ReLU after a 3x3'),
    ('rn20', dict(act_layer='silu'), 1, 'no BN-ReLU after a 3x3'),
    ('rn20', dict(maximizer='softmax'), 1, 'no BN-ReLU after a 3x3 .*, not fused'),
    ('rn20', {}, 0, 'no images'),
    ('rn20', {}, 1, 'as before training'),
])
def test_what_cannot_be_measured_is_refused(name, kwargs, batches, message):
    with pytest.raises(ValueError, match=message):
        measure_maximizer(timm.create_model(name, **kwargs), [torch.randn(1, 3, 32, 32)] * batches)
