"""Steps as CUDA graphs: what is captured, with what rates, and what is not; test_gpu.py has real ones."""
import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from timm.optim import create_optimizer_v2

from timm_tmblock.errors import InputError
from train.graph import WARMUP_STEPS, GraphedStep, set_capturable


@pytest.fixture
def step(monkeypatch):
    """A step on stand-ins for CUDA: what is captured does nothing until it is replayed."""
    log = []
    capturing = []
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.NAdam([weight], lr=0.1)

    def train(images, targets):
        rate, = (group['lr'] for group in optimizer.param_groups)
        if capturing:
            capturing[-1].work = lambda: log.append(('replay', images.clone(), targets.clone(), rate.item()))
        else:
            log.append(('eager', images.clone(), targets.clone(), rate.item()))
        return {'loss': torch.ones((), requires_grad=True) * 2}

    class Graph:
        def replay(self):
            self.work()

    @contextmanager
    def capture(graph, **kwargs):
        capturing.append(graph)
        yield
        capturing.pop()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(
            Stream=lambda device: stream, current_stream=lambda device: stream, stream=lambda s: nullcontext(),
            CUDAGraph=Graph, graph=capture).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return GraphedStep(train, optimizer, torch.device('cpu')), optimizer, log


def test_steps_are_replayed_on_their_batches_at_the_rates_of_the_schedule(step):
    graphed, optimizer, log = step
    sizes = [4] * (WARMUP_STEPS + 2) + [3, 4]
    for i, size in enumerate(sizes):
        optimizer.param_groups[0]['lr'] = 0.5 ** i
        result = graphed(torch.full((size, 3), float(i)), torch.full((size,), i))
        assert result['loss'] == 2
        assert type(optimizer.param_groups[0]['lr']) is float  # as checkpoints and logs have it
    kinds = ['eager'] * WARMUP_STEPS + ['replay'] * 2 + ['eager', 'replay']  # a smaller batch does not fit
    assert [entry[0] for entry in log] == kinds
    for i, (_, images, targets, rate) in enumerate(log):
        assert images.shape == (sizes[i], 3) and (images == i).all() and (targets == i).all() and rate == 0.5 ** i
    assert not graphed.result['loss'].requires_grad


@pytest.mark.parametrize('name', ['muon', 'nadamw', 'nadam', 'adamw', 'adam'])
def test_checkpoint_of_a_graph_goes_on_without_one(name):
    weight = torch.nn.Parameter(torch.ones(8, 8))
    bias = torch.nn.Parameter(torch.ones(8))

    def create():
        return create_optimizer_v2([weight, bias], opt=name, lr=0.1)

    def take_step(optimizer):
        weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
        optimizer.step()

    plain = create()
    take_step(plain)
    weights, state = copy.deepcopy([weight.data, bias.data]), copy.deepcopy(plain.state_dict())
    take_step(plain)
    expected = weight.detach().clone(), bias.detach().clone()
    for group in state['param_groups']:
        group['capturable'] = True

    def resume():
        weight.data.copy_(weights[0])
        bias.data.copy_(weights[1])
        resumed = create()
        resumed.load_state_dict(state)
        return resumed

    with pytest.raises((AssertionError, RuntimeError), match='capturable'):  # on the CPU
        take_step(resume())
    resumed = resume()
    set_capturable(resumed, False, torch.device('cpu'))
    take_step(resumed)
    torch.testing.assert_close((weight.detach(), bias.detach()), expected)


@pytest.mark.parametrize('agrees', [False, True])
def test_state_of_a_checkpoint_goes_to_the_device(agrees):
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.NAdam([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.param_groups[0]['capturable'] = agrees  # Accelerate may load onto another device than the flag says
    set_capturable(optimizer, True, torch.device('meta'))
    assert optimizer.param_groups[0]['capturable']
    state, = optimizer.state.values()
    assert {k: v.device.type for k, v in state.items()} == dict(
        step='meta', mu_product='meta', exp_avg='cpu', exp_avg_sq='cpu')


@pytest.mark.parametrize('name', ['sgd', 'lookahead_adam', 'lookahead_muon', 'rmsprop'])
def test_optimizers_that_cannot_be_captured_are_refused(step, name):
    graphed, _, _ = step
    optimizer = create_optimizer_v2([torch.nn.Parameter(torch.zeros(8, 8))], opt=name, lr=0.1)
    for wrapped in (optimizer, SimpleNamespace(optimizer=optimizer)):
        with pytest.raises(InputError, match='--cuda-graph needs an optimizer whose steps can be captured'):
            GraphedStep(graphed.step, wrapped, torch.device('cpu'))


@pytest.mark.parametrize('error, kind, message', [
    (RuntimeError('not permitted while capturing\nmore'), InputError, r'captured \(not permitted .*\); use --no-cuda'),
    (torch.OutOfMemoryError('no memory'), torch.OutOfMemoryError, 'no memory'),
])
def test_what_cannot_be_captured_is_told(step, monkeypatch, error, kind, message):
    graphed, _, _ = step
    for _ in range(WARMUP_STEPS):
        graphed(torch.zeros(2, 3), torch.zeros(2))

    def fail(images, targets):
        raise error

    @contextmanager
    def capture(graph, **kwargs):
        try:
            yield
        finally:  # as PyTorch's
            raise RuntimeError('operation failed due to a previous error during capture')

    monkeypatch.setattr(torch.cuda, 'graph', capture)
    graphed.step = fail
    with pytest.raises(kind, match=message) as raised:
        graphed(torch.zeros(2, 3), torch.zeros(2))
    assert '\n' not in str(raised.value)
