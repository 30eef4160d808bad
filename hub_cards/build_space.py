"""Put together the folder of a Hugging Face Space that shows models.

    python -m hub_cards.build_space --output space                          # the shipped models
    python -m hub_cards.build_space --output space best.safetensors rn26    # those with template matching come first
    python space/app.py                                                     # try it: pip install gradio onnxruntime
    hf upload user/name space . --repo-type space --exclude "__pycache__/*" --delete "models/*" --delete "examples/*"

The folder has all that the app needs: ONNX files, the runtime, example images. Nothing in it needs PyTorch.
"""
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from timm_tmblock.errors import InputError, exiting_on_input_error
from timm_tmblock.explanation import METHODS, has_class_activation
from timm_tmblock.files import remove, writing
from timm_tmblock.image import IMAGE_SUFFIXES, list_images
from train.config import Parser

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / 'hub_cards' / 'space'
EXAMPLES = ROOT / 'train' / 'sample' / 'images'
MODELS = ('rn26_tm', 'rn26_tm.cifar100', 'rn26')
LICENSE = 'apache-2.0'  # of the app and the shipped weights


def build(
        output: Path,
        models: Sequence[Tuple[str, Any]],
        args: Namespace,
        method: str = 'match',
        examples: Sequence[Path] = (EXAMPLES,),
) -> List[Path]:
    """Write the folder.

    Args:
        output: Folder, which must be empty if it is there.
        models: Networks by name, in evaluation mode.
        args: Options of `export.images.add_image_options`, of the images the ONNX files are checked on.
        method: What networks with template matching show, 'match' or 'cam'; the others show class activation maps.
        examples: Images to try, and folders of them.

    Returns:
        Its files.

    Raises:
        InputError: If there is something in the folder, it cannot be written, an example is no image, or a network has
            no such map.
        ParityError: If an ONNX file does not give what PyTorch gives.
    """
    from export.images import load_images
    from export.onnx import OnnxOptions, export_onnx
    names = [name for name, _ in models]
    if len(set(names)) < len(names):
        raise InputError(f'Two models are called alike among {", ".join(names)}; rename a file.')
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f'{output} is not an empty folder; name another, or empty it.')
    pictures = _list_examples(examples)
    if not output.name:
        output = output.resolve()
    with writing(output) as tmp:
        remove(tmp)  # of a run that was killed
        shutil.copytree(APP, tmp, ignore=shutil.ignore_patterns('__pycache__', 'models', 'examples', '.*'))
        tmp.chmod(0o755)  # a checkout may be read-only
        if any(model.pretrained_cfg.get('license') != LICENSE for _, model in models):  # others' are theirs to license
            page = (APP / 'README.md').read_text(encoding='utf-8')
            remove(tmp / 'README.md')
            (tmp / 'README.md').write_text(page.replace(f'license: {LICENSE}\n', ''), encoding='utf-8', newline='\n')
        shutil.copyfile(ROOT / 'export' / 'runtime.py', tmp / 'runtime.py')
        (tmp / 'examples').mkdir()
        for path in pictures:
            shutil.copyfile(path, tmp / 'examples' / path.name)
        (tmp / 'models').mkdir()
        for name, model in models:
            shown = method if model.has_template_matching else 'cam' if has_class_activation(model) else None
            options = OnnxOptions(patch_logits=True, method=shown) if shown else OnnxOptions()
            export_onnx(model, tmp / 'models' / f'{name}.onnx', options, load_images(args, model, calibrate=False))
        if output.exists():
            output.rmdir()  # it is empty, and Windows replaces no folder
        os.replace(tmp, output)
    return sorted(path for path in output.rglob('*') if path.is_file())


def _list_examples(paths: Sequence[Path]) -> List[Path]:
    found: Dict[str, Path] = {}
    for path in list_images(paths):
        if not path.is_file() or path.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(
                f'{path} is not there, or no image ({", ".join(IMAGE_SUFFIXES)}); name others with --examples.')
        if path.name in found:
            raise InputError(f'The examples {found[path.name]} and {path} are called alike; rename one.')
        found[path.name] = path
    return list(found.values())


def main(argv: Optional[List[str]] = None) -> None:
    """Run the command.

    Raises:
        InputError: See `build`.
    """
    from export.images import add_image_options
    from export.load import load
    from export.publish import settle_license
    parser = Parser(
        prog='python -m hub_cards.build_space', description='Put together the folder of a Space that shows models.')
    parser.add_argument(
        'models', nargs='*', metavar='MODEL', default=MODELS,
        help=f'name with pretrained weights, hf-hub:USER/NAME, or weight file (default: {", ".join(MODELS)})')
    parser.add_argument('--output', type=Path, required=True, metavar='FOLDER')
    parser.add_argument('--method', choices=METHODS, default='match', help=(
        "'cam': show class activation maps for networks with template matching, too; others always show them"))
    parser.add_argument('--examples', type=Path, nargs='+', default=[EXAMPLES], metavar='FILE', help=(
        'example images, or folders of them, published unchanged with their EXIF data such as location and camera '
        '(default: images of the sample)'))
    add_image_options(parser)
    args = parser.parse_args(argv)
    args.examples = _list_examples(args.examples)
    models = [(Path(name.split(':')[-1]).name.removesuffix('.safetensors'), load(name)) for name in args.models]
    for name, (_, model) in zip(args.models, models):
        settle_license(model, name)
    for path in build(args.output, models, args, args.method, args.examples):
        print(f'{path.stat().st_size:>10,} {path}')
    # the models and examples of an earlier one, and what Python writes where it was tried
    print(
        f'Publish it: hf upload USER/NAME {args.output} . --repo-type space --exclude "__pycache__/*" '
        f'--delete "models/*" --delete "examples/*"')


if __name__ == '__main__':
    with exiting_on_input_error():
        main()
