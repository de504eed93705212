"""Training: data, optimizer, loop, metrics, checkpoints and export.

Takes a model that ``parallelize`` cut, its plan and a job; gives a run directory.  Knows nothing of how
plans are found, and prints nothing.
"""

from .checkpoint import TrainState, all_checkpoints, find_checkpoint, load_checkpoint, read_state, save_checkpoint
from .data import Dataset
from .export import checkpoint_to_hf
from .interface import Reporter
from .lineage import Lineage, check_goes_on, notable_changes
from .load import load_dataset, prepare_source
from .memory import PeakMemory
from .metrics import StepMetrics, read_metrics
from .optimizer import build_optimizer, lr_at
from .processing import processing_of
from .rows import DocumentRows, StreamRows
from .start import train
from .tokenizer import ByteTokenizer, load_tokenizer
from .tokens import prepare_tokens
from .trainer import Trainer, TrainResult

__all__ = [
    "ByteTokenizer",
    "Dataset",
    "DocumentRows",
    "Lineage",
    "PeakMemory",
    "Reporter",
    "StepMetrics",
    "StreamRows",
    "TrainResult",
    "TrainState",
    "Trainer",
    "all_checkpoints",
    "build_optimizer",
    "check_goes_on",
    "checkpoint_to_hf",
    "find_checkpoint",
    "load_checkpoint",
    "load_dataset",
    "load_tokenizer",
    "lr_at",
    "notable_changes",
    "prepare_source",
    "prepare_tokens",
    "processing_of",
    "read_metrics",
    "read_state",
    "save_checkpoint",
    "train",
]
