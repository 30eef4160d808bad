"""Write trained networks in deployment formats.

    python -m export onnx rn26_tm --output rn26_tm.onnx --patch-logits
"""
import argparse
from pathlib import Path
from typing import List, Optional

from timm_tmblock.errors import exiting_on_input_error


def add_onnx(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        'onnx', help='write an ONNX file and check it against PyTorch',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument('model', help='name registered with timm')
    command.add_argument('--checkpoint', type=Path, help='weights of training; the pretrained ones if not given')
    command.add_argument('--output', type=Path, required=True, help='file to write')
    command.add_argument('--patch-logits', action='store_true', help='add the class scores of each region as an output')
    command.add_argument('--opset', type=int, default=18)
    command.set_defaults(run=run_onnx)


def run_onnx(args: argparse.Namespace) -> None:
    from export.load import load
    from export.onnx import export_onnx
    model = load(args.model, args.checkpoint)
    differences = export_onnx(model, args.output, patch_logits=args.patch_logits, opset=args.opset)
    for name, difference in differences.items():
        print(f'{name}: differs from PyTorch by at most {difference:.2g} of its largest value')
    print(f'wrote {args.output} ({args.output.stat().st_size / 1e6:.2f} MB)')


def main(argv: Optional[List[str]] = None) -> None:
    """Run a command.

    Raises:
        InputError: For arguments or files that cannot be used.
    """
    parser = argparse.ArgumentParser(prog='python -m export', description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(required=True, metavar='FORMAT')
    add_onnx(commands)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == '__main__':
    with exiting_on_input_error():
        main()
