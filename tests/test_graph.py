"""Steps as CUDA graphs: what is captured, with what rates, and what is not; test_gpu.py has real ones."""
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from timm_tmblock.errors import InputError
from train.graph import WARMUP_STEPS, GraphedStep


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


def test_optimizer_of_a_checkpoint_becomes_capturable(step):
    graphed, optimizer, _ = step
    assert not optimizer.param_groups[0]['capturable']
    graphed(torch.zeros(2, 3), torch.zeros(2))
    assert optimizer.param_groups[0]['capturable']


def test_optimizers_with_their_state_elsewhere_are_refused(step):
    graphed, _, _ = step
    with pytest.raises(InputError, match='--cuda-graph needs an optimizer that keeps its state on the GPU'):
        GraphedStep(graphed.step, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), torch.device('cpu'))


@pytest.mark.parametrize('error, kind, message', [
    (RuntimeError('operation not permitted when stream is capturing\nmore'), InputError, '--cuda-graph cannot be used'),
    (torch.OutOfMemoryError('no memory'), torch.OutOfMemoryError, 'no memory'),
])
def test_what_cannot_be_captured_is_told(step, error, kind, message):
    graphed, _, _ = step
    for _ in range(WARMUP_STEPS):
        graphed(torch.zeros(2, 3), torch.zeros(2))

    def fail(images, targets):
        raise error

    graphed.step = fail
    with pytest.raises(kind, match=message) as raised:
        graphed(torch.zeros(2, 3), torch.zeros(2))
    assert '\n' not in str(raised.value)
