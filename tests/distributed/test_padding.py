"""Padded rows under every technique against transformers' own masks; dropout of ends; classes that are told right."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed.small_runs import worst_error
from galvatron.core.errors import ConfigError, DataError, UnsupportedError
from galvatron.core.tasks import Task
from galvatron.models import auto_class, for_task, freeze_parameters, random_inputs, spec_of
from galvatron.parallelize import ParallelModel, World, init_world, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import draw_weights, tiny_config, tiny_model
from galvatron.testing.plans import SEQ_LEN, pure_plans, random_plans
from galvatron.testing.pool import Pool
from galvatron.train.data import IGNORED_LABEL

LENGTHS = (3, 16, 9, 1, 12, 16, 7, 15)
"""Of the tokens of each row: within, at and across the cuts of a sequence."""
CASES: dict[str, tuple[str, Task]] = {
    "bert": ("bert", "masked_lm"),
    "modernbert": ("modernbert", "masked_lm"),
    "roberta-classes": ("roberta", "text_classification"),
    "llama-classes": ("llama", "text_classification"),
    "llama": ("llama", "causal_lm"),
    "t5": ("t5", "seq2seq_lm"),
    "bart": ("bart", "seq2seq_lm"),
}


def model_of(case: str, **overrides: object) -> torch.nn.Module:
    family, task = CASES[case]
    extra = {"pad_token_id": 1, "num_labels": 5} if task == "text_classification" else {}
    config = for_task(tiny_config(family, **extra, **overrides), task)
    model = draw_weights(auto_class(config).from_config(config, dtype=torch.float32), 0)
    keys = {"bert": ("*key.bias",), "roberta": ("*key.bias",), "bart": ("*k_proj.bias",)}
    freeze_parameters(model, keys.get(family, ()))  # whose true gradient is zero
    return model


def padded_batch(case: str, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(SEQ_LEN) < torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(rows)])[:, None]).long()
    ids = torch.randint(4, 97, (rows, SEQ_LEN), generator=generator)
    ids[mask == 0] = 1
    labels = torch.randint(97, (rows, SEQ_LEN), generator=generator)
    if CASES[case][1] == "seq2seq_lm":  # whose answers are of other lengths
        before = torch.randint(97, (rows, SEQ_LEN), generator=generator)
        labels[mask.flip(0) == 0] = IGNORED_LABEL
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": before, "labels": labels}
    labels = labels.masked_fill(mask == 0, IGNORED_LABEL)
    if CASES[case][1] == "text_classification":
        labels = torch.randint(5, (rows,), generator=generator)
        labels[-1] = IGNORED_LABEL
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@cache
def truth(case: str, rows: int) -> tuple[torch.nn.Module, float, float]:
    """Plain transformers with gradients of the mean, that loss, and which share is told right."""
    plain, batch = model_of(case), padded_batch(case, rows)
    options = {"use_cache": False} if CASES[case][0] in ("llama", "t5", "bart") else {}
    logits = plain(**{name: value for name, value in batch.items() if name != "labels"}, **options).logits
    loss = F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())
    loss.backward()
    right = (logits.argmax(-1) == batch["labels"]).sum() / (batch["labels"] != IGNORED_LABEL).sum()
    return plain, loss.item(), right.item()


def deviations(plans: list[tuple[str, Plan]]) -> list[tuple[str, str, list[float]]]:
    """Of loss, gradients and evaluation, of each case under its plan."""
    world, found = init_world("cpu"), []
    for case, plan in plans:
        model, batch = parallelize(model_of(case), plan, world=world), padded_batch(case, plan.global_batch_size)
        plain, loss, right = truth(case, plan.global_batch_size)
        errors = [abs(float(model.train_step(**batch)) / loss - 1), worst_error(model, plain)]
        if CASES[case][1] == "text_classification":
            evaluated, share = model.evaluate_classes(**batch)
            errors.append(abs(float(share) - right))
        else:
            evaluated = model.evaluate(**{**batch, "attention_mask": batch["attention_mask"].bool()})
        found.append((case, plan.describe(), [*errors, abs(float(evaluated) / loss - 1)]))
    return found


def plans_of(case: str, world_size: int, count: int) -> list[tuple[str, Plan]]:
    return [(case, plan) for plan in random_plans(spec_of(model_of(case)), world_size, count, seed=5)]


def check(pool: Pool, plans: list[tuple[str, Plan]], world_size: int) -> None:
    for found in pool.run(deviations, plans, world_size=world_size):
        for case, plan, errors in found:
            assert errors == pytest.approx([0.0] * len(errors), abs=1e-5), f"{case}: {plan}"


def test_padding_is_seen_by_no_token(pool: Pool) -> None:
    names = ("tp", "ulysses", "ring", "zero3", "1f1b")
    pure = [("bert", plan) for name, plan in pure_plans(spec_of(model_of("bert")), 2).items() if name in names]
    others = [
        (case, pure_plans(spec_of(model_of(case)), 2)["1f1b" if case == "bart" else "tp"])
        for case in CASES
        if case != "bert"
    ]
    check(pool, [*pure, *others], 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_padding_is_seen_by_no_token_under_mixes(pool: Pool, case: str, world_size: int) -> None:
    check(pool, plans_of(case, world_size, 10), world_size)


def alone(case: str) -> tuple[ParallelModel, dict[str, Tensor]]:
    model = parallelize(
        model_of(case), next(iter(pure_plans(spec_of(model_of(case)), 1).values())), world=init_world("cpu")
    )
    return model, padded_batch(case, model.plan.global_batch_size)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda batch: batch["attention_mask"].flip(1), r"attention_mask\[0, 13\]=1 does not fit: .* pad on the right"),
        (lambda batch: batch["attention_mask"] * 0, r"attention_mask\[0, 0\]=0 does not fit: a row is ones"),
        (lambda batch: batch["attention_mask"] * 2, r"attention_mask\[0, 0\]=2 does not fit"),
        (lambda batch: batch["attention_mask"].float(), "attention_mask must be int64, got float32"),
        (lambda batch: batch["attention_mask"][:, :3], r"got attention_mask of \[2, 3\]"),
        (lambda batch: (torch.arange(SEQ_LEN) < 2).long().expand(2, -1), r"labels\[0, 2\] counts, but attention_mask"),
    ],
)
def test_masks_that_are_no_padding_are_refused(change: object, words: str) -> None:
    model, batch = alone("bert")
    with pytest.raises(DataError, match=words):
        model.train_step(**{**batch, "attention_mask": change(batch)})  # type: ignore[operator]


def test_packed_documents_and_unknown_classes_are_refused_where_ends_are_whole() -> None:
    model, batch = alone("roberta-classes")
    positions = torch.arange(SEQ_LEN).expand(2, -1)
    with pytest.raises(UnsupportedError, match="packed for causal language models, not for text_classification"):
        model.train_step(**batch, position_ids=positions)
    with pytest.raises(DataError, match=r"labels\[0\]=5 is not among the model's 5 classes \(0 to 4\); give a model"):
        model.train_step(**{**batch, "labels": torch.tensor([5, 0])})


def losses_with_dropout(world: World, plan: Plan) -> list[float]:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.5}
    model = parallelize(model_of("roberta-classes", **rates), plan, world=world, seed=1)
    losses = []
    for _ in range(2):
        torch.manual_seed(world.rank)
        losses.append(float(model.train_step(**padded_batch("roberta-classes", plan.global_batch_size))))
    return [*losses, float(model.eval().train_step(**padded_batch("roberta-classes", plan.global_batch_size)))]


def head_under(tp: int, world_size: int) -> Plan:
    spec = spec_of(model_of("roberta-classes"))
    whole = LayerStrategy(tp=tp)
    return Plan(
        model=spec.name,
        world_size=world_size,
        num_microbatches=2,
        global_batch_size=4,
        seq_len=SEQ_LEN,
        layers_per_stage=(spec.num_layers,),
        embedding=whole,
        layers=(whole,) * spec.num_layers,
        head=whole,
    )


def with_dropout(plan: Plan) -> list[float]:
    return losses_with_dropout(init_world("cpu"), plan)


def test_ranks_that_do_the_same_work_at_an_end_draw_alike(pool: Pool) -> None:
    """So that it is the work of one process: a head that drops half of what it sees gives the same loss under tp 2."""
    (single,) = pool.run(with_dropout, head_under(1, 1), world_size=1)
    cut, other = pool.run(with_dropout, head_under(2, 2), world_size=2)
    assert cut == other
    assert cut == pytest.approx(single, rel=1e-5)
    first, second, still = single
    assert abs(first - second) > 1e-3
    assert abs(first - still) > 1e-3


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"label_smoothing": 0.1}, ConfigError, "a contrast has a loss of its own"),
        ({"z_loss": 1e-4}, ConfigError, "a contrast has a loss of its own"),
        (
            {"attention_mask": torch.ones(2, SEQ_LEN, dtype=torch.int64)},
            UnsupportedError,
            "layers of siglip do not keep padding apart .* leave attention_mask out of tokenizer.model_input_names",
        ),
    ],
)
def test_what_a_contrast_has_no_place_for_is_refused(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    whole = tiny_model("siglip")
    spec = spec_of(whole)
    plan = pure_plans(spec, 1)["dp"]
    inputs = random_inputs(whole.config, spec.task, plan.global_batch_size, plan.seq_len, torch.Generator())
    model = parallelize(whole, plan, world=init_world("cpu"))
    with pytest.raises(error, match=words):
        model.train_step(**inputs, **settings)


def test_padding_behind_texts_that_are_contrasted_is_seen_by_none() -> None:
    """CLIP's are causal, and end with a token that its mask does not hide."""
    whole, plain = tiny_model("clip"), tiny_model("clip")
    plan = pure_plans(spec_of(whole), 1)["dp"]
    inputs = random_inputs(whole.config, "contrast", plan.global_batch_size, plan.seq_len, torch.Generator(), lowest=3)
    lengths = torch.tensor((LENGTHS * plan.global_batch_size)[: plan.global_batch_size])
    inputs["attention_mask"] = (torch.arange(plan.seq_len) < lengths.unsqueeze(1)).long()
    inputs["input_ids"] *= inputs["attention_mask"]
    inputs["input_ids"][torch.arange(len(lengths)), lengths - 1] = 96  # the end, which is the highest of all
    wanted = plain(**inputs, return_loss=True)
    model = parallelize(whole, plan, world=init_world("cpu"))
    loss, right = model.evaluate_classes(**inputs)
    assert float(loss) == pytest.approx(float(wanted.loss.detach()), rel=1e-6)
    own = torch.arange(len(lengths))
    shares = [(of.argmax(1) == own).float().mean() for of in (wanted.logits_per_text, wanted.logits_per_image)]
    assert float(right) == pytest.approx(float(sum(shares)) / 2)
