"""What people see: lines as wide as the terminal, in any encoding; help and version the short way."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from galvatron import __version__
from galvatron.cli.console import wrapped
from galvatron.core.units import counted
from galvatron.plan import LayerStrategy, Plan

ONE = LayerStrategy()
PLAN = Plan(
    model="tiny",
    world_size=1,
    layers_per_stage=(1,),
    global_batch_size=1,
    seq_len=1,
    embedding=ONE,
    layers=(ONE,),
    head=ONE,
)


def _galvatron(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "galvatron", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode("ascii" if "PYTHONIOENCODING" in environment else "utf-8")


def test_lines_are_broken_between_words_and_go_on_further_in() -> None:
    assert wrapped("  one two three\nfour", 10) == "  one two\n      three\nfour"
    assert wrapped("as long as this", 15) == "as long as this"
    assert wrapped("a path/that/is/too/long stays", 10) == "a\n    path/that/is/too/long\n    stays"


def test_a_number_stays_beside_its_unit() -> None:
    assert wrapped("it takes 4.1 GiB", 14) == "it takes\n    4.1 GiB"


def test_words_after_numbers() -> None:
    assert [counted(n, "microbatch") for n in (0, 1, 2)] == ["0 microbatches", "1 microbatch", "2 microbatches"]
    assert PLAN.describe().startswith(
        "1 device, 1 stage of 1 layer, 1f1b, 1 microbatch of 1 sequence x 1 token, fp32\nembedding: one device\n"
    )


def test_strategies_speak_as_plan_files_and_options_do() -> None:
    strategy = LayerStrategy(tp=2, dp_shard=4, dp_replicate=2, zero=3)
    assert str(strategy) == "tp 2, dp_shard 4, dp_replicate 2, zero 3"
    assert str(LayerStrategy(dp_replicate=4)) == "dp_replicate 4"


@pytest.mark.parametrize(("columns", "widest"), [("60", 60), (None, 120)])
def test_output_fits_the_terminal_and_a_pipe(
    columns: str | None, widest: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    arguments = ("search", "--model", "llama2-7b", "--cluster", "a100:1x8", "--seq-len", "4096", "--out", "/dev/null")
    out = _galvatron(*arguments, "--global-batch-size", "64", **({"COLUMNS": columns} if columns else {}))
    assert widest - 12 < max(len(line) for line in out.splitlines()) <= widest


def test_an_ascii_terminal_reads_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from galvatron.cli.console import heading, say\n"
        "heading('Train')\n"
        "say('12 \\u00b5s, 3 \\u00d7 4 \\u2192 12 \\u2026 \\u6f22')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode("ascii").splitlines() == ["Train " + "-" * 34, "12 us, 3 x 4 -> 12 ... \\u6f22"]


def test_help_and_version_the_short_way() -> None:
    assert _galvatron("--version") == f"galvatron {__version__}\n"
    assert _galvatron("-h") == _galvatron("--help")
    assert "-h, --help" in _galvatron("plan", "show", "-h")
