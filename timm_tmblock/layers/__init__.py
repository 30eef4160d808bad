from .fuse import fuse_conv_norm as fuse_conv_norm
from .maximizer import HardMaximizer as HardMaximizer
from .maximizer import PerturbedMaximizer as PerturbedMaximizer
from .maximizer import SoftMaximizer as SoftMaximizer
from .maximizer import get_maximizer_layer as get_maximizer_layer
from .patch_mean import PatchMean as PatchMean
from .template_matching import PatchClassifier as PatchClassifier
from .template_matching import TemplateMatching as TemplateMatching
