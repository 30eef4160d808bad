"""Export trained networks, check, run, time and publish them.

    python -m export onnx rn26_tm --output rn26_tm.onnx --patch-logits
    python -m export onnx rn26_tm --output rn26_tm.int8.onnx --precision int8
    python -m export tensorrt rn26_tm.onnx --output rn26_tm.engine --batch 1 16 256
    python -m export check rn26_tm.engine rn26_tm
    python -m export triton rn26_tm.onnx --output repository
    python -m export bench rn26_tm.onnx rn26_tm.int8.onnx --torch rn26_tm
    python -m export run rn26_tm.onnx IMAGE ... --explain explained
    python -m export selftest
    python -m export push rn26_tm --repo USER/NAME --dry-run
"""
import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from export import runtime


def add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument('model', help=(
        "name of a model of this package, 'hf-hub:USER/NAME', 'local-dir:FOLDER' or a .safetensors file"))
    command.add_argument('--checkpoint', type=Path, help='trained weight file (default: the pretrained weights)')


def add_content_options(command: Any) -> None:
    from timm_tmblock.explanation import METHODS
    command.add_argument('--patch-logits', action='store_true', help=(
        'add the class scores of each region as a second output'))
    command.add_argument('--method', choices=METHODS, default='match', help=(
        "what the patch logits are: 'match': those of template matching; 'cam': class activation maps, which work for "
        'baselines too'))
    command.add_argument('--softmax', action='store_true', help='output probabilities instead of logits')
    command.add_argument(
        '--preprocessing', choices=('NCHW', 'NHWC'),
        help='accept uint8 pixels of the input size in this layout, and normalize them in the graph')
    command.add_argument('--dynamic-size', action='store_true', help='make height and width dynamic, too')


def add_onnx(commands: argparse._SubParsersAction) -> None:
    from export.images import add_image_options
    from export.metadata import PRECISIONS, TARGETS
    command = commands.add_parser('onnx', help='write an ONNX file and check it against PyTorch')
    add_model_options(command)
    command.add_argument('--output', type=Path, required=True, help='file to write; metadata is written to OUTPUT.json')
    command.add_argument('--precision', choices=PRECISIONS, default='fp32', help='precision of weights and computation')
    command.add_argument('--target', choices=TARGETS, default='cpu', help='what an int8 file will run on')
    add_content_options(command)
    command.add_argument('--opset', type=int, help='ONNX opset (default: 18, or 22 for bf16)')
    add_image_options(command)
    command.set_defaults(run=run_onnx)


def run_onnx(args: argparse.Namespace) -> None:
    from export.images import load_images
    from export.load import load
    from export.onnx import OnnxOptions, export_onnx, name_failed
    from export.parity import ParityError
    from timm_tmblock.errors import InputError
    if args.target != 'cpu' and args.precision != 'int8':
        raise InputError('--target applies to int8 files only; add --precision int8, or leave it out.')
    model = load(args.model, args.checkpoint)
    options = OnnxOptions(
        args.precision, args.target, args.patch_logits, args.method, args.softmax, args.preprocessing,
        args.dynamic_size, args.opset)
    options.validate(model)
    images = load_images(args, model, calibrate=args.precision == 'int8')
    try:
        parity = export_onnx(model, args.output, options, images)['parity']
    except ParityError as e:
        raise ParityError(f'{e} The file is kept as {name_failed(args.output)}.') from e
    print_parity(parity)
    print(f'wrote {args.output} ({args.output.stat().st_size / 1e6:.2f} MB) and {args.output.name}.json')


def print_parity(parity: Dict[str, Any]) -> None:
    for name, values in parity['outputs'].items():
        print(
            f'{name}: differs from PyTorch by at most {values["max_relative_difference"]:.2g} of its largest value, '
            f'{100 * values["same_class"]:.2f} % have the same class')
    if 'top1' in parity:
        top1 = parity['top1']
        print(f'top-1 of {parity["images"]} images: {top1["exported"]:.2f} %, in PyTorch {top1["pytorch"]:.2f} %')


def add_check(commands: argparse._SubParsersAction) -> None:
    from export.images import add_image_options
    command = commands.add_parser('check', help='compare an ONNX file or an engine with PyTorch')
    command.add_argument('file', type=Path, help='.onnx file or TensorRT engine')
    add_model_options(command)
    command.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='where an ONNX file runs')
    add_image_options(command)
    command.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> None:
    from export.check import check_file
    from export.images import load_images
    from export.load import load
    model = load(args.model, args.checkpoint)
    parity, failure = check_file(args.file, model, load_images(args, model, calibrate=False), args.device)
    print_parity(parity)
    if failure is not None:
        raise failure


def add_tensorrt(commands: argparse._SubParsersAction) -> None:
    from export.images import add_image_options
    from export.tensorrt import BACKENDS, HARDWARE
    command = commands.add_parser('tensorrt', help='build a TensorRT engine')
    command.add_argument('model', metavar='FILE.onnx|MODEL', help='ONNX file, or a model as for the onnx command')
    command.add_argument('--output', type=Path, required=True, help='file to write; metadata is written to OUTPUT.json')
    command.add_argument('--backend', choices=BACKENDS, default='auto', help='auto: tensorrt if installed')
    command.add_argument(
        '--batch', type=int, nargs='+', action='append', metavar='N',
        help=(
            'one batch size, or the smallest, preferred and largest (default: 1 16 64); repeat it for further '
            'optimization profiles'))
    command.add_argument('--size', type=int, nargs='+', metavar='N', help='the same for height and width, if dynamic')
    command.add_argument('--tf32', action='store_true', help='allow TF32 in float32 layers')
    command.add_argument('--optimization-level', type=int, choices=range(6), default=3, help=(
        'higher levels take longer to build and may give faster engines (default: 3)'))
    command.add_argument('--workspace', type=int, metavar='MB', help='scratch memory that kernels may use')
    command.add_argument('--no-timing-cache', action='store_true', help='do not reuse measurements of earlier builds')
    command.add_argument('--version-compatible', action='store_true', help='let later versions load the engine')
    command.add_argument('--hardware-compatibility', choices=HARDWARE, default='none', help='let other GPUs load it')
    command.add_argument('--layers', type=Path, help="write TensorRT's description of the layers to this file, as JSON")
    first = len(command._actions)
    group = command.add_argument_group('for a MODEL, which is first exported to OUTPUT.onnx, e.g. rn26_tm.engine.onnx')
    group.add_argument('--checkpoint', type=Path, help='trained weight file (default: the pretrained weights)')
    group.add_argument('--precision', choices=('fp32', 'fp16', 'bf16', 'int8'), help='precision (default: fp16)')
    add_content_options(group)
    add_image_options(command)
    defaults = {action.dest: action.default for action in command._actions[first:]}
    command.set_defaults(run=run_tensorrt, defaults=defaults)


def run_tensorrt(args: argparse.Namespace) -> None:
    from export.onnx import BF16_OPSET
    from export.tensorrt import EngineOptions, build_engine, check_before_export, find_last_opset, parse_ranges
    from timm_tmblock.errors import InputError
    options = EngineOptions(
        backend=args.backend,
        batches=parse_ranges(args.batch) if args.batch else EngineOptions.batches,
        size=parse_ranges([args.size])[0] if args.size else None,
        tf32=args.tf32,
        optimization_level=args.optimization_level,
        workspace=args.workspace,
        timing_cache=not args.no_timing_cache,
        version_compatible=args.version_compatible,
        hardware_compatibility=args.hardware_compatibility,
    )
    source = Path(args.model)
    if source.suffix == '.onnx':
        given = [flag for flag, default in args.defaults.items() if getattr(args, flag) != default]
        if given:
            raise InputError(
                f'--{given[0].replace("_", "-")} is for a MODEL: {source} was exported and checked before; leave it '
                f'out.')
    else:
        if args.dynamic_size and not args.size:
            raise InputError('An engine with --dynamic-size needs a range of sizes: --size MIN OPT MAX.')
        if args.size and not args.dynamic_size:
            raise InputError('--size is for dynamic height and width; add --dynamic-size.')
        trt = check_before_export(args.output, options, args.layers)
        args.precision = args.precision or 'fp16'
        if args.precision == 'bf16' and find_last_opset(trt) < BF16_OPSET:
            raise InputError(
                f'bf16 needs opset {BF16_OPSET}, which TensorRT {trt.__version__} does not read; use fp16, or install '
                f'10.13 or later.')
        source = args.output.with_name(f'{args.output.name}.onnx')
        target = 'tensorrt' if args.precision == 'int8' else 'cpu'
        run_onnx(argparse.Namespace(**{**vars(args), 'output': source, 'target': target, 'opset': None}))
    engine = build_engine(source, args.output, options, args.layers)['engine']
    place = f'on {engine["gpu"]["name"]}' if engine['gpu'] else 'for all GPUs it supports'
    print(
        f'wrote {args.output} ({args.output.stat().st_size / 1e6:.2f} MB) and {args.output.name}.json: '
        f'{engine["backend"]} {engine["version"]} {place}, {engine["build_seconds"]} s\n'
        f'compare it with PyTorch on the GPU it is for: python -m export check {args.output} MODEL')


def add_triton(commands: argparse._SubParsersAction) -> None:
    from export.triton import KINDS
    from train.config import number
    count = number(int, 1, 2 ** 31 - 1)  # what the server can count to
    command = commands.add_parser('triton', help='write a model repository for the Triton Inference Server')
    command.add_argument('files', type=Path, nargs='+', metavar='FILE', help='.onnx files and TensorRT engines')
    command.add_argument('--output', type=Path, required=True, metavar='REPOSITORY', help=(
        'folder of the model repository, created if needed'))
    command.add_argument('--name', help=(
        'model name (default: that of the file); several files become versions of it, and the server loads the last'))
    command.add_argument('--max-batch', type=count, default=64, help=(
        'largest batch of ONNX files; engines have their own (default: 64)'))
    command.add_argument('--instances', type=count, default=1, help='instances per device (default: 1)')
    command.add_argument('--kind', choices=KINDS, default='auto', help='where ONNX files run')
    command.add_argument('--threads', type=count, help='threads of each instance on a CPU (default: all cores)')
    command.add_argument(
        '--max-delay', type=number(int, 0, 2 ** 63 - 1), default=500,
        help='microseconds a request may wait for others to form a batch (default: 500)')
    command.set_defaults(run=run_triton)


def run_triton(args: argparse.Namespace) -> None:
    from export.triton import ServingOptions, add_models, tell_server
    options = ServingOptions(args.max_batch, args.instances, args.kind, args.max_delay, args.threads)
    for folder in add_models(args.output, args.files, args.name, options):
        print(f'wrote {folder}')
    flags, needs = tell_server(args.files)
    print(f'serve it with: tritonserver --model-repository={args.output}{flags}')
    for need in needs:
        print(need)


def add_bench(commands: argparse._SubParsersAction) -> None:
    from train.config import above_zero, positive
    command = commands.add_parser('bench', help='time exported files and PyTorch side by side')
    command.add_argument('files', type=Path, nargs='*', metavar='FILE', help='.onnx files and TensorRT engines')
    command.add_argument('--torch', nargs='*', default=[], metavar='MODEL', help=(
        'models to time in PyTorch, with fused batch norms and channels_last: names (random weights) or weight files'))
    command.add_argument('--compile', action='store_true', help='time them with torch.compile, too')
    command.add_argument('--precision', choices=('fp32', 'fp16', 'bf16'), default='fp32', help='precision in PyTorch')
    command.add_argument(
        '--device', choices=('cpu', 'cuda'), default='cpu',
        help='where PyTorch and ONNX files run; engines always run on the GPU')
    command.add_argument('--batch-sizes', type=positive, nargs='+', default=[1, 16, 64], help=(
        'images at a time (default: 1 16 64)'))
    command.add_argument('--threads', type=positive, help="CPU threads for all of them (default: PyTorch's choice)")
    command.add_argument('--seconds', type=above_zero, default=20., help='time per batch size (default: 20)')
    command.add_argument('--output', metavar='NAME', help='write NAME.json, NAME.md and NAME.png')
    command.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> None:
    from export.bench import (
        Contestant,
        describe_machine,
        draw,
        measure,
        name_apart,
        open_file,
        open_torch,
        to_markdown,
    )
    from export.runtime import ENGINE_SUFFIXES
    from timm_tmblock.errors import InputError
    from train.files import write_report
    if not args.files and not args.torch:
        raise InputError('There is nothing to time; name files, or networks with --torch.')
    if not args.torch and (args.compile or args.precision != 'fp32'):
        raise InputError(
            f'{"--compile" if args.compile else "--precision"} only applies to PyTorch networks; '
            f'name some with --torch.')
    if args.threads:
        import torch
        torch.set_num_threads(args.threads)
    contestants: List[Contestant] = []
    for name in args.torch:
        for compiled in (False, True) if args.compile else (False,):
            contestants.append(open_torch(name, compiled, args.device, args.precision))
    contestants += [
        open_file(path, args.device, name) for path, name in zip(args.files, name_apart(args.files))]
    rows = measure(contestants, args.batch_sizes, args.seconds)
    table = to_markdown(rows)
    print(table)
    if args.output:
        on_gpu = args.device == 'cuda' or any(path.suffix in ENGINE_SUFFIXES for path in args.files)
        result = dict(command='python -m export ' + shlex.join(sys.argv[1:]), **describe_machine(on_gpu), rows=rows)
        versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
        write_report(args.output, result, f'`{result["command"]}`\n\n{result["hardware"]}; {versions}\n\n{table}')
        draw(rows, Path(f'{args.output}.png'))


def add_selftest(commands: argparse._SubParsersAction) -> None:
    from export.images import add_image_options
    from export.tensorrt import BACKENDS
    from train.config import above_zero
    command = commands.add_parser(
        'selftest', help='export, build, compare and time everything on this machine, and write a report')
    command.add_argument('model', nargs='?', default='rn26_tm', help='a model as for the onnx command')
    command.add_argument('--checkpoint', type=Path, help='trained weight file (default: the pretrained weights)')
    command.add_argument('--backend', choices=BACKENDS, default='auto', help='auto: tensorrt if installed')
    command.add_argument('--seconds', type=above_zero, default=4., help='time per file (default: 4)')
    command.add_argument('--output', metavar='NAME', help='write NAME.json and NAME.md')
    add_image_options(command)
    command.set_defaults(run=run_selftest)


def run_selftest(args: argparse.Namespace) -> None:
    from export.images import load_images
    from export.load import load
    from export.selftest import run_steps, to_markdown
    from timm_tmblock.errors import InputError
    from train.files import write_report
    model = load(args.model, args.checkpoint)
    report = run_steps(model, load_images(args, model, calibrate=True), args.backend, args.seconds)
    command = 'python -m export ' + shlex.join(sys.argv[1:])
    table = to_markdown(report, command)
    print(table)
    if args.output:
        write_report(args.output, dict(report, command=command), table)
    failed = [row['file'] for row in report['rows'] if row['result'] == 'failed']
    if failed:
        raise InputError(f'{len(failed)} of {len(report["rows"])} steps failed, see the table.')


def add_push(commands: argparse._SubParsersAction) -> None:
    from export.images import add_image_options
    command = commands.add_parser('push', help='publish weights, exports and a card on the Hugging Face Hub')
    add_model_options(command)
    command.add_argument('--repo', required=True, metavar='USER/NAME', help='repository on the Hub')
    command.add_argument(
        '--precisions', nargs='+', default=['fp32', 'fp16', 'int8'],
        choices=['fp32', 'fp16', 'bf16', 'int8', 'int8-tensorrt'], help=(
            'precisions of the ONNX files (default: fp32 fp16 int8); fp32 is always included'))
    command.add_argument('--engines', type=Path, nargs='+', default=[], metavar='FILE', help=(
        'TensorRT engines to upload'))
    card = command.add_mutually_exclusive_group()
    card.add_argument('--card', type=Path, metavar='README.md', help='card to upload instead of the generated one')
    card.add_argument('--keep-card', action='store_true', help='keep the card of the repository, if it has one')
    command.add_argument('--license', metavar='ID', help=(
        'license of your own weights, by the name the Hub uses: apache-2.0, mit, ...'))
    command.add_argument('--private', action='store_true', help='create a private repository')
    command.add_argument('--revision', help=(
        'branch, created if needed; or refs/pr/N to update a pull request'))
    command.add_argument('--tag', help='tag for the commit')
    command.add_argument('--message', default='Upload model, exports and card', help='commit message')
    command.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    command.add_argument('--deadline', type=float, default=1800., help=(
        'time limit of the upload, in seconds (default: 1800)'))
    command.add_argument('--dry-run', action='store_true', help='list the files and print the card without uploading')
    add_image_options(command)
    command.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> None:
    from export.push import PushError, leave_hanging
    try:
        _push(args)
    except PushError as e:  # the Hub failed, which is nobody's input, so a script may try again
        print(f'error: {e}', file=sys.stderr)
        sys.exit(1)
    finally:
        leave_hanging(1)


def _push(args: argparse.Namespace) -> None:
    import tempfile

    from export.images import load_images
    from export.load import load
    from export.publish import create_files, read_card, settle_license
    from export.push import Published, PushError, PushOptions, check_access, list_files, push, read_published
    from timm_tmblock.errors import InputError
    options = PushOptions(
        args.repo, args.private, args.revision, args.tag, args.message, args.create_pr, args.deadline)
    options.validate()
    if args.keep_card and args.dry_run:
        raise InputError('--dry-run does not contact the Hub, so there is no card to keep; leave out --keep-card.')
    if args.license is not None and not re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', args.license):
        raise InputError(f'{args.license!r} is not how the Hub names a license; use a name like apache-2.0 or mit.')
    published = Published()
    if not args.dry_run:
        check_access(options)
        published = read_published(options)
    keep_card = args.keep_card and published.card is not None
    model = load(args.model, args.checkpoint)
    settle_license(
        model, args.model, args.license, read_card(args.card) if args.card else published.card if keep_card else None)
    images = load_images(args, model, calibrate=any(p.startswith('int8') for p in args.precisions))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights_file = args.checkpoint or (Path(args.model) if args.model.endswith('.safetensors') else None)
        files = create_files(
            folder, model, args.repo, args.precisions, args.engines, images, args.card, weights_file, published,
            keep_card)
        print('\n'.join(list_files(folder, files)))
        if args.dry_run:
            print((folder / 'README.md').read_text(encoding='utf-8'))
            return
        # the card names engines
        if not (args.card or keep_card) and read_published(options).engines != published.engines:
            raise PushError(f'Another machine pushed engines to {args.repo} meanwhile; run the same command again.')
        print(push(folder, files, options))


def create_parser() -> argparse.ArgumentParser:
    from train.config import Parser
    parser = Parser(prog='python -m export', description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    runtime.add_run(commands)
    add_onnx(commands)
    add_check(commands)
    add_tensorrt(commands)
    add_triton(commands)
    add_bench(commands)
    add_selftest(commands)
    add_push(commands)
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Run a command.

    Raises:
        InputError: For arguments or files that cannot be used.
    """
    args = create_parser().parse_args(argv)
    args.run(args)


if __name__ == '__main__':
    if sys.argv[1:2] == ['run']:  # before PyTorch is imported, which it does without
        runtime.run_command_line()
    from timm_tmblock.errors import exiting_on_input_error
    with exiting_on_input_error(runtime.RuntimeInputError):
        main()
