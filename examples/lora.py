"""LoRA from a checkpoint to peft: `python examples/lora.py`.

Teaches the quickstart's model (which is trained first, if need be) to write docstrings as Python's library does, then
loads what was trained as peft and transformers do.  Another model's directory may be given as an argument.
"""

import ast
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

OUT, JOB = Path("runs/lora"), Path(__file__).with_name("lora.toml")
BASE = sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/exported/step-000300"


def docstrings():
    """What the functions and classes of Python's library say of themselves."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (says := ast.get_docstring(node)):
                yield f'def {node.name}: """{says}"""\n'


def galvatron(*words):
    """Run a verb of the command line."""
    subprocess.run([sys.executable, "-m", "galvatron", *words], check=True)


if len(sys.argv) == 1 and not Path(BASE).exists():
    galvatron("run", str(JOB.with_name("quickstart.toml")))
OUT.mkdir(parents=True, exist_ok=True)
(OUT / "docstrings.txt").write_text("".join(docstrings()))
job = JOB.read_text().replace("runs/quickstart/exported/step-000300", str(Path(BASE).resolve()))
(OUT / "job.toml").write_text(job.replace("../runs/lora/", ""))
galvatron("run", str(OUT / "job.toml"), "--run-dir", str(OUT / "run"))
galvatron("convert", "to-hf", str(OUT / "run"), str(OUT / "merged"))
galvatron("convert", "to-hf", str(OUT / "run"), str(OUT / "adapter"), "--adapter-only")

ids = torch.tensor([list(b'def join: """')])
base = AutoModelForCausalLM.from_pretrained(BASE)
with torch.inference_mode():
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, OUT / "adapter")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(OUT / "merged")(ids).logits
print(f"the adapter changes logits by up to {(adapted - before).abs().max():.2g}")
print(f"adapter and merged model differ by up to {(adapted - merged).abs().max():.1g}")
