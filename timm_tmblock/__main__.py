"""Explain images, or run a script that knows the models, from the command line.

    python -m timm_tmblock explain rn26_tm IMAGE FOLDER ... --output pictures
    python -m timm_tmblock explain rn26_tm.onnx IMAGE ... --class-name ship --output pictures
    python -m timm_tmblock run validate.py --model rn26_tm ...
"""
import argparse
import json
import runpy
import sys
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, Callable, List, Optional, Set

from .checkpoint import load_pretrained
from .errors import InputError, exiting_on_input_error
from .explanation import METHODS, Explainer
from .files import writing
from .image import list_images


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m timm_tmblock', description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    command = commands.add_parser('explain', help='classify images and show which class each region matched')
    command.add_argument('model', help=(
        "name registered with timm, 'hf-hub:USER/NAME', 'local-dir:FOLDER', or an .onnx or .safetensors file"))
    command.add_argument('images', nargs='+', metavar='IMAGE', help='files and folders')
    command.add_argument('--checkpoint', metavar='FILE', help='weights to load instead of the pretrained ones')
    command.add_argument('--method', choices=METHODS, help=(
        "'match': patch logits of template matching; 'cam': class activation maps, for any model of this package "
        "(default: the method an ONNX file was exported with, 'match' for a model)"))
    command.add_argument('--class-name', help='class shown in the heat map of --output (default: the predicted class)')
    command.add_argument('--output', type=Path, help='folder to write a picture of each explanation to')
    command.add_argument('--json', action='store_true', help=(
        'print one JSON object per line, with the class of each region'))
    command.set_defaults(run=explain)
    command = commands.add_parser(
        'run', help="run a script, such as timm's own, with the models of this package registered",
        usage='%(prog)s SCRIPT [ARGUMENT ...]')
    command.add_argument('script', type=Path)
    command.add_argument('arguments', nargs=argparse.REMAINDER)
    command.set_defaults(run=run_script)
    return parser


def main(argv: Optional[List[str]] = None) -> Optional[Callable[[], Any]]:
    """Run a command; `run` returns its script as a function that the caller has to call.

    Raises:
        InputError: If an image could not be explained, or a model or script cannot be read.
    """
    args = create_parser().parse_args(argv)
    return args.run(args)


def run_script(args: argparse.Namespace) -> Callable[[], Any]:
    if not args.script.is_file():
        raise InputError(f'There is no script {args.script}.')
    sys.argv = [str(args.script), *args.arguments]
    sys.path[0] = str(args.script.resolve().parent)
    return partial(runpy.run_path, str(args.script), run_name='__main__')


def explain(args: argparse.Namespace) -> None:
    model = load_pretrained(args.model, args.checkpoint) if args.checkpoint else args.model
    explainer = Explainer(model, args.method)
    images = list_images(args.images)
    failed = []
    written: Set[str] = set()
    for path in images:
        try:
            explanation = explainer(path)
        except InputError as e:  # the other images may be fine
            print(f'error: {e}', file=sys.stderr)
            failed.append(path)
            continue
        explanation.template_index(args.class_name)  # is there such a class?
        result = dict(image=str(path), top=explanation.top())
        if args.json:
            result['regions'] = [[explanation.template_names[k] for k in row] for row in explanation.patch_classes]
        if args.output:
            numbered = (f'{path.stem}-{i}' for i in count(2))  # of another folder
            name = next(name for name in chain([path.stem], numbered) if name.lower() not in written)
            written.add(name.lower())  # some disks take a and A for one
            picture = args.output / f'{name}.explained.png'
            with writing(picture) as tmp:
                explanation.picture(args.class_name).save(tmp, format='PNG')
                tmp.replace(picture)
            result['picture'] = str(picture)
        if args.json:
            print(json.dumps(result))
        else:
            best = ', '.join(f'{name} {100 * p:.1f} %' for name, p in explanation.top())
            print(f'{path}: {best}' + (f' -> {result["picture"]}' if args.output else ''))
    if failed:
        raise InputError(f'{len(failed)} of {len(images)} images could not be read.')


if __name__ == '__main__':
    with exiting_on_input_error():
        script = main()
    if script is not None:  # whose errors are its own
        script()
