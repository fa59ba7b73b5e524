"""Operate on the batch-normalization layers of any PyTorch model.

Find them (:func:`bn_layers`), choose what trains (:func:`freeze_except_bn`), reset and re-estimate their statistics
(:func:`reset_bn_stats`, :func:`recalibrate_bn`), read them as one affine map (:func:`fold_bn`), fuse them
(:func:`fuse_bn`), split them into branches (:func:`split_bn`), replace them (:func:`replace_bn`), keep them as a small
patch (:func:`bn_state`, :func:`save_bn_patch`), fine-tune them adversarially (:func:`adv_finetune`), and measure the
result (:func:`evaluate`).
"""

from __future__ import annotations

from bnsurgery.adapters import autoattack
from bnsurgery.attacks import PGD, Attack
from bnsurgery.engine import Engine
from bnsurgery.errors import (
    BNSurgeryError,
    BNSurgeryWarning,
    CheckpointError,
    FusionError,
    LostProcessError,
    MissingExtraError,
    NoBatchNormError,
    NonFiniteError,
    PatchError,
)
from bnsurgery.evaluation import AttackRow, Evaluation, evaluate
from bnsurgery.finetuning import EpochRecord, Finetuning, StepRecord, adv_finetune
from bnsurgery.folding import Affine, fold_bn
from bnsurgery.freezing import Freeze, freeze_except_bn
from bnsurgery.fusion import FusionPlan, fuse_bn, plan_fusion
from bnsurgery.layers import bn_layers
from bnsurgery.patches import bn_state, load_bn_patch, load_bn_state, save_bn_patch, swap_bn
from bnsurgery.processes import Processes, processes
from bnsurgery.replacement import Replaced, Replacement, replace_bn
from bnsurgery.stats import Recalibration, recalibrate_bn, reset_bn_stats
from bnsurgery.surgery import keep_branch, split_bn, use_branch

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "Affine",
    "Attack",
    "AttackRow",
    "BNSurgeryError",
    "BNSurgeryWarning",
    "CheckpointError",
    "Engine",
    "EpochRecord",
    "Evaluation",
    "Finetuning",
    "Freeze",
    "FusionError",
    "FusionPlan",
    "LostProcessError",
    "MissingExtraError",
    "NoBatchNormError",
    "NonFiniteError",
    "PatchError",
    "Processes",
    "Recalibration",
    "Replaced",
    "Replacement",
    "StepRecord",
    "adv_finetune",
    "autoattack",
    "bn_layers",
    "bn_state",
    "evaluate",
    "fold_bn",
    "freeze_except_bn",
    "fuse_bn",
    "keep_branch",
    "load_bn_patch",
    "load_bn_state",
    "plan_fusion",
    "processes",
    "recalibrate_bn",
    "replace_bn",
    "reset_bn_stats",
    "save_bn_patch",
    "split_bn",
    "swap_bn",
    "use_branch",
]
