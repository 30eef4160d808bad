from .densenet import *  # noqa: F403  the entry points, as timm.models has them
from .densenet import DenseNetSmall as DenseNetSmall
from .resnet import *  # noqa: F403
from .resnet import PreActResNet as PreActResNet
