"""The networks against their layers written out, in float64, from section 4 of the paper."""
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import make_trained_like
from test_models import MODELS
from test_template_matching import patch_mean_loop


def reference(weights, name, x, halvings, patch_size):
    """Logits, of weights by their names."""
    def conv(key, x, stride=1, bias=None):
        w = weights[f'{key}.weight']
        return F.conv2d(x, w, bias, stride, w.shape[-1] // 2)

    def bn(key, x):
        gamma, beta, mean, var = (
            weights[f'{key}.{k}'].view(-1, 1, 1) for k in ('weight', 'bias', 'running_mean', 'running_var'))
        return ((x - mean) / (var + 1e-5).sqrt() * gamma + beta).clamp(min=0)

    def residual(key, x, stride):
        y = bn(f'{key}.norm1', x)
        shortcut = conv(f'{key}.shortcut', y, stride) if f'{key}.shortcut.weight' in weights else x
        strides = (1, stride, 1) if f'{key}.conv3.weight' in weights else (stride, 1)
        for i, s in enumerate(strides, 1):
            y = conv(f'{key}.conv{i}', y if i == 1 else bn(f'{key}.norm{i}', y), s)
        return y + shortcut

    def dense(key, x):
        y = conv(f'{key}.conv1', bn(f'{key}.norm1', x))
        return torch.cat([x, conv(f'{key}.conv2', bn(f'{key}.norm2', y))], 1)

    stages = (1, 2, 4) if name.startswith('rn20') else (1, 2, 3, 4)  # the last is always called layer4
    x = conv('conv1', x, 2 if halvings == 2 else 1)
    for stage in stages:
        if stage == 4 and 'tm.match.weight' in weights:
            a = conv('tm.match', patch_mean_loop(x, patch_size), bias=weights['tm.match.bias'])
            values = conv('tm.value', bn('tm.norm', a))
            x = conv('tm.shortcut', x) + values if 'tm.shortcut.weight' in weights else torch.cat([x, values], 1)
        first = {1: 2 if halvings else 1, 2: 2, 3: 2, 4: 2 if name.startswith('rn20') else 1}[stage]
        for i in range(sum(k.startswith(f'layer{stage}.') and k.endswith('.norm1.weight') for k in weights)):
            key = f'layer{stage}.blocks.{i}'
            x = dense(key, x) if name.startswith('dn') else residual(key, x, first if i == 0 else 1)
        if f'transition{stage}.norm.weight' in weights:
            x = F.avg_pool2d(conv(f'transition{stage}.conv', bn(f'transition{stage}.norm', x)), 2)
        elif name.startswith('dn') and stage == 3 and halvings:
            x = F.avg_pool2d(x, 2)
    return F.linear(bn('norm', x).mean((2, 3)), weights['fc.weight'], weights['fc.bias'])


@pytest.mark.parametrize('name, size, batch_size', [
    *((name, 32, batch_size) for name in MODELS for batch_size in (1, 2)),
    ('rn26_tm', 84, 3), ('dn100_tm', 84, 1), ('rn20_tm', 128, 1), ('wrn16_tm', 128, 1), ('dn100_tm_cat', 128, 1)])
def test_network_is_that_of_the_paper(name, size, batch_size):
    torch.manual_seed(0)
    model = make_trained_like(timm.create_model(name, img_size=size)).double().eval()
    x = torch.randn(batch_size, 3, size, size).double()
    with torch.no_grad():
        expected = reference(model.state_dict(), name, x, {32: 0, 84: 1, 128: 2}[size], model.patch_size)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
