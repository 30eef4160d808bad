"""What is said of a network's class map beside other maps of where the evidence is."""
import math
from typing import Any, Dict, List, Optional


def find_p(lead: float, error: float, images: int) -> float:
    """McNemar's exact test of two accuracies on the same images, two-sided.

    Args:
        lead: Mean over images of the difference of right answers, each 1, 0 or -1.
        error: Its standard error.
        images: Their number.
    """
    discordant = round(images * (error ** 2 * (images - 1) + lead ** 2))
    fewer = round((discordant - images * abs(lead)) / 2)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1))  # SciPy's binomtest is not where cards are made
    return min(1., 2 * tail / 2 ** discordant)


def compare_maps(trust: Dict[str, Any], name: str) -> Dict[str, List[str]]:
    """By which measures the class map is significantly better or worse than another, each with its lead.

    Areas differ by two standard errors, accuracies by McNemar's exact test at 5 %. Insertion starts from the blurred
    image, whatever the mask, so that it counts where that is the mask.
    """
    row = trust['maps'][name]
    verdicts: Dict[str, List[str]] = {'better': [], 'worse': [], 'not significantly different': []}
    for key, sign, title in (
            ('deletion', -1, 'deletion'),
            ('insertion', 1, 'insertion'),
            ('without_most', -1, 'accuracy without the higher-ranked half'),
            ('without_least', 1, 'accuracy without the lower-ranked half')):
        if key == 'insertion' and trust['fill'] == 'mean':
            continue
        lead, error = sign * row[f'{key}_lead'] + 0., row[f'{key}_lead_error']  # nor is 0 negative
        if key.startswith('without'):
            same, digits = find_p(lead / 100, error / 100, trust['images']) > 0.05, 1
        else:
            same, digits = abs(lead) <= 2 * error, 3
        verdict = 'not significantly different' if same else 'better' if lead > 0 else 'worse'
        verdicts[verdict].append(f'{title} ({lead:+.{digits}f} ± {error:.{digits}f})')
    return verdicts


def say_leads(trust: Dict[str, Any]) -> List[str]:
    """A sentence on the class map beside each other map."""
    lines = []
    for name in list(trust['maps'])[1:]:
        found = [f'{verdict} by {", ".join(parts)}' for verdict, parts in compare_maps(trust, name).items() if parts]
        lines.append(f'Against {name}, the class map is {"; ".join(found)}.')
    return lines


def say_fillings(fillings: Optional[List[str]]) -> str:
    """What training has to do with what a network makes of images masked by the mean colour."""
    if fillings is None:
        return 'Whether training had the mean colour in its images is not recorded.'
    if not fillings:
        return ('The network was trained without random erasing: patches of the mean colour are unlike anything it has '
                'seen.')
    if fillings == ['random erasing']:
        return ('The network was trained with random erasing, which puts the same mean colour in the place of '
                'rectangles: it has learnt to do without parts that are masked.')
    return (f'Training put the same mean colour into images ({" and ".join(fillings)}), so the network has seen such '
            f'patches.')
