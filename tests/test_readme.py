"""Numbers in README and in the READMEs of the folders are those of the committed results, and their links lead on."""
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch

import export.__main__
import timm_tmblock  # noqa: F401  registers the models
import timm_tmblock.__main__ as cli
import train.analysis.__main__ as analysis
from export.parity import LIMITS
from timm_tmblock.checkpoint import save_weights
from timm_tmblock.errors import InputError
from train import evaluate, reproduce, ship, train
from train.comparison import HOLDS, UNDECIDED, Difference, compare_others
from train.config import parse_args
from train.evidence import collect
from train.lineage import count_epochs, read_runs
from train.maps import compare_maps
from train.paper import TABLE_1
from train.tables import format_scores, read_results

ROOT = Path(__file__).parent.parent
TAG = 'rn26_tm.cifar10'
PAGES = ['README.md', 'train/README.md', 'export/README.md', 'benchmarks/README.md']
TEXT, TRAIN, EXPORT, _ = ((ROOT / page).read_text() for page in PAGES)
PLAIN = ' '.join(TEXT.split())
RESULTS = (ROOT / 'RESULTS.md').read_text()
PAIRS = {c.tag: c.baseline for c in compare_others(collect(ROOT))}


def read(*parts):
    return json.loads(ROOT.joinpath(*parts).read_text())


def test_table_of_exports():
    rows = re.findall(rf'\| \[([\w-]+)\]\(results/{TAG}/(\S+)\) \|(.+)\|\n', EXPORT)
    assert [row[0] for row in rows] == ['fp32', 'fp16', 'bf16', 'int8', 'int8-tensorrt']
    for _, file, cells in rows:
        sidecar = read('export', 'results', TAG, file)
        parity = sidecar['parity']
        logits, patches = (parity['outputs'][key] for key in ('logits', 'patch_logits'))
        assert [cell.strip() for cell in cells.split('|')] == [
            f'{sidecar["file_bytes"] / 1e6:.2f}', f'{100 * logits["same_class"]:.2f} %',
            f'{parity["top1"]["exported"]:.2f} %', f'{logits["max_relative_difference"]:.1e}',
            f'{100 * patches["same_class"]:.2f} %']
    assert f'top-1 (PyTorch {parity["top1"]["pytorch"]:.2f} %)' in EXPORT
    cells = {row[0]: [cell.strip() for cell in row[2].split('|')] for row in rows}
    assert (
        f'{cells["fp16"][1]} in fp16 (emulated on a CPU) and {cells["int8"][1]} in int8 ({cells["int8"][0]} MB, '
        f'{cells["int8"][2]} top-1)'
    ) in PLAIN


def test_halves_of_images_that_are_masked():
    found = [read('train', 'results', TAG, 'analysis', f'{name}.json') for name in ('trust', 'trust_blur')]
    assert len({trust['images'] for trust in found}) == len({trust['weights_sha256'] for trust in found}) == 1
    assert f'We mask half of the regions of {found[0]["images"]} test images of CIFAR-10' in PLAIN
    assert f'({found[0]["top1"]:.1f} % without masking)' in PLAIN
    for name in found[0]['maps']:
        cells = [f'{trust["maps"][name][key]:.1f} %' for trust in found for key in ('without_most', 'without_least')]
        assert f'\n| {name} | {" | ".join(cells)} |\n' in TEXT


def test_code_of_the_readme_runs_and_gives_what_its_comments_say(tmp_path, monkeypatch):
    (tmp_path / 'train').symlink_to(ROOT / 'train')
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
    assert 'import timm, timm_tmblock ' in blocks[0]  # which is done here
    assert len(blocks) == 6 and blocks[-1].startswith('from export.runtime import load')  # of a file to be exported
    scope = dict(targets=torch.tensor([0, 4]))
    for block in blocks[:-1]:
        exec(block, scope)
        if 'forward_patch_logits' in block:
            assert scope['logits'].shape == (1, 10) and scope['patch_logits'].shape == (1, 10, 8, 8)
            scope['images'] = torch.randn(2, 3, 32, 32)
    assert (tmp_path / 'explained.png').is_file()
    (name, share), = scope['explanation'].top(1)
    assert f"# [('{name}', {share:.2f}), ...]" in TEXT
    (name, share), = scope['explainer']('train/sample/images/cat.png').top(1)
    assert f'# [("{name}", {share:.2f}), ...], (classes, 8, 8)' in TEXT
    birds = timm.create_model('local-dir:birds', pretrained=True)
    assert birds.pretrained_cfg['label_names'] == ['crow', 'owl', 'swan', 'tern', 'wren']


def test_network_of_ones_own_trains_with_the_block(monkeypatch):
    code = re.search(r'```python\n(import timm, timm_tmblock\nfrom torch import nn\n.*?)```', TRAIN, re.DOTALL)[1]
    scope = {'__name__': 'net_of_ones_own'}
    monkeypatch.setitem(sys.modules, scope['__name__'], ModuleType(scope['__name__']))
    exec(code, scope)
    task = scope['task'].train()
    network = task.get_trainable_module()
    targets = torch.tensor([0, 4, 2])
    result = task(torch.randn(3, 3, 64, 64), targets)
    logits, patch_logits = network(torch.randn(3, 3, 64, 64))
    assert logits.shape == (3, 5) and patch_logits.shape == (3, 5, 4, 4)
    assert result['loss'].item() == pytest.approx(0.5 * (result['class_loss'] + result['patch_loss']).item())
    result['loss'].backward()
    assert all(p.grad is not None for p in network.tm.parameters())
    assert network.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    explanation = timm_tmblock.explain(network, ROOT / 'train' / 'sample' / 'images' / 'ship.png')
    assert explanation.patch_classes.shape == (14, 14) and explanation.top(1)[0][0].startswith('class ')


def test_network_of_ones_own_trains_with_the_script(tmp_path, monkeypatch, fresh_accelerate):
    code = re.search(r'```python\n(import timm, timm_tmblock\nfrom torch import nn\n.*?)\ntask = ', TRAIN, re.DOTALL)[1]
    (tmp_path / 'nets_of_ones_own.py').write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ['--device-modules', 'nets_of_ones_own', '--device', 'cpu']
    result = train.main([
        *flags, '--model', 'my_net', '--img-size', '32', '--train-split', 'train[:20]', '--val-split', 'test[:10]',
        '--epochs', '1', '--batch-size', '10', '--output', str(tmp_path), '--experiment', 'run', '--report-to', 'none'])
    assert 'train_patch_loss' in result['last'] and result['test'] is None
    path = tmp_path / 'run' / 'best.safetensors'
    found = evaluate.main([str(path), '--split', 'test[:10]', *flags])
    assert found['loss'] == pytest.approx(result['best']['loss'], rel=1e-4) and 0 <= found['patch_accuracy'] <= 100
    with pytest.raises(InputError, match='--device-modules cannot be used: No module named'):
        evaluate.main([str(path), '--device-modules', 'not_a_module'])
    network = sys.modules['nets_of_ones_own'].Net(10)
    monkeypatch.setattr('timm.models.build_model_with_cfg', lambda *args, **kwargs: network)
    message = 'Net was created without the weights of .*weights.safetensors; let its function'
    with pytest.raises(InputError, match=message.replace('weights.s', 'best.s')):
        timm_tmblock.load_model(path)
    for more, said in (([], message), (['--initial-checkpoint', str(path)], message.replace('weights.s', 'best.s')),
                       (['--grad-checkpointing'], 'my_net has no method set_grad_checkpointing')):
        with pytest.raises(InputError, match=said):
            train.main([*flags, '--model', 'my_net', '--img-size', '32', '--output', str(tmp_path / 'new'), *more])


def test_layers_that_a_function_replaces_have_the_weights_of_the_file(tmp_path):
    @timm.models.register_model
    def resnet10t_with_a_head(pretrained=False, num_classes=10, **kwargs):
        model = timm.create_model('test_resnet', pretrained=pretrained, **kwargs)
        model.fc = torch.nn.Linear(model.num_features, num_classes)
        return model

    model = timm.create_model('resnet10t_with_a_head')
    path = tmp_path / 'w.safetensors'
    save_weights(path, model.state_dict(), dict(model='resnet10t_with_a_head', num_classes=10))
    loaded = timm_tmblock.load_model(path)
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


def test_pixels_a_region_depends_on():
    """The extent of the gradient of one region's scores."""
    seen = []
    for name in ('rn26_tm', 'rn38_tm', 'wrn16_tm'):
        torch.manual_seed(0)
        x = torch.randn(1, 3, 80, 80, dtype=torch.float64, requires_grad=True)
        scores = timm.create_model(name).eval().double().forward_patch_logits(x)[1]
        middle = scores.shape[2] // 2
        scores[:, :, middle, middle].abs().sum().backward()
        rows = x.grad.abs().sum((0, 1, 3)).nonzero()
        seen.append('{0}×{0}'.format(int(rows.max() - rows.min()) + 1))
    assert (
        f'depends on {seen[0]} pixels of the image in `rn26_tm`, {seen[1]} in `rn38_tm`, {seen[2]} in `wrn16_tm`'
    ) in PLAIN


INSERTION = dict(trust=[], trust_blur=['insertion'])  # of a blurred image, whatever the mask


def test_what_is_said_of_the_class_map_follows_from_both_masks():
    most, least = 'accuracy without the higher-ranked half', 'accuracy without the lower-ranked half'

    def tell(tag, mask, other):
        found = compare_maps(read('train', 'results', tag, 'analysis', f'{mask}.json'), other)
        return [[measure.partition(' (')[0] for measure in found[verdict]] for verdict in ('better', 'worse')]

    for tag in (TAG, 'rn26_tm.cifar100'):
        for mask in ('trust', 'trust_blur'):
            for other in ('random', "another image's class map"):
                assert tell(tag, mask, other) == [['deletion', *INSERTION[mask], most, least], []]
        for other in ('occlusion', 'Grad-CAM'):
            (better, worse), (better_blurred, worse_blurred) = (tell(tag, m, other) for m in ('trust', 'trust_blur'))
            assert len(better) >= len(worse) and len(better) + len(worse) <= 3
            assert len(worse_blurred) > len(better_blurred)
    for mask, counts in dict(trust=(0, 0), trust_blur=(1, 2)).items():  # and by probabilities it is the better one
        assert tuple(map(len, tell('rn26_tm.cifar100', mask, 'Grad-CAM'))) == counts
        assert tuple(map(len, tell('rn26_tm.cifar100', mask, 'CAM probabilities'))) == (3 + (mask != 'trust'), 0)
    assert '`rn26_tm.cifar100` | yes; about as well as CAM |' in TEXT
    assert (
        '`rn26_tm.cifar10` | yes; [in one test](#explain) as well as class activation maps (CAM) or slightly better, '
        'in the other less well |') in TEXT
    others = 'Grad-CAM', 'CAM probabilities', 'occlusion'
    counts = {mask: [tuple(map(len, tell(TAG, mask, other))) for other in others] for mask in ('trust', 'trust_blur')}
    assert max(counts['trust']) == (1, 0) and all(worse == 0 for _, worse in counts['trust'])
    assert set(counts['trust_blur']) == {(0, 3)}
    assert (
        'it is with the mean colour significantly worse on no measure and better on at most one of three, with the '
        'blurred mask worse on three of four and better on none') in PLAIN

    for mask in ('trust', 'trust_blur'):
        for tag in ('dist_cifar10', 'dist_cifar100'):
            assert tell(f'rn26_tm.{tag}', mask, "another image's class map") == [
                ['deletion', *INSERTION[mask], most, least], []]
            assert ['deletion', *INSERTION[mask], most] == [
                measure for measure in tell(f'rn26_tm.{tag}', mask, 'Grad-CAM')[1] if measure != least]
            better, worse = tell(f'rn26_tm.{tag}', mask, 'occlusion')
            assert not worse if tag == 'dist_cifar10' else not better and worse
    assert '`rn26_tm.dist_cifar100` | less well than CAM |' in TEXT


def test_maps_of_larger_networks_show_less_than_occlusion_and_cam():
    for name in ('rn38_tm', 'wrn16_tm', 'dn100_tm', 'dn100_tm_cat'):
        for tag in (path.name for path in (ROOT / 'hub_cards' / 'models').glob(f'{name}.*.yaml')):
            for mask in ('trust', 'trust_blur'):
                trust = read('train', 'results', tag.removesuffix('.yaml'), 'analysis', f'{mask}.json')
                for other in ('occlusion', 'Grad-CAM'):
                    found = compare_maps(trust, other)
                    margin = 1 if mask == 'trust_blur' else 0
                    assert len(found['worse']) > len(found['better']) + margin, (tag, mask, other)
    assert 'all others with template matching | less well than CAM; on CIFAR-10 little or not at all' in TEXT


def test_neighbours_of_regions():
    found = read('train', 'results', TAG, 'analysis', 'geometry.json')

    def share(space, network='rn26_tm'):
        name = next(n for n in found['spaces'] if n.startswith(network) and n.endswith(f': {space}'))
        return f'{100 * found["spaces"][name]["class_neighbour_rate"]:.0f} %'

    assert (
        f'by the features before the block of `rn26_tm` {share("stage 3")} of them are of its class, by those after it '
        f'{share("block output")}, by chance {100 * found["chance"]["class"]:.0f} %. But averaging the features over '
        f'patches, without the rest of the block, already gives {share("patch mean")} (in `rn26` '
        f'{share("patch mean", "rn26: ")};') in PLAIN


def test_what_the_block_mixes():
    index = read('timm_tmblock', 'weights', 'index.json')
    share = {tag: f'{100 * read("train", "results", tag, "analysis", "mixing.json")["agreement"]:.0f}'
             for tag in index if '_tm' in tag}
    ours = [share[f'rn26_tm.{tag}'] for tag in ('cifar10', 'cifar100', 'dist_cifar10', 'dist_cifar100')]
    others = [int(value) for tag, value in share.items() if not tag.startswith('rn26_tm.')]
    assert (
        'weight in the mixture in {} % and {} % of the regions, in the distilled `rn26_tm` in {} % and {} %, in all '
        'others in {} to {} %.').format(*ours, min(others), max(others)) in PLAIN


def test_parameters_of_each_network():
    cell = r'`(\w+)`(?: \(no weights\))? \| ([\d,]+) \|'
    rows = re.findall(rf'^\| {cell} {cell}', TEXT, re.M)
    assert len(rows) == 6
    for ours, own, baseline, theirs in rows:
        for name, told in ((ours, own), (baseline, theirs)):
            model = timm.create_model(name, device='meta')
            assert f'{sum(p.numel() for p in model.parameters()):,}' == told


def test_cost_of_the_block():
    found = read('benchmarks', 'results', 'cpu.json')['ratios']

    def span(start, name=''):
        ratios = [r['ratio'] for r in found if r['group'].startswith(start) and name in r['name']]
        return f'{min(ratios):.2f}', f'{max(ratios):.2f}'

    block = 'Template matching over its baseline'
    (low, inference), (least, training) = span(f'{block}, inference'), span(f'{block}, training step')
    cpu = ' '.join((ROOT / 'benchmarks' / 'README.md').read_text().split())
    assert (
        f'takes {low} to {inference} times as long as its baseline in inference, fused or not, and {least} to '
        f'{training} times in training') in cpu
    time, memory = (span('dn100 with memory_efficient=True over', name) for name in ('time', 'memory'))
    assert '`dn100` takes {} to {} of the time and {} to {} of the peak memory'.format(*time, *memory) in cpu
    fused = span('Fused over unfused, inference')
    assert '`fuse()` brings the time of inference to {} to {} of what it was'.format(*fused) in cpu
    above = [[r['ratio'] > r['goal'] for r in found if r['group'].startswith(f'{block}, {kind}')] for kind in (
        'inference', 'training')]
    assert f'{sum(above[0])} of {len(above[0])} comparisons in inference and one of five in training,' in cpu
    assert sum(above[1]) == 1 and len(above[1]) == 5
    printed = re.findall(r'over its baseline, (\w+).*: (\S+)\n', (
        ROOT / 'benchmarks' / 'results' / 'cuda_stopped.txt').read_text())
    missed = [sum(float(x) > goal for k, x in printed if k == kind) for kind, goal in (
        ('inference', 1.03), ('training', 1.05))]
    assert f'{missed[0]} of 15 and {({3: "three"})[missed[1]]} of four are above the goals there' in cpu
    on_gpu = {kind: f'{max(float(x) for k, x in printed if k == kind):.2f}' for kind in ('inference', 'training')}
    added = [f'{100 * (float(ratio) - 1):.0f} %' for ratio in (inference, training, *map(on_gpu.get, sorted(on_gpu)))]
    assert (
        'The block adds up to {} to inference time and {} to training time on a CPU, {} and {} on an H100'
    ).format(*added) in PLAIN


@pytest.mark.parametrize('tag', sorted(read('timm_tmblock', 'weights', 'index.json')))
def test_row_of_each_pretrained_network(tag):
    found = read('train', 'results', tag, 'evaluation.json')
    regions = f'{found["patch_accuracy"]:.1f} %' if 'patch_accuracy' in found else '–'
    epochs = count_epochs(tag, read_runs(ROOT / 'train' / 'results'))
    accuracy = [f'{found["top1"]:.2f} %', f'{found["flip_top1"]:.2f} %', regions, f'{100 * found["ece"]:.1f} %']
    start = rf'\| \[`{re.escape(tag)}`\]\(train/results/{re.escape(tag)}\)(?: \*)? \|'
    rows = {page: re.search(rf'{start}(.+)\|\n', text) for page, text in (('README', TEXT), ('RESULTS', RESULTS))}
    for page, row in rows.items():
        if row is None and page == 'README':  # which has half of them
            continue
        cells = [cell.strip() for cell in row[1].split('|')]
        recipe = cells[6] if page == 'README' else cells[7]
        name, path = re.fullmatch(r'\[(.+)\]\((.+)\)', recipe).groups()
        assert path.endswith(f'/{name}') and (ROOT / path).is_file()
        if page == 'README':
            baseline = PAIRS.get(tag)
            theirs = f'{read("train", "results", baseline, "evaluation.json")["top1"]:.2f} %' if baseline else '–'
            if tag == 'rn26_tm.cifar100':
                earlier = [read('train', 'results', name, 'evaluation.json')['top1'] for name in (
                    'rn26_tm_24_epochs.cifar100', 'rn26.cifar100')]
                theirs = '– (after 24 epochs: {1:.2f} %, and {0:.2f} % with the block)'.format(*earlier)
            assert cells[:6] == [str(epochs), accuracy[0], theirs, *accuracy[1:]]
        else:
            assert cells[1].partition(',')[0] == str(epochs) and cells[3:7] == accuracy


def test_default_weights_are_marked():
    marked = set(re.findall(r'\| \[`(\S+)`\]\(\S+\) \* \|', TEXT))
    listed = set(re.findall(r'(?m)^\| \[`(\S+)`\]', TEXT))
    rows = re.findall(r'\| \[`(\S+)`\]\(train/results/\S+\)(?: \*)? \|.+\|\n', TEXT)
    assert set(rows) == listed and len(rows) == 9  # those that are compared with the results above
    default = {f'{tag.partition(".")[0]}.{timm.get_pretrained_cfg(tag.partition(".")[0]).tag}' for tag in listed}
    assert marked == default & listed and len(marked) == 3


def test_differences_from_the_baselines():
    index = read('timm_tmblock', 'weights', 'index.json')
    best = {end: max(entry['top1'] for tag, entry in index.items() if tag.endswith(end)) for end in (
        'cifar10', 'cifar100')}
    untaught = {tag: entry['top1'] for tag, entry in index.items() if '_tm' in tag and '.dist' not in tag}
    alone = [max(top1 for tag, top1 in untaught.items() if tag.endswith(end)) for end in best]
    assert (
        'CIFAR-10 and CIFAR-100 come with the package: with the block, top-1 up to {:.2f} and {:.2f} %, or up to '
        '{:.2f} and {:.2f} % when distilled from other networks.').format(*alone, *best.values()) in PLAIN
    assert (
        f'has 95.87 % on CIFAR-10 and a DenseNet-BC-100 78.81 % on CIFAR-100: {best["cifar10"] - 95.87:.2f} points '
        f'below and '
        f'{78.81 - best["cifar100"]:.2f} above the distilled `rn26_tm`') in PLAIN
    for end, top1 in best.items():
        assert index[f'rn26_tm.dist_{end}']['top1'] == top1
    assert (
        f'`rn26_tm.cifar10` ({index["rn26_tm.cifar10"]["top1"]:.2f} %) or `rn26_tm.cifar100` '
        f'({index["rn26_tm.cifar100"]["top1"]:.2f} %)') in PLAIN
    assert 'The most accurate are `rn26_tm.dist_cifar10` and `.dist_cifar100`' in PLAIN
    taught, before = (
        index[tag]['top1'] - read('train', 'results', PAIRS[tag], 'evaluation.json')['top1']
        for tag in ('dn100_tm.dist_cifar100', 'dn100_tm.cifar100'))
    assert (
        f'is {taught:.2f} points below `dn100_tm.dist_cifar100`; without a teacher it was {before:.2f} points below'
    ) in PLAIN
    short = read('train', 'results', 'rn26_tm_24_epochs.cifar100', 'evaluation.json')['top1']
    baseline = index['rn26.cifar100']['top1']
    assert f'| 75.23 % | – (after 24 epochs: {baseline:.2f} %, and {short:.2f} % with the block) |' in TEXT
    section = RESULTS[RESULTS.index('## With and without template matching'):]
    rows = re.findall(
        r'\| \[([\w.]+)\]\(\S+\) \| \S+(?: at 24×24)? \| \d+ \| ([\d.]+) % \| \[([\w.]+)\]\(\S+\) \| ([\d.]+) % '
        r'\| (\S+) ± (\S+)( ‡)?(?: †)?( §)? \|', section)
    for ours, top1, baseline, other, difference, error, unpaired, _ in rows:
        found = [read('train', 'results', name, 'evaluation.json') for name in (ours, baseline)]
        p, q = (e['top1'] / 100 for e in found)
        expected = 100 * ((p * (1 - p) + q * (1 - q)) / 10000) ** 0.5
        if not unpaired:
            bits = [f'{int(e["right"], 16):010000b}' for e in found]
            assert [b.count('1') for b in bits] == [round(10000 * p), round(10000 * q)]
            apart = sum(a != b for a, b in zip(*bits)) / 10000
            expected = 100 * ((apart - (p - q) ** 2) / 10000) ** 0.5
        assert [f'{100 * p:.2f}', f'{100 * q:.2f}'] == [top1, other]
        assert (difference, error) == (f'{100 * (p - q):+.2f}', f'{expected:.2f}')
    alone, taught = ([row for row in rows if bool(row[-1]) == marked] for marked in (False, True))
    last = {re.sub(r'_(\d+px|\d+_epochs)\.', '.', row[0]): row for row in alone}  # of each pair, as rows are by epochs
    beyond = [sum(sign * float(row[4]) > 2 * float(row[5]) for row in last.values()) for sign in (1, -1)]
    assert (
        f'Of the {len(last)} differences after the last phase without a teacher, {beyond[0]} are more than two such '
        f'errors above zero and {beyond[1]} more than two below it') in ' '.join(section.split())
    ends = sorted(float(row[4]) for row in last.values())
    count = {6: 'six', 7: 'seven', 8: 'eight'}[len(last)]
    baselines = {4: 'four', 5: 'five', 6: 'six'}[len({row[2] for row in last.values()})]
    assert (
        f'In {count} comparisons of a network with its baseline ({baselines} baselines, trained the same way, one run '
        f'each), the difference is {ends[0]:.2f} to {ends[-1]:+.2f} points').replace('-', '−') in PLAIN
    (_, _, _, _, difference, *_), = taught
    assert f'is {difference.lstrip("+")} points below' in PLAIN


def test_table_of_the_paper_redone():
    results, scores = read_results(ROOT / 'train' / 'results' / 'paper' / 'table1')
    ours = {row: format_scores(scores[row, 'cifar10']).partition(' (')[0] for row in ('rn26', 'rn26_tm')}
    assert all(len(scores[row, 'cifar10']) == 3 for row in ('rn26', 'rn26_tm', 'wrn16', 'wrn16_tm'))
    assert (
        f'On CIFAR-10 `rn26_tm` has {ours["rn26_tm"]} % and `rn26` {ours["rn26"]} % (three runs each, ± the standard '
        f'deviation); the paper reports {TABLE_1["rn26_tm"][1]:.2f} and {TABLE_1["rn26"][1]:.2f} %') in PLAIN
    aux = format_scores(scores['rn26_aux', 'cifar10']).partition(' (')[0]
    assert f'Supervising patches without the block gives {aux} %, significantly more than `rn26` alone' in PLAIN
    assert {r['epochs'] for r in results} == {40}
    for claim in ('Template matching improves the baselines', 'It does more than auxiliary supervision alone'):
        assert f'| {claim} | 4.2, Table 1 | **undecided** |' in RESULTS

    def compare(ours, theirs, dataset='cifar10'):
        return Difference.of_runs([scores[ours, dataset]], [scores[theirs, dataset]])

    rn26, wrn16, elsewhere = (compare(f'{m}_tm', m, d) for m, d in (
        ('rn26', 'cifar10'), ('wrn16', 'cifar10'), ('rn26', 'cifar100')))
    assert (
        f'differs by (here ± is one standard error) {rn26} points for `rn26` (p = {rn26.p:.2f}) and {wrn16} for '
        f'`wrn16` (p = {wrn16.p:.2g}, not corrected for several tests) on CIFAR-10, and by {elsewhere} for `rn26` on '
        f'CIFAR-100 (two runs each)'
    ) in PLAIN.replace('−', '-')
    assert (rn26.verdict, wrn16.verdict) == (UNDECIDED, HOLDS)
    assert compare('rn26_tm', 'rn26_aux').verdict == UNDECIDED and compare('rn26_aux', 'rn26').verdict == HOLDS


def test_results_of_other_runtimes():
    rows = [r for r in read('export', 'results', 'other_runtimes.json')['rows'] if r['file'].count('.') == 1]  # float32
    found = {True: 0., False: 0.}
    for row in rows:
        by_default = row['runtime'].startswith('OpenVINO 20')
        outputs = [value for value in row.values() if isinstance(value, dict)]
        assert outputs and (by_default or all(value['same_class'] == 1 for value in outputs))
        found[by_default] = max(found[by_default], *(value['max_relative_difference'] for value in outputs))
    text = ' '.join(EXPORT.split())
    assert f'with ONNX Runtime\'s results to {found[False]:.1e} of the largest value' in text
    assert f'which differs by up to {found[True]:.1e}, unless' in text


def test_int8_of_a_hundred_classes():
    parity = read('export', 'results', 'rn26_tm.cifar100', 'rn26_tm.int8.onnx.json')['parity']
    logits, top1, limit = parity['outputs']['logits'], parity['top1'], LIMITS['int8']
    assert (
        f'keeps the class of {100 * logits["same_class"]:.2f} % of the images, '
        f'{100 * logits["same_class_decided"]:.2f} % excluding ties '
        f'({100 * (limit.decided - limit.allow(parity["images"])):.2f} % would pass: two standard errors below the '
        f'limit), and {top1["exported"]:.2f} % top-1 of PyTorch\'s {top1["pytorch"]:.2f} %'
    ) in ' '.join(EXPORT.split())


def test_rates_of_exported_files():
    rows = {(name.strip(), int(batch)): f'{int(rate):,}' for name, batch, rate in re.findall(
        r'\| (.+?) \| (\d+) \|.*\| (\d+) \|', (ROOT / 'benchmarks' / 'results' / 'deployment_cpu.md').read_text())}
    for name, told in (
            ('rn26_tm eager', 'PyTorch as created'), ('rn26_tm compiled', 'PyTorch, `torch.compile`'),
            ('rn26_tm eager, prepared', 'PyTorch, norms folded, channels_last'),
            ('rn26_tm fp32', 'ONNX Runtime, fp32'), ('rn26_tm int8', 'ONNX Runtime, int8')):
        assert f'| {told} | {rows[name, 1]} | {rows[name, 64]} |' in TEXT
    told_rates = re.findall(r'(?m)^\| `(\w+_tm\w*)`.*\| [\d,]+ \| ([\d,]+|–) \| [^|]+\|$', TEXT)
    assert len(told_rates) == 6
    for model, rate in told_rates:
        assert rate == ('–' if model == 'rn20_tm' else rows[f'{model} fp32, patch logits', 64]), model


PARSERS = {  # of what follows `python` in a command
    'train/train.py': parse_args, 'train/evaluate.py': evaluate.create_parser().parse_args,
    'train/reproduce.py': lambda words: reproduce.create_parser().parse_args(words[:[*words, '--'].index('--')]),
    'train/ship.py': ship.create_parser().parse_args, '-m train.analysis': analysis.create_parser().parse_args,
    '-m export': export.__main__.create_parser().parse_args, '-m timm_tmblock': cli.create_parser().parse_args,
    **dict.fromkeys(('runtime.py', 'net/runtime.py'), export.__main__.create_parser().parse_args)}


@pytest.mark.parametrize('page', [
    *PAGES, 'hub_cards/rendered/rn26_tm.cifar10.md', 'hub_cards/rendered/rn26.cifar10.md'])
def test_code_of_pages_is_python(page):
    text = (ROOT / page).read_text()
    for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
        compile(block, page, 'exec')


@pytest.mark.parametrize('page, least', [
    (PAGES[0], 16), (PAGES[1], 30), (PAGES[2], 14), ('hub_cards/rendered/rn26_tm.cifar10.md', 7)])
def test_commands_are_such_as_the_programs_take(page, least):
    fenced = re.findall(r'```(\w*)\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)
    blocks = [text for language, text in fenced if not language]
    found = 0
    for line in '\n'.join(blocks).replace('\\\n', ' ').splitlines():
        words = shlex.split(line.replace('RECIPE', 'train/recipes/sample/rn26_tm.yaml'), comments=True)
        for program, parse in PARSERS.items():
            start = program.split()
            at = next((i for i in range(len(words)) if words[i:i + len(start)] == start), None)
            if at is not None and '--help' not in words:
                parse(words[at + len(start):])
                found += 1
    assert found >= least


def test_version_is_that_of_the_package():
    version = timm_tmblock.__version__
    assert f'\nversion: {version}\n' in (ROOT / 'CITATION.cff').read_text()
    assert (ROOT / 'CHANGELOG.md').read_text().startswith(f'# Changelog\n\n## {version.partition(".dev")[0]} ')


def find_anchors(text):
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in re.findall(r'(?m)^#+ (.+)', text)}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    links = [link for link in re.findall(r'\]\s*\(([^)\s]+)\)', (ROOT / page).read_text()) if '://' not in link]
    for link in links:
        path, _, anchor = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists() and (not anchor or anchor in find_anchors(target.read_text())), link
    assert links


@pytest.mark.parametrize('page', PAGES)
def test_no_list_item_stands_within_a_paragraph(page):
    found = re.findall(r'\S - (?:\*\*|`--)[^\n]*', (ROOT / page).read_text())
    assert not found, found


def test_accuracies_told_beside_recipes_and_cards_are_measured():
    """Of the run itself and of others that a header or a note compares it with."""
    results = ROOT / 'train' / 'results'
    measured = {f'{read(path)["top1"]:.2f}' for path in results.glob('*/evaluation.json')}
    runs = map(read, results.glob('*/result.json'))
    known = measured | {f'{run["test"]["top1"]:.2f}' for run in runs if run.get('test')}
    recipes = [p for p in (ROOT / 'train' / 'recipes').glob('*/*.yaml') if p.parent.name not in ('paper', 'strong')]
    for path in (*recipes, *(ROOT / 'hub_cards' / 'models').glob('*.yaml')):
        text = ' '.join(path.read_text().split())
        told = {n for pair in re.findall(r'\b(\d\d\.\d\d)(?: and (\d\d\.\d\d))? %', text) for n in pair if n}
        in_bfloat16 = set(re.findall(r'\b(\d\d\.\d\d) % in bfloat16', text))
        assert told - in_bfloat16 <= measured and in_bfloat16 <= known, path
