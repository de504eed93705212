"""``python -m benchmarks.gpu`` without a GPU: small, but every part, so that it still runs where there is one."""

from __future__ import annotations

import json
import time
from typing import get_args

import pytest
from benchmarks.gpu.__main__ import measured
from benchmarks.gpu.children import Child, CutShortError
from benchmarks.gpu.report import Parts, ratios_to_fastest, targets

from galvatron.core.model import RECOMPUTES, Precision

FOREVER_S = 3600.0


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    _, found = measured(out, "cpu", FOREVER_S)
    written = json.loads(out.read_text())
    assert written["parts"] == found
    assert "| modes that equal one CPU process |" in out.with_suffix(".md").read_text()
    assert {name: part["status"] for name, part in found.items()} == dict.fromkeys(found, "whole")
    return found


def test_every_mode_of_one_device_equals_one_process(parts: Parts) -> None:
    rows = [row for row in parts["modes"]["rows"] if "skipped" not in row]
    modes = {(row["precision"], row["compiled"], row["recompute"], row["loss"]) for row in rows}
    wanted = {(p, False, r, loss) for p in ("fp32", "bf16") for r in RECOMPUTES for loss in ("fused", "own")}
    assert wanted | {("fp32", True, r, loss) for r in ("none", "full") for loss in ("fused", "own")} <= modes
    assert [row for row in rows if not row["holds"]] == []
    assert {row["precision"] for row in parts["modes"]["rows"]} == set(get_args(Precision))


def test_memory_is_as_predicted_and_never_under(parts: Parts) -> None:
    rows = parts["predictions"]["rows"]
    assert rows[0]["profile"]["attention_backend"] == "flash"
    assert {row["plan"].split("recompute ")[1] for row in rows[1:]} >= {f"{level}, eager" for level in RECOMPUTES}
    assert all(0 <= row["memory_error"] <= 0.05 for row in rows[1:])
    assert all(row["predicted_step_time_s"] > 0 for row in rows[1:])


def test_rank_zero_of_larger_plans_takes_no_more_than_predicted(parts: Parts) -> None:
    rows = parts["ranks"]["rows"]
    assert [row["devices"] for row in rows] == [8, 64]
    assert all(0 <= row["tensor_error"] <= 0.4 for row in rows)  # of 300 KiB, boundaries are a part


def test_peers_take_turns_and_those_that_cannot_say_why(parts: Parts) -> None:
    about, *rows = parts["peers 1.2B"]["rows"]
    assert about["model"] == "tiny"
    ran = [(row["contender"], row["round"]) for row in rows if "step_times_s" in row]
    assert {(name, turn) for name in ("galvatron", "plain") for turn in (0, 1)} <= set(ran)
    assert all(row["skipped"] for row in rows if "step_times_s" not in row)
    assert len(ratios_to_fastest([about, *rows])) == 2


def test_models_of_other_kinds_are_predicted_and_raced(parts: Parts) -> None:
    rows = parts["families"]["rows"]
    assert {row["model"] for row in rows} == {"tiny BERT", "tiny CLIP"}
    errors = [row["memory_error"] for row in rows if "memory_error" in row]
    assert len(errors) == 2
    assert all(0 <= error <= 0.05 for error in errors)
    ran = {(row["model"], row["contender"], row["round"]) for row in rows if "round" in row}
    assert ran == {(f"tiny {m}", c, n) for m in ("BERT", "CLIP") for c in ("galvatron", "plain") for n in (0, 1)}


def _rows(times: dict[str, list[float]]) -> list[dict[str, object]]:
    about = {"peak_flops_per_s": 1e15, "causal_flops_per_token": 1e10, "tokens": 1000}
    return [about] + [
        {"contender": name, "round": turn, "step_times_s": [s, s]}
        for name, row in times.items()
        for turn, s in enumerate(row)
    ]


def test_targets_are_ratios_to_the_fastest_peer_of_the_round_and_causal_mfu() -> None:
    rows = _rows({"galvatron": [0.02, 0.01], "plain": [0.03, 0.03], "liger": [0.021, 0.012]})
    assert ratios_to_fastest(rows) == pytest.approx([1.05, 1.2])
    found = {t.what: t for t in targets({"peers 1.2B": {"rows": rows}}, on_gpu=True)}
    assert found["1.2B: against the fastest peer"].met is True
    assert found["1.2B: causal MFU"].figure == "+66.7%"  # 10 TFLOP in 15 ms of a PFLOP/s
    assert all(t.met is None for t in targets({"peers 3B": {"rows": rows[:1]}}, on_gpu=True))


def _dies(connection: object) -> None:
    connection.send({"first": 1})  # type: ignore[attr-defined]
    raise MemoryError("no room")


def test_what_a_part_has_sent_outlives_it() -> None:
    with Child(_dies) as child:
        assert child.receive(60) == {"first": 1}
        with pytest.raises(CutShortError, match="MemoryError: no room"):
            child.receive(60)


def _sleeps(connection: object) -> None:
    time.sleep(60)


def test_a_part_that_hangs_is_ended() -> None:
    with Child(_sleeps) as child, pytest.raises(CutShortError, match="no answer in time"):
        child.receive(0.1)
