""" Class names, in the order of the labels: of any pretrained config, and of the sets that pretrained weights are of
"""
from typing import Any, List

CIFAR10_LABELS = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')

CIFAR100_LABELS = tuple('''
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
'''.split())


def list_class_names(cfg: Any) -> List[str]:
    """Names of the classes of a pretrained config, none if it has none; timm takes a list, or a dict by index."""
    names = cfg.get('label_names') or ()
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    return list(names)
