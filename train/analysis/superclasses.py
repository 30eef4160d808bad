"""Classes that belong together, of the sets that say so."""
from typing import Dict, List, Optional

import numpy as np

_VEHICLES = ('airplane', 'automobile', 'ship', 'truck')
_ANIMALS = ('bird', 'cat', 'deer', 'dog', 'frog', 'horse')

# the 20 of the set itself (Krizhevsky, 2009)
_CIFAR100 = '''
aquatic mammals: beaver dolphin otter seal whale
fish: aquarium_fish flatfish ray shark trout
flowers: orchid poppy rose sunflower tulip
food containers: bottle bowl can cup plate
fruit and vegetables: apple mushroom orange pear sweet_pepper
household electrical devices: clock keyboard lamp telephone television
household furniture: bed chair couch table wardrobe
insects: bee beetle butterfly caterpillar cockroach
large carnivores: bear leopard lion tiger wolf
large man-made outdoor things: bridge castle house road skyscraper
large natural outdoor scenes: cloud forest mountain plain sea
large omnivores and herbivores: camel cattle chimpanzee elephant kangaroo
medium-sized mammals: fox porcupine possum raccoon skunk
non-insect invertebrates: crab lobster snail spider worm
people: baby boy girl man woman
reptiles: crocodile dinosaur lizard snake turtle
small mammals: hamster mouse rabbit shrew squirrel
trees: maple_tree oak_tree palm_tree pine_tree willow_tree
vehicles 1: bicycle bus motorcycle pickup_truck train
vehicles 2: lawn_mower rocket streetcar tank tractor
'''


def _read_sets() -> List[Dict[str, str]]:
    lines = (line.partition(': ') for line in _CIFAR100.strip().split('\n'))
    return [
        {**dict.fromkeys(_VEHICLES, 'vehicles'), **dict.fromkeys(_ANIMALS, 'animals')},
        {name: group for group, _, names in lines for name in names.split()},
    ]


def _find_groups(class_names: List[str]) -> Dict[str, str]:
    """Superclass of each class by name, empty for a set without any."""
    return next((groups for groups in _read_sets() if set(groups) == set(class_names)), {})


def find_superclasses(class_names: List[str]) -> Optional[np.ndarray]:
    """Index of the superclass of each class (num_classes,), None for a set without any.

    CIFAR-10 has vehicles and animals, the halves of Figure 5; CIFAR-100 has its 20.
    """
    groups, names = _find_groups(class_names), name_superclasses(class_names)
    return np.array([names.index(groups[name]) for name in class_names]) if groups else None


def name_superclasses(class_names: List[str]) -> List[str]:
    """Names of the superclasses, empty for a set without any."""
    return list(dict.fromkeys(_find_groups(class_names).values()))
