"""Parts ``parity`` and ``mixes``: plans of several ranks against one process in float32 on the CPU, over NCCL.

On one GPU the ranks share it (``galvatron.testing.Pool``): what they send each other is slow, what they compute and in
which order is what many GPUs would.  ``parity``: plans of one technique; ``mixes``: random ones of every kind of model,
in the precisions that train, the last ones compiled.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from galvatron.core.errors import GalvatronError
from galvatron.core.model import Precision
from galvatron.plan import Plan
from galvatron.testing import Pool, WorkerError
from galvatron.testing.models import VARIANTS
from galvatron.testing.plans import pure_plans, random_plans
from galvatron.testing.sweep import Sweep, seq_len_for, variant_spec

from .children import Child, Clock, CutShortError, Row, reason_of, rows_of_all
from .modes import WRONG
from .sizes import Device

PURE = {"llama": 2, "mixtral": 2, "gpt_oss": 2}
"""Models whose plans of one technique are tried, and on how many ranks."""
LANES = 4
"""Checks that run at once: ranks of one mostly wait for each other."""
FIRST = (
    "llama",
    "mixtral",
    "t5",
    "gpt_oss",
    "clip",
    "bert",
    "gemma2",
    "vit",
    "qwen3_moe",
    "llava",
    "modernbert",
    "whisper",
)
"""Models whose mixes come first; those of all others follow."""
MODES: tuple[tuple[int, Precision, bool], ...] = (
    (2, "bf16", False),
    (4, "fp32", False),
    (2, "fp32", True),
    (4, "bf16", False),
    (2, "bf16", True),
)
"""Ranks, precision, and whether layers are compiled, of the mixes of a model in turn."""
RENAMED = ("dinov2",)
"""Models whose parameters have other names in the lowest versions of transformers."""
ENGINES = {"cuda": "inductor", "cpu": "aot_eager"}
TIMEOUT_S = {False: 45.0, True: 120.0}
SEED = 2030


@dataclass(frozen=True)
class Case:
    """A plan of a model that a ``Sweep`` can check."""

    variant: str
    name: str
    plan: Plan
    compiled: bool = False

    @property
    def words(self) -> Row:
        how = {"precision": self.plan.precision, "compiled": self.compiled}
        return {"model": self.variant, "plan": self.name, "ranks": self.plan.world_size, **how}


def run(cases: Callable[[], Iterator[Case]], device: Device, clock: Clock) -> Iterator[Row]:
    """A row for each of ``pure`` or ``mixed``; a CPU tries the first."""
    with ExitStack() as stack:
        lanes = range(LANES if device.is_gpu else 1)
        children = [stack.enter_context(Child(lane, cases, n, device, clock, start=device.start)) for n in lanes]
        for row in rows_of_all(children, clock):
            if "failed" in row:
                raise CutShortError(row["failed"])
            yield row


def lane(connection: Connection, cases: Callable[[], Iterator[Case]], place: int, device: Device, clock: Clock) -> None:
    """Sends a row for every case that falls to this one of ``LANES`` processes, each with ranks of its own."""
    with Pool(device=device.type, start=device.start) as pool, tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(pool, Path(folder))
        for case in itertools.islice(cases(), place, None if device.is_gpu else 1, LANES):
            if clock.left_s <= 0:
                connection.send({**case.words, "skipped": "no time left, nor for those that would follow"})
                return
            pool.timeout_s = min(TIMEOUT_S[case.compiled], clock.left_s + 10.0)
            start = time.perf_counter()
            found = _checked(sweep, case, ENGINES[device.type] if case.compiled else None)
            connection.send({**case.words, **found, "seconds": time.perf_counter() - start})


def pure() -> Iterator[Case]:
    """Plans of one technique each, in bf16, whose kernels are others, and in float32."""
    for precision, (variant, world_size) in itertools.product(("bf16", "fp32"), PURE.items()):
        for name, plan in pure_plans(variant_spec(variant, world_size), world_size).items():
            yield Case(variant, name, plan.model_copy(update={"precision": precision}))


def mixed() -> Iterator[Case]:
    """Random plans: modes are dealt to all models, five times, so that in the end every model has had each."""
    names = [*FIRST, *(v.name for v in VARIANTS if v.name not in FIRST and v.name not in RENAMED)]
    for shift, (place, variant) in itertools.product(range(len(MODES)), enumerate(names)):
        world_size, precision, compiled = MODES[(place + shift) % len(MODES)]
        spec = variant_spec(variant, world_size)
        seq_len = None if spec.task == "image_classification" else seq_len_for(world_size)
        plan = random_plans(spec, world_size, shift + 1, SEED, seq_len)[shift]
        yield Case(variant, "a mix", plan.model_copy(update={"precision": precision}), compiled)


def _checked(sweep: Sweep, case: Case, engine: str | None) -> Row:
    try:
        report = sweep.parity(case.variant, case.plan, engine=engine)
    except (GalvatronError, WorkerError) as error:
        return {"holds": False, "found": str(error)[-2000:], "reason": reason_of(error)}
    found = {} if report.ok else {"found": report.explain()[:2000]}
    worst = {kind: min(error, WRONG) for kind, error in report.worst.items()}
    return {"holds": report.ok, "worst": worst, **found}
