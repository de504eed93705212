"""``job.toml``: everything one run needs, in one file; every section maps to one verb's options.

Paths in a job file are relative to the file itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StrictBool, field_validator, model_validator

from .errors import ConfigError
from .lora import Lora
from .model import Precision, ReduceDtype
from .numbers import Count, Devices, Layers, NonNegative, Positive, Sequences, Tokens, Whole
from .parsing import parse_toml, read_text
from .records import Record, validate
from .tasks import Task
from .units import parse_bytes

MAX_NAME, MAX_PATH = 255, 2000  # bytes of a part (Linux), characters in all: half of what Linux takes


def _no_endless_name(text: str) -> str:
    if "\0" in text or len(text) > MAX_PATH or any(len(part.encode()) > MAX_NAME for part in text.split("/")):
        raise ValueError(f"a path or name has at most {MAX_NAME} bytes a part and no null byte; shorten it")
    return text


HELD_OUT = 0.02
"""The share of a source that is evaluated on where none is given."""

Place = Annotated[str, AfterValidator(_no_endless_name)]
"""A path or a name that a file system can be asked for."""


class ModelSection(Record):
    """Which model: a Hugging Face ``config.json``, a local directory or a hub name.

    ``weights`` loads the checkpoint found there; otherwise weights are initialised from ``train.seed``.  ``freeze``:
    parameters that are not trained, by name or shell pattern (``model.layers.0.*``).  ``lora``: adapters, beside which
    all that the checkpoint holds is frozen.

    ``task``, and ``num_labels`` of a classifier, replace what its config says.
    """

    path: Place
    task: Task | None = None
    num_labels: Count | None = None
    weights: StrictBool = False
    freeze: tuple[str, ...] = ()
    lora: Lora | None = None

    @model_validator(mode="after")
    def _adapters_have_something_to_adapt(self) -> Self:
        if self.lora is not None and not self.weights:
            raise ValueError("lora adapts trained weights; set weights = true, so that path's checkpoint is loaded")
        return self


class DataSection(Record):
    """Which text: ``.txt``, ``.jsonl``, ``.csv``, ``.parquet`` files (or ``.gz`` of them), a dataset, ``python-docs``.

    ``records`` says what a record is: ``text`` in ``text_field``; ``conversations``, messages of a role and a content
    in ``messages_field``, of which answers alone are learnt; or ``pairs`` of ``prompt_field`` and ``completion_field``,
    of which completions alone are learnt.  ``chat_template`` is a Jinja file in place of the tokenizer's own template.
    ``separate_documents``: whether texts in one row of tokens are apart; others always are.
    ``tokenizer`` is a local directory, a hub name or ``bytes`` (256 byte tokens and an end-of-text token).
    ``label_field`` has the class of a sample, and ``image_field`` or ``audio_field`` a path or bytes, where records
    hold them; ``processor`` is the directory or hub name of what reads images or sounds, and ``augment`` crops and
    turns images that are trained on.
    ``skip_bad_records``: a record that is not what it should be is counted and left out, not refused.
    ``validation`` is a source of its own, never trained on; of a dataset its ``validation_split``.  ``eval_fraction``
    of ``source`` is held out, by default 0.02, nothing where there is a ``validation``.
    """

    source: Place
    validation: Place | None = None
    tokenizer: Place = "bytes"
    records: Literal["text", "conversations", "pairs"] = "text"
    text_field: str = "text"
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    image_field: str = "image"
    audio_field: str = "audio"
    label_field: str = "label"
    processor: Place | None = None
    augment: StrictBool = True
    chat_template: Place | None = None
    separate_documents: StrictBool = False
    split: str = "train"
    validation_split: str = "validation"
    skip_bad_records: StrictBool = False
    eval_fraction: float | None = Field(default=None, strict=True, ge=0, lt=1)

    @property
    def is_apart(self) -> bool:
        """Whether no document of a row sees another one."""
        return self.records != "text" or self.separate_documents

    @property
    def held_out(self) -> float:
        """The share of ``source`` that is evaluated on, not trained on."""
        usual = HELD_OUT if self.validation is None else 0.0
        return usual if self.eval_fraction is None else self.eval_fraction

    @property
    def of_validation(self) -> Self | None:
        """The section of the validation source, if there is one."""
        if self.validation is None:
            return None
        own = {"source": self.validation, "split": self.validation_split, "validation": None}
        return self.model_copy(update=own)

    @model_validator(mode="after")
    def _template_renders_conversations(self) -> Self:
        if self.chat_template is not None and self.records != "conversations":
            raise ValueError(f"chat_template renders conversations, not {self.records}; set records or remove it")
        return self


class ClusterSection(Record):
    """Where it runs: local processes to start, and the device type."""

    num_processes: Devices = 1
    device: Literal["cpu", "cuda", "auto"] = "auto"


class SearchSection(Record):
    """What the search may choose: the memory limit per device and, if given, fixed dimensions."""

    memory: str | None = None
    pp: Layers | None = None
    num_microbatches: Sequences | None = None
    max_tp: Devices | None = None

    @field_validator("memory")
    @classmethod
    def _memory_parses(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_bytes(value)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value


Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


class TrainSection(Record):
    """How to train: batch, optimiser, learning-rate schedule, and how often to evaluate, log and save.

    ``label_smoothing`` and ``z_loss`` are terms of the training loss, not of evaluations.
    ``router_bias_rate``: what the biases of routers that have some move by after every step (DeepSeek-V3's: 0.001).
    ``capacity_factor``: how many of a microbatch's choices an expert takes, of an even load; by default all.
    ``compile``: whether layers are compiled, profiled ones too; ``auto`` on CUDA alone.
    ``fp8``: whether products of layers are made in float8, profiled ones too, beside bf16 for all else.
    ``seed`` is what torch's generators take.  ``max_skipped_steps`` steps in a row may be skipped, unlearnt, because
    their loss or gradient is not finite; the next one ends the run.
    """

    global_batch_size: Sequences
    seq_len: Tokens
    num_steps: Count
    precision: Precision = "fp32"
    grad_reduce_dtype: ReduceDtype = "fp32"
    label_smoothing: float = Field(default=0.0, strict=True, ge=0, lt=1)
    z_loss: NonNegative = 0.0
    router_bias_rate: NonNegative = 0.0
    capacity_factor: Positive | None = None
    compile: StrictBool | Literal["auto"] = "auto"
    fp8: StrictBool = False
    seed: int = Field(default=0, strict=True, ge=0, lt=2**64)
    lr: Positive = 3e-4
    min_lr: NonNegative = 0.0
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: Whole = 0
    decay_steps: Whole = 0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    max_grad_norm: Positive | None = 1.0
    max_skipped_steps: Whole = 0
    eval_every: Whole = 0
    eval_batches: Count = 4
    save_every: Whole = 0
    keep_checkpoints: Count = 3
    tensorboard: StrictBool = False

    @property
    def compiled(self) -> bool | None:
        """``compile`` as functions take it: None where the device decides."""
        return None if self.compile == "auto" else self.compile

    @model_validator(mode="after")
    def _schedule_agrees(self) -> Self:
        if self.fp8 and self.precision != "bf16":
            raise ValueError(f"fp8 products go with precision=bf16 for all else, got {self.precision}; set it to bf16")
        steps, warmup, decay = self.num_steps, self.warmup_steps, self.decay_steps
        if warmup > steps:
            raise ValueError(f"warmup_steps={warmup} must not exceed num_steps={steps}; lower warmup_steps")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} must not exceed lr={self.lr}; lower min_lr")
        if self.min_lr > 0 and self.lr_schedule == "constant":
            raise ValueError(f"min_lr={self.min_lr} has no meaning for a constant schedule; remove it or choose cosine")
        if self.lr_schedule == "wsd" and not 0 < decay <= steps - warmup:
            raise ValueError(
                f"a wsd schedule needs decay_steps from 1 to num_steps - warmup_steps = {steps - warmup}, got {decay}; "
                "a tenth of num_steps is usual"
            )
        if self.lr_schedule != "wsd" and decay > 0:
            raise ValueError(f"decay_steps={decay} belongs to the wsd schedule, not to {self.lr_schedule}; remove it")
        return self


class ResumeSection(Record):
    """A rehearsed restart: stop and save after ``at_step``, then train on in new processes under another plan.

    ``plan`` is ``runner-up`` (another plan that fits, with another pipeline or other layer strategies) or a plan file.
    """

    at_step: Count
    plan: Place = "runner-up"


class GenerateSection(Record):
    """Text to continue with the trained model, exported to Hugging Face's format.

    Each token is the likeliest at ``temperature`` 0, else drawn with ``train.seed``.
    """

    prompt: str
    max_new_tokens: Count = 64
    temperature: NonNegative = 0.0


class Job(Record):
    """A job file."""

    model: ModelSection
    data: DataSection
    cluster: ClusterSection = ClusterSection()
    search: SearchSection = SearchSection()
    train: TrainSection
    resume: ResumeSection | None = None
    generate: GenerateSection | None = None

    @model_validator(mode="after")
    def _resume_is_within(self) -> Self:
        if self.resume is not None and self.resume.at_step >= self.train.num_steps:
            raise ValueError(
                f"resume.at_step={self.resume.at_step} must be below train.num_steps={self.train.num_steps}; lower it"
            )
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a TOML job; relative paths become relative to the file.  Raises ConfigError."""
        text = parse_toml(read_text(path, ConfigError), str(path), ConfigError)
        job = validate(cls, text, str(path), ConfigError)
        base = Path(path).resolve().parent
        given = {name: getattr(job.data, name) for name in _PLACES_OF_DATA}
        places = {name: _relative(place, base) for name, place in given.items() if place is not None}
        updates: dict[str, Record] = {
            "model": job.model.model_copy(update={"path": _relative(job.model.path, base)}),
            "data": job.data.model_copy(update=places),
        }
        if job.resume is not None:
            updates["resume"] = job.resume.model_copy(update={"plan": _relative(job.resume.plan, base)})
        return job.model_copy(update=updates)

    def adapted(self, lora: str | None) -> Self:
        """The same job with the adapters that ``lora`` describes (see ``Lora.parse``); raises ConfigError."""
        if lora is None:
            return self
        data = self.model_dump()
        data["model"]["lora"] = Lora.parse(lora).model_dump()
        return validate(type(self), data, "the job with --lora", ConfigError)

    def trained_for(self, task: Task | None) -> Self:
        """The same job for another ``model.task``, if it is given."""
        if task is None:
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"task": task})})

    def validated_on(self, source: str | None) -> Self:
        """The same job with another ``data.validation``, if it is given."""
        if source is None:
            return self
        return self.model_copy(update={"data": self.data.model_copy(update={"validation": source})})


_PLACES_OF_DATA = ("source", "validation", "tokenizer", "chat_template", "processor")


def _relative(text: str, base: Path) -> str:
    """``text`` as a path under ``base`` where such a file exists, else unchanged (a hub name, a keyword)."""
    candidate = base / text
    return str(candidate) if candidate.exists() else text
