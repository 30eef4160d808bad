"""Explain images from the command line.

    python -m timm_tmblock explain rn26_tm IMAGE ... --output pictures
    python -m timm_tmblock explain rn26_tm.onnx IMAGE ... --class-name ship
"""
import argparse
import json
import sys
from pathlib import Path
from typing import List, Optional

from .checkpoint import writing
from .errors import InputError
from .explanation import Explainer


def main(argv: Optional[List[str]] = None) -> None:
    """Run a command.

    Raises:
        InputError: If no image could be explained, or the model cannot be read.
    """
    parser = argparse.ArgumentParser(prog='python -m timm_tmblock', description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    command = commands.add_parser(
        'explain', help='classify images and show which class each region matched',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument('model', help='pretrained model, or .onnx or .safetensors file')
    command.add_argument('images', nargs='+', metavar='IMAGE')
    command.add_argument('--class-name', help='class of the heat map, the predicted one if not given')
    command.add_argument('--output', type=Path, help='folder for a picture of each image')
    command.add_argument('--json', action='store_true', help='one JSON object a line instead of text')
    args = parser.parse_args(argv)

    explainer = Explainer(args.model)
    failed = []
    for path in map(Path, args.images):
        try:
            explanation = explainer(path)
        except InputError as e:  # the other images may be fine
            print(f'error: {e}', file=sys.stderr)
            failed.append(path)
            continue
        result = dict(image=str(path), top=explanation.top())
        if args.output:
            picture = args.output / f'{path.stem}.explained.png'
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
        raise InputError(f'{len(failed)} of {len(args.images)} images could not be read.')


if __name__ == '__main__':
    try:
        main()
    except InputError as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)
