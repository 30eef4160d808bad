"""Template matching residual networks for small images, registered with timm.

>>> import timm, timm_tmblock
>>> model = timm.create_model('rn26_tm', pretrained=True)
"""
from timm import create_model as create_model

from . import analysis as analysis
from . import layers as layers
from . import models as models
from ._version import __version__ as __version__
from .auxiliary import PatchSupervised as PatchSupervised
from .checkpoint import load_model as load_model
from .errors import InputError as InputError
from .explanation import Explainer as Explainer
from .explanation import Explanation as Explanation
from .explanation import explain as explain
from .task import TemplateMatchingTask as TemplateMatchingTask
