from .tm_densenet import *  # noqa: F403  the entry points, as timm.models has them
from .tm_densenet import DenseNetSmall as DenseNetSmall
from .tm_resnet import *  # noqa: F403
from .tm_resnet import PreActResNet as PreActResNet
