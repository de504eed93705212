"""A user's loss on logits: exact under cut vocabularies, cut sequences and stages, or refused first."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed.small_runs import MIXED, PIPELINE, batch, plan_for, worst_error
from galvatron.core.errors import ConfigError
from galvatron.parallelize import World, init_world, parallelize
from galvatron.parallelize.losses.own import check_loss
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_model
from galvatron.testing.pool import Pool

CUT_IN_FOUR = plan_for((4,), LayerStrategy(tp=4), *(LayerStrategy(tp=4),) * 4)
ALONG_THE_SEQUENCE = plan_for(
    (4,), LayerStrategy(tp=2, dp_replicate=2), *(LayerStrategy(ulysses=2, cp=2), LayerStrategy(cp=4)) * 2
)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Lin et al. 2017 with gamma 2, and a z-loss: not a sum over the vocabulary's parts."""
    log_p = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -((1 - log_p.exp()) ** 2) * log_p + 1e-2 * logits.logsumexp(-1) ** 2


def deviations(world: World, plan: Plan, ignored: int) -> list[float]:
    """Of loss, gradients and evaluation from plain transformers'."""
    model, plain = parallelize(tiny_model("gpt2"), plan, world=world), tiny_model("gpt2")
    ids, labels = batch(0, ignored)
    counted = labels != -100
    truth = focal(plain(ids).logits[counted].float(), labels[counted]).mean()
    truth.backward()
    loss = model.train_step(ids, labels, loss_fn=focal)
    found = [abs(float(loss) / float(truth) - 1), worst_error(model, plain)]
    found.append(abs(float(model.evaluate(ids, labels, loss_fn=focal)) / float(truth) - 1))
    cross_entropy = partial(F.cross_entropy, reduction="none")
    own, usual = model.evaluate(ids, labels, loss_fn=cross_entropy), model.evaluate(ids, labels)
    found.append(abs(float(own) / float(usual) - 1))
    return found


def terms_deviations() -> dict[str, list[float]]:
    """Of loss and gradients with a smoothed target and a z-loss; and of the evaluation, which has neither."""
    world, found = init_world("cpu"), {}
    for name, plan in {"pipeline": PIPELINE, "mixed": MIXED, "cut in four": CUT_IN_FOUR}.items():
        model, plain = parallelize(tiny_model("gpt2"), plan, world=world), tiny_model("gpt2")
        ids, labels = batch(0, 21)
        logits = plain(ids).logits.flatten(0, 1)
        squares = logits.logsumexp(-1).square()[labels.flatten() != -100].mean()
        truth = F.cross_entropy(logits, labels.flatten(), label_smoothing=0.1) + 1e-2 * squares
        truth.backward()
        loss = model.train_step(ids, labels, label_smoothing=0.1, z_loss=1e-2)
        usual = F.cross_entropy(logits, labels.flatten())
        found[name] = [
            abs(float(loss) / float(truth) - 1),
            worst_error(model, plain),
            abs(float(model.evaluate(ids, labels)) / float(usual) - 1),
        ]
        for words, settings in (
            (r"label_smoothing=1\.0 must be from 0 to below 1", {"label_smoothing": 1.0}),
            ("z_loss=-0.1 not negative", {"z_loss": -0.1}),
            (
                "are terms of cross entropy, which loss_fn replaces; let loss_fn add them",
                {"z_loss": 1e-4, "loss_fn": focal},
            ),
        ):
            with pytest.raises(ConfigError, match=words):
                model.train_step(ids, labels, **settings)
    return found


def test_smoothing_and_z_loss_equal_plain_transformers(pool: Pool) -> None:
    for found in pool.run(terms_deviations, world_size=4):
        for name, errors in found.items():
            assert max(errors) < 1e-5, (name, errors)


def all_deviations() -> dict[str, list[float]]:
    world = init_world("cpu")
    plans = {"pipeline": PIPELINE, "mixed": MIXED, "cut in four": CUT_IN_FOUR, "along the sequence": ALONG_THE_SEQUENCE}
    return {
        f"{name}, {64 - ignored} tokens": deviations(world, plan, ignored)
        for name, plan in plans.items()
        for ignored in (21, 63)
    }


def test_an_own_loss_equals_plain_transformers(pool: Pool) -> None:
    for found in pool.run(all_deviations, world_size=4):
        for name, errors in found.items():
            assert max(errors) < 1e-5, (name, errors)


def refused_by_the_model() -> str:
    model = parallelize(tiny_model("gpt2"), PIPELINE, world=init_world("cpu"))
    with pytest.raises(ConfigError) as caught:
        model.train_step(*batch(0), loss_fn=F.cross_entropy)
    model.train_step(*batch(0))
    return str(caught.value)


def test_a_mean_is_refused_on_all_ranks(pool: Pool) -> None:
    texts = pool.run(refused_by_the_model, world_size=4)
    assert set(texts) == {texts[0]}
    assert "one loss a token, shape [2] for two tokens, but returned shape []; leave out its mean" in texts[0]


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda logits, labels: logits.sum(), r"returned shape \[\]"),
        (lambda logits, labels: logits, r"returned shape \[2, 97\]"),
        (lambda logits, labels: [0.0, 0.0], "returned list"),
        (lambda logits, labels: logits.detach().sum(-1), "a gradient to the logits"),
        (
            lambda logits, labels: (torch.ones(3, requires_grad=True).sum() * logits).sum(-1),
            r"its own \(the first is \[3",
        ),
        (lambda logits, labels: logits.argmax(-1), "a gradient to the logits"),
    ],
)
def test_what_is_no_loss_a_token_is_refused(loss_fn: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_loss(loss_fn, 97, torch.device("cpu"))  # type: ignore[arg-type]
