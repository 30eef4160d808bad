from ._base import TemplateMatchingNet as TemplateMatchingNet
from .tm_densenet import *  # noqa: F403  the entry points, as timm.models has them
from .tm_resnet import *  # noqa: F403
