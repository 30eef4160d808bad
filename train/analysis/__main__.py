"""Pictures and measures of what a trained network makes of the regions of images.

    python -m train.analysis geometry rn26_tm --baseline rn26      # Figure 5: t-SNE of features, by class
    python -m train.analysis mosaic rn26_tm                        # Figure 6: patches by class scores and by values
    python -m train.analysis words rn26_tm                         # Figure 7: combinations of classes
    python -m train.analysis trust rn26_tm                         # does the class map show the evidence?
    python -m train.analysis mixing rn26_tm                        # does the block mix what the class map shows?
    python -m train.analysis maximizer WEIGHTS                     # mu and eta of sections 3.2 and 4.1

A network is a name with pretrained weights or a weight file of training; the images are those of the sample unless
--dataset names others. Each writes NAME.json and, but for mixing and maximizer, NAME.png and NAME.svg; the same seed
gives the same. They need the extra 'analysis'.
"""
import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch

from export.load import load
from timm_tmblock.analysis import measure_maximizer
from timm_tmblock.errors import InputError, exiting_on_input_error
from timm_tmblock.explanation import class_color
from timm_tmblock.files import check_writable
from timm_tmblock.models._labels import list_class_names
from train.analysis import FILLS, name_network
from train.analysis.regions import Sample, crop_patches, draw_sample, embed_regions, map_size, normalize
from train.augment import DataConfig
from train.config import Parser, not_negative, number, positive, seed
from train.data import (
    InMemorySet,
    add_data_options,
    adopt_classes,
    check_classes,
    decode,
    open_named,
    tell_whole_folder,
)
from train.failure import naming_failures
from train.files import hash_file, save_figure, write_json
from train.hardware import describe_hardware, describe_versions, resolve_device
from train.maps import say_leads
from train.runner import find_weights

PAPER_MU, PAPER_ETA = 2.5, 17.
several = number(int, 2)  # images, as errors are over them
FIRST = 'number of images: the first of the split, or a random sample if it is sorted by class'


def create_parser() -> Parser:
    parser = Parser(
        prog='python -m train.analysis', description='What a trained network makes of the regions of images.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def add(
            command: str,
            description: str,
            images_per_class: Optional[int] = None,
            regions: Optional[int] = None,
            max_regions: Optional[int] = None,
    ) -> Any:
        sub = commands.add_parser(command, help=description, description=description)
        sub.add_argument('model', help='name with pretrained weights, or a trained weight file')
        sub.add_argument('--output', metavar='NAME', help=(
            f'output files without suffix (default: output/analysis/MODEL.{command}' +
            (', or .trust_blur with --fill blur)' if command == 'trust' else ')')))
        add_data_options(sub)
        sub.add_argument('--seed', type=seed, default=0)
        sub.add_argument('--device', choices=['auto', 'cpu', 'cuda', 'mps'], default='auto')
        sub.add_argument('--workers', type=not_negative, default=4, help='worker processes that decode images')
        if images_per_class:
            sub.add_argument('--images-per-class', type=positive, default=images_per_class, help=(
                'at most; fewer if the smallest class has fewer'))
        if regions:
            sub.add_argument('--regions', type=positive, default=regions, help='regions of each image, drawn at random')
            sub.add_argument('--max-regions', type=positive, default=max_regions, help=(
                'limit over all images; with many classes fewer images of each are taken'))
        return sub

    sub = add('geometry', 't-SNE of features by class, with how well classes lie together', 80, 8, 10_000)
    sub.add_argument('--baseline', metavar='MODEL', help='network without template matching to set beside it')
    sub.add_argument('--perplexity', type=positive, default=30)
    add('mosaic', 'patches laid out by their class scores and by their value embeddings', 80, 2, 3600)
    sub = add('words', 'k-means over the class scores of patches', 80, 64, 150_000)
    sub.add_argument('--words', type=positive, default=100)
    sub.add_argument('--patches', type=positive, default=16, help='nearest to each centre, each from a different image')
    sub.add_argument('--show', type=positive, help='draw this many words, evenly from pure to mixed (default: all)')
    sub = add('trust', 'does the class map show the evidence? Beside Grad-CAM, occlusion and chance')
    sub.add_argument('--images', type=several, default=1000, help=FIRST)
    sub.add_argument('--steps', type=positive, default=16)
    sub.add_argument('--fill', choices=FILLS, default='mean', help=(
        'what replaces masked parts: the mean color, which networks trained with random erasing have seen, or a '
        'blurred version of the image'))
    for command, description in (
            ('mixing', 'does the block mix the values of the classes that match?'),
            ('maximizer', 'mu and eta of a network, for soft maximizers in place of BN-ReLU')):
        sub = add(command, description)
        sub.add_argument('--images', type=several, default=2000, help=FIRST)
    return parser


def load_network(name: str, device: torch.device, template_matching: Optional[bool] = None) -> Any:
    """
    Raises:
        InputError: If there is no such network, or it has a block where it should have none, or the reverse.
    """
    model: Any = load(name)
    if template_matching is not None and model.has_template_matching != template_matching:
        raise InputError(
            f'{name} has {"no " if template_matching else "a "}template matching block; '
            f'name a network with{"" if template_matching else "out"} one.')
    return model.to(device, memory_format=torch.channels_last)  # on CPUs three times as fast


def open_images(args: argparse.Namespace, model: Any) -> InMemorySet:
    """The split, as the network takes it.

    Raises:
        InputError: If it cannot be opened or has other classes.
    """
    cfg = model.pretrained_cfg
    config = DataConfig.of(cfg)
    dataset = open_named(args, args.split)
    tell_whole_folder(args, dataset)
    names = list_class_names(cfg) or [f'class {i}' for i in range(model.num_classes)]
    check_classes(args.model, names, args.dataset, adopt_classes(dataset, names))
    return decode(dataset, config, num_workers=args.workers)


def take_images(args: argparse.Namespace, model: Any) -> InMemorySet:
    """As many as the settings say: the first, or a draw where the split lies sorted by class, as folders do."""
    data = open_images(args, model)
    if len(data) < 2:
        raise InputError(f'{args.dataset} {args.split} has one image; name a split of two or more.')
    if bool((data.targets.diff() >= 0).all()):  # where the image after one would be of its class
        return data.subset(torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))[:args.images])
    return data.subset(torch.arange(min(args.images, len(data))))


def colors_of(num_classes: int) -> np.ndarray:
    return np.array([class_color(k) for k in range(num_classes)], dtype=np.uint8)


def say_sample(args: argparse.Namespace, sample: Sample) -> str:
    images = len(sample.targets) // len(sample.class_names)
    return (f'{images} images of each class of {Path(args.dataset).name} {args.split}, '
            f'{sample.places.shape[1]} regions of each')


def check_templates(name: str, model: Any) -> None:
    """
    Raises:
        InputError: If the templates are not the classes, so that patches have no class scores.
    """
    if model.tm.num_templates != model.num_classes:
        raise InputError(
            f'{name} matches {model.tm.num_templates} templates and has {model.num_classes} classes; give a '
            f'network with a template for each class.')


def sample_regions(args: argparse.Namespace, model: Any) -> Sample:
    data = open_images(args, model)
    grid = map_size(model, data.images.shape[2:])
    return draw_sample(data, grid, args.images_per_class, args.regions, args.seed, args.max_regions)


Outcome = Tuple[Dict[str, Any], Any]  # values, and a Matplotlib figure, None where there is nothing to see


def run_geometry(args: argparse.Namespace, model: Any) -> Outcome:
    from train.analysis import geometry

    networks = {args.model: model}
    if args.baseline:
        baseline = load_network(args.baseline, next(model.parameters()).device, False)
        if len({map_size(network, model.pretrained_cfg['input_size'][1:]) for network in (baseline, model)}) > 1:
            raise InputError(f'{args.baseline} and {args.model} have feature maps of different sizes.')
        classes = [list_class_names(network.pretrained_cfg) for network in (baseline, model)]
        if classes[0] != classes[1]:
            raise InputError(f'{args.baseline} and {args.model} have different classes.')
        networks = {args.baseline: baseline, args.model: model}
    if len(set(map(name_network, networks))) == len(networks):  # files of two runs are called alike
        networks = {name_network(name): network for name, network in networks.items()}
    sample = sample_regions(args, model)
    layers = ('stage 3', 'patch mean', 'shortcut', 'values', 'block output')
    spaces = {
        f'{name}: {layer}': x for name, network in networks.items()
        for layer, x in embed_regions(network, sample, layers, model.patch_size).items()}
    values = geometry.measure_spaces(spaces, sample)
    maps = {name: geometry.project(x, args.seed, args.perplexity) for name, x in spaces.items()}
    if args.baseline:
        values['baseline_sha256'] = hash_file(find_weights(baseline))
    return values, geometry.draw_geometry(maps, values['spaces'], sample, say_sample(args, sample))


def run_mosaic(args: argparse.Namespace, model: Any) -> Outcome:
    from train.analysis import geometry, mosaic

    check_templates(args.model, model)
    sample = sample_regions(args, model)
    spaces = embed_regions(model, sample, ('scores', 'values'))
    spaces = {'class scores': spaces['scores'], 'value embeddings': spaces['values']}
    values = geometry.measure_spaces(spaces, sample)
    patches = crop_patches(sample, model.patch_size, model.patch_reduction)
    _, names, color_of = geometry.choose_colors(sample)
    colors = colors_of(len(names))
    mosaics = [
        mosaic.paint_mosaic(geometry.project(x, args.seed), patches, colors[color_of[sample.region_targets]])
        for x in spaces.values()]
    figure = mosaic.draw_mosaics(
        mosaics, [f'{name_network(args.model)}: patches by their {name}' for name in spaces],
        [geometry.describe(values['spaces'][name]) for name in spaces], names, colors)
    return values, figure


def run_words(args: argparse.Namespace, model: Any) -> Outcome:
    from train.analysis import words

    check_templates(args.model, model)
    sample = sample_regions(args, model)
    scores = embed_regions(model, sample, ['scores'])['scores']
    if len(scores) < args.words:
        raise InputError(f'There are {len(scores)} patches, too few for {args.words} words; take more images.')
    found = words.find_words(scores, sample.image_index, args.words, args.patches, args.seed)
    values = words.measure_words(found, sample.region_targets)
    patches = crop_patches(sample, model.patch_size, model.patch_reduction)
    shown = found.order
    if args.show:
        by_purity = np.argsort(-found.centers.max(axis=1), kind='stable')
        shown = by_purity[np.linspace(0, len(by_purity) - 1, min(args.show, len(by_purity))).round().astype(int)]
    kinds = dict(purity='pure words', mixed_purity='mixed ones')
    purity = [f'{100 * values[key]:.0f} % in {kind}' for key, kind in kinds.items() if np.isfinite(values[key])]
    caption = (
        f'{name_network(args.model)}: {args.words} words of {len(scores):,} patches ({say_sample(args, sample)}). '
        f'{100 * values["mixed_words"]:.0f} % of the words,\n{100 * values["mixed_patches"]:.0f} % of the patches, are '
        f'mixed: no class has half of the score. Nearest patches of the best class: {", ".join(purity)}.')
    figure = words.draw_words(
        found, shown, patches, sample.class_names, colors_of(len(sample.class_names)), caption,
        columns=10 if len(shown) >= 10 else len(shown))
    centers = [dict(zip(sample.class_names, np.round(c, 4).tolist())) for c in found.centers[found.order]]
    # a word that has no mixed ones has no purity of them
    return {**{k: v if np.isfinite(v) else None for k, v in values.items()}, 'centers': centers}, figure


def run_trust(args: argparse.Namespace, model: Any) -> Outcome:
    from train.analysis import trust

    check_templates(args.model, model)
    data = take_images(args, model)
    images, targets = normalize(model, data.images), data.targets
    targets = targets.to(images.device)
    with torch.inference_mode():
        outputs = [model.forward_patch_logits(x) for x in images.split(200)]
    predicted = torch.cat([logits.argmax(1) for logits, _ in outputs])
    matched = torch.cat([patches.argmax(1) for _, patches in outputs])
    curves = trust.follow(
        model, images, targets, trust.create_explainers(model, map_size(model, images.shape[2:]), args.seed, args.fill),
        args.steps, args.fill)
    summary = trust.summarize(curves)
    values = dict(
        images=len(images),
        top1=100 * (predicted == targets).cpu().double().mean().item(),
        patch_accuracy=100 * (matched == targets[:, None, None]).cpu().double().mean().item(),
        patch_agreement=100 * (matched == predicted[:, None, None]).cpu().double().mean().item(),
        steps=args.steps,
        fill=args.fill,
        occlusion_window=model.patch_size * model.patch_reduction,  # pixels
        maps=summary,
        curves={
            name: {key: getattr(c, key).mean(axis=0).round(5).tolist() for key in ('deletion', 'insertion')}
            for name, c in curves.items()},
    )
    title = f'{name_network(args.model)}: {len(images):,} images of {Path(args.dataset).name} {args.split}'
    return values, trust.draw_trust(curves, summary, title, args.fill)


def run_mixing(args: argparse.Namespace, model: Any) -> Outcome:
    from train.analysis.mixing import measure_mixing

    images = normalize(model, take_images(args, model).images)
    return dict(images=len(images), **measure_mixing(model, images.split(200))), None


def run_maximizer(args: argparse.Namespace, model: Any) -> Outcome:
    images = normalize(model, take_images(args, model).images)
    try:
        constants = measure_maximizer(model, images.split(200))
    except ValueError as e:
        raise InputError(str(e)) from e
    return dict(vars(constants), images=len(images), paper=dict(mu=PAPER_MU, eta=PAPER_ETA)), None


def tell_command(argv: List[str]) -> str:
    """The command that was given, but for where its files go."""
    words, rest = [], iter(argv)
    for word in rest:
        if word == '--output':
            next(rest)
        elif not word.startswith('--output='):
            words.append(word)
    return shlex.join(['python', '-m', 'train.analysis', *words])


RUN: Dict[str, Callable[[argparse.Namespace, Any], Outcome]] = dict(
    geometry=run_geometry, mosaic=run_mosaic, words=run_words, trust=run_trust, mixing=run_mixing,
    maximizer=run_maximizer)


def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    """Run a command, write its files and return what the JSON says.

    Raises:
        InputError: For a network, images or settings that cannot be used.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = create_parser().parse_args(argv)
    fill = getattr(args, 'fill', 'mean')
    name = args.command if fill == 'mean' else f'{args.command}_{fill}'
    given, args.output = args.output, args.output or f'output/analysis/{name_network(args.model)}.{name}'
    device = resolve_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 is what it says
    with naming_failures('take fewer images or regions'):
        model = load_network(args.model, device, None if args.command == 'maximizer' else True)
        if given:
            check_writable(Path(f'{given}.json'))
        try:
            values, figure = RUN[args.command](args, model)
        except ImportError as e:
            raise InputError(f'The analyses need more than is installed ({e}); pip install -e ".[analysis]".') from e
    own = ('command', 'output', 'device', 'workers', 'dataset_download')  # of this machine
    settings = {k: v for k, v in vars(args).items() if k not in own}
    result = dict(
        analysis=args.command, command=tell_command(argv), settings=settings,
        weights_sha256=hash_file(find_weights(model)), **values,
        hardware=describe_hardware(device), versions=describe_versions())
    if figure is not None:
        for suffix in ('png', 'svg'):
            save_figure(figure, Path(f'{args.output}.{suffix}'))
    write_json(Path(f'{args.output}.json'), result)
    print(f'wrote {args.output}.json' + ('' if figure is None else ', .png and .svg'))
    if args.command == 'trust':
        print('\n'.join(['Differences above zero favour the class map.', *say_leads(result)]))
    return result


if __name__ == '__main__':
    with exiting_on_input_error():
        main()
