"""Benchmarks: their pages are those of their results, and their ratios those of the rates by hand."""
import json
from pathlib import Path

import pytest

from benchmarks import deployment, speed, training

RESULTS = Path(__file__).parent.parent / 'benchmarks' / 'results'


@pytest.mark.parametrize('render, name', [
    (speed.render, 'cpu'), (deployment.to_markdown, 'deployment_cpu'), (training.render, 'training_cpu'),
    (training.render, 'training_memory_cpu')])
def test_committed_page_is_that_of_the_committed_result(render, name):
    assert render(json.loads((RESULTS / f'{name}.json').read_text())) == (RESULTS / f'{name}.md').read_text()


def test_ratios_of_deployment_are_of_rates_at_the_same_batch_size():
    rates = {('rn26_tm fp32', 1): 300., ('rn26_tm eager', 1): 100., ('rn26_tm fp32', 64): 900.,
             ('rn26_tm eager', 64): 200., ('rn26_tm int8', 64): 2700., ('rn26 fp32', 64): 945.}
    rows = [dict(name=name, batch_size=size, images_per_second=rate) for (name, size), rate in rates.items()]
    found = {ratio['ratio']: ratio['by_batch_size'] for ratio in deployment.find_ratios(rows)}
    assert found['ONNX Runtime fp32 over PyTorch eager, as created'] == {'1': 3., '64': 4.5}
    assert found['ONNX Runtime int8 over fp32'] == {'64': 3.}
    assert found['time of rn26_tm over that of rn26, fp32'] == {'64': 1.05}  # of times, so the rates change places
    assert found['ONNX Runtime fp32 over torch.compile'] == {}


def test_speed_writes_the_ratios_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', [
        'speed.py', '--only', 'maximizers', '--seconds', '0.1', '--output', str(tmp_path / 'speed')])
    speed.main()
    ratio, = json.loads((tmp_path / 'speed.json').read_text())['ratios']
    assert ratio['ratio'] == pytest.approx(ratio['numerator'] / ratio['denominator']) and ratio['rounds'] > 0
    assert f'| {ratio["ratio"]:.3f} [' in (tmp_path / 'speed.md').read_text()
    assert ratio['name'] in capsys.readouterr().err
