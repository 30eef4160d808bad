"""The loss of a run: cross-entropy or equation 3.1, with or without a teacher."""
from argparse import Namespace
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.task import ClassificationTask, TrainingTask
from timm.task.distillation import DistillationTeacher
from timm.utils import unwrap_model

from timm_tmblock.checkpoint import load_model, load_pretrained
from timm_tmblock.errors import InputError
from timm_tmblock.models._labels import list_class_names
from timm_tmblock.task import TemplateMatchingTask
from train.augment import DataConfig
from train.config import refusing
from train.data import check_classes


class DistillationTask(TrainingTask):
    """Any classification task with a teacher's soft targets added, as in timm's LogitDistillationTask.

        loss = task_loss_weight * task loss + distill_loss_weight * temperature^2 * KL(teacher || student)

    The logits of several teachers are averaged. Each sees the student's images, normalised and resized as it was
    trained.
    """

    def __init__(
            self,
            task: TrainingTask,
            teachers: Sequence[DistillationTeacher],
            config: DataConfig,
            temperature: float,
            task_loss_weight: Optional[float],
            distill_loss_weight: Optional[float],
            autocast: Callable[[], ContextManager],
    ) -> None:
        """
        Args:
            task: Task of the student.
            teachers: Teachers, on the task's device.
            config: What the student expects of its input.
            temperature: Temperature of both softmaxes.
            task_loss_weight: Weight of the task's own loss.
            distill_loss_weight: Weight of the divergence; both as in timm's LogitDistillationTask where None.
            autocast: Context the teachers run in.
        """
        super().__init__(device=task.device)
        self.task = task
        self.trainable_module = task.trainable_module
        self.teachers = torch.nn.ModuleList(teacher.requires_grad_(False) for teacher in teachers)
        self.temperature = temperature
        complementary = distill_loss_weight is None and task_loss_weight is not None
        self.task_loss_weight = 1. if task_loss_weight is None else task_loss_weight
        self.distill_loss_weight = 1. - self.task_loss_weight if complementary else (
            1. if distill_loss_weight is None else distill_loss_weight)
        self.autocast = autocast
        self.register_buffer('mean', torch.tensor(config.mean, device=task.device).view(1, -1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(config.std, device=task.device).view(1, -1, 1, 1), persistent=False)
        # here, as comparing tensors waits for the device
        self.same_pixels = [torch.equal(self.mean, t.mean_kd) and torch.equal(self.std, t.std_kd) for t in teachers]
        self.sizes = [tuple(unwrap_model(t.model).pretrained_cfg['input_size'][-2:]) for t in teachers]

    @torch.no_grad()
    def teach(self, input: torch.Tensor) -> torch.Tensor:
        """Mean of the teachers' logits [B, num_classes] for the student's input [B, C, H, W]."""
        logits = []
        for teacher, same_pixels, size in zip(self.teachers, self.same_pixels, self.sizes):
            x = input if same_pixels else (input * self.std + self.mean - teacher.mean_kd) / teacher.std_kd
            if x.shape[-2:] != size:
                x = F.interpolate(x, size, mode='bicubic', antialias=True)
            with self.autocast():
                logits.append(teacher.eval()(x).float())
        return torch.stack(logits).mean(0)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        result = self.task(input, target)
        student = F.log_softmax(result['output'].float() / self.temperature, dim=-1)
        teacher = F.log_softmax(self.teach(input) / self.temperature, dim=-1)
        kd_loss = F.kl_div(student, teacher, reduction='batchmean', log_target=True) * self.temperature ** 2
        loss = self.task_loss_weight * result['loss'] + self.distill_loss_weight * kd_loss
        return {**result, 'loss': loss, 'task_loss': result['loss'], 'kd_loss': kd_loss}


def create_teachers(
        args: Namespace,
        class_names: Sequence[str],
        in_chans: int,
        device: torch.device,
) -> List[DistillationTeacher]:
    """The teachers the settings name, with their weights; none if they name none.

    Raises:
        InputError: If there is none of a name, it has no weights, they are for other classes or channels, or the loss
            weights leave nothing for them.
    """
    names, files = args.kd_model_name or [], args.kd_checkpoint or []
    if (names or files) and args.distill_loss_weight is None and (args.task_loss_weight or 0) >= 1:
        raise InputError(
            f'--task-loss-weight {args.task_loss_weight:g} leaves nothing for the teacher; give --distill-loss-weight '
            f'too.')
    if names and files and len(names) != len(files):
        raise InputError(
            f'--kd-checkpoint names {len(files)} files and --kd-model-name {len(names)} models; name one model each, '
            f'or none if the files say theirs.')
    if files:
        models = [load_model(file, name) for file, name in zip(files, names or [None] * len(files))]
    else:
        models = [load_pretrained(name) for name in names]
    return [_prepare_teacher(model, args, class_names, in_chans, device) for model in models]


def _prepare_teacher(
        model: torch.nn.Module,
        args: Namespace,
        class_names: Sequence[str],
        in_chans: int,
        device: torch.device,
) -> DistillationTeacher:
    if model.num_classes != len(class_names):
        raise InputError(
            f'The teacher has {model.num_classes} classes and the data has {len(class_names)}; '
            f'train it on this data first and name its weights with --kd-checkpoint.')
    config: Any = model.pretrained_cfg
    channels = getattr(model, 'in_chans', config['input_size'][0])
    if channels != in_chans and in_chans != 1:  # images of one channel are given to teachers of three
        raise InputError(f'The teacher takes images of {channels} channels and the model of {in_chans}; name another.')
    labels = list_class_names(config)
    if labels:
        check_classes('The teacher', labels, 'the data', class_names)
    if args.channels_last:  # as the images
        model = model.to(memory_format=torch.channels_last)
    teacher = DistillationTeacher(model.to(device), device=device)
    if args.torchcompile:
        with refusing('These settings of the compiler'):
            teacher.compile(args.torchcompile, args.torchcompile_mode, dynamic=False)
    return teacher


def create_task(
        args: Namespace,
        model: torch.nn.Module,
        accelerator: Accelerator,
        config: DataConfig,
        teachers: Sequence[DistillationTeacher],
) -> TrainingTask:
    """The task of a model, which may be prepared by Accelerate."""
    soft_targets = args.mixup > 0 or args.cutmix > 0
    criterion_kwargs = dict(smoothing=args.smoothing, soft_targets=soft_targets)
    device = accelerator.device
    with refusing('These settings of the loss'):
        plain = unwrap_model(model)
        if getattr(plain, 'has_template_matching', hasattr(plain, 'set_patch_supervision')):
            task: TrainingTask = TemplateMatchingTask(
                model, criterion_kwargs=criterion_kwargs, patch_loss_weight=args.patch_loss_weight, device=device)
        else:
            task = ClassificationTask(model, criterion_kwargs=criterion_kwargs, device=device)
    if not teachers:
        return task
    return DistillationTask(
        task, teachers, config, args.kd_temperature, args.task_loss_weight, args.distill_loss_weight,
        accelerator.autocast)
