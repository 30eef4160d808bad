"""Draw the template matching block, for the cards and the README.

    python -m hub_cards.block            # writes hub_cards/block.png

After figure 1 and section 3 of Feature Embedding by Template Matching as a ResNet Block - https://arxiv.org/abs/2210.00992
"""
from pathlib import Path
from typing import Tuple

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from train.files import save_figure

PATH = Path(__file__).resolve().parent / 'block.png'
PLAIN, GOLD, BLUE = '#f2f2f2', '#ffe08a', '#d5e5f7'
Point = Tuple[float, float]


def draw(path: Path = PATH) -> None:
    """Write the picture."""
    figure = Figure(figsize=(13, 3.9))
    axes = figure.subplots()
    axes.set(xlim=(0, 22), ylim=(0, 6.8))
    axes.axis('off')

    def box(center: Point, text: str, color: str, width: float = 2.9) -> None:
        x, y = center
        axes.add_patch(FancyBboxPatch(
            (x - width / 2, y - 0.65), width, 1.3, boxstyle='round,pad=0.04,rounding_size=0.15', facecolor=color,
            edgecolor='#555'))
        axes.text(x, y, text, ha='center', va='center', fontsize=10)

    def arrow(start: Point, end: Point, shape: str = 'arc3') -> None:
        axes.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', color='#555', connectionstyle=shape, lw=1.3))

    top, bottom = 3.4, 1.0
    box((1.6, top), 'features\n(B, C, H, W)', PLAIN)
    box((5.4, top), 'mean of the patch\naround each pixel', BLUE)
    box((9.2, top), 'match templates\none for each class', GOLD)
    box((13.0, top), 'batch norm,\nReLU', PLAIN)
    box((16.6, top), 'value vectors\nof what matched', BLUE)
    box((9.2, bottom), '1×1 convolution', PLAIN)
    for left, right in ((3.1, 3.9), (6.9, 7.7), (10.7, 11.5), (14.5, 15.1), (18.1, 18.9)):
        arrow((left, top), (right, top))
    arrow((1.6, top - 0.7), (7.7, bottom), 'angle,angleA=-90,angleB=180,rad=8')
    arrow((10.7, bottom), (19.3, top - 0.4), 'angle,angleA=0,angleB=90,rad=8')
    axes.text(19.3, top, '+', ha='center', va='center', fontsize=15, bbox=dict(
        boxstyle='circle,pad=0.2', facecolor='white', edgecolor='#555'))
    arrow((19.7, top), (21.9, top))
    axes.text(20.9, top + 0.25, 'last stage', ha='center', fontsize=10)
    arrow((9.2, top + 0.7), (9.2, top + 1.6))
    axes.text(
        9.2, top + 1.8, 'patch logits (B, classes, H, W): which class each region matched,\n'
        'supervised by the label of the image', ha='center', fontsize=10)
    save_figure(figure, path, bbox_inches='tight')


if __name__ == '__main__':
    draw()
    print(f'wrote {PATH}')
