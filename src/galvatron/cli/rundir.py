"""The run directory: where every phase of a run leaves its file, so that any phase can be read or redone.

Takes a path; gives the paths inside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from galvatron.core.files import check_folder


@dataclass(frozen=True)
class RunDirectory:
    """``hardware.json``, ``model.json``, ``plan.json``, ``metrics.jsonl``, ``checkpoints/`` of one run."""

    path: Path

    @classmethod
    def of_job(cls, job_file: Path, run_dir: Path | None) -> RunDirectory:
        """``run_dir``, or ``runs/<job file's stem>`` under the current directory.

        Raises OutputError where no files could be written into it.
        """
        path = run_dir or Path("runs") / job_file.stem
        check_folder(path, "the run directory")
        return cls(path)

    @property
    def hardware(self) -> Path:
        """The hardware profile."""
        return self.path / "hardware.json"

    @property
    def model(self) -> Path:
        """The model profile."""
        return self.path / "model.json"

    @property
    def plan(self) -> Path:
        """The plan that the run trains under."""
        return self.path / "plan.json"

    @property
    def timeline(self) -> Path:
        """A picture of the plan's predicted step."""
        return self.path / "timeline.svg"

    @property
    def resumed_plan(self) -> Path:
        """The plan of the second leg of a job with a ``[resume]`` section."""
        return self.path / "plan-resumed.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step, and one an evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One directory a saved step."""
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path | None:
        """The latest complete checkpoint; None before the first save."""
        from galvatron.train import find_checkpoint

        if not (self.checkpoints / "latest").exists():
            return None
        return find_checkpoint(self.checkpoints, "latest")

    @property
    def has_begun(self) -> bool:
        """Whether a run has begun here, saved or not."""
        return (self.path / "run.json").exists()

    @property
    def exported(self) -> Path:
        """Trained models as Hugging Face directories, one an exported step."""
        return self.path / "exported"
