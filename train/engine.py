"""Accelerate's part of a run: processes, precision and compilation."""
import os
from argparse import Namespace
from datetime import timedelta
from typing import Any, Dict

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    is_torch_xla_available,
)

from timm_tmblock.errors import InputError
from train.config import refusing
from train.hardware import resolve_device
from train.memory import keep_freed_memory
from train.trackers import resolve_trackers


def create_accelerator(args: Namespace) -> Accelerator:
    """Create the Accelerator; flags take precedence over `accelerate launch`.

    Raises:
        InputError: For a device, precision, compiler or tracker that is not to be had here.
    """
    launched = int(os.environ.get('WORLD_SIZE', 1)) if 'LOCAL_RANK' in os.environ else 1
    _check_gpus(args)
    if launched == 1 and AcceleratorState._shared_state:  # of an earlier run in this process, as in a notebook
        AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate would keep its precision and compiler
    compiler = _create_compiler(args)
    with refusing('These settings of Accelerate'):
        accelerator = Accelerator(
            cpu=args.device == 'cpu' or args.device == 'auto' and not _has_collectives(),
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(args.grad_accum_steps),  # the launcher's aside
            log_with=resolve_trackers(args.report_to) or None,
            project_dir=args.output,  # trackers want one; the experiment folder's name needs an accelerator first
            dynamo_plugin=compiler,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # one may download while others wait
        )
    _check_launch(accelerator, args, launched)
    if accelerator.mixed_precision in ('no', 'fp16', 'bf16'):
        args.mixed_precision = accelerator.mixed_precision  # the launcher's too belongs to the settings of the run
    _check_graphs(accelerator, args)
    _check_sharding(accelerator, args)
    if accelerator.device.type == 'cpu':
        if accelerator.mixed_precision == 'fp16':
            raise InputError('fp16 needs a GPU; use --mixed-precision bf16 or no on the CPU.')
        if args.sync_bn:
            raise InputError('--sync-bn needs GPUs; PyTorch has no synchronized batch norm for the CPU.')
        keep_freed_memory()
    if accelerator.distributed_type == DistributedType.FSDP or accelerator.device.type == 'mps':
        # FSDP2 refuses such parameters; batch norm and pooling have wrong gradients there on Apple's GPUs
        # (pytorch/pytorch#175189, #175190)
        args.channels_last = False
    torch.backends.cudnn.benchmark = True  # all batches have one shape, as in timm's train.py
    return accelerator


def _check_gpus(args: Namespace) -> None:
    device = resolve_device(args.device)
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if device.type == 'cuda' and here > max(1, torch.cuda.device_count()):  # NCCL refuses two on one
        raise InputError(
            f'{here} processes were launched on a machine with {torch.cuda.device_count()} GPUs; launch one per GPU '
            f'(--num_processes of accelerate launch).')


def _check_launch(accelerator: Accelerator, args: Namespace, launched: int) -> None:
    if args.device not in ('auto', accelerator.device.type):  # by `accelerate launch --cpu`
        raise InputError(
            f'--device {args.device} was asked for, but Accelerate was set up for {accelerator.device.type}; leave out '
            f'--device, or launch without --cpu.')
    if accelerator.num_processes < launched:  # each would train alone and write to the same folder
        raise InputError(f'{launched} processes were launched, but Accelerate joins none of them on this device, so '
                         f'each would train alone; use --device cpu, or launch a single process.')


def _check_graphs(accelerator: Accelerator, args: Namespace) -> None:
    if args.grad_accum_steps > 1 and captures_graphs(args):
        raise InputError(
            'This --torchcompile captures CUDA graphs, which overwrite the gradients that --grad-accum-steps adds up; '
            'leave out one of the two.')
    if not args.cuda_graph:
        return
    if args.grad_accum_steps > 1:
        raise InputError(
            '--cuda-graph cannot capture steps that only add up gradients; use --no-cuda-graph or --grad-accum-steps '
            '1.')
    if captures_graphs(args):
        raise InputError(
            'This --torchcompile captures CUDA graphs itself, which --cuda-graph cannot capture again; use '
            '--no-cuda-graph.')
    if args.eval_only:
        return
    if accelerator.device.type != 'cuda':
        raise InputError(
            f'--cuda-graph needs a GPU of NVIDIA or AMD, not {accelerator.device}; use --no-cuda-graph.')
    if accelerator.distributed_type != DistributedType.NO or accelerator.mixed_precision not in ('no', 'bf16'):
        raise InputError(
            '--cuda-graph is for one process, and neither fp16 nor fp8; use --no-cuda-graph, or launch one process '
            'with --mixed-precision bf16.')


def _check_sharding(accelerator: Accelerator, args: Namespace) -> None:
    if accelerator.state.deepspeed_plugin is not None:
        _configure_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, args)
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator, args)
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded and args.model_ema:
        raise InputError('--model-ema keeps whole weights, which FSDP and DeepSpeed divide; leave out --model-ema.')


def _create_compiler(args: Namespace) -> TorchDynamoPlugin:
    """The compiler of the flags, else the launcher's, which the settings of the run then name."""
    with refusing(f'The compiler {args.torchcompile!r}'):
        compiler = TorchDynamoPlugin(
            backend=args.torchcompile, mode=args.torchcompile_mode, dynamic=False if args.torchcompile else None)
    compiles = compiler.backend != DynamoBackend.NO
    args.torchcompile = compiler.backend.value.lower() if compiles else None
    args.torchcompile_mode = compiler.mode if compiles else None
    return compiler


def _has_collectives() -> bool:
    # without a GPU, Accelerate joins the processes of a launch only if it is told to use the CPU; Apple's joins none,
    # and is left to --device mps
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and device.type != 'mps' or is_torch_xla_available()


def _check_fsdp(accelerator: Accelerator, args: Namespace) -> None:
    """
    Raises:
        InputError: For settings that FSDP cannot train with.
    """
    plugin = getattr(accelerator.state, 'fsdp_plugin', None)
    if plugin is not None and (plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading):
        raise InputError(
            'FSDP must be version 2, without fsdp_cpu_ram_efficient_loading; launch with --config_file '
            'train/accelerate/fsdp.yaml.')
    if args.mixed_precision != 'no':
        raise InputError('FSDP casts batch norms but not their running statistics; use --mixed-precision no.')
    if args.clip_grad and args.clip_mode != 'norm':  # of which PyTorch's shards allow nothing else
        raise InputError(f'FSDP clips by the norm alone, not by {args.clip_mode}; use --clip-mode norm.')
    if args.torchcompile:
        raise InputError(
            'FSDP gathers the weights of a compiled model in its compiled call alone, which validation does not '
            'make; use --torchcompile no.')


def _configure_deepspeed(config: Dict[str, Any], args: Namespace) -> None:
    """Write the run's batch, accumulation and clipping into DeepSpeed's configuration.

    Raises:
        InputError: For what DeepSpeed does otherwise than the flags say.
    """
    if args.mixed_precision != 'no':
        raise InputError('DeepSpeed casts the whole network, batch norms too, but no images; use --mixed-precision no.')
    if 'muon' in args.opt:
        raise InputError(f'{args.opt} needs the shapes of the weights, which DeepSpeed flattens; choose another --opt.')
    if args.clip_grad and args.clip_mode != 'norm':
        raise InputError(f'DeepSpeed clips only by the norm, not by {args.clip_mode}; use --clip-mode norm.')
    if config.get('zero_optimization', {}).get('stage') == 3:
        raise InputError('ZeRO stage 3 divides the weights, which are then not validated; use --zero_stage 2.')
    for key, flag, default, value in (
            ('gradient_accumulation_steps', 'grad-accum-steps', 1, args.grad_accum_steps),
            ('gradient_clipping', 'clip-grad', 0, args.clip_grad or 0)):
        configured = config.get(key, 'auto')
        if configured not in ('auto', default, value):
            raise InputError(
                f'The configuration of DeepSpeed has {key} {configured}, but the flags of the run set it; use --{flag} '
                f'{configured}, or take {key} out of the configuration.')
    config['gradient_accumulation_steps'] = args.grad_accum_steps
    config['gradient_clipping'] = args.clip_grad or 0.  # it clips by itself, 'auto' by 1
    config['train_micro_batch_size_per_gpu'] = args.batch_size  # which it would take from a DataLoader


def captures_graphs(args: Namespace) -> bool:
    """Whether the compiler replays CUDA graphs."""
    if args.torchcompile != 'inductor':
        return args.torchcompile == 'cudagraphs'
    from torch._inductor import list_mode_options  # takes its time
    return bool(list_mode_options().get(args.torchcompile_mode, {}).get('triton.cudagraphs'))
