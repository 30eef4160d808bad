"""Weights that come with the package: what the index says of each is so, and how they get there."""
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from export.metadata import hash_weights
from timm_tmblock.checkpoint import read_description, save_weights
from timm_tmblock.errors import InputError
from train import ship, train
from train.data import SAMPLE

ROOT = Path(__file__).parent.parent
SET = ['--dataset', f'hfds/{SAMPLE}', '--input-key', 'img']
INDEX = json.loads((ship.WEIGHTS / 'index.json').read_text())


def test_index_tells_of_every_file_and_every_tag():
    assert {path.stem for path in ship.WEIGHTS.glob('*.safetensors')} == set(INDEX)
    files = {name: timm.get_pretrained_cfg(name).file for name in timm.list_pretrained()}
    assert {name for name, file in files.items() if file and 'timm_tmblock' in str(file)} == set(INDEX)


@pytest.mark.parametrize('name', INDEX)
def test_index_says_what_the_file_is(name):
    entry, path = INDEX[name], ship.WEIGHTS / f'{name}.safetensors'
    assert entry['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry['bytes'] == path.stat().st_size
    dtypes = {str(t.dtype).removeprefix('torch.') for t in load_file(path).values() if t.is_floating_point()}
    assert dtypes == {entry['dtype']} == {ship.choose_precision(entry['top1_by_dtype'])}
    evaluation = json.loads((ROOT / entry['source'] / 'evaluation.json').read_text())
    assert evaluation['weights_sha256'] == entry['sha256'] and evaluation['images'] == entry['images']
    assert round(evaluation['top1'], 4) == entry['top1'] == entry['top1_by_dtype'][entry['dtype']]
    assert entry['dataset'] == Path(evaluation['dataset']).name  # without the place on a machine
    run = json.loads((ROOT / entry['source'] / 'result.json').read_text())
    assert run['model'] == name.partition('.')[0]


@pytest.mark.parametrize('name', INDEX)
def test_tag_has_the_preprocessing_and_classes_of_the_training(name):
    cfg = timm.get_pretrained_cfg(name)
    about = read_description(ship.WEIGHTS / f'{name}.safetensors')
    assert list(cfg.label_names) == about['label_names'] and cfg.num_classes == about['num_classes']
    assert (list(cfg.mean), list(cfg.std), list(cfg.input_size)) == (about['mean'], about['std'], about['input_size'])


@pytest.mark.parametrize('name', INDEX)
def test_analyses_and_exports_are_of_the_shipped_weights(name):
    for path in (ROOT / INDEX[name]['source'] / 'analysis').glob('*.json'):
        analysis = json.loads(path.read_text())
        assert analysis['weights_sha256'] == INDEX[name]['sha256'], path
        baseline = analysis['settings'].get('baseline')
        if baseline:
            cfg = timm.get_pretrained_cfg(baseline)
            assert analysis['baseline_sha256'] == INDEX[f'{cfg.architecture}.{cfg.tag}']['sha256'], path
    model = timm.create_model(name, pretrained=True)
    exports = list((ROOT / 'export' / 'results' / name).glob('*.json'))
    assert exports
    for path in exports:
        assert json.loads(path.read_text())['weights_sha256'] == hash_weights(model), path


def test_wheel_stays_small():
    assert sum(path.stat().st_size for path in ship.WEIGHTS.iterdir()) < 60e6


def test_values_that_float16_cannot_hold_are_told(tmp_path):
    for value, held in ((65504., True), (65536., False)):
        save_weights(tmp_path / 'a.safetensors', {'running_var': torch.tensor([value]), 'n': torch.tensor(3)}, {})
        assert ship.round_weights(tmp_path / 'a.safetensors', tmp_path / 'b.safetensors') is held


def test_float16_where_it_costs_nothing():
    assert ship.choose_precision(dict(float32=92.79, float16=92.77)) == 'float16'
    assert ship.choose_precision(dict(float32=92.79)) == 'float32'  # float16 cannot hold them
    assert ship.choose_precision(dict(float32=92.79, float16=92.76)) == 'float32'
    assert ship.choose_precision(dict(float32=92.79, float16=92.82)) == 'float32'  # not identical


@pytest.fixture(scope='module')
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    train.main([
        '--model', 'rn20_tm', '--train-split', 'train[:60]', '--max-steps', '2', '--batch-size', '20', '--val-fraction',
        '0.2', '--device', 'cpu', '--report-to', 'none', '--output', str(folder), '--experiment', 'run'])
    return folder / 'run'


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(ship, 'ROOT', tmp_path)
    monkeypatch.setattr(ship, 'WEIGHTS', tmp_path / 'weights')
    monkeypatch.setattr(ship, 'RESULTS', tmp_path / 'results')
    return tmp_path


@pytest.mark.parametrize('tolerance, dtype', [(100., torch.float16), (-1., torch.float32)])
def test_shipped_weights_are_those_of_the_run(finished_run, elsewhere, monkeypatch, tolerance, dtype):
    monkeypatch.setattr(ship, 'TOLERANCE', tolerance)
    before = elsewhere / 'results' / 'rn20_tm.sample' / 'analysis' / 'trust.json'
    before.parent.mkdir(parents=True)
    before.write_text('of other weights')
    entry = ship.main([str(finished_run), '--tag', 'sample', '--split', 'test[:20]', *SET])
    path = elsewhere / 'weights' / 'rn20_tm.sample.safetensors'
    best, shipped = load_file(finished_run / 'best.safetensors'), load_file(path)
    assert set(best) == set(shipped)
    for key, tensor in best.items():
        assert torch.equal(shipped[key], tensor.to(dtype) if tensor.is_floating_point() else tensor)
    assert json.loads((elsewhere / 'weights' / 'index.json').read_text()) == {'rn20_tm.sample': entry}
    assert entry['source'] == 'results/rn20_tm.sample' and entry['images'] == 20
    files = {p.name for p in (elsewhere / 'results' / 'rn20_tm.sample').iterdir()}
    assert files == {'args.yaml', 'result.json', 'summary.csv', 'evaluation.json', 'evaluation.png'}
    result = json.loads((elsewhere / 'results' / 'rn20_tm.sample' / 'result.json').read_text())
    assert result['best'] and str(finished_run.parent) not in json.dumps(result)
    model = timm.create_model('rn20_tm', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert model.fc.weight.dtype == torch.float32


@pytest.mark.parametrize('name', ['args.yaml', 'result.json'])
def test_unfinished_run_is_refused_and_leaves_nothing(finished_run, elsewhere, tmp_path, name):
    shutil.copytree(finished_run, tmp_path / 'half')
    (tmp_path / 'half' / name).unlink()
    with pytest.raises(InputError, match=f'half has no {name}; give the folder of a run that has finished'):
        ship.main([str(tmp_path / 'half'), '--tag', 'sample', *SET])
    assert not (elsewhere / 'weights').exists()


@pytest.mark.parametrize('flags, message', [
    ([*SET, '--split', 'nothing'], "Cannot open split 'nothing'"),
    ([], 'name it with --dataset'),
    (['--dataset', 'FOLDER', '--split', 'validation'], 'has 10 classes and .* has 2'),
])
def test_set_that_will_not_do_is_refused_and_leaves_nothing(finished_run, elsewhere, tmp_path, flags, message):
    for name in ('ant', 'bee'):
        (tmp_path / 'set' / 'validation' / name).mkdir(parents=True)
        shutil.copy(SAMPLE / 'images' / 'frog.png', tmp_path / 'set' / 'validation' / name / 'a.png')
    flags = [str(tmp_path / 'set') if flag == 'FOLDER' else flag for flag in flags]
    with pytest.raises(InputError, match=message):
        ship.main([str(finished_run), '--tag', 'sample', *flags])
    assert not (elsewhere / 'weights').exists() and not (elsewhere / 'results').exists()


@pytest.mark.parametrize('settings', [
    dict(pool=[65, 15, 20]), dict(train_split='test'), dict(val_split='test'), dict(train_split='train+test[:5]')])
def test_run_that_has_seen_the_images_is_refused(finished_run, elsewhere, tmp_path, settings):
    shutil.copytree(finished_run, tmp_path / 'run')
    path = tmp_path / 'run' / 'args.yaml'
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **settings}))
    with pytest.raises(InputError, match="trained or chosen on images of the split 'test'; name another"):
        ship.main([str(tmp_path / 'run'), '--tag', 'sample', *SET])
    assert not (elsewhere / 'weights').exists()


def test_record_of_a_stage_is_not_lost_to_the_next(finished_run, elsewhere, tmp_path):
    shutil.copytree(finished_run, tmp_path / 'next')
    path, recorded = tmp_path / 'next' / 'args.yaml', elsewhere / 'results' / 'rn20_tm.sample' / 'args.yaml'
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(dict(settings, experiment='next', initial_checkpoint='output/run/last.safetensors')))
    recorded.parent.mkdir(parents=True)
    shutil.copy(finished_run / 'args.yaml', recorded)
    with pytest.raises(InputError, match='records the run that .*next continues; rename it first, as rn20_tm_24_'):
        ship.main([str(tmp_path / 'next'), '--tag', 'sample', '--split', 'test[:20]', *SET])
    assert yaml.safe_load(recorded.read_text()) == settings and not (elsewhere / 'weights').exists()
    shutil.copy(path, recorded)  # once more the same
    ship.main([str(tmp_path / 'next'), '--tag', 'sample', '--split', 'test[:20]', *SET])


def test_arguments_that_change_how_a_network_runs_make_it_no_other(tmp_path):
    model = timm.create_model('dn100', memory_efficient=True)
    for arguments in (dict(memory_efficient=True), dict(memory_efficient=True, growth_rate=24)):
        save_weights(tmp_path / 'w.safetensors', model.state_dict(), dict(model='dn100', model_args=arguments))
        assert ship.find_own_arguments(tmp_path / 'w.safetensors') == [k for k in arguments if k == 'growth_rate']


def test_network_with_arguments_of_its_own_is_refused(finished_run, elsewhere, tmp_path):
    shutil.copytree(finished_run, tmp_path / 'run')
    path = tmp_path / 'run' / 'best.safetensors'
    save_weights(path, load_file(path), dict(read_description(path), model_args=dict(patch_size=3)))
    with pytest.raises(InputError, match='trained rn20_tm with patch_size of its own'):
        ship.main([str(tmp_path / 'run'), '--tag', 'sample', *SET])
    assert not (elsewhere / 'weights').exists()
