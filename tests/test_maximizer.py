"""The maximizers of (P1)-(P3) against a linear-program solver, float64 definitions and finite differences."""
import math

import numpy as np
import pytest
import timm
import torch
from scipy.optimize import linprog
from scipy.stats import norm
from torch.utils._python_dispatch import TorchDispatchMode

from timm_tmblock.layers import HardMaximizer, PerturbedMaximizer, SoftMaximizer
from timm_tmblock.layers import maximizer as maximizer_module

BATCHES = [1, 2, 5]


def soft_definition(a, mu, epsilon):
    """p of (P3) at one pixel in Python floats, numerator and denominator divided by their largest term."""
    top = max([mu, *a])
    terms = [math.exp(epsilon * (v - top)) for v in a]
    return [t / (math.exp(epsilon * (mu - top)) + sum(terms)) for t in terms]


@pytest.mark.parametrize('batch_size', BATCHES)
@pytest.mark.parametrize('mu', [-1., 0., 2.5])
def test_hard_maximizer_solves_the_linear_program(mu, batch_size):
    a = torch.randn(batch_size, 4, 3, 2, generator=torch.Generator().manual_seed(0)) * 2
    p = HardMaximizer(mu=mu, eta=1.)(a)
    matched = 0
    for n, i, j in np.ndindex(batch_size, 3, 2):
        scores = [mu, *a[n, :, i, j].tolist()]
        solution = linprog([-s for s in scores], A_eq=[[1.] * 5], b_eq=[1.], bounds=(0, None))
        assert solution.success
        np.testing.assert_allclose(p[n, :, i, j], solution.x[1:], atol=1e-9)
        matched += solution.x[1:].sum()
    assert 0 < matched
    assert torch.equal(HardMaximizer(mu=mu, eta=17.)(a), 17. * p)


def test_activations_at_the_threshold_do_not_match():
    assert HardMaximizer(mu=2.5)(torch.full((1, 3, 1, 1), 2.5)).sum() == 0


@pytest.mark.parametrize('batch_size', BATCHES)
@pytest.mark.parametrize('scale', [1., 30., 1e4])
@pytest.mark.parametrize('epsilon', [0.5, 1., 3.])
def test_soft_maximizer_equals_its_definition(epsilon, scale, batch_size):
    a = (torch.rand(batch_size, 5, 2, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1) * scale
    a[0, 0, 0, 0], a[0, :, 1, 1] = scale, -scale
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5 if scale < 1e3 else 5e-3)):
        out = SoftMaximizer(mu=2.5, eta=17., epsilon=epsilon)(a.to(dtype))
        assert out.dtype == dtype and out.isfinite().all()
        for n, i, j in np.ndindex(batch_size, 2, 3):
            expected = soft_definition(a[n, :, i, j].to(dtype).tolist(), 2.5, epsilon)
            np.testing.assert_allclose(out[n, :, i, j] / 17., expected, rtol=tolerance, atol=1e-30)


def test_soft_maximizer_does_not_overflow_in_half_precision():
    a = torch.tensor([900., 899., -1000., 3.]).view(1, 4, 1, 1)
    out = SoftMaximizer(mu=2.5, eta=1., epsilon=100.)(a.half())  # 100 times 900 is no number of it
    assert out.dtype == torch.half and out.flatten().tolist() == [1, 0, 0, 0]
    with torch.autocast('cpu', dtype=torch.half):
        assert SoftMaximizer(mu=2.5, eta=1., epsilon=100.)(a.half()).flatten().tolist() == [1, 0, 0, 0]


def test_soft_maximizer_solves_its_problem():
    """No other feasible point has a larger objective in (P3)."""
    generator = torch.Generator().manual_seed(2)
    a, mu, epsilon = torch.randn(4, generator=generator).double(), 0.3, 2.

    def objective(qp):
        return qp[..., 0] * mu + qp[..., 1:] @ a - torch.xlogy(qp, qp).sum(-1) / epsilon

    p = SoftMaximizer(mu, 1., epsilon)(a[None, :, None, None]).flatten()
    best = torch.cat([1 - p.sum(0, keepdim=True), p])
    others = torch.rand(10_000, 5, generator=generator).double()
    near = best + 1e-3 * (others - others.mean(-1, keepdim=True))
    for points in (others / others.sum(-1, keepdim=True), near):
        assert (points >= 0).all() and (objective(points) < objective(best)).all()


@pytest.mark.parametrize('batch_size', BATCHES)
def test_soft_jacobian_equals_finite_differences_and_autograd(batch_size):
    layer = SoftMaximizer(mu=0.5, eta=17., epsilon=1.7)
    a = torch.randn(batch_size, 4, 2, 3, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    jacobian = layer.jacobian(a)
    for i in range(4):
        step = torch.zeros_like(a)
        step[:, i] = 1e-5
        difference = (layer(a + step) - layer(a - step)) / 2e-5
        torch.testing.assert_close(jacobian[:, i], difference, rtol=1e-6, atol=1e-6)
    grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(4)).double()
    got, = torch.autograd.grad(layer(a), a, grad)
    torch.testing.assert_close(got, torch.einsum('bijhw,bjhw->bihw', jacobian, grad))


def test_perturbed_maximizer_approaches_arg_max_as_epsilon_grows():
    a = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(5)) * 2
    hard = HardMaximizer(mu=1.)(a)
    errors = []
    for epsilon in (0.5, 2., 8., 1e6):
        torch.manual_seed(0)
        errors.append((PerturbedMaximizer(mu=1., epsilon=epsilon)(a) - hard).abs().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


@pytest.mark.parametrize('epsilon', [0.5, 1., 2.])
def test_perturbed_maximizer_of_one_kernel_equals_the_normal_distribution(epsilon):
    """With one kernel p is the probability that a normal variable exceeds another, whose derivative is known."""
    torch.manual_seed(0)
    samples, mu = 200_000, 0.5
    a = torch.tensor([-1., 0.2, 0.5, 2.]).double().view(1, 1, 2, 2).requires_grad_()
    p = PerturbedMaximizer(mu, 1., epsilon, samples)(a)
    p.sum().backward()
    argument = epsilon * (a.detach().numpy() - mu) / math.sqrt(2)
    standard_error = 0.5 / math.sqrt(samples)
    np.testing.assert_allclose(p.detach(), norm.cdf(argument), atol=4 * standard_error)
    np.testing.assert_allclose(
        a.grad, epsilon / math.sqrt(2) * norm.pdf(argument), atol=4 * epsilon / math.sqrt(samples))


def test_perturbed_jacobian_equals_a_finite_difference_within_its_standard_error():
    samples, epsilon, h = 300_000, 1.3, 0.1
    layer = PerturbedMaximizer(mu=0.4, eta=17., epsilon=epsilon, num_samples=samples)

    def run(x):
        torch.manual_seed(0)
        return layer(x)

    a = torch.tensor([0.3, 0.9, -0.5]).double().view(1, 3, 1, 1).requires_grad_()
    jacobian = torch.stack([torch.autograd.grad(run(a)[0, k].sum(), a)[0].flatten() for k in range(3)], dim=1)
    differences = []
    for i in range(3):
        step = torch.zeros_like(a)
        step[0, i] = h
        differences.append(((run(a + step) - run(a - step)) / (2 * h)).detach().flatten())
    # eta epsilon sqrt(E[p z^2] / S), and for the difference eta sqrt(changed / S) / 2h with at most a tenth changed
    standard_error = 17. * math.hypot(epsilon, math.sqrt(0.1) / (2 * h)) / math.sqrt(samples)
    bias = 17. * epsilon ** 3 * h ** 2 / 6
    assert jacobian.abs().max() > 20 * standard_error
    torch.testing.assert_close(jacobian, torch.stack(differences), rtol=0, atol=4 * standard_error + bias)


@pytest.mark.parametrize('batch_size', BATCHES)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_perturbed_maximizer_is_proposition_3_1_sample_by_sample(batch_size, memory_format, monkeypatch):
    """Forward and backward from the same noise as a plain mean over samples, whatever the chunk."""
    a = torch.randn(batch_size, 4, 3, 2, generator=torch.Generator().manual_seed(6)).double()
    grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(7)).double()
    for chunk in (1, 3 * a.numel(), 2 ** 22):
        monkeypatch.setattr(maximizer_module, 'CHUNK', chunk)
        noise = []
        samples = maximizer_module._samples

        def record(*args, samples=samples, noise=noise):
            for z, matched, index in samples(*args):
                one_hot = torch.zeros(len(z), *a.shape, dtype=a.dtype)
                one_hot.scatter_(2, index.transpose(0, 1)[:, :, None], matched.transpose(0, 1)[:, :, None])
                noise.extend(zip(z.clone(), one_hot))
                yield z, matched, index

        monkeypatch.setattr(maximizer_module, '_samples', record)
        x = a.clone(memory_format=memory_format).requires_grad_()
        p = PerturbedMaximizer(mu=0.5, eta=3., epsilon=2., num_samples=7)(x)
        p.backward(grad)
        monkeypatch.setattr(maximizer_module, '_samples', samples)
        forward, backward = noise[:7], noise[7:]
        for (z, _), (z_again, _) in zip(forward, backward):
            assert torch.equal(z, z_again)
        assert not torch.equal(forward[0][0], forward[1][0])
        expected = sum(one_hot for _, one_hot in forward) / 7
        torch.testing.assert_close(p.detach(), 3. * expected)
        jacobian = sum(2. * torch.einsum('bkhw,bihw->bkihw', one_hot, z) for z, one_hot in forward) / 7
        torch.testing.assert_close(x.grad, 3. * torch.einsum('bkhw,bkihw->bihw', grad, jacobian))


def test_perturbed_maximizer_repeats_under_a_seed_and_only_then():
    layer, a = PerturbedMaximizer(num_samples=50), torch.randn(2, 4, 3, 3)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        x = a.clone().requires_grad_()
        p = layer(x)
        torch.randn(3)  # what others draw between the passes does not matter
        p.square().sum().backward()
        results.append((p.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    assert not torch.equal(layer(a), layer(a))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operator gives."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_memory_of_the_perturbed_maximizer_does_not_grow_with_samples(monkeypatch):
    monkeypatch.setattr(maximizer_module, 'CHUNK', 4096)
    used = {}
    for samples in (20, 200):
        saved = []
        x = torch.randn(2, 8, 4, 4, requires_grad=True)
        with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            PerturbedMaximizer(num_samples=samples)(x).sum().backward()
        used[samples] = (largest.numel, sum(saved))
    assert used[20] == used[200] and used[200][0] <= 4096


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_perturbed_maximizer_counts_in_float32(dtype):
    """In half precision 600 samples would stop adding up at 256 or 2048."""
    torch.manual_seed(0)
    x = torch.full((1, 1, 1, 1), 100., dtype=dtype, requires_grad=True)
    p = PerturbedMaximizer(eta=1., num_samples=5000)(x)
    assert p.dtype == dtype and p.item() == 1
    p.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize('kwargs, message', [(dict(num_samples=0), 'num_samples'), (dict(epsilon=0.), 'epsilon')])
def test_impossible_maximizers_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PerturbedMaximizer(**kwargs)


def test_perturbed_network_without_data_has_the_shapes_of_others():
    kwargs = dict(maximizer='perturbed', device='meta')
    model = timm.create_model('rn20', **kwargs)
    x = torch.empty(2, 3, 32, 32, device='meta', requires_grad=True)
    logits = model(x)
    logits.sum().backward()
    assert logits.shape == (2, 10) and logits.is_meta and x.grad.shape == x.shape


def test_perturbed_maximizer_refuses_second_derivatives():
    layer, x = PerturbedMaximizer(num_samples=3), torch.randn(1, 4, 2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match='has no second derivatives; use maximizer="softmax"'):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize('name, layer', [('softmax', SoftMaximizer), ('perturbed', PerturbedMaximizer)])
@pytest.mark.parametrize('model_name, blocks, norm', [('rn20', 6, 'norm3'), ('rn26_tm', 8, 'norm3'),
                                                      ('wrn16', 8, 'norm2')])
def test_maximizer_follows_each_3x3_convolution_inside_the_blocks(model_name, blocks, norm, name, layer):
    kwargs = dict(num_samples=3) if name == 'perturbed' else {}
    model = timm.create_model(model_name, maximizer=name, maximizer_kwargs=dict(mu=1.5, eta=9., **kwargs))
    found = {n: m for n, m in model.named_modules() if isinstance(m, layer)}
    assert len(found) == blocks and all(n.endswith(f'.{norm}') for n in found)
    assert all((m.mu, m.eta, m.epsilon) == (1.5, 9., 1.) for m in found.values())
    channels = sum(dict(timm.create_model(model_name).named_modules())[n].num_features for n in found)
    assert sum(p.numel() for p in timm.create_model(model_name).parameters()) == \
        sum(p.numel() for p in model.parameters()) + 2 * channels
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bn_relu_is_the_default():
    a, b = timm.create_model('rn20'), timm.create_model('rn20', maximizer='bn_relu')
    assert str(a) == str(b)


@pytest.mark.parametrize('kwargs, message', [
    (dict(maximizer='sparsemax'), 'one of bn_relu, softmax, perturbed'),
    (dict(maximizer_kwargs=dict(mu=1.)), 'bn_relu has no mu'),
])
def test_unknown_maximizers_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('rn20', **kwargs)


@pytest.mark.parametrize('kwargs', [{}, dict(mu=2, eta=17, epsilon=1)])
def test_soft_model_works_wherever_others_do(trained_like, kwargs):
    model = trained_like('rn20', maximizer='softmax', maximizer_kwargs=kwargs)
    x = torch.randn(3, 3, 32, 32)
    for other in (torch.jit.script(model), torch.compile(model, fullgraph=True, backend='eager'),
                  torch.fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        torch.testing.assert_close(other(x), model(x))


def test_perturbed_model_compiles_and_says_that_it_cannot_be_exported():
    model = timm.create_model('rn20', maximizer='perturbed', maximizer_kwargs=dict(num_samples=3)).eval()
    x = torch.randn(2, 3, 32, 32)
    outputs = []
    for run in (model, torch.compile(model, backend='eager')):
        torch.manual_seed(0)
        outputs.append(run(x))
    torch.testing.assert_close(*outputs)
    for trace in (torch.jit.trace, torch.export.export):
        with pytest.raises(RuntimeError, match='mean over 3 random samples drawn in each forward pass'):
            trace(model, (x,))
