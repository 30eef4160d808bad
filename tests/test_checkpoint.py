"""Weight files: what was saved, the same bytes each time."""
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from timm_tmblock.checkpoint import read_description, save_weights


@pytest.fixture
def weights():
    torch.manual_seed(0)
    half, transposed = torch.randn(7).half(), torch.randn(4, 2).t()
    return {'b.weight': torch.randn(3, 5), 'a': half, 'n': torch.tensor(3), 'c.t': transposed}


@pytest.mark.parametrize('description', [{}, dict(model='rn26_tm', label_names=['Bär', 'a "b"'], mean=[0.1])])
def test_file_gives_back_what_was_saved(weights, tmp_path, description):
    path = tmp_path / 'weights.safetensors'
    save_weights(path, weights, description)
    loaded = load_file(path)
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert read_description(path) == description
    with safe_open(path, framework='pt') as f:
        assert f.metadata() == {'format': 'pt', 'timm_tmblock': json.dumps(description)}


def test_same_weights_are_the_same_file(weights, tmp_path):
    """safetensors itself would write one of two orders, by chance."""
    files = []
    for i in range(16):
        save_weights(tmp_path / f'{i}.safetensors', weights, dict(model='rn26_tm'))
        files.append((tmp_path / f'{i}.safetensors').read_bytes())
    assert len(set(files)) == 1
    assert int.from_bytes(files[0][:8], 'little') % 8 == 0
