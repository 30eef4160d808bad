"""Cut the sample out of the full CIFAR-10, as Hugging Face parquet: the first images of each class, in stored order.

    python train/sample/make.py ../shared/datasets/cifar10
"""
import sys
from collections import Counter
from pathlib import Path

import datasets

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
        data.select(rows).to_parquet(str(Path(__file__).parent / 'data' / f'{split}-00000-of-00001.parquet'))


if __name__ == '__main__':
    main(sys.argv[1])
