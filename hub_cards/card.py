"""Model cards: accuracies and timings of shipped weights are read from committed results."""
import json
import math
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import timm
import torch
import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import CardData
from torch.utils.flop_counter import FlopCounterMode

import timm_tmblock  # noqa: F401  registers the models
from timm_tmblock.errors import InputError
from timm_tmblock.mode import evaluating
from train.lineage import find_fillings, find_legs, read_runs
from train.maps import compare_maps, say_fillings
from train.tables import is_of_copy

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / 'hub_cards' / 'models'
RENDERED = ROOT / 'hub_cards' / 'rendered'
TEMPLATE = ROOT / 'hub_cards' / 'card.md.jinja'
# names of the files on the Hub, by precision and target
FILES = {'fp32': 'onnx/model.onnx', 'fp16': 'onnx/model_fp16.onnx', 'bf16': 'onnx/model_bf16.onnx',
         'int8': 'onnx/model_int8.onnx', 'int8-tensorrt': 'onnx/model_int8_tensorrt.onnx'}
REQUIRED = ('description', 'recipe', 'precisions', 'notes')
DATASETS: Dict[str, Dict[str, str]] = {
    'cifar10': dict(id='uoft-cs/cifar10', name='CIFAR-10', split='test'),
    'cifar100': dict(id='uoft-cs/cifar100', name='CIFAR-100', split='test', target_key='fine_label')}
TAGS = ['image-classification', 'timm', 'onnx', 'arxiv:2210.00992']
PATCH_TAGS = ['template-matching', 'explainability']
RATES = 'benchmarks/results/deployment_cpu.json'
# its rows of PyTorch
PYTORCH = {'eager': 'eager, as created', 'eager, prepared': 'norms folded, channels_last', 'compiled': 'compiled'}


def choose_tags(has_patches: bool, has_engines: bool) -> List[str]:
    return [*TAGS, *(PATCH_TAGS if has_patches else ()), *(['tensorrt'] if has_engines else ())]


def measure_cost(model: Any) -> Dict[str, float]:
    """What an image costs, as timm's cards tell it: the multiplications of convolutions and matrix products, with their
    additions, in billions (`gmacs`), and the outputs of convolutions and linear layers, in millions (`activations`).
    """
    outputs: List[int] = []
    hooks = [
        m.register_forward_hook(lambda module, args, output: outputs.append(output.numel()))
        for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    size = model.pretrained_cfg['input_size']
    try:
        with evaluating(model), torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *size, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return dict(gmacs=counter.get_total_flops() / 2e9, activations=sum(outputs) / 1e6)


def list_cards() -> List[str]:
    """Names of the models that have a card."""
    return sorted(path.stem for path in MODELS.glob('*.yaml'))


def load_data(name: str) -> Dict[str, Any]:
    """What a card says: the data file of a model, and what its name says of the rest.

    Raises:
        InputError: If there is none, or a field is missing.
    """
    path = MODELS / f'{name}.yaml'
    if not path.is_file():
        raise InputError(f'There is no card of {name!r}; there are {", ".join(list_cards())}.')
    data = yaml.safe_load(path.read_text(encoding='utf-8'))
    missing = [field for field in REQUIRED if field not in data]
    if missing:
        raise InputError(f'{path.name} lacks {", ".join(missing)}.')
    if unknown := set(data) - {*REQUIRED, 'pictures'}:
        raise InputError(f'{path.name} has {", ".join(sorted(unknown))}, which its name says; leave it out.')
    model, _, tag = name.partition('.')
    if tag.removeprefix('dist_') not in DATASETS:
        raise InputError(f'{path.name} is of no dataset in DATASETS of {Path(__file__).name}; add it there.')
    results = f'train/results/{name}'
    pictures = dict(evaluation=f'{results}/evaluation.png')
    if '_tm' in model:
        pictures.update(block='hub_cards/block.png', explanation=f'{results}/explained.png')
        data['analysis'] = f'{results}/analysis'
    return dict(
        data,
        model=model,
        tag=tag,
        license='apache-2.0',
        dataset=DATASETS[tag.removeprefix('dist_')],
        training=f'{results}/result.json',
        evaluation=f'{results}/evaluation.json',
        exports=f'export/results/{name}',
        pictures={**pictures, **data.get('pictures', {})})


def find_card(weights_sha256: str) -> Optional[str]:
    """The card of these weights, if there is one."""
    for name in list_cards():
        data = load_data(name)
        path = ROOT / data['exports'] / f'{data["model"]}.fp32.onnx.json'
        if path.is_file() and json.loads(path.read_text(encoding='utf-8'))['weights_sha256'] == weights_sha256:
            return name
    return None


def describe_engine(path: str, sidecar: Dict[str, Any]) -> Dict[str, Any]:
    """A row of the table of engines.

    Args:
        path: In the repository.
        sidecar: Metadata of the engine.
    """
    engine = sidecar['engine']
    gpu = engine['gpu']
    if gpu is None:
        runs_on = 'every GPU that TensorRT-RTX supports'
    elif engine['hardware_compatibility'] == 'ampere+':
        runs_on = 'Ampere and later'
    else:
        runs_on = f'compute capability {gpu["compute_capability"]} ({gpu["name"]})'
    ranges = [[shape[0] for shape in profile] for profile in engine['profiles']]
    return dict(
        path=path,
        precision=sidecar['precision'],
        megabytes=f'{sidecar["file_bytes"] / 1e6:.2f}',
        version=f'{engine["backend"]} {engine["version"]}' + (' or later' if engine['version_compatible'] else ''),
        runs_on=runs_on,
        batches=', '.join(f'{low}' if low == high else f'{low} to {high}' for low, _, high in ranges),
    )


def render_plain(
        model: Any,
        repo: str,
        exports: Dict[str, Dict[str, Any]],
        run: Optional[Dict[str, Any]] = None,
        engines: Sequence[Dict[str, Any]] = (),
        before: Optional[str] = None,
) -> ModelCard:
    """The card of a network without committed results: what it is, its files and how to use them.

    Args:
        model: Network, with timm's pretrained_cfg.
        repo: Hub repository it is for.
        exports: Metadata of the ONNX files, by key of FILES.
        run: What `read_run` says of the weights.
        engines: Rows of the table of engines.
        before: Card that the repository has of the same weights, which may know the run where this machine does not.

    Raises:
        InputError: For an accuracy that is no number.
    """
    first = exports['fp32']
    _check_numbers(run, 'result.json')
    measured: Dict[str, Any] = {}
    if run and run['dataset_id']:
        measured = dict(datasets=[run['dataset_id']])
    if run and run['split']:
        measured.update(metrics=['accuracy'], model_name=repo.split('/')[-1], eval_results=[EvalResult(
            task_type='image-classification', dataset_type=run['dataset_type'],
            dataset_name=run['dataset'], dataset_split=run['split'], metric_type='accuracy',
            metric_name='Top-1 accuracy', metric_value=round(run['top1'], 2))])
    told = re.search(r'^Top-1 [\d.]+ %.*?(?=\n\n)', before, re.DOTALL | re.MULTILINE) if before and not run else None
    theirs = read_front_matter(before) if before else ModelCardData()
    if told:  # what this wrote where the run was
        measured = {key: theirs.get(key) for key in ('datasets', 'metrics', 'model_name', 'eval_results')}
    base = (model.pretrained_cfg.get('hf_hub_id') or '').partition('@')[0]  # where the weights are from
    base = None if base in ('', repo) else base
    card_data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        base_model=base,
        license=first['license'],
        tags=choose_tags(len(first['outputs']) > 1, bool(engines)),
        **measured,
    )
    files = [
        dict(path=FILES[key], precision=key, same_class=100 * e['parity']['outputs']['logits']['same_class'])
        for key, e in exports.items()]
    return ModelCard.from_template(
        card_data,
        template_str=_read_template('plain.md.jinja'),
        name=repo.split('/')[-1],
        repo=repo,
        model=first['model'],
        files=files,
        images=first['parity']['images'],
        run=run,
        base=base,
        told=told[0] if told else None,
        matches_classes=first.get('template_names') == first['class_names'],
        **_describe_network(model, exports, engines),
    )


def _describe_network(
        model: Any, exports: Dict[str, Dict[str, Any]], engines: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """What every card says."""
    first = exports['fp32']
    return dict(
        class_names=[escape_markdown(class_name) for class_name in first['class_names']],
        preprocessing=first['preprocessing'],
        parameters=sum(p.numel() for p in model.parameters()),
        cost=measure_cost(model),
        rounded=[key for key in ('fp16', 'bf16') if key in exports],
        has_int8='int8' in exports,
        has_patches=len(first['outputs']) > 1,
        engines=engines,
    )


def _describe_files(exports: Dict[str, Dict[str, Any]], rates: Dict[str, float], model: str) -> List[Dict[str, Any]]:
    """Rows of the table of files of shipped weights, with images/s of the model's by its row."""
    files, images = [], exports['fp32']['parity']['images']
    patches = ', patch logits' if len(exports['fp32']['outputs']) > 1 else ''
    for key, sidecar in exports.items():
        parity = sidecar['parity']
        output, rate = parity['outputs']['logits'], rates.get(f'{model} {key}{patches}')
        files.append(dict(
            path=FILES[key],
            precision=key.replace('-', ' for '),
            megabytes=f'{sidecar["file_bytes"] / 1e6:.2f}',
            # of the images that the others are compared on
            top1='' if 'top1' not in parity or parity['images'] != images else f'{parity["top1"]["exported"]:.2f} %',
            parity=parity,
            difference=output['max_relative_difference'],
            same_class=output['same_class'],
            rate='' if rate is None else f'{rate:.0f}',
        ))
    return files


def read_front_matter(text: str) -> CardData:
    """What a card of somebody's says of itself; nothing if that cannot be read."""
    try:
        return ModelCard(text, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):
        return ModelCardData()


def escape_markdown(text: str) -> str:
    """A name as it is, on one line."""
    return re.sub(r'([\\`*_\[\]<>|~&])', r'\\\1', ' '.join(text.split()))


def _read_template(name: str) -> str:
    """With the table of engines, as huggingface_hub renders text alone, where templates cannot include others."""
    text = (TEMPLATE.parent / name).read_text(encoding='utf-8')
    return text.replace('{{ engine_table }}\n', (TEMPLATE.parent / 'engines.md.jinja').read_text(encoding='utf-8'))


def _count_leads(trust: Optional[Dict[str, Any]]) -> Dict[str, Dict[str, int]]:
    """For each other map, on how many measures the class map is better, worse, and neither."""
    return {name: {verdict: len(found) for verdict, found in compare_maps(trust, name).items()}
            for name in list(trust['maps'])[1:]} if trust else {}


def tell_command(analysis: Dict[str, Any], dataset_id: str) -> str:
    """The command of an analysis, with the set as the Hub calls it."""
    return analysis['command'].replace(analysis['settings']['dataset'], f'hfds/{dataset_id}')


def read_commands(recipe: str) -> str:
    """The commands at the top of a recipe, one after the other, which lead to its result.

    Raises:
        InputError: If there are none.
    """
    lines = _read(recipe).split('\n#\n')
    commands = [line.removeprefix('#   ') for line in lines[1].splitlines()] if len(lines) > 2 else []
    if not commands or not all(line.startswith('#   ') for line in lines[1].splitlines()):
        raise InputError(f'{recipe} must have its commands in the second paragraph of the comment at the top.')
    return '\n'.join(commands)


def _read(path: str) -> str:
    """
    Raises:
        InputError: If there is no such file.
    """
    file = ROOT / path
    if not file.is_file():
        raise InputError(f'The card needs {path}, which is not there; run the command that writes it.')
    return file.read_text(encoding='utf-8')


def _load_json(path: str) -> Any:
    result = json.loads(_read(path))
    _check_numbers(result, path)
    return result


def _check_numbers(value: Any, where: str) -> None:
    """
    Raises:
        InputError: For a number that is none.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(item, f'{where}.{key}')
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_numbers(item, f'{where}[{i}]')
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f'{where} is {value}; a card needs finite numbers.')


def check(text: str) -> None:
    """What the Hub would say of a card, before anything is uploaded.

    Args:
        text: README.md.

    Raises:
        InputError: For front matter that is missing, no YAML, or of the wrong kinds.
    """
    block = REGEX_YAML_BLOCK.search(text)
    try:
        data = yaml.safe_load(block[2]) if block else None
    except yaml.YAMLError as e:
        raise InputError(f'The front matter of the card is not YAML: {" ".join(str(e).split())}') from e
    if not isinstance(data, dict):
        raise InputError('The card must begin with front matter: settings in YAML between two lines of ---.')
    for field in ('license', 'library_name', 'pipeline_tag'):
        if not isinstance(data.get(field, ''), str):
            raise InputError(f'{field} in the front matter of the card must be text, not {data[field]!r}.')
    for field in ('tags', 'datasets', 'metrics'):
        value = data.get(field, [])
        if isinstance(value, str) and field != 'tags':  # the Hub takes a single one so
            continue
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f'{field} in the front matter of the card must be a list of text.')
    _check_numbers(data, 'front matter')
    try:
        ModelCard(text, ignore_metadata_errors=False)
    except (ValueError, KeyError, TypeError) as e:
        reason = ' '.join(str(e).split(' Pass ')[0].split())
        raise InputError(f'The model-index of the card is not as the Hub wants it: {reason}') from e


def render(
        name: str,
        repo: str = '',
        exports: Optional[Dict[str, Dict[str, Any]]] = None,
        engines: Sequence[Dict[str, Any]] = (),
) -> ModelCard:
    """The card of a model.

    Args:
        name: Model and tag, as in `list_cards`.
        repo: Hub repository it is for, 'USER/NAME' if not known.
        exports: Sidecars of the ONNX files that lie beside the card, by key of FILES; the committed ones if None.
        engines: Rows of the table of engines.

    Raises:
        InputError: If a result is missing or no number.
    """
    data = load_data(name)
    evaluation, training = _load_json(data['evaluation']), _load_json(data['training'])
    latency = _load_json(RATES)
    runs = read_runs(ROOT / 'train' / 'results')
    legs = [int(leg['epochs']) for leg in find_legs(name, runs) or []]
    continued = runs[name]['settings'].get('initial_checkpoint') is not None
    model = timm.create_model(name)
    has_patches: bool = model.has_template_matching
    for field in ('top1', 'top5', 'ece', 'flip_top1', 'images', *(['patch_accuracy'] if has_patches else [])):
        if evaluation.get(field) is None:
            raise InputError(f'{data["evaluation"]} has no {field}; run train/evaluate.py --tta flip again.')
    trust, blurred, mixing = (
        _load_json(f'{data["analysis"]}/{part}.json') if has_patches else None
        for part in ('trust', 'trust_blur', 'mixing'))
    sidecars = exports or {
        key: _load_json(f'{data["exports"]}/{data["model"]}.{key}.onnx.json') for key in data['precisions']}
    _check_numbers(exports, 'sidecars')
    rates = {row['name']: row['images_per_second'] for row in latency['rows'] if row['batch_size'] == 64}
    patches = sidecars['fp32']['outputs'][1] if has_patches else None
    dataset = data['dataset']
    card_data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=data['license'],
        datasets=[dataset['id']],
        metrics=['accuracy'],
        tags=choose_tags(has_patches, bool(engines)),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type='image-classification', dataset_type=dataset['id'], dataset_name=dataset['name'],
                dataset_split=dataset['split'], metric_type=kind, metric_name=label,
                metric_value=round(float(evaluation[key]), 2))
            for kind, label, key in (
                ('accuracy', 'Top-1 accuracy', 'top1'), ('top-5-accuracy', 'Top-5 accuracy', 'top5'))],
    )
    return ModelCard.from_template(
        card_data,
        template_str=_read_template(TEMPLATE.name),
        name=name,
        repo=repo or f'USER/{name}',
        model=data['model'],
        description=data['description'],
        notes=data['notes'],
        dataset=dataset,
        commands=read_commands(data['recipe']),
        of_copy=is_of_copy(evaluation['dataset']),
        concat=has_patches and model.tm.shortcut is None,
        for_tensorrt=FILES['fp16' if 'fp16' in sidecars else 'fp32'],
        regions='×'.join(map(str, patches['shape'][2:])) if patches else '',
        stride=patches['stride'] if patches else 0,
        megabytes=sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6,
        commit=training.get('commit'),
        processes=training.get('processes', 1),
        epochs=training['epochs'],
        legs=legs,
        all_epochs=sum(legs) if legs else None,
        seed=training['seed'],
        versions=evaluation['versions'],
        evaluation=evaluation,
        trust=trust,
        mixing=mixing,
        leads=_count_leads(trust),
        blurred_leads=_count_leads(blurred),
        fillings=say_fillings(find_fillings(name, runs)),
        has_words='words' in data['pictures'],
        trust_command=tell_command(trust, dataset['id']) if trust else '',
        continued=continued,
        training_hardware=training.get('hardware', 'hardware in the recipe'),
        files=_describe_files(sidecars, rates, data['model']),
        rates=dict(torch=', '.join(
            f'{rates[name]:.0f} ({said})' for key, said in PYTORCH.items()
            if (name := f'{data["model"]} {key}') in rates)),
        latency=latency,
        **_describe_network(model, sidecars, engines),
    )
