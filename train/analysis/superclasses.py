"""Classes that belong together, of the sets that say so."""
from typing import List, Optional, Tuple

import numpy as np

# the halves of Figure 5
_CIFAR10 = '''
vehicles: airplane automobile ship truck
animals: bird cat deer dog frog horse
'''

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


def find_superclasses(class_names: List[str]) -> Tuple[List[str], Optional[np.ndarray]]:
    """Names of the superclasses of a set and which of them each class is in (num_classes,), or [] and None."""
    for groups in (_CIFAR10, _CIFAR100):
        lines = [line.split(': ') for line in groups.strip().split('\n')]
        index = {name: i for i, (_, names) in enumerate(lines) for name in names.split()}
        if set(index) == set(class_names):
            return [name for name, _ in lines], np.array([index[name] for name in class_names])
    return [], None
