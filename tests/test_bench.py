"""The commands that time and test on this machine: what they report is what ran."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import export.bench
import export.selftest
from export.__main__ import main
from export.bench import Contestant, measure, name_apart
from export.onnx import OnnxOptions
from export.runtime import RuntimeInputError, load
from timm_tmblock.errors import InputError


@pytest.fixture(scope='module')
def files(write_unchecked, tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    for name, options in dict(a=OnnxOptions(), b=OnnxOptions(patch_logits=True, preprocessing='NHWC')).items():
        write_unchecked(model, folder / f'{name}.onnx', options)
    return folder


def test_every_contestant_is_called_at_every_size_and_its_times_are_its_own(monkeypatch):
    clock = [0.]
    monkeypatch.setattr(export.bench.time, 'perf_counter', lambda: clock[0])
    shapes = []

    def take(per_image):
        def call(x):
            shapes.append(x.shape)
            clock[0] += per_image * len(x)
        return call

    contestants = [Contestant(n, take(t), lambda b: np.zeros((b, 3))) for n, t in (('slow', 0.02), ('fast', 0.005))]
    rows = measure(contestants, [1, 4], seconds=3)
    assert [(r['name'], r['batch_size']) for r in rows] == [('slow', 1), ('fast', 1), ('slow', 4), ('fast', 4)]
    for row in rows:
        per_image = {'slow': 0.02, 'fast': 0.005}[row['name']]
        assert row['images_per_second'] == pytest.approx(1 / per_image)
        assert row['latency_ms']['p99'] == pytest.approx(1e3 * per_image * row['batch_size']) and row['calls'] >= 5
    assert {s[0] for s in shapes} == {1, 4}


def test_files_of_one_name_are_told_apart():
    paths = [Path(p) for p in ('a/model.onnx', 'b/model.onnx', 'a/model.onnx', 'net.onnx', 'a/model.onnx')]
    assert name_apart(paths) == ['a/model.onnx', 'b/model.onnx', 'a/model.onnx (2)', 'net.onnx', 'a/model.onnx (3)']


def test_command_writes_table_json_and_plot(files, tmp_path, capsys):
    flags = ['--batch-sizes', '1', '3', '--seconds', '0.5', '--output', str(tmp_path / 'out')]
    weights = timm.get_pretrained_cfg('rn26').file
    main(['bench', str(files / 'a.onnx'), str(files / 'b.onnx'), '--torch', weights, *flags])
    result = json.loads((tmp_path / 'out.json').read_text())
    names = [f'PyTorch CPU eager fp32, {weights}', 'ONNX Runtime CPU, a.onnx', 'ONNX Runtime CPU, b.onnx']
    assert [r['name'] for r in result['rows']] == 2 * names
    for row in result['rows']:
        latency = row['latency_ms']
        assert 0 < latency['p10'] <= latency['p50'] <= latency['p90'] <= latency['p99']
    assert {'python', 'torch', 'onnxruntime'} <= set(result['versions']) and ' thread' in result['hardware']
    table = (tmp_path / 'out.md').read_text()
    assert table.count('\n|') == 8 and table.count('**') == 4 and table.split('\n\n')[-1] in capsys.readouterr().out
    with Image.open(tmp_path / 'out.png') as picture:
        assert picture.width > 1000


@pytest.mark.parametrize('flags, on_gpu', [
    (['a.onnx'], False), (['a.onnx', 'x.engine'], True), (['a.onnx', '--device', 'cuda'], True)])
def test_report_names_the_gpu_where_something_ran_there(monkeypatch, tmp_path, flags, on_gpu):
    row = dict(name='a', batch_size=1, calls=1, latency_ms=dict(p10=1., p50=1., p90=1., p99=1.), images_per_second=1.)
    for name, stand_in in (
            ('query_gpu', lambda: dict(name='NVIDIA T4')), ('open_file', lambda *args: None),
            ('measure', lambda *args: [row]), ('draw', lambda *args: None)):
        monkeypatch.setattr(export.bench, name, stand_in)
    main(['bench', *flags, '--output', str(tmp_path / 'out')])
    hardware = json.loads((tmp_path / 'out.json').read_text())['hardware']
    assert ' thread' in hardware and hardware.startswith('NVIDIA T4, ') == on_gpu


def test_everything_has_as_many_threads_as_one_asks_for(files, monkeypatch):
    used = []
    monkeypatch.setattr(export.bench, 'load', lambda *args, **kwargs: used.append(kwargs['threads']) or load(
        *args, **kwargs))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            main(['bench', str(files / 'a.onnx'), '--threads', str(threads), '--batch-sizes', '1', '--seconds', '0.1'])
            assert used.pop() == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_compiler_that_is_missing_is_one_sentence(monkeypatch):
    def fail(graph, inputs):
        raise OSError('g++ is not there')

    compiled = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model, **_: compiled(model, backend=fail))
    with pytest.raises(InputError, match=r'torch.compile fails here \(.*g\+\+ is not there.*leave out --compile'):
        main(['bench', '--torch', 'rn20', '--compile', '--batch-sizes', '1', '--seconds', '0.1'])


@pytest.mark.parametrize('flags, message', [
    ([], 'There is nothing to time'),
    (['x.onnx', '--threads', '0'], '--threads: must be at least 1'),
    (['x.onnx', '--compile'], '--compile only applies to PyTorch networks; name some with --torch'),
    (['x.onnx', '--precision', 'fp16'], '--precision only applies to PyTorch networks; name some with --torch'),
    (['missing.onnx'], 'There is no file or folder missing.onnx'),
    (['--torch', 'rn26', '--device', 'cuda'], 'finds no GPU'),
    (['--torch', 'rn27'], "no model 'rn27'"),
    (['--torch', 'rn26', 'rn26.mini_imagenet'], 'takes images of 3x32x32 and .* of 3x84x84; time them apart'),
    (['--torch', 'rn26', '--batch-sizes', '0'], 'must be at least 1'),
])
def test_what_cannot_be_timed_is_one_sentence(flags, message):
    if 'cuda' in flags and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises((InputError, RuntimeInputError), match=message) as error:
        main(['bench', *flags])
    assert '\n' not in str(error.value)


def test_selftest_reports_every_precision(tmp_path, capsys):
    main([
        'selftest', '--seconds', '0.2', '--output', str(tmp_path / 'report'), '--calibration-images', '64',
        '--check-images', '100'])
    report = json.loads((tmp_path / 'report.json').read_text())
    rows = {(r['file'], r['step']): r for r in report['rows']}
    assert len(rows) == len(report['rows'])
    for precision in ('fp32', 'fp16', 'int8 for cpu', 'int8 for tensorrt'):
        row = rows[precision, 'ONNX Runtime']
        assert row['result'] == 'passed' and row['images_per_second']['64'] > 1
        assert row['same_class'] >= (0.93 if precision.startswith('int8') else 0.99)
    assert rows['bf16', 'ONNX Runtime']['result'] == 'compared'
    engines = {file: r for (file, step), r in rows.items() if step == 'TensorRT'}
    assert set(engines) == {'fp32', 'fp16', 'bf16', 'int8 for tensorrt'}
    if report['gpu'] is None:
        assert {r['result'] for r in engines.values()} <= {'built, not run', 'not available'}
    table = (tmp_path / 'report.md').read_text()
    assert table.count('\n|') == len(report['rows']) + 2 and table in capsys.readouterr().out


def test_selftest_fails_where_tensorrt_is_broken_not_where_it_is_missing(monkeypatch, tmp_path):
    from export.runtime import NotInstalledError, RuntimeInputError
    for error, result in ((NotInstalledError, 'not available'), (RuntimeInputError, 'failed')):
        def build(*args, error=error):
            raise error('tensorrt: a reason')
        monkeypatch.setattr(export.selftest, 'build_engine', build)
        row = export.selftest._test_engine(tmp_path / 'x.onnx', 'fp16', None, None, 'tensorrt', 1.)
        assert (row['result'], row['reason']) == (result, 'tensorrt: a reason')


def test_selftest_that_fails_says_so_and_ends_with_an_error(monkeypatch, capsys):
    real_export = export.selftest.export_onnx

    def export_onnx(model, path, options, images):
        if options.precision != 'fp32':
            raise InputError('logits differs.')
        return real_export(model, path, options, images)

    monkeypatch.setattr(export.selftest, 'export_onnx', export_onnx)
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    monkeypatch.setitem(sys.modules, 'tensorrt_rtx', None)
    with pytest.raises(InputError, match='4 of 6 steps failed, see the table'):
        main(['selftest', '--seconds', '0.2', '--check-images', '80', '--calibration-images', '64'])
    table = capsys.readouterr().out
    assert table.count('| failed |') == 4 and table.count('| not available |') == 1 and '| passed |' in table
