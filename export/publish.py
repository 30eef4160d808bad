"""The files of a Hub repository, ready in a folder, and proven to load back."""
import json
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple
from urllib.parse import unquote

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from timm.data.model_config import resolve_input_data_config
from timm.models import save_for_hf

from export.images import Images
from export.metadata import describe_model, find_difference, hash_weights, load_metadata, sidecar, write_sidecar
from export.network import check_deterministic
from export.onnx import OnnxOptions, export_onnx
from export.parity import ParityError
from export.push import WEIGHTS, Published
from export.runtime import ENGINE_SUFFIXES, RuntimeInputError, check_built, load
from export.tensorrt import find_source, read_options, tell_command
from hub_cards.card import (
    FILES,
    check,
    describe_engine,
    find_card,
    load_data,
    read_front_matter,
    render,
    render_plain,
)
from hub_cards.run import read_run
from timm_tmblock.errors import InputError, first_line
from timm_tmblock.models._labels import list_class_names
from train.files import hash_file

ROOT = Path(__file__).resolve().parent.parent
# pictures of a card
SHOWN = re.compile(r'!\[[^\]]*\]\((?:<([^>]+)>|([^)\s]+))|<img\b[^>]*\bsrc=["\']([^"\']+)')
ELSEWHERE = re.compile(r'[a-zA-Z][a-zA-Z0-9+.-]*:|//|#')  # of addresses


def find_license(model: str) -> Optional[str]:
    """The license that the card of a repository on the Hub, or in a folder, names; None if there is no such card.

    Raises:
        InputError: If the Hub does not say whether there is one.
    """
    kind, _, place = model.replace('hf_hub:', 'hf-hub:').partition(':')
    if kind not in ('hf-hub', 'local-dir'):
        return None
    repo, _, revision = place.partition('@')
    try:
        path = Path(place, 'README.md')
        if kind == 'hf-hub':
            path = Path(hf_hub_download(repo, 'README.md', revision=revision or None))
        elif not path.is_file():
            return None
        text = path.read_text(encoding='utf-8-sig')
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError, HfHubHTTPError) as e:
        advice = 'try again'
        if kind == 'local-dir':
            advice = 'save it as UTF-8'
        elif HF_HUB_OFFLINE:
            command = f'hf download {repo} README.md{f" --revision {revision}" if revision else ""}'
            advice = f'unset HF_HUB_OFFLINE, or run "{command}" first'
        raise InputError(
            f'The card of {model}, which names the license of the weights, cannot be read ({first_line(e)}); '
            f'{advice}.') from e
    return read_front_matter(text).get('license')


def settle_license(model: Any, source: str, given: Optional[str] = None, card: Optional[str] = None) -> None:
    """Let the configuration name the license of the weights, where timm wrote that of the package into it.

    Args:
        model: The network.
        source: Where its weights are from.
        given: License that one's own weights are to have.
        card: Text of the card that goes with them.

    Raises:
        InputError: If they have another, or the card names another.
    """
    if find_card(hash_weights(model)) is None:
        model.pretrained_cfg['license'] = find_license(source)
    if given is None:
        return
    known = model.pretrained_cfg.get('license')
    if known not in (None, given):
        raise InputError(f'{source} has weights under {known}; --license is for weights of your own.')
    model.pretrained_cfg['license'] = given
    said = given if card is None else read_front_matter(card).get('license')
    if said != given:
        raise InputError(f'The card names the license {said}, not {given}; change one of the two.')


def read_card(path: Path) -> str:
    """
    Raises:
        InputError: If there is none, or the Hub would refuse it.
    """
    if not path.is_file():
        raise InputError(f'There is no card {path}.')
    try:
        text = path.read_text(encoding='utf-8-sig')  # some editors begin with a mark
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f'The card {path} cannot be read as UTF-8 ({e}); save it so.') from e
    check(text)
    return text


def create_files(
        folder: Path,
        model: Any,
        repo: str,
        precisions: Sequence[str],
        engines: Sequence[Path],
        images: Images,
        card: Optional[Path] = None,
        weights_file: Optional[Path] = None,
        published: Optional[Published] = None,
        keep_card: bool = False,
) -> List[Path]:
    """Write everything that is to be published.

    config.json and model.safetensors as timm and transformers read them; onnx/ with a sidecar for each file, compared
    with PyTorch; engines/ with theirs; runtime.py; README.md and its pictures.

    Args:
        folder: Empty folder to write to.
        model: Network with trained weights, in evaluation mode.
        repo: Name of the repository, for the card.
        precisions: Keys of hub_cards.card.FILES; fp32 is always among them.
        engines: Engines to go with the ONNX files.
        images: For calibration and comparison.
        card: README.md to take instead of the rendered one.
        weights_file: Where the weights are from; if a run of train.py wrote them, the card tells what it measured.
        published: What the repository has already. The card names its engines of the same weights, of other machines
            say, which stay there, and says what its own card says of the accuracy of the same weights.
        keep_card: Write no card, as the repository has one that is to stay.

    Returns:
        The files, relative to the folder, sorted.

    Raises:
        InputError: If an engine is of other weights, is not the file that was built or its ONNX file is gone, something
            does not load back, or the Hub would refuse the card.
        ParityError: If an ONNX file does not give what PyTorch gives.
    """
    card_text = read_card(card) if card else None
    shown = _find_pictures(card, card_text) if card and card_text else []
    check_deterministic(model)
    save_model(model, folder)
    published = published or Published()
    before = published.card if published.weights == hash_file(folder / WEIGHTS) else None  # card of the same weights
    known = read_front_matter(card_text or before or '').get('license')  # an earlier push may have been told it
    if model.pretrained_cfg.get('license') is None and isinstance(known, str):
        model.pretrained_cfg['license'] = known
        save_model(model, folder)
    described = describe_model(model, resolve_input_data_config(model, pretrained_cfg=model.pretrained_cfg))
    ours = dict(add_engine(folder, path, described) for path in engines)  # which may refuse one, before the work
    check_loads_back(model, folder, described['preprocessing']['input_size'])
    patches = getattr(model, 'has_template_matching', False)
    (folder / 'onnx').mkdir()
    exports = {}
    for key in dict.fromkeys(('fp32', *precisions)):
        precision, _, target = key.partition('-')
        options = OnnxOptions(precision, target or 'cpu', patch_logits=patches)
        try:
            export_onnx(model, folder / FILES[key], options, images)
        except ParityError as e:
            raise ParityError(f'In {key}, {e}{"" if key == "fp32" else " Leave it out of --precisions."}') from e
        if precision != 'bf16':  # which ONNX Runtime has no kernels for
            _open_again(folder / FILES[key])
        exports[key] = json.loads(sidecar(folder / FILES[key]).read_text(encoding='utf-8'))
    shutil.copyfile(ROOT / 'export' / 'runtime.py', folder / 'runtime.py')
    if card is not None and card_text is not None:
        (folder / 'README.md').write_text(card_text, encoding='utf-8', newline='\n')
        _add_pictures_of(card, shown, folder, find_card(described['weights_sha256']))
    elif not keep_card:
        _write_card(folder, model, repo, exports, ours, weights_file, published, before)
    return sorted(path.relative_to(folder) for path in folder.rglob('*') if path.is_file())


def _write_card(
        folder: Path,
        model: Any,
        repo: str,
        exports: Dict[str, Dict[str, Any]],
        ours: Dict[str, Dict[str, Any]],
        weights_file: Optional[Path],
        published: Published,
        before: Optional[str],
) -> None:
    """Render the card, of the engines in the repository and of ours, and put its pictures beside it."""
    name = find_card(exports['fp32']['weights_sha256'])
    there = {path: metadata for path, metadata in published.engines.items() if _is_engine_of(exports['fp32'], metadata)}
    rows = [describe_engine(path, metadata) for path, metadata in sorted({**there, **ours}.items())]
    text = str(render(name, repo, exports, rows) if name else
               render_plain(model, repo, exports, read_run(weights_file), rows, before))
    check(text)
    (folder / 'README.md').write_text(text, encoding='utf-8', newline='\n')
    if name:
        for path in load_data(name)['pictures'].values():
            shutil.copyfile(ROOT / path, folder / Path(path).name)


def save_model(model: Any, folder: Path) -> None:
    """Write config.json and model.safetensors, for timm and for transformers' TimmWrapper."""
    names = list_class_names(model.pretrained_cfg)
    save_for_hf(
        model, str(folder), model_config=dict(label_names=names) if names else None, safe_serialization=True)
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # TimmWrapper would pass it twice
    path.write_text(json.dumps(config, indent=2) + '\n')


def check_loads_back(model: Any, folder: Path, input_size: Sequence[int]) -> None:
    """
    Raises:
        InputError: If timm gets other logits from the folder.
    """
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same = torch.equal(model(x), loaded(x))
    if not same:
        raise InputError('What was saved gives other logits than the model: config.json cannot tell its arguments.')


def _open_again(path: Path) -> None:
    try:
        load(path, 'cpu')
    except RuntimeInputError as e:
        raise InputError(f'What was written does not load back: {e}') from e


def read_engine(path: Path, network: Dict[str, Any]) -> Dict[str, Any]:
    """The metadata of an engine of the network that other metadata describe.

    Raises:
        InputError: If it is not, or is no engine, or the ONNX file it was built from is gone.
    """
    if path.suffix not in ENGINE_SUFFIXES:
        raise InputError(f'{path} must end in {" or ".join(ENGINE_SUFFIXES)}.')
    metadata = load_metadata(path)
    different = find_difference(network, metadata)
    if different:
        raise InputError(f'{path} was built from other {different}; build it again.')
    find_source(path, metadata['engine'])
    return metadata


def add_engine(folder: Path, path: Path, network: Dict[str, Any]) -> Tuple[str, Dict[str, Any]]:
    """Put an engine of the network that other metadata describe into the folder.

    Returns:
        Its path there, and its metadata.
    """
    metadata = read_engine(path, network)
    built: Dict[str, Any] = metadata['engine']
    gpu = 'any'
    if built['gpu']:  # its name too, as of one compute capability there are several that want engines of their own
        gpu = f'sm{built["gpu"]["compute_capability"].replace(".", "")}-{built["gpu"]["name"]}'
        gpu = re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')
    target = folder / 'engines' / f'{built["backend"]}-{built["version"]}-{gpu}' / path.name
    if target.is_file():
        raise InputError(f'Two engines for one machine are called {path.name}; rename one, and build it again.')
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    built['onnx'] = _add_source(path, built, target.parent)
    built['command'] = tell_command(built['onnx'], target, read_options(built))
    write_sidecar(target, metadata)
    return target.relative_to(folder).as_posix(), metadata


def _is_engine_of(network: Dict[str, Any], metadata: Any) -> bool:
    """Whether what was found in a repository is a whole sidecar of an engine of this network."""
    try:
        check_built(metadata, Path('engine'))
    except (RuntimeInputError, AttributeError):
        return False
    return bool(find_difference(network, metadata) is None and {'precision', 'file_bytes'} <= metadata.keys())


def _add_source(path: Path, built: Dict[str, Any], beside: Path) -> str:
    """Copy the ONNX file an engine can be built again from beside it, and give its name.

    Not one of onnx/, which the next push may replace by one of another version, and engines stay; equal content takes
    no place of its own on the Hub.
    """
    source = path.parent / built['onnx']
    copy = beside / f'{source.stem}-{built["onnx_sha256"][:8]}.onnx'  # nor is it another file of that name
    shutil.copyfile(source, copy)
    if sidecar(source).is_file():
        shutil.copyfile(sidecar(source), sidecar(copy))
    return copy.name


def _find_pictures(card: Path, text: str) -> List[str]:
    """
    Raises:
        InputError: For one that cannot lie beside the card in a repository.
    """
    shown = {''.join(found) for found in SHOWN.findall(text)}
    pictures = sorted(unquote(path) for path in shown if not ELSEWHERE.match(path))
    for picture in pictures:
        if '..' in Path(picture).parts or Path(picture).is_absolute():
            raise InputError(
                f'{card} shows {picture}, which is outside of its folder; put it beside the card and name it so there.')
    return pictures


def _add_pictures_of(card: Path, pictures: Sequence[str], folder: Path, name: Optional[str]) -> None:
    """Put the pictures that somebody's card shows beside it: those that lie there, or of the card of the network."""
    files = {Path(path).name: ROOT / path for path in (load_data(name)['pictures'].values() if name else ())}
    for picture in pictures:
        source = next((path for path in (card.parent / picture, files.get(picture)) if path and path.is_file()), None)
        if source is not None and not (folder / picture).exists():  # others may be in the repository
            (folder / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / picture)
