"""What is published lies as its sidecars say, and an engine never goes without the ONNX file it is of."""
import hashlib
import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import yaml
from conftest import can_build_rtx
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

import export.__main__ as export
from export import parity
from export.load import load
from export.onnx import OnnxOptions, export_onnx
from export.publish import _is_engine_of, add_engine, create_files, find_license
from export.push import Published
from export.tensorrt import EngineOptions, build_engine, rebuild_engine
from timm_tmblock.checkpoint import save_weights
from timm_tmblock.errors import InputError
from train import train
from train.config import parse_args
from train.files import hash_file
from train.publish import publish

ANSWER = SimpleNamespace(headers={}, request=None)
real = pytest.mark.skipif(
    not importlib.util.find_spec('tensorrt_rtx') or not can_build_rtx(),
    reason='pip install tensorrt-rtx, which takes no GPU before Ampere')


@pytest.fixture(scope='module')
def model():
    return timm.create_model('rn26_tm', pretrained=True).eval()


@pytest.fixture(scope='module')
def engines(model, images, tmp_path_factory):
    """Engines of the ONNX file that is published too, and of one that is not."""
    folder = tmp_path_factory.mktemp('engines')
    paths = []
    for name, options in (('same', OnnxOptions(patch_logits=True)), ('pixels', OnnxOptions(preprocessing='NHWC'))):
        export_onnx(model, folder / f'{name}.onnx', options, images(model, 8, 8))
        paths.append(folder / f'{name}.engine')
        build_engine(folder / f'{name}.onnx', paths[-1], EngineOptions(backend='tensorrt_rtx', batches=((1, 2, 4),)))
    return paths


def test_what_cannot_be_published_is_found_before_the_work(model, images, tmp_path):
    card = tmp_path / 'card.md'
    card.write_bytes('Görgün'.encode('latin-1'))
    with pytest.raises(InputError, match='card.md cannot be read as UTF-8'):
        create_files(tmp_path, model, 'me/net', (), (), images(model, 8, 8), card=card)
    perturbed = timm.create_model('rn20', maximizer='perturbed').eval()
    with pytest.raises(InputError, match='export a model with maximizer=softmax'):
        create_files(tmp_path, perturbed, 'me/net', (), (), images(model, 8, 8))


def test_pictures_of_a_card_of_ones_own_go_with_it(model, images, tmp_path):
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'pictures' / 'map.png').write_bytes(b'a map')
    (tmp_path / 'outside.png').write_bytes(b'no part of it')
    card = tmp_path / 'pictures' / 'CARD.md'
    card.write_text(
        '---\nlicense: mit\n---\n![a](map.png "A map") ![b](explained.png) ![c](https://a.b/c.png) ![e](no.png) '
        f'<img width=9 src="other%20map.png"> ![d](data:image/png;base64,{"A" * 999})', encoding='utf-8-sig')
    (tmp_path / 'pictures' / 'other map.png').write_bytes(b'another')
    folder = tmp_path / 'repository'
    folder.mkdir()
    files = create_files(folder, model, 'me/net', (), (), images(model, 8, 8), card=card)
    pictures = {path.name: (folder / path).read_bytes() for path in files if path.suffix == '.png'}
    ours = Path(__file__).parent.parent / 'train' / 'results' / 'rn26_tm.cifar10' / 'explained.png'
    assert pictures == {'map.png': b'a map', 'other map.png': b'another', 'explained.png': ours.read_bytes()}
    assert (folder / 'README.md').read_bytes().startswith(b'---\nlicense: mit')  # without the mark of some editors
    push = ['push', 'rn26', '--repo', 'me/net', '--dry-run', '--license', 'apache-2.0', '--card', str(card)]
    for content, message in ((b'---\nlicense: \t[mit\n---\n', 'is not YAML'), (b'\xe9', 'cannot be read as UTF-8')):
        card.write_bytes(content)
        with pytest.raises(InputError, match=message):
            export.main(push)
    card.write_text('---\nlicense: mit\n---\n![a](../outside.png)')
    with pytest.raises(InputError, match='shows ../outside.png, which is outside of its folder; put it beside'):
        create_files(tmp_path / 'other', model, 'me/net', (), (), images(model, 8, 8), card=card)


@real
def test_engines_are_published_with_the_onnx_file_they_can_be_built_from(model, engines, images, tmp_path):
    files = create_files(tmp_path, model, 'me/net', (), engines, images(model, 8, 8))
    assert sorted(files) == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob('*') if p.is_file())
    same, pixels = (next(tmp_path.glob(f'engines/*/{path.name}')) for path in engines)
    rows = [line for line in (tmp_path / 'README.md').read_text().splitlines() if line.startswith('| `engines/')]
    assert len(rows) == 2
    for row, path in zip(rows, sorted(tmp_path.glob('engines/*/*.engine'))):
        version = json.loads(Path(f'{path}.json').read_text())['engine']['version']
        assert row == (
            f'| `{path.relative_to(tmp_path)}` | fp32 | {path.stat().st_size / 1e6:.2f} | tensorrt_rtx {version} '
            f'| every GPU that TensorRT-RTX supports | 1 to 4 |')
    # one has the bytes of onnx/model.onnx, which the next push may replace
    for path, stem in ((same, 'same'), (pixels, 'pixels')):
        metadata = json.loads(Path(f'{path}.json').read_text())
        onnx = f'{stem}-{metadata["engine"]["onnx_sha256"][:8]}.onnx'
        assert metadata['file_sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
        engine = metadata['engine']
        assert engine['onnx'] == onnx and f'export tensorrt {onnx} ' in engine['command']
        source = (path.parent / onnx).read_bytes()
        assert hashlib.sha256(source).hexdigest() == engine['onnx_sha256']
        built = path.stat().st_size
        path.unlink()
        rebuild_engine(path)  # as the runtime does on a GPU of another kind
        assert abs(path.stat().st_size - built) < 0.01 * built
        assert [shape[0] for shape in engine['profiles'][0]] == [1, 2, 4]


@real
def test_engine_is_refused_without_its_onnx_file_or_of_other_weights(engines, tmp_path):
    for name in ('pixels.engine', 'pixels.engine.json'):
        shutil.copy(engines[1].with_name(name), tmp_path)
    network = json.loads(Path(f'{engines[1]}.json').read_text())
    renamed = dict(network, class_names=network['class_names'][::-1])
    (tmp_path / 'cut.engine').write_bytes(engines[1].read_bytes()[:-1])
    shutil.copy(f'{engines[1]}.json', tmp_path / 'cut.engine.json')
    for path, of, message in (
            (tmp_path / 'pixels.engine', network, r'pixels\.engine was built from .*pixels\.onnx, which is gone'),
            (tmp_path / 'cut.engine', network, r'cut\.engine does not match its sidecar: another file, or cut short'),
            (engines[0], dict(network, weights_sha256=64 * '0'), r'same\.engine was built from other weights'),
            (engines[0], renamed, r'same\.engine was built from other class names; build it again'),
            (tmp_path / 'a.onnx', network, r'a\.onnx must end in \.engine or \.plan')):
        with pytest.raises(InputError, match=message):
            add_engine(tmp_path / 'out', path, of)


def test_onnx_file_that_does_not_load_back_is_not_published(model, images, tmp_path, monkeypatch):
    def export_half(model, path, *args):
        written = export_onnx(model, path, *args)
        path.write_bytes(path.read_bytes()[:-1000])
        return written

    monkeypatch.setattr('export.publish.export_onnx', export_half)
    with pytest.raises(InputError, match='What was written does not load back: ONNX Runtime cannot load .*model.onnx'):
        create_files(tmp_path, model, 'me/net', (), (), images(model, 8, 8))


def test_file_that_fails_is_named_by_its_precision(model, images, tmp_path, monkeypatch):
    """Where it lay is gone with the folder."""
    monkeypatch.setitem(parity.LIMITS, 'fp16', parity.Limits(1e-12, 1., 1., 0., 1., 1.))
    with pytest.raises(InputError, match='^In fp16, logits differs from PyTorch .* Leave it out of --precisions.$'):
        create_files(tmp_path, model, 'me/net', ('fp16',), (), images(model, 8, 8))


@pytest.mark.parametrize('found', [
    [], {}, {'foo': 1}, {'engine': None}, {'engine': {'backend': 'tensorrt'}}])
def test_what_lies_on_the_hub_and_is_no_sidecar_of_an_engine_is_passed_over(found):
    assert not _is_engine_of(dict(weights_sha256=64 * '0'), found)


def test_name_of_the_repository_is_checked_before_the_training():
    with pytest.raises(InputError, match="'run' is not a repository name: its owner comes first, USER/run"):
        train.main(['--push-to-hub', 'run'])


@pytest.mark.parametrize('flags, message', [
    (['--model', 'resnet18'], "The model is not a network of this project; timm's onnx_export.py exports it"),
    (['--model-kwargs', 'maximizer=perturbed'], 'The model has perturbed maximizers'),
    (['--crop-mode', 'border'], "The network takes images by crop_mode 'border'"),
])
def test_network_that_cannot_be_exported_is_refused_before_the_training(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(train, 'check_push', lambda *args: None)  # without a token
    with pytest.raises(InputError, match=f'--push-to-hub cannot export this network: {message}'):
        train.main([*flags, '--epochs', '1', '--output', str(tmp_path), '--push-to-hub', 'me/net', '--workers', '0'])
    assert not list(tmp_path.rglob('*.safetensors'))


def test_network_with_auxiliary_supervision_is_pushed_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'check_push', lambda *args: None)
    monkeypatch.setattr(train, 'publish', lambda weights, args: type(load(str(weights))).__name__)
    result = train.main([
        '--model', 'rn26', '--aux-head', '--max-steps', '1', '--batch-size', '8', '--train-split', 'train[:40]',
        '--val-fraction', '0', '--output', str(tmp_path), '--push-to-hub', 'me/net', '--device', 'cpu'])
    assert result['pushed'] == 'PreActResNet'


def test_license_is_that_of_the_card_beside_the_weights(tmp_path, monkeypatch):
    assert find_license(f'local-dir:{tmp_path}') is None and find_license('rn26_tm') is None
    (tmp_path / 'README.md').write_text('---\nlicense: cc-by-nc-4.0\n---\n')
    assert find_license(f'local-dir:{tmp_path}') == 'cc-by-nc-4.0'
    (tmp_path / 'latin').mkdir()
    (tmp_path / 'latin' / 'README.md').write_bytes(b'\xe9')
    with pytest.raises(InputError, match='cannot be read .*; save it as UTF-8'):
        find_license(f'local-dir:{tmp_path}/latin')
    asked = []

    def download(repo, name, revision):
        asked.append((repo, name, revision))
        return tmp_path / 'README.md'

    monkeypatch.setattr('export.publish.hf_hub_download', download)
    assert {find_license(name) for name in ('hf-hub:a/b', 'hf_hub:a/b@v1')} == {'cc-by-nc-4.0'}
    assert asked == [('a/b', 'README.md', None), ('a/b', 'README.md', 'v1')]


@pytest.mark.parametrize('error, told', [
    (RemoteEntryNotFoundError('404', response=ANSWER), False), (HfHubHTTPError('503', response=ANSWER), True),
    (LocalEntryNotFoundError('cannot find the requested files'), True)])
def test_license_that_cannot_be_asked_for_is_not_taken_for_none(monkeypatch, error, told):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr('export.publish.hf_hub_download', fail)
    if told:
        for offline, advice in ((False, 'try again'), (True, 'unset .* "hf download a/b README.md --revision v1"')):
            monkeypatch.setattr('export.publish.HF_HUB_OFFLINE', offline)
            with pytest.raises(InputError, match=f'The card of hf-hub:a/b@v1, .* cannot be read .*; {advice}'):
                find_license('hf-hub:a/b@v1')
    else:
        assert find_license('hf-hub:a/b') is None


@pytest.mark.parametrize('flags, expected', [([], None), (['--license', 'mit'], 'mit')])
def test_weights_of_ones_own_have_the_license_one_gives_them(tmp_path, capsys, flags, expected):
    network = timm.create_model('rn26_tm', num_classes=2)
    path = tmp_path / 'weights.safetensors'
    save_weights(path, network.state_dict(), dict(model='rn26_tm', num_classes=2, label_names=['ant', 'bee']))
    export.main([
        'push', str(path), '--repo', 'me/net', '--precisions', 'fp32', '--check-images', '8', '--dry-run', *flags])
    out = capsys.readouterr().out
    assert 'onnx/model.onnx.json' in out and 'hf-hub:me/net' in out
    assert yaml.safe_load(out.partition('---\n')[2].partition('---\n')[0]).get('license') == expected


def test_next_push_of_the_same_weights_keeps_the_license_in_every_file(images, tmp_path):
    path = tmp_path / 'weights.safetensors'
    network = timm.create_model('rn26_tm', num_classes=2)
    save_weights(path, network.state_dict(), dict(model='rn26_tm', num_classes=2, label_names=['ant', 'bee']))
    card = '---\nlicense: mit\n---\n# A model\n'
    folder, found = tmp_path / 'first', []
    for published in (Published(), Published(card=card), Published(card=card, weights='of others')):
        if published.card and not published.weights:
            published = Published(card=card, weights=hash_file(str(folder / 'model.safetensors')))
        folder = tmp_path / f'push{len(found)}'
        folder.mkdir()
        model = load(str(path))
        create_files(folder, model, 'me/net', [], [], images(model, 8, 8), published=published)
        card_data = yaml.safe_load((folder / 'README.md').read_text().split('---\n')[1])
        told = json.loads((folder / 'onnx' / 'model.onnx.json').read_text())['license']
        saved = json.loads((folder / 'config.json').read_text())['pretrained_cfg'].get('license')
        assert card_data.get('license') == told == saved
        found.append(told)
    assert found == [None, 'mit', None]


def test_weights_trained_from_others_may_have_another_license(tmp_path, capsys):
    network = timm.create_model('rn26_tm', pretrained=True, num_classes=2).eval()
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    flags = ['--repo', 'me/net', '--precisions', 'fp32', '--check-images', '8', '--dry-run']
    export.main(['push', f'local-dir:{tmp_path}', *flags])
    assert 'license' not in yaml.safe_load(capsys.readouterr().out.partition('---\n')[2].partition('---\n')[0])
    flags += ['--license', 'mit']
    export.main(['push', f'local-dir:{tmp_path}', *flags])
    card = capsys.readouterr().out.partition('---\n')[2].partition('---\n')[0]
    assert yaml.safe_load(card)['license'] == 'mit'
    (tmp_path / 'card.md').write_text('---\nlicense: bsd-3-clause\n---\n# A model\n')
    with pytest.raises(InputError, match='The card names the license bsd-3-clause, not mit; change one of the two'):
        export.main(['push', f'local-dir:{tmp_path}', *flags, '--card', str(tmp_path / 'card.md')])
    timm.models.save_for_hf(timm.create_model('rn26_tm', pretrained=True), tmp_path, safe_serialization=True)
    with pytest.raises(InputError, match='has weights under apache-2.0; --license is for weights of your own'):
        export.main(['push', f'local-dir:{tmp_path}', *flags])


@pytest.mark.parametrize('name', ['Apache 2.0', 'Apache-2.0', ''])
def test_license_is_named_as_the_hub_names_it(name):
    with pytest.raises(InputError, match='is not how the Hub names a license'):
        export.main(['push', 'rn26_tm', '--repo', 'me/net', '--dry-run', '--license', name])


def test_whatever_fails_while_publishing_ends_in_one_sentence(monkeypatch, capsys, tmp_path):
    def fail(options):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('export.push.check_access', fail)
    assert publish(tmp_path / 'best.safetensors', parse_args(['--push-to-hub', 'me/net'])) is None
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and 'not pushed: OSError: [Errno 28] No space left on device. Push' in message


def test_license_of_the_shipped_weights_is_what_it_is():
    with pytest.raises(InputError, match='rn26_tm has weights under apache-2.0; --license is for weights of your own'):
        export.main(['push', 'rn26_tm', '--repo', 'me/net', '--dry-run', '--license', 'mit'])


def test_training_publishes_with_images_of_its_own_set(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv('HF_TOKEN', '')
    monkeypatch.setattr('huggingface_hub.utils._auth._get_token_from_file', lambda: None)
    args = parse_args([
        '--dataset', 'torch/cifar10', '--data-dir', str(tmp_path), '--dataset-download', '--test-split', 'validation',
        '--input-key', 'img', '--target-key', 'fine_label', '--push-to-hub', 'me/net', '--hub-private'])
    assert publish(tmp_path / 'best.safetensors', args) is None
    message = capsys.readouterr().err
    command = shlex.split(message.split('Push it with: ')[1])
    assert command[:4] == ['python', '-m', 'export', 'push'] and '--dataset-download' in command
    for flag, value in (
            ('--dataset', 'torch/cifar10'), ('--data-dir', str(tmp_path)), ('--check-split', 'validation'),
            ('--repo', 'me/net'), ('--input-key', 'img'), ('--target-key', 'fine_label')):
        assert command[command.index(flag) + 1] == value
    assert '--private' in command
