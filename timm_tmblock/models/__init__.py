from .densenet import DenseNetSmall as DenseNetSmall
from .resnet import PreActResNet as PreActResNet
