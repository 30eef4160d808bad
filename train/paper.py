"""What the paper reports: Table 1, top-1 accuracy (%), and what its ablations vary."""
from typing import Dict, List, Tuple

DATASETS = ('cifar10', 'cifar100', 'mini_imagenet')
DATASET_NAMES = dict(cifar10='CIFAR-10', cifar100='CIFAR-100', mini_imagenet='Mini-ImageNet')

# recipe: name in the paper, accuracy on CIFAR-10, CIFAR-100 and Mini-ImageNet
TABLE_1: Dict[str, Tuple[str, float, float, float]] = {
    'rn26': ('RN26', 89.52, 65.94, 60.43),
    'rn26_aux': ('RN26-aux', 90.57, 66.21, 60.70),
    'rn26_tm': ('RN26-Ours', 91.06, 66.78, 61.23),
    'rn38': ('RN38', 90.78, 68.15, 60.72),
    'rn38_tm': ('RN38-Ours', 91.36, 69.01, 63.83),
    'wrn16': ('WRN16', 90.52, 67.11, 60.73),
    'wrn16_tm': ('WRN16-Ours', 91.10, 67.36, 62.92),
    'dn100': ('DN100', 92.62, 71.65, 65.03),
    'dn100_tm': ('DN100-Ours', 92.92, 71.25, 68.86),
    'dn100_tm_cat': ('DN100-Ours-C', 92.71, 72.14, 68.93),
}
DEPTH = ('rn26', 'rn26_tm', 'rn38', 'rn38_tm')
LAMBDAS: List[float] = [0., 0.1, 0.25, 0.5, 0.75, 0.9]  # the grid of Figure 4 is not in the text
NUM_SAMPLES = 600  # of the perturbed maximizer
