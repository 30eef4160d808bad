"""Cut the sample out of the full CIFAR-10: the first images of each class, in stored order.

Writes data/*.parquet, and images/*.png, the first test image of each class as a file to try things on.

    python train/sample/make.py uoft-cs/cifar10        # or a copy of it
"""
import sys
from collections import Counter
from pathlib import Path

import datasets

FOLDER = Path(__file__).parent
PER_CLASS = {'train': 150, 'test': 50}


def main(source: str) -> None:
    for split, per_class in PER_CLASS.items():
        data = datasets.load_dataset(source, split=split)
        seen: Counter = Counter()
        rows = []
        for i, label in enumerate(data['label']):
            seen[label] += 1
            if seen[label] <= per_class:
                rows.append(i)
        sample = data.select(rows)
        sample.to_parquet(str(FOLDER / 'data' / f'{split}-00000-of-00001.parquet'))
    (FOLDER / 'images').mkdir(exist_ok=True)
    for label, name in enumerate(sample.features['label'].names):
        image = sample[sample['label'].index(label)]['img']
        image.save(FOLDER / 'images' / f'{name}.png')


if __name__ == '__main__':
    main(sys.argv[1])
