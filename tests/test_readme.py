"""Numbers in README and in the READMEs of the folders are those of the committed results, and their links lead on."""
import json
import re
from pathlib import Path

import pytest
import timm
import torch

import timm_tmblock  # noqa: F401  registers the models
from train.lineage import count_epochs, read_runs
from train.report import compare_maps

ROOT = Path(__file__).parent.parent
TAG = 'rn26_tm.cifar10'
PAGES = ['README.md', 'train/README.md', 'export/README.md', 'benchmarks/README.md']
TEXT, TRAIN, EXPORT, _ = ((ROOT / page).read_text() for page in PAGES)
PLAIN = ' '.join(TEXT.split())


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
        f'{cells["fp16"][1]} in fp16 and {cells["int8"][1]} in int8 ({cells["int8"][0]} MB, {cells["int8"][2]} top-1)'
    ) in PLAIN


def test_protocol_of_the_paper():
    runs = {row: read('train', 'results', 'paper', 'table1', f'{row}.cifar10.seed0', 'result.json')
            for row in ('rn26', 'rn26_aux', 'rn26_tm')}
    plain, auxiliary, ours = (f'{run["test"]["top1"]:.2f} %' for run in runs.values())
    epochs = {run['epochs'] for run in runs.values()}
    assert (
        f'`rn26` has {plain} here, `rn26` with auxiliary supervision {auxiliary} and `rn26_tm` {ours} after '
        f'{epochs.pop()} epochs') in PLAIN and not epochs


def test_halves_of_images_that_are_masked():
    found = [read('train', 'results', TAG, 'analysis', f'{name}.json') for name in ('trust', 'trust_blur')]
    assert len({trust['images'] for trust in found}) == len({trust['weights_sha256'] for trust in found}) == 1
    assert f'Of {found[0]["images"]} test images' in PLAIN
    for name in found[0]['maps']:
        cells = [f'{trust["maps"][name][key]:.1f} %' for trust in found for key in ('without_most', 'without_least')]
        assert f'\n| {name} | {" | ".join(cells)} |\n' in TEXT


def test_pixels_a_region_depends_on():
    """The extent of the gradient of one region's scores."""
    seen = []
    for name in ('rn20_tm', 'rn26_tm', 'rn38_tm', 'wrn16_tm'):
        torch.manual_seed(0)
        x = torch.randn(1, 3, 80, 80, dtype=torch.float64, requires_grad=True)
        scores = timm.create_model(name).eval().double().forward_patch_logits(x)[1]
        middle = scores.shape[2] // 2
        scores[:, :, middle, middle].abs().sum().backward()
        rows = x.grad.abs().sum((0, 1, 3)).nonzero()
        seen.append('{0}×{0}'.format(int(rows.max() - rows.min()) + 1))
    assert (
        f'depends on {seen[0]} pixels of the image in `rn20_tm`, {seen[1]} in `rn26_tm`, {seen[2]} in `rn38_tm`, '
        f'{seen[3]} in `wrn16_tm`') in PLAIN


def test_measures_by_which_a_map_is_better_than_another_images():
    better = {}
    for name in ('rn38_tm.cifar10', 'wrn16_tm.cifar10', 'dn100_tm.cifar10', 'dn100_tm.dist_cifar10'):
        maps = read('train', 'results', name, 'analysis', 'trust.json')['maps']
        better[name] = len(compare_maps(maps["another image's class map"])['better'])
        assert len(compare_maps(maps['Grad-CAM'])['worse']) == 4
    told = re.sub(r'\]\(\S+\)', '', PLAIN).replace('[', '')
    assert (
        f"map of `rn38_tm` is better than another image's on {better['rn38_tm.cifar10']} of the four measures, that of "
        f"`wrn16_tm` on {better['wrn16_tm.cifar10']}, those of `dn100_tm.cifar10` and `dn100_tm.dist_cifar10` on "
        f"{better['dn100_tm.cifar10']} (") in told and better['dn100_tm.dist_cifar10'] == better['dn100_tm.cifar10']
    other = "another image's class map"
    blurred = {name: len(compare_maps(
        read('train', 'results', name, 'analysis', 'trust_blur.json')['maps'][other])['better']) for name in (
            *better, 'rn38_tm.cifar100', 'wrn16_tm.cifar100')}
    assert list(blurred.values()) == [0, 0, 0, 0, 4, 4]
    assert "By the blurred image all four are better than another image's on 0." in PLAIN
    found = {
        name: read('train', 'results', f'{name}.cifar100', 'analysis', 'trust.json')['maps']
        for name in ('rn38_tm', 'wrn16_tm', 'dn100_tm')}
    own = [len(compare_maps(maps[other])['better']) for maps in found.values()]
    cam = [len(compare_maps(maps['Grad-CAM'])['worse']) for maps in found.values()]
    assert own[0] == own[1] and (
        f"On CIFAR-100 the maps of `rn38_tm` and `wrn16_tm` are better than another image's on {own[0]} by both masks, "
        f"that of `dn100_tm` on {own[2]} by the mean colour; Grad-CAM is better on {cam[0]}, {cam[1]} and {cam[2]}."
    ) in told


def test_what_is_said_of_the_class_map_follows_from_both_masks():
    names = ('trust', 'trust_blur')
    found = {name: read('train', 'results', TAG, 'analysis', f'{name}.json')['maps'] for name in names}
    for maps in found.values():
        for other in ('occlusion', "another image's class map"):
            assert len(compare_maps(maps[other])['better']) == 4
    for other in ('Grad-CAM', 'CAM probabilities'):
        worse = compare_maps(found['trust_blur'][other])['worse']
        assert [measure.partition(' (')[0] for measure in worse] == [
            'deletion', 'insertion', 'what is right without the more evident half']
    for name in names:
        maps = read('train', 'results', 'rn26_tm.cifar100', 'analysis', f'{name}.json')['maps']
        assert len(compare_maps(maps['CAM probabilities'])['better']) == 4
        assert abs(len(compare_maps(maps['Grad-CAM'])['better']) - len(compare_maps(maps['Grad-CAM'])['worse'])) <= 1
        for tag in ('dist_cifar10', 'dist_cifar100'):
            maps = read('train', 'results', f'rn26_tm.{tag}', 'analysis', f'{name}.json')['maps']
            assert len(compare_maps(maps["another image's class map"])['better']) == 4
            worse = [measure.partition(' (')[0] for measure in compare_maps(maps['Grad-CAM'])['worse']]
            assert worse[:3] == ['deletion', 'insertion', 'what is right without the more evident half']
            by = compare_maps(maps['occlusion'])
            assert len(by['worse']) in (2, 3, 4)
            assert len(by['better']) == ((tag, name) == ('dist_cifar10', 'trust_blur'))
    before = read('train', 'results', 'rn26_tm_37_epochs.cifar10', 'analysis', 'trust.json')['maps']['Grad-CAM']
    assert len(compare_maps(before)['worse']) == 3 and not compare_maps(before)['better']


def test_neighbours_of_regions():
    found = read('train', 'results', TAG, 'analysis', 'geometry.json')
    rates = {name: f'{100 * space["class_neighbour_rate"]:.0f} %' for name, space in found['spaces'].items()}
    assert (
        f'The share that has its class is {rates["rn26: stage 3"]} in `rn26`, {rates["rn26_tm: stage 3"]} before the '
        f'block of `rn26_tm`, {rates["rn26_tm: block output"]} after the block, and '
        f'{100 * found["chance"]["class"]:.0f} % by chance. The increase comes in with the value vectors: of the two '
        f'summands it is {rates["rn26_tm: values"]} in these and {rates["rn26_tm: shortcut"]} in the projected input. '
        f'But the mean of the input over patches, with no template, has {rates["rn26_tm: patch mean"]} too.') in PLAIN
    found = read('train', 'results', 'rn26_tm.cifar100', 'analysis', 'geometry.json')
    spaces = ('rn26.cifar100: stage 3', *(f'rn26_tm.cifar100: {name}' for name in (
        'stage 3', 'block output', 'values', 'patch mean')))
    shares = [f'{100 * found["spaces"][name]["class_neighbour_rate"]:.0f} %' for name in spaces]
    assert (
        f'the shares are {shares[0]}, {shares[1]}, {shares[2]} and, by chance, {100 * found["chance"]["class"]:.0f} %; '
        f'{shares[3]} in the value vectors and {shares[4]} in the mean over patches.') in PLAIN


def test_what_the_block_mixes():
    share = {tag: f'{100 * read("train", "results", f"rn26_tm.{tag}", "analysis", "mixing.json")["agreement"]:.0f} %'
             for tag in ('cifar10', 'cifar100', 'dist_cifar10', 'dist_cifar100')}
    assert (
        f'In {share["cifar10"]} of the regions of `rn26_tm.cifar10` and {share["cifar100"]} of those of '
        f'`rn26_tm.cifar100` the class that matches best has the largest part in the mixture too. In the `.dist_` tags '
        f'of `rn26_tm` it has it in {share["dist_cifar10"]} and {share["dist_cifar100"]}:') in PLAIN


def test_cost_of_the_block():
    cpu = ' '.join((ROOT / 'benchmarks' / 'README.md').read_text().split())
    inference, training = re.search(
        r'takes 1.00 to (1.\d+) times as long as its baseline .* and 0.97 to (1.\d+) times in training', cpu).groups()
    printed = re.findall(r'over its baseline, (\w+).*: (\S+)\n', (
        ROOT / 'benchmarks' / 'results' / 'cuda_stopped.txt').read_text())
    on_gpu = {kind: f'{max(float(x) for k, x in printed if k == kind):.2f}' for kind in ('inference', 'training')}
    assert (
        f'up to {inference} times as long as its baseline in inference on a CPU and up to {on_gpu["inference"]} times '
        f'on an H100, in training {training} and {on_gpu["training"]} times') in PLAIN


@pytest.mark.parametrize('tag', sorted(read('timm_tmblock', 'weights', 'index.json')))
def test_row_of_each_pretrained_network(tag):
    found = read('train', 'results', tag, 'evaluation.json')
    start = f'| [`{tag}`](train/results/{tag}) |'
    cells, name, recipe = re.search(rf'{re.escape(start)}(.+)\| \[(.+)\]\((.+)\) \|\n', TEXT).groups()
    regions = f'{found["patch_accuracy"]:.1f} %' if 'patch_accuracy' in found else '–'
    assert [cell.strip() for cell in cells.split('|')[:5]] == [
        str(count_epochs(tag, read_runs(ROOT / 'train' / 'results'))), f'{found["top1"]:.2f} %',
        f'{found["flip_top1"]:.2f} %', regions, f'{100 * found["ece"]:.1f} %']
    assert recipe.endswith(f'/{name}') and (ROOT / recipe).is_file()


def test_accuracy_with_and_without_the_block():
    plain, ours = (f'{read("train", "results", f"{name}.cifar10", "evaluation.json")["top1"]:.2f} %'
                   for name in ('rn26', 'rn26_tm'))
    assert f'on CIFAR-10 `rn26` has {plain} and `rn26_tm` {ours}, and of' in PLAIN
    index = read('timm_tmblock', 'weights', 'index.json')
    best = [max(entry['top1'] for tag, entry in index.items() if tag.endswith(end)) for end in ('cifar10', 'cifar100')]
    assert f'and {best[0]:.2f} % on CIFAR-10 and {best[1]:.2f} % on CIFAR-100.' in PLAIN


def test_int8_of_a_hundred_classes():
    parity = read('export', 'results', 'rn26_tm.cifar100', 'rn26_tm.int8.onnx.json')['parity']
    logits, top1 = parity['outputs']['logits'], parity['top1']
    assert (
        f'keeps {100 * logits["same_class"]:.2f} % of all classes, {100 * logits["same_class_decided"]:.2f} % of those '
        f'that are no tie, and {top1["exported"]:.2f} % top-1 of PyTorch\'s {top1["pytorch"]:.2f} %'
    ) in ' '.join(EXPORT.split())


@pytest.mark.parametrize('ours, baseline, start', [
    ('rn26_tm_13_epochs.cifar10', 'rn26_13_epochs.cifar10', '| `rn26_tm` | CIFAR-10 | 13 |'),
    ('rn26_tm_37_epochs.cifar10', 'rn26_37_epochs.cifar10', '| `rn26_tm` | CIFAR-10 | 37 |'),
    ('rn26_tm.cifar10', 'rn26.cifar10', '| `rn26_tm` | CIFAR-10 | 60 |'),
    ('rn26_tm_24_epochs.cifar100', 'rn26.cifar100', '| `rn26_tm` | CIFAR-100 | 24 |'),
    ('dn100_tm_24px.cifar10', 'dn100_24px.cifar10', '| `dn100_tm` | CIFAR-10, 24×24 pixels | 10 |'),
    ('dn100_tm_13_epochs.cifar10', 'dn100.cifar10', '| `dn100_tm` | CIFAR-10 | 13 |'),
    ('dn100_tm_cat_24px.cifar10', 'dn100_24px.cifar10', '| `dn100_tm_cat` | CIFAR-10, 24×24 pixels | 10 |'),
    ('dn100_tm_cat.cifar10', 'dn100.cifar10', '| `dn100_tm_cat` | CIFAR-10 | 13 |'),
    ('dn100_tm_24px.cifar100', 'dn100_24px.cifar100', '| `dn100_tm` | CIFAR-100, 24×24 pixels | 13 |'),
    ('dn100_tm.cifar100', 'dn100.cifar100', '| `dn100_tm` | CIFAR-100 | 19 |')])
def test_gain_over_the_baseline_as_it_was_trained_on(ours, baseline, start):
    p, q = (read('train', 'results', name, 'evaluation.json')['top1'] / 100 for name in (ours, baseline))
    gain, error = 100 * (p - q), 200 * ((p * (1 - p) + q * (1 - q)) / 10000) ** 0.5
    assert f'{start} {gain:+.2f} | {error:.2f} |\n'.replace('| -', '| −') in TEXT


def test_differences_beyond_two_standard_errors_are_counted():
    rows = re.findall(r'(?m)^\| `\w+` \| CIFAR.* \| \d+ \| (\S+) \| (\S+) \|$', TEXT)
    gains = [(float(gain.replace('−', '-')), float(errors)) for gain, errors in rows]
    above, below = (sum(sign * gain > errors for gain, errors in gains) for sign in (1, -1))
    assert (len(gains), above, below) == (10, 2, 2) and 'of [ten comparisons](#models) two are clearly' in PLAIN
    assert 'two of the differences are more than two standard errors above zero and two more than two below it' in PLAIN


def test_rates_of_exported_files():
    rows = {(name.strip(), int(batch)): f'{int(rate):,}' for name, batch, rate in re.findall(
        r'\| (.+?) \| (\d+) \|.*\| (\d+) \|', (ROOT / 'benchmarks' / 'results' / 'deployment_cpu.md').read_text())}
    ours, int8, eager = ((rows[name, 1], rows[name, 64]) for name in ('rn26_tm fp32', 'rn26_tm int8', 'eager'))
    assert (
        f'{ours[0]} images/s one at a time and {ours[1]} in batches of 64 with `rn26_tm` in float32, {int8[0]} and '
        f'{int8[1]} in int8, PyTorch {eager[0]} and {eager[1]}') in PLAIN


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
