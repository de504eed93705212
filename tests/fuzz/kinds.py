"""The six kinds of files that people hand in, and what is done with each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fuzz.harness import Kind, check_words
from fuzz.mutate import mutated_data, mutated_text, to_json, to_toml
from galvatron.cli.inputs import memory_limit
from galvatron.cli.search import limits_of
from galvatron.core.errors import GalvatronError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.job import DataSection, Job
from galvatron.core.model_profile import ModelProfile
from galvatron.cost import predict
from galvatron.estimate import estimate_model, model_spec
from galvatron.exchange import export_plan, import_plan, to_megatron, to_torchtitan
from galvatron.models import build_spec, load_config
from galvatron.plan import LayerStrategy, Plan
from galvatron.report import explain, explain_prediction
from galvatron.report.diff import diff_plans
from galvatron.search import Limits, search
from galvatron.train import TrainState, prepare_tokens
from galvatron.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from galvatron.train.data import Dataset
from galvatron.train.load import _map_tokens
from galvatron.train.optimizer import build_optimizer
from galvatron.train.rows import StreamRows
from unit.profiles import make_hardware, make_model, make_spec
from unit.train.train_fakes import FakeModel, lineage_for, plan_for, section

MODEL = make_model(make_spec(3, hidden=32, ffn=64, vocab=64), tps=(1, 2), flops_per_s=2e11)
HARDWARE = make_hardware(4)
Mutate = Callable[[Path, random.Random], None]


def json_mutator(*names: str) -> Mutate:
    """Half of the mutations change the data of one of ``names``, half its text."""
    return _mutator(json.loads, to_json, names)


def _mutator(read: Callable[[str], Any], write: Callable[[Any], str], names: tuple[str, ...]) -> Mutate:
    def mutate(folder: Path, rng: random.Random) -> None:
        path = folder / rng.choice(names)
        text = path.read_text()
        by_data = rng.random() < 0.6
        path.write_bytes(write(mutated_data(read(text), rng)).encode() if by_data else mutated_text(text, rng))

    return mutate


# plans


def make_plans(folder: Path) -> None:
    """One that the search found, one with all that a file can say, one for the runtime."""
    found = search(MODEL, HARDWARE, global_batch_size=8, limits=Limits(fix={"pp": 2}), baselines=False).plan
    found.save(folder / "found.json")
    mixed = LayerStrategy(tp=2, cp=2)
    plan = Plan(
        model="toy",
        world_size=8,
        layers_per_stage=(1, 1, 1, 0 + 1),
        schedule="interleaved",
        model_chunks=2,
        num_microbatches=2,
        global_batch_size=8,
        seq_len=64,
        embedding=LayerStrategy(tp=4),
        layers=(mixed, mixed, LayerStrategy(ulysses=2, dp_shard=2, zero=3, recompute="full"), mixed),
        head=LayerStrategy(dp_replicate=4),
        what_if=("schedule interleaved",),
    )
    plan.save(folder / "mixed.json")
    export = found.model_copy(update={"layers": (LayerStrategy(dp_replicate=2),) * 3})
    ends = {"embedding": LayerStrategy(dp_replicate=2), "head": LayerStrategy(dp_replicate=2)}
    export.model_copy(update=ends).save(folder / "plain.json")


def use_plan(folder: Path) -> None:
    """Load, show, compare, export, check and predict: whatever a plan that validates is asked for works."""
    for path in sorted(folder.glob("*.json")):
        plan = Plan.load(path)
        assert Plan.from_json(plan.to_json()) == plan
        plan.validate()
        check_words(plan.describe())
        if plan.prediction is not None:
            check_words(explain_prediction(plan))
        diff_plans(plan, plan)
        _export(plan)
        _predict(plan)


def _export(plan: Plan) -> None:
    for export in (to_torchtitan, to_megatron):
        _unless_refused(lambda export=export: export(plan))  # type: ignore[misc]
    text = _unless_refused(lambda: export_plan(plan))
    if text is not None:
        back = import_plan(text, plan.world_size, plan.seq_len, precision=plan.precision, model=plan.model)
        assert back.layers == plan.layers


def _predict(plan: Plan) -> None:
    def predicted() -> None:
        plan.validate(MODEL.spec, 4)
        prediction = predict(plan, MODEL, HARDWARE, 2**30)
        assert 0 < prediction.step_time_s < 1e9
        assert all(stage.peak_memory_bytes >= stage.low_memory_bytes >= 0 for stage in prediction.stages)
        assert all(seconds >= -1e-9 for seconds in prediction.parts_s.values())

    _unless_refused(predicted)


def _unless_refused(do: Callable[[], Any]) -> Any:
    """What ``do`` gives; None where it refuses by a sentence, which is as good."""
    try:
        return do()
    except GalvatronError:
        return None


# jobs

JOB: dict[str, Any] = {
    "model": {"path": "config.json", "weights": False},
    "data": {"source": "text.txt", "tokenizer": "bytes", "text_field": "text", "split": "train", "eval_fraction": 0.1},
    "cluster": {"num_processes": 4, "device": "cpu"},
    "search": {"memory": "512MiB", "pp": 2, "num_microbatches": 2, "max_tp": 2},
    "train": {
        "global_batch_size": 8, "seq_len": 64, "num_steps": 20, "precision": "fp32", "seed": 3, "lr": 3e-4,
        "min_lr": 1e-5, "lr_schedule": "cosine", "warmup_steps": 2, "betas": [0.9, 0.95], "eps": 1e-8,
        "weight_decay": 0.1, "max_grad_norm": 1.0, "eval_every": 5, "eval_batches": 2, "save_every": 5,
        "keep_checkpoints": 2, "tensorboard": False,
    },
    "resume": {"at_step": 10, "plan": "runner-up"},
    "generate": {"prompt": "The", "max_new_tokens": 8, "temperature": 0.5},
}  # fmt: skip


def make_job(folder: Path) -> None:
    """A job with every section."""
    (folder / "job.toml").write_text(to_toml(JOB))
    (folder / "job.json").write_text(json.dumps(JOB))
    (folder / "config.json").write_text("{}")


def mutate_job(folder: Path, rng: random.Random) -> None:
    """By its data or its text."""
    if rng.random() < 0.6:
        (folder / "job.toml").write_text(to_toml(mutated_data(JOB, rng)), errors="replace")
    else:
        (folder / "job.toml").write_bytes(mutated_text((folder / "job.toml").read_text(), rng))


def use_job(folder: Path) -> None:
    """Load it and search what it asks for."""
    job = Job.load(folder / "job.toml")
    assert Job.model_validate_json(job.model_dump_json()) == job
    train = job.train
    result = search(
        MODEL,
        HARDWARE,
        global_batch_size=train.global_batch_size,
        seq_len=train.seq_len,
        precision=train.precision,
        grad_reduce_dtype=train.grad_reduce_dtype,
        memory_limit_bytes=memory_limit(job.search.memory, HARDWARE),
        limits=limits_of(job.search),
        num_candidates=1,
        baselines=False,
    )
    assert result.plan.global_batch_size == train.global_batch_size
    check_words(explain(result))


# profiles


def make_profiles(folder: Path) -> None:
    """A model and a cluster."""
    MODEL.save(folder / "model.json")
    HARDWARE.save(folder / "hardware.json")


def use_profiles(folder: Path) -> None:
    """A search on both gives a plan that holds together."""
    model, hardware = ModelProfile.load(folder / "model.json"), HardwareProfile.load(folder / "hardware.json")
    assert ModelProfile.from_json(model.to_json()) == model
    assert HardwareProfile.from_json(hardware.to_json()) == hardware
    result = search(model, hardware, global_batch_size=4, num_candidates=1, baselines=False)
    plan = result.plan
    assert Plan.from_json(plan.to_json()) == plan
    plan.validate(model.spec, hardware.world_size)
    assert 0 < result.prediction.step_time_s < 1e12
    assert 0 < result.prediction.peak_memory_bytes <= hardware.device.memory_bytes
    check_words(explain(result))


# Hugging Face configurations

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 64,
        "attention_bias": False, "mlp_bias": False, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "rope_theta": 10000.0,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 64,
    },
    "mistral": {
        "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 131,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 32,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 131, "n_positions": 64,
        "n_inner": 80, "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 131,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "t5": {
        "model_type": "t5", "d_model": 64, "num_heads": 4, "vocab_size": 131, "d_ff": 96, "num_layers": 2, "d_kv": 16,
        "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8,
        "n_positions": 64,
    },
    "swin": {
        "model_type": "swin", "embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4,
        "image_size": 32, "patch_size": 4, "mlp_ratio": 4.0, "num_labels": 7,
    },
    "vit": {
        "model_type": "vit", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "id2label": {"0": "cat", "1": "dog"},
    },
}  # fmt: skip


def make_configs(folder: Path) -> None:
    """One of them is chosen by the mutation."""
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


def mutate_config(folder: Path, rng: random.Random) -> None:
    """The others go, so that ``use`` knows which it is."""
    name = rng.choice(sorted(CONFIGS))
    for other in CONFIGS.keys() - {name}:
        (folder / f"{other}.json").unlink()
    json_mutator(f"{name}.json")(folder, rng)


def use_config(folder: Path) -> None:
    """By formula, and where the runtime knows the family by transformers itself: refused, or the same shapes."""
    (path,) = folder.glob("*.json")
    spec = None
    refusal: GalvatronError | None = None
    try:
        spec = model_spec(str(path))
        seq_len = spec.max_seq_len if spec.task == "image_classification" else min(spec.max_seq_len, 16)
        profile = estimate_model(spec, "h100", seq_len=seq_len, tp_degrees=[1, 2], max_batch=2)
        assert all(sample.forward_s > 0 and sample.backward_s > 0 for sample in profile.compute)
    except GalvatronError as error:
        refusal = error
    built = _unless_refused(lambda: build_spec(load_config(path), path.stem))
    if built is not None and spec is not None:
        assert built == spec
    if refusal is not None:
        raise refusal


# checkpoints


def make_checkpoint(folder: Path) -> None:
    """Weights, moments and random states of a small model."""
    model, train = FakeModel.make(seed=1), section()
    optimizer = build_optimizer(model.local_parameters, train)
    state = TrainState(step=7, world_size=1, run=lineage_for(train))
    save_checkpoint(folder, model, optimizer, state, plan=plan_for(train), keep=3)


def mutate_checkpoint(folder: Path, rng: random.Random) -> None:
    """The index, the state, the pointer, or bytes of the tensors."""
    step = folder / "step-000007"
    name = rng.choice(("metadata.json", "metadata.json", "metadata.json", "state.json", "latest", "rank"))
    if name == "latest":
        (folder / name).write_bytes(mutated_text((folder / name).read_text(), rng))
    elif name == "rank":
        path = step / "rank-00000.safetensors"
        raw = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 64)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw[: rng.choice((len(raw), len(raw), rng.randrange(len(raw))))])
    else:
        json_mutator(f"step-000007/{name}")(folder, rng)


def use_checkpoint(folder: Path) -> None:
    """What loads has the values that were saved."""
    directory = find_checkpoint(folder, "latest")
    twin, model = FakeModel.make(swapped=True, seed=2), FakeModel.make(seed=1)
    state = load_checkpoint(directory, twin, build_optimizer(twin.local_parameters, section()))
    assert state.step == 7
    half = 257 // 2
    assert torch.equal(twin.table.tensor[: 257 - half], model.table.tensor[half:])
    assert torch.equal(twin.bias.tensor, model.bias.tensor)


# dataset files

LINES = [
    {"text": "All work and no play makes Jack a dull boy. " * 3},
    {"text": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 🦊", "n": 1},
    {"text": "", "n": 2},
    {"text": "line one\nline two\r\nline three\ttab", "other": {"text": [1, None]}},
]


def make_dataset(folder: Path) -> None:
    """A plain text and JSON lines; one of them is chosen by the mutation."""
    (folder / "text.txt").write_text("\n".join(line["text"] for line in LINES for _ in range(2)))  # type: ignore[misc]
    (folder / "text.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES * 2))


def mutate_dataset(folder: Path, rng: random.Random) -> None:
    """A text by its bytes, a line also by its data."""
    name = rng.choice(("text.txt", "text.jsonl"))
    path, raw = folder / name, (folder / name).read_bytes()
    for other in {"text.txt", "text.jsonl"} - {name}:
        (folder / other).unlink()
    if name == "text.jsonl" and rng.random() < 0.5:
        lines = path.read_text().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(mutated_data(json.loads(lines[at]), rng))
        path.write_text("\n".join(lines))
    else:
        path.write_bytes(mutated_text(raw.decode(), rng))


def use_dataset(folder: Path) -> None:
    """Tokens are the bytes of the texts, each with its end."""
    (path,) = folder.glob("text.*")
    tokens_path = prepare_tokens(DataSection(source=str(path)), folder / "run")
    info = json.loads(tokens_path.with_suffix(".json").read_text())
    tokens = _map_tokens(tokens_path, info["num_tokens"])
    expected: list[int] = []
    for text in _texts(path):
        expected += [*text.encode(), 256]
    assert tokens.tolist() == expected
    Dataset(StreamRows(tokens, 8), global_batch_size=2, eval_fraction=0.1).batch(3)


def _texts(path: Path) -> list[str]:
    """The documents by another way than the package's."""
    text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    if path.suffix == ".txt":
        return [text] if text else []
    return [found for line in text.split("\n") if line.strip() and (found := json.loads(line)["text"])]


KINDS: dict[str, tuple[Callable[[Path], None], Mutate, Callable[[Path], None]]] = {
    "plans": (make_plans, json_mutator("found.json", "mixed.json", "plain.json"), use_plan),
    "jobs": (make_job, mutate_job, use_job),
    "profiles": (make_profiles, json_mutator("model.json", "model.json", "hardware.json"), use_profiles),
    "configs": (make_configs, mutate_config, use_config),
    "checkpoints": (make_checkpoint, mutate_checkpoint, use_checkpoint),
    "datasets": (make_dataset, mutate_dataset, use_dataset),
}


def kind(name: str, folder: Path) -> Kind:
    """The kind with its good files made in ``folder``."""
    make, mutate, use = KINDS[name]
    good = folder / "good"
    good.mkdir(parents=True)
    make(good)
    use_each(use, mutate, good)
    return Kind(name, good, mutate, use)


def use_each(use: Callable[[Path], None], mutate: Mutate, good: Path) -> None:
    """Good files pass, but where ``use`` wants one of several."""
    if use not in (use_config, use_dataset):
        use(good)
