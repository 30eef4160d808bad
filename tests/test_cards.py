"""Cards tell what the committed results say, their snippets run, and a stale or broken one is refused."""
import functools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import hub_cards.card as cards
from export.onnx import OnnxOptions
from hub_cards.__main__ import main
from hub_cards.run import read_run
from timm_tmblock.errors import InputError
from train.config import parse_args
from train.lineage import count_epochs, read_runs

ROOT = Path(__file__).parent.parent
NAMES = cards.list_cards()
FULL = 'rn26_tm.cifar10'  # the card of all there can be


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The data and results of a card, where they can be spoilt."""
    data = cards.load_data(FULL)
    settings = str(Path(data['training']).with_name('args.yaml'))
    results = (data['training'], settings, data['evaluation'], cards.RATES, data['exports'], data['analysis'])
    for path in (*results, data['recipe'], 'hub_cards'):
        source, target = ROOT / path, tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    monkeypatch.setattr(cards, 'ROOT', tmp_path)
    monkeypatch.setattr(cards, 'MODELS', tmp_path / 'hub_cards' / 'models')
    return tmp_path, data


def test_cards_need_nothing_that_the_analyses_do():
    """A push installs the extras export, ort and hub."""
    code = (
        'import sys; sys.modules.update(dict.fromkeys(("scipy", "sklearn", "captum", "accelerate")))\n'
        f'import export.publish, hub_cards.card; print(hub_cards.card.render({FULL!r}))')
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and f'# {FULL}' in run.stdout, run.stderr


def test_every_pretrained_model_has_a_card_and_none_is_stale():
    import timm_tmblock  # noqa: F401
    files = {n: timm.get_pretrained_cfg(n).file for n in timm.list_pretrained('*')}
    shipped = [n for n, file in files.items() if file and 'timm_tmblock' in str(file)]
    assert NAMES == sorted(shipped)
    main(['--check'])


@pytest.mark.parametrize('name', NAMES)
def test_numbers_are_those_of_the_results(name):
    data, text = cards.load_data(name), (cards.RENDERED / f'{name}.md').read_text()
    evaluation = json.loads((ROOT / data['evaluation']).read_text())
    card = ModelCard(text)
    results = {r.metric_type: r for r in card.data.eval_results}
    assert results['accuracy'].metric_value == round(evaluation['top1'], 2)
    assert (results['accuracy'].dataset_type, results['accuracy'].dataset_split) == (data['dataset']['id'], 'test')
    assert f'Top-1 {evaluation["top1"]:.2f} %' in text
    if evaluation.get('patch_accuracy') is not None:
        assert f'Patch accuracy {evaluation["patch_accuracy"]:.1f} %' in text
    for key in data['precisions']:
        path = cards.FILES[key]
        sidecar = json.loads((ROOT / data['exports'] / f'{data["model"]}.{key}.onnx.json').read_text())
        row = next(line for line in text.splitlines() if line.startswith(f'| `{path}`'))
        parity = sidecar['parity']
        whole = parity['images'] == evaluation['images']  # accuracies of fewer images are not to be compared
        assert (f'| {parity["top1"]["exported"]:.2f} % |' in row) == whole
        assert whole or f'images of {parity["images_of"]}, for {key} {parity["images"]:,}' in text
        assert f'images of {parity["images_of"]}' in text
        assert f'| {sidecar["file_bytes"] / 1e6:.2f} |' in row
    for picture in re.findall(r'!\[[^]]*\]\(([^)]+)\)', text):
        assert picture in {f'../../{p}' for p in data['pictures'].values()}
        assert (cards.RENDERED / picture).is_file()


@pytest.mark.parametrize('keys, file', [
    (('fp32', 'bf16', 'int8'), 'onnx/model.onnx'), (('fp32', 'fp16', 'int8-tensorrt'), 'onnx/model_fp16.onnx')])
def test_tensorrt_is_told_to_build_a_file_that_is_pushed(keys, file):
    folder = ROOT / cards.load_data(FULL)['exports']
    exports = {key: json.loads((folder / f'rn26_tm.{key}.onnx.json').read_text()) for key in keys}
    assert f'python -m export tensorrt net/{file} --output model.engine' in str(cards.render(FULL, exports=exports))


@pytest.mark.parametrize('name', NAMES)
def test_front_matter_is_plain_and_complete(name):
    text = (cards.RENDERED / f'{name}.md').read_text()
    front = yaml.safe_load(text.split('---\n')[1])
    assert front['library_name'] == 'timm' and front['pipeline_tag'] == 'image-classification'
    assert front['license'] == 'apache-2.0' and front['datasets'] and 'timm' in front['tags']
    for result in front['model-index'][0]['results']:
        assert result['task']['type'] and result['dataset']['type'] and result['dataset']['name']
        for metric in result['metrics']:
            assert type(metric['value']) in (int, float) and math.isfinite(metric['value']) and metric['type']
    assert '!!python' not in text and '{{' not in text and '{%' not in text


@pytest.mark.parametrize('name', NAMES)
def test_commands_of_the_training_lead_from_one_to_the_next(name):
    text = (cards.RENDERED / f'{name}.md').read_text().partition('## Training')[2]
    commands = [shlex.split(line) for line in text.split('```')[1].replace('\\\n', ' ').strip().splitlines()]
    runs = [parse_args(command[command.index('train/train.py') + 1:]) for command in commands]
    assert commands[-1][commands[-1].index('-c') + 1] == cards.load_data(name)['recipe']
    written = [f'output/{run.experiment}/last.safetensors' for run in runs]
    assert all(file in written[:i] for i, run in enumerate(runs) for file in run.kd_checkpoint or ())
    teachers = {file for run in runs for file in run.kd_checkpoint or ()}
    stages = [len(runs) - 1]  # the last run, and before each the one it begins with
    while (start := runs[stages[0]].initial_checkpoint) in written[:stages[0]]:
        stages.insert(0, written.index(start))
    assert all(i in stages or path in teachers for i, path in enumerate(written))
    runs = [runs[i] for i in stages]
    known = read_runs(ROOT / 'train' / 'results')
    before = 0 if start is None else count_epochs(Path(start).relative_to('timm_tmblock/weights').stem, known)
    assert before + sum(run.epochs for run in runs) == count_epochs(name, known)


def test_cost_is_that_of_a_loop_over_layers():
    model = timm.create_model('rn26_tm')
    sizes, x = {}, torch.zeros(1, 3, 32, 32)
    for m in model.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)):
            m.register_forward_hook(lambda module, args, output: sizes.__setitem__(module, output.shape[1:]))
    with torch.no_grad():
        model.eval()(x)
    model.train()
    macs = sum(shape.numel() * m.weight[0].numel() for m, shape in sizes.items())
    cost = cards.measure_cost(model)
    assert model.training and cost['gmacs'] * 1e9 == pytest.approx(macs, rel=1e-9)
    assert cost['activations'] * 1e6 == pytest.approx(sum(shape.numel() for shape in sizes.values()), rel=1e-9)


KINDS = {'patches': FULL, 'none': 'rn26.cifar10'}  # cards whose snippets are run


@functools.cache
def find_snippets(name):
    text = str(cards.render(name, 'user/net'))
    return re.findall(r'```python\n(.*?)```', text, re.DOTALL), next(
        line for line in text.splitlines() if line.startswith('python net/runtime.py run net/onnx/'))


@pytest.mark.parametrize('name', NAMES)
def test_snippets_are_those_that_are_run_of_weights_that_load(name, tmp_path):
    from export.publish import save_model
    model = timm.create_model(name, pretrained=True).eval()
    assert find_snippets(name) == find_snippets(KINDS['patches' if model.has_template_matching else 'none'])
    save_model(model, tmp_path / 'net')
    x = torch.randn(2, 3, *model.pretrained_cfg['input_size'][1:])
    with torch.inference_mode():
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval()(x), model(x))


@pytest.mark.parametrize('name', KINDS.values())
def test_snippets_run(name, tmp_path, write_unchecked, forks):
    blocks, command = find_snippets(name)
    data = cards.load_data(name)
    model = timm.create_model(f'{data["model"]}.{data["tag"]}', pretrained=True).eval()
    patches = model.has_template_matching
    assert len(blocks) == (3 if patches else 2) and 'hf-hub:user/net' in blocks[0]
    assert 'import timm_tmblock' in blocks[0]  # which the process that the program is forked from has done
    from export.publish import save_model
    save_model(model, tmp_path / 'net')
    (tmp_path / 'net' / 'onnx').mkdir()
    write_unchecked(model, tmp_path / 'net' / 'onnx' / 'model.onnx', OnnxOptions(patch_logits=patches))
    image = ROOT / 'train' / 'sample' / 'images' / 'ship.png'
    shutil.copy(image, tmp_path / 'photo.jpg')
    with_timm, with_onnx = ''.join(blocks[:-1]).replace('hf-hub:user/net', f'local-dir:{tmp_path / "net"}'), blocks[-1]
    code = f'{with_timm}del image\n{with_onnx}'
    run = forks.run('-c', code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    config = timm.data.resolve_model_data_config(model)
    with Image.open(image) as picture, torch.inference_mode():
        label = model.pretrained_cfg['label_names'][model(timm.data.create_transform(**config)(picture)[None]).argmax()]
    assert label == 'ship' or data['tag'] != 'cifar10'
    shape = f' torch.Size([1, {model.num_classes}, 8, 8])' if patches else ''
    assert lines[0] == label + shape and lines[-1] == label
    if patches:
        with Image.open(tmp_path / 'explained.png') as picture:
            assert picture.width > 500
    shutil.copy(ROOT / 'export' / 'runtime.py', tmp_path / 'net')
    run = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and f'photo.jpg: {label}' in run.stdout, run.stderr


def test_card_of_weights_without_results_says_so(tmp_path):
    from timm_tmblock.checkpoint import load_model, save_weights
    model = timm.create_model('rn26', num_classes=2)
    names = ['__ant__', '<bee>']
    description = dict(model='rn26', num_classes=2, label_names=names)
    save_weights(tmp_path / 'w.safetensors', model.state_dict(), description)
    exports = {'fp32': dict(
        model='rn26', license='apache-2.0', class_names=names, outputs=[{}],
        preprocessing=dict(input_size=[3, 32, 32]), parity=dict(images=80, outputs=dict(logits=dict(same_class=1.))))}
    text = str(cards.render_plain(load_model(tmp_path / 'w.safetensors'), 'user/ants', exports))
    assert r'\_\_ant\_\_, \<bee\>' in text and 'Its accuracy was not measured' in text and 'hf-hub:user/ants' in text
    assert 'which class each region' not in text and '| `onnx/model.onnx` | fp32 | 100.00 % |' in text
    assert ModelCard(text).data.get('library_name') == 'timm'


def test_card_says_what_the_one_before_said_of_the_same_weights(tmp_path):
    name = 'rn26_tm.cifar10'
    sidecar = json.loads((cards.ROOT / 'export' / 'results' / name / 'rn26_tm.fp32.onnx.json').read_text())
    model, exports = timm.create_model('rn26_tm'), dict(fp32=sidecar)
    result = dict(
        epochs=3, images=dict(train=7), seed=0, hardware='a GPU', mixed_precision='no',
        versions=dict(torch='2', timm='1'), commit='0' * 40)
    run = dict(
        top1=71.5, top5=99.0, images=30, part='test', split='test', dataset='me/ants', dataset_id='me/ants',
        dataset_type='me/ants', started_from=None, teachers=[], result=result)
    before = cards.render_plain(model, 'me/net', exports, run)
    again = cards.render_plain(model, 'me/net', exports, None, (), str(before))
    assert str(again) == str(before) and again.data.eval_results[0].metric_value == 71.5
    edited = cards.render_plain(model, 'me/net', exports, None, (), '# By hand')
    assert 'Its accuracy was not measured' in str(edited) and edited.data.eval_results is None


@pytest.mark.parametrize('settings, test, expected, metric', [
    (dict(dataset='hfds/me/ants', test_split='test'), dict(top1=71.5, top5=100.), '30 images (me/ants: test)', 71.5),
    (dict(dataset='ants', test_split='validation'), dict(top1=71.5, top5=100.), '30 images (ants: validation)', 71.5),
    (dict(dataset='hfds/../sets/ants', test_split='test'), dict(top1=71.5, top5=100.), '30 images (ants: test)', 71.5),
    (dict(dataset='hfds/me/ants', pool=[65, 15, 20], test_split='test'), dict(top1=71.5, top5=100.),
     '30 images (me/ants: a part divided off for tests)', None),
    (dict(dataset='ants', pool=[65, 35, 0]), None, '20 images (ants: a part divided off to choose the weights)', None),
    (dict(dataset='ants'), None, '20 images (ants: held out of train, which chose the weights too)', None),
    (dict(dataset='ants', val_split='val'), None, '20 images (ants: val, which chose the weights too)', None)])
def test_card_of_a_run_tells_what_the_run_measured_and_on_which_images(tmp_path, settings, test, expected, metric):
    model = timm.create_model('rn26', num_classes=2)
    sidecar = json.loads((ROOT / 'export/results/rn26.cifar10/rn26.fp32.onnx.json').read_text())
    exports = dict(fp32=dict(sidecar, class_names=['ant', 'bee']))
    result = json.loads((ROOT / 'train/results/rn26.cifar10/result.json').read_text())
    result.update(best=dict(top1=80., top5=100.), test=test, images=dict(train=90, validation=20, test=30))
    (tmp_path / 'result.json').write_text(json.dumps(result))
    defaults = dict(train_split='train', val_split=None, test_split=None)
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**defaults, **settings}))
    card = cards.render_plain(model, 'me/net', exports, read_run(tmp_path / 'best.safetensors'))
    cards.check(str(card))
    assert f'Top-1 {71.5 if test else 80.:.2f} % on {expected}' in str(card)  # no top-5 of two classes
    assert [r.metric_value for r in card.data.eval_results or ()] == ([metric] if metric else [])
    assert card.data.get('datasets') == (['me/ants'] if settings['dataset'] == 'hfds/me/ants' else None)
    model_index = yaml.safe_load(str(card).split('---')[1]).get('model-index')
    if metric:
        kind = 'me/ants' if settings['dataset'] == 'hfds/me/ants' else 'imagefolder'
        assert model_index[0]['results'][0]['dataset']['type'] == kind
    for other in (tmp_path / 'last.safetensors', tmp_path / 'other' / 'best.safetensors', None):
        assert read_run(other) is None  # nothing was measured of those
    (tmp_path / 'result.json').write_text(json.dumps(dict(result, best=dict(top1=math.nan, top5=1.), test=None)))
    with pytest.raises(InputError, match='a card needs finite numbers'):
        cards.render_plain(model, 'me/net', exports, read_run(tmp_path / 'best.safetensors'))


@pytest.mark.parametrize('settings, told, kind', [
    (dict(dataset='torch/cifar10'), 'with seed 42, trained and', 'cifar10'),
    (dict(dataset='hfds/mnist', pretrained=True), 'with seed 42, started from the weights `rn26`, trained', 'mnist'),
    (dict(dataset='sample', initial_checkpoint='/home/me/a/last.safetensors', kd_checkpoint=['/b/t.safetensors']),
     'with seed 42, started from the weights `a/last.safetensors`, taught by `b/t.safetensors`, trained and',
     'sample'),
    (dict(dataset='sample', initial_checkpoint='../acme/best.pth.tar', kd_model_name=['local-dir:../acme/teacher']),
     'with seed 42, started from the weights `best.pth.tar`, taught by `teacher`, trained and', 'sample'),
    (dict(dataset='birds', kd_model_name=['wrn16'], kd_checkpoint=['a/last.safetensors']),
     'with seed 42, taught by `a/last.safetensors`, trained and', 'imagefolder'),
    (dict(dataset='birds', kd_model_name=['hf-hub:me/one', 'local-dir:/home/me/two']),
     'with seed 42, taught by `hf-hub:me/one` and `two`, trained and', 'imagefolder')])
def test_card_of_a_run_tells_what_it_began_with_and_who_taught_it(tmp_path, settings, told, kind):
    sidecar = json.loads((ROOT / 'export/results/rn26.cifar10/rn26.fp32.onnx.json').read_text())
    result = json.loads((ROOT / 'train/results/rn26.cifar10/result.json').read_text())
    result.update(best=None, test=dict(top1=71.5, top5=100.), images=dict(train=90, test=30))
    (tmp_path / 'result.json').write_text(json.dumps(result))
    defaults = dict(model='rn26', train_split='train', val_split=None, test_split='test')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**defaults, **settings}))
    card = str(cards.render_plain(
        timm.create_model('rn26'), 'me/net', dict(fp32=sidecar), read_run(tmp_path / 'last.safetensors')))
    cards.check(card)
    assert told in card and '/home/me' not in card
    assert yaml.safe_load(card.split('---')[1])['model-index'][0]['results'][0]['dataset']['type'] == kind


@pytest.mark.parametrize('templates', [['ant', 'bee'], ['template 0', 'template 1', 'template 2']])
def test_plain_card_says_class_of_regions_only_where_templates_are_classes(templates):
    sidecar = json.loads((ROOT / 'export/results/rn26_tm.cifar10/rn26_tm.fp32.onnx.json').read_text())
    sidecar.update(class_names=['ant', 'bee'], template_names=templates)
    text = str(cards.render_plain(timm.create_model('rn26_tm', num_classes=2), 'me/net', dict(fp32=sidecar)))
    assert ('which class each region' in text) == (len(templates) == 2)
    assert ('which template each region' in text and 'of other classes than these' in text) == (len(templates) == 3)


@pytest.mark.parametrize('repo, named', [('me/net', True), ('them/net', False)])
def test_plain_card_names_the_repository_that_weights_are_from(repo, named):
    sidecar = json.loads((ROOT / 'export/results/rn26_tm.cifar10/rn26_tm.fp32.onnx.json').read_text())
    model = timm.create_model('rn26_tm', pretrained_cfg_overlay=dict(hf_hub_id='them/net@v1'))
    card = cards.render_plain(model, repo, dict(fp32=sidecar))
    assert card.data.base_model == ('them/net' if named else None)
    assert ('The weights are those of [them/net](https://huggingface.co/them/net)' in str(card)) == named


@pytest.mark.parametrize('engines', [[], [dict(
    path='engines/a/x.engine', precision='fp16', megabytes='2.00', version='tensorrt 11', runs_on='L4', batches='1')]])
def test_cards_are_tagged_with_tensorrt_where_there_are_engines(engines):
    for card in (cards.render(FULL, engines=engines), cards.render_plain(
            timm.create_model('rn26_tm'), 'me/net', dict(fp32=json.loads((
                ROOT / 'export/results/rn26_tm.cifar10/rn26_tm.fp32.onnx.json').read_text())), engines=engines)):
        assert ('tensorrt' in card.data.tags) == bool(engines)


def spoil(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_missing_and_broken_numbers_are_refused(copied):
    root, data = copied
    cards.render(FULL)
    spoil(root / data['evaluation'], top1=float('nan'))
    with pytest.raises(InputError, match='evaluation.json.top1 is nan; a card needs finite numbers'):
        cards.render(FULL)
    spoil(root / data['evaluation'], top1=None)
    with pytest.raises(InputError, match='evaluation.json has no top1; run train/evaluate.py'):
        cards.render(FULL)
    (root / data['evaluation']).unlink()
    with pytest.raises(InputError, match='needs train/results/.*evaluation.json, which is not there'):
        cards.render(FULL)
    (root / 'hub_cards' / 'models' / f'{FULL}.yaml').write_text('notes: none\n')
    with pytest.raises(InputError, match='lacks description, recipe, precisions'):
        cards.render(FULL)
    path = root / 'hub_cards' / 'models' / 'rn26_tm.mnist.yaml'
    for more, message in (('', 'is of no dataset in DATASETS'), ('tag: x', 'yaml has tag, which its')):
        path.write_text(f'description: a\nrecipe: b\nprecisions: []\nnotes: c\n{more}\n')
        with pytest.raises(InputError, match=message):
            cards.load_data('rn26_tm.mnist')
    path.unlink()
    with pytest.raises(InputError, match="There is no card of 'nothing'"):
        cards.render('nothing')


def test_stale_card_is_found(copied):
    root, data = copied
    evaluation = json.loads((root / data['evaluation']).read_text())
    spoil(root / data['evaluation'], top1=evaluation['top1'] + 1)
    with pytest.raises(InputError, match='is stale; run python -m hub_cards and commit it'):
        main(['--check', FULL])


FRONT = 'license: mit\ntags: [a]\nmodel-index:\n- name: x\n  results:\n'
RESULT = '  - task: {type: image-classification}\n    dataset: {type: a/b, name: b}\n    metrics: [%s]\n'


@pytest.mark.parametrize('front, message', [
    (None, r'must begin with front matter: settings in YAML between two lines of ---'),
    ('just text', r'must begin with front matter'),
    ('license: [mit', r'The front matter of the card is not YAML: '),
    ('license: [mit, apache-2.0]', r"license in the front matter of the card must be text, not \['mit', "),
    ('license: mit\ntags: a', r'tags in the front matter of the card must be a list of text'),
    ('license: mit\ndatasets: [1]', r'datasets in the front matter of the card must be a list of text'),
    (FRONT + RESULT % '{type: accuracy, value: .nan}', r'front matter\.model-index\[0\].*value is nan'),
    (FRONT + RESULT % '{value: 3}', r'The model-index of the card is not as the Hub wants it: '),
])
def test_card_the_hub_would_refuse_is_one_sentence(front, message):
    text = '# A card\n' if front is None else f'---\n{front}\n---\n\n# A card\n'
    with pytest.raises(InputError, match=message) as error:
        cards.check(text)
    assert '\n' not in str(error.value)


def test_card_that_is_well_is_taken():
    cards.check(f'---\n{FRONT}{RESULT % "{type: accuracy, value: 3.5}"}---\n\n# A card\n')
    for name in NAMES:
        cards.check((cards.RENDERED / f'{name}.md').read_text())
