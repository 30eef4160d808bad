"""Render the model cards.

    python -m hub_cards                       # all of them, into hub_cards/rendered
    python -m hub_cards rn26_tm.cifar10
    python -m hub_cards --check               # fails when one is stale
"""
import argparse
from pathlib import Path
from typing import List, Optional

from hub_cards.card import RENDERED, list_cards, load_data, render
from timm_tmblock.errors import InputError, exiting_on_input_error
from timm_tmblock.files import write_text


def main(argv: Optional[List[str]] = None) -> None:
    """Run the command.

    Raises:
        InputError: For a card that cannot be rendered or, with --check, is stale.
    """
    parser = argparse.ArgumentParser(prog='python -m hub_cards', description='Render the model cards.')
    parser.add_argument('models', nargs='*', metavar='MODEL', help=f'default: all of {", ".join(list_cards())}')
    parser.add_argument('--check', action='store_true', help='write nothing, but fail if a card is out of date')
    args = parser.parse_args(argv)
    for name in args.models or list_cards():
        path, text = RENDERED / f'{name}.md', str(render(name))
        for picture in load_data(name)['pictures'].values():  # beside the card on the Hub alone
            text = text.replace(f']({Path(picture).name})', f'](../../{picture})')
        if args.check:
            if not path.is_file() or path.read_text(encoding='utf-8') != text:
                raise InputError(f'{path.name} is stale; run python -m hub_cards and commit it.')
            continue
        write_text(path, text)
        print(f'wrote {path}')


if __name__ == '__main__':
    with exiting_on_input_error():
        main()
