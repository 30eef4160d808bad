from .patch_mean import PatchMean as PatchMean
from .template_matching import PatchClassifier as PatchClassifier
from .template_matching import TemplateMatching as TemplateMatching
