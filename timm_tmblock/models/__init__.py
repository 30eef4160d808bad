from .resnet import PreActResNet as PreActResNet
