"""Do interleaving and zero bubble shrink the bubble as the replay says?  Four stages on gloo, passes that sleep.

    python benchmarks/schedule_bubbles.py --out benchmarks/results/schedule_bubbles_cpu_202611.json

The runtime's own loop and messages (``parallelize/pipeline/passes.py``); every pass sleeps for its seconds, so that
ranks on few cores wait for each other as devices would.  A stage's forward, input and weight pass take 100 ms each,
divided by its chunks.  The bubble is what a step takes beyond a stage's own work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from galvatron.core.files import write_atomic
from galvatron.core.records import dump_json
from galvatron.cost.pipeline import Pipeline, timeline
from galvatron.parallelize import Grid, init_world
from galvatron.parallelize.pipeline.passes import Border, Inbox, Messages, Outputs, run
from galvatron.plan import LayerStrategy, Plan
from galvatron.plan.plan import Schedule
from galvatron.plan.schedules import actions
from galvatron.testing import Pool

PP, PASS_S, REPEATS = 4, 0.1, 3
SCHEDULES: tuple[tuple[Schedule, int], ...] = (("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2))


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return gradient, None, None


def step_s(schedule: Schedule, chunks: int, m: int) -> float:
    """On every rank: the median step."""
    one, entries = LayerStrategy(), PP * chunks
    plan = Plan(
        model="asleep", world_size=PP, layers_per_stage=(1,) * entries, schedule=schedule, model_chunks=chunks,
        num_microbatches=m, global_batch_size=m, seq_len=1, embedding=one, layers=(one,) * entries, head=one,
    )  # fmt: skip
    grid = Grid(plan, init_world("cpu"))
    own = [chunk * PP + grid.stage for chunk in range(chunks)]
    borders = tuple(Border(((1,),), entry == 0, entry == entries - 1, trains_before=entry > 0) for entry in own)
    order = actions(schedule, PP, grid.stage, m, chunks)
    pass_s, start = PASS_S / chunks, torch.ones(1, requires_grad=True)
    backward_s = pass_s if schedule == "zero_bubble" else 2 * pass_s

    def forward(microbatch: int, chunk: int, inbox: Inbox | None) -> Outputs:
        slow: Tensor = _Slow.apply(start if inbox is None else inbox.open()[0], pass_s, backward_s)
        return (slow.sum() if borders[chunk].is_last else slow,)

    seconds = []
    for _ in range(REPEATS + 1):
        torch.distributed.barrier()
        began, messages = time.perf_counter(), Messages(grid, borders, torch.float32)
        run(order, forward, messages, lambda *_: None, lambda chunk, is_last: time.sleep(pass_s))
        messages.finish()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def predicted_s(schedule: Schedule, chunks: int, m: int) -> float:
    """What the replay says, messages taken as free."""
    pass_s, entries = PASS_S / chunks, PP * chunks
    splits = schedule == "zero_bubble"
    backward = [pass_s if splits else 2 * pass_s] * entries
    pipeline = Pipeline(schedule, PP, m, [pass_s] * entries, backward, [pass_s] * entries if splits else ())
    return max(event.end_s for event in timeline(pipeline))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out, rows = parser.parse_args().out, []
    with Pool() as pool:
        for m in (4, 8, 16):
            for schedule, chunks in SCHEDULES:
                work_s, found = m * 3 * PASS_S, max(pool.run(step_s, schedule, chunks, m, world_size=PP))
                said = predicted_s(schedule, chunks, m)
                rows.append(
                    {
                        "num_microbatches": m,
                        "schedule": schedule,
                        "model_chunks": chunks,
                        "predicted_step_s": said,
                        "measured_step_s": found,
                        "predicted_bubble": 1 - work_s / said,
                        "measured_bubble": 1 - work_s / found,
                    }
                )
                about = f"m {m:2}  {schedule:12} {chunks} chunks"
                print(f"{about} {1 - work_s / said:6.1%} predicted {1 - work_s / found:6.1%} measured", flush=True)
    write_atomic(out, dump_json({"pp": PP, "pass_s": PASS_S, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
