#!/usr/bin/env python3
"""Which names of TensorRT's Python interface the project uses, and which versions have them.

    python export/tensorrt_names.py                     # writes export/results/tensorrt_names.json and .md
    python export/tensorrt_names.py --check tensorrt    # looks for the names in an installed module

The first needs pip, a network, gcc and readelf.

No machine has every version, and the full ones need a GPU to be tried. Their bindings are published by themselves,
though, and a name that is missing there fails wherever it is used. The versions' wheels are downloaded, each imported
in a process of its own beside empty libraries in place of TensorRT's, and asked for every name.

A name is found in the sources of `export/` as an attribute of `trt` or of a variable in VARIABLES.
"""
import argparse
import ast
import importlib
import json
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional

ROOT = Path(__file__).resolve().parent
SOURCES = ('tensorrt.py', 'runtime.py')
RESULT = ROOT / 'results' / 'tensorrt_names'
VARIABLES = dict(
    builder='Builder', network='INetworkDefinition', parser='OnnxParser', error='ParserError', config='IBuilderConfig',
    profile='IOptimizationProfile', runtime='Runtime', engine='ICudaEngine', context='IExecutionContext',
    tensor='ITensor', t='ITensor', timed='ITimingCache', settings='IRuntimeConfig')
BINDINGS = {
    '10.0': ('tensorrt_cu12_bindings', '10.0.1'),
    '10.16': ('tensorrt_cu13_bindings', '10.16.1.11'),
    '11.0': ('tensorrt_cu13_bindings', '11.0.0.114'),
    '11.4': ('tensorrt_cu13_bindings', '11.4.0.106'),
    'RTX 1.7': ('tensorrt_rtx_cu13_bindings', '1.7.1.116'),
}
# what is asked for by a name that is made up when it runs
COMPUTED = ('HardwareCompatibilityLevel.AMPERE_PLUS', 'HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY')
# what may be missing: asked for before it is used, or used with TensorRT-RTX alone
GUARDED = {
    'HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY': 'asked for before it is used',
    **dict.fromkeys((
        'CudaGraphStrategy', 'CudaGraphStrategy.WHOLE_GRAPH_CAPTURE', 'ICudaEngine.create_runtime_config',
        'IRuntimeConfig.cuda_graph_strategy'), 'TensorRT-RTX alone'),
}
# results of calls, whose classes the sources do not name
RETURNED = dict(
    create_timing_cache='ITimingCache', get_timing_cache='ITimingCache', create_engine_inspector='EngineInspector')


def find_names() -> List[str]:
    """Every name of TensorRT in the sources, as 'Class.member' or 'name', sorted."""
    names = set(COMPUTED)
    for source in SOURCES:
        tree = ast.parse((ROOT / source).read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                name = _resolve(node)
                if name:
                    names.add(name)
    return sorted(names)


def _resolve(node: ast.Attribute) -> Optional[str]:
    value = node.value
    if isinstance(value, ast.Attribute) and value.attr == 'trt' or isinstance(value, ast.Name) and value.id == 'trt':
        return None if node.attr.startswith('__') else node.attr
    if isinstance(value, ast.Attribute):
        outer = _resolve(value)
        if outer and outer[0].isupper() and '.' not in outer:
            return f'{outer}.{node.attr}'
        if value.attr in VARIABLES and isinstance(value.value, ast.Name) and value.value.id in ('self', 'session'):
            return f'{VARIABLES[value.attr]}.{node.attr}'
    if isinstance(value, ast.Name) and value.id in VARIABLES:
        return f'{VARIABLES[value.id]}.{node.attr}'
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in RETURNED:
        return f'{RETURNED[value.func.attr]}.{node.attr}'
    return None


def has_name(module: Any, name: str) -> bool:
    """Whether a module has 'name' or 'Class.member'."""
    for part in name.split('.'):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def ask_bindings(package: str, version: str, names: List[str]) -> Dict[str, bool]:
    """Download bindings and ask them for names, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = ''.join(platform.python_version_tuple()[:2])
        subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary', ':all:',
             '--python-version', python, '--dest', folder, f'{package}=={version}'], check=True)
        wheel = next(folder.glob('*.whl'))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        extension = next(f for f in folder.rglob('*.so') if re.match(r'tensorrt(_rtx)?\b', f.name))
        _write_empty_libraries(extension, folder)
        module = f'{extension.parent.name}.{extension.name.split(".")[0]}'
        code = (
            f'import json, sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT.parent)!r}]; import importlib.util as u; '
            f's = u.spec_from_file_location({module.split(".")[-1]!r}, {str(extension)!r}); '
            f'm = u.module_from_spec(s); s.loader.exec_module(m); '
            f'from export.tensorrt_names import has_name; '
            f'print(json.dumps({{n: has_name(m, n) for n in {names!r}}}))')
        run = subprocess.run(
            [sys.executable, '-c', code], check=True, capture_output=True, text=True,
            env={'LD_LIBRARY_PATH': str(folder), 'PATH': ''})
        return json.loads(run.stdout.splitlines()[-1])


def _write_empty_libraries(extension: Path, folder: Path) -> None:
    """Libraries with the functions that the extension looks for, which do nothing."""
    run = subprocess.run(['readelf', '-d', '--dyn-syms', '-W', extension], check=True, capture_output=True, text=True)
    dump = run.stdout
    libraries = re.findall(r'NEEDED.*\[(libnv[^\]]+|libtensorrt[^\]]+)\]', dump)
    pattern = r'(create|init|get).*(Infer|INTERNAL|Plugin|Parser|Logger|Builder)'
    symbols = [s for s in re.findall(r'UND (\w+)', dump) if re.match(pattern, s)]
    source = folder / 'empty.c'
    source.write_text('\n'.join(f'void *{s}(void) {{ return 0; }}' for s in sorted(set(symbols))) + '\n')
    for library in libraries:
        subprocess.run(
            ['gcc', '-shared', '-fPIC', '-o', folder / library, source, f'-Wl,-soname,{library}'], check=True)


def to_markdown(table: Dict[str, Any]) -> str:
    versions = list(table['versions'])
    lines = [
        'Names of TensorRT that `export/` uses, and the versions that have them. Written by `export/tensorrt_names.py`',
        'from the published bindings: ' + ', '.join(f'{p} {v}' for p, v in table['versions'].values()) + '.', '',
        '| name | ' + ' | '.join(versions) + ' |', '|---|' + '---|' * len(versions)]
    for name, has in table['names'].items():
        note = f' ({GUARDED[name]})' if name in GUARDED else ''
        lines.append(f'| `{name}`{note} | ' + ' | '.join('yes' if has[v] else 'no' for v in versions) + ' |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--check', metavar='MODULE', help='compare an installed module with the table')
    args = parser.parse_args()
    names = find_names()
    if args.check:
        module = importlib.import_module(args.check)
        missing = [n for n in names if n not in GUARDED and not has_name(module, n)]
        sys.exit(f'{args.check} {module.__version__} lacks {", ".join(missing)}' if missing else None)
    asked = {label: ask_bindings(package, version, names) for label, (package, version) in BINDINGS.items()}
    table = dict(versions=BINDINGS, names={n: {label: has[n] for label, has in asked.items()} for n in names})
    from train.files import write_report
    write_report(RESULT, table, to_markdown(table))


if __name__ == '__main__':
    if __package__ in (None, ''):  # run as a script: find the checkout, not this folder's modules
        sys.path[0] = str(ROOT.parent)
    main()
