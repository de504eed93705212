"""A ParallelModel as a module: parameters, gradients that add up, state dicts, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from distributed.small_runs import MIXED, PIPELINE, batch, plan_for, worst_error
from galvatron.core.errors import CheckpointError, ConfigError, UnsupportedError
from galvatron.parallelize import ParallelModel, World, init_world, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_model
from galvatron.testing.pool import Pool

DATA_PARALLEL = plan_for((4,), *(LayerStrategy(dp_replicate=4),) * 5)


def make(plan: Plan, seed: int = 0, world: World | None = None) -> tuple[ParallelModel, PreTrainedModel]:
    """The same weights under ``plan`` and in one process."""
    return parallelize(tiny_model("gpt2", seed), plan, world=world or init_world("cpu")), tiny_model("gpt2", seed)


def accumulate(plan: Plan) -> tuple[list[float], list[float]]:
    model, plain = make(plan)
    batches = [batch(0), batch(1, ignored=40), batch(2, ignored=64)]  # the last one counts nothing
    num_tokens = 64 + 24
    total = 0.0
    for index, (ids, labels) in enumerate(batches):
        total += float(model.train_step(ids, labels, accumulate=index > 0, num_tokens=num_tokens))
    losses = [
        F.cross_entropy(plain(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum") for ids, labels in batches
    ]
    loss = torch.stack(losses).sum() / num_tokens
    loss.backward()
    errors = [worst_error(model, plain)]
    model.train_step(*batches[0])  # forgets what was before
    plain.zero_grad()
    ids, labels = batches[0]
    F.cross_entropy(plain(ids).logits.flatten(0, 1), labels.flatten()).backward()
    errors.append(worst_error(model, plain))
    return [total, float(loss)], errors


@pytest.mark.parametrize("plan", [PIPELINE, MIXED], ids=["pipeline", "mixed"])
def test_gradients_of_several_calls_add_up_to_the_mean_over_all_tokens(pool: Pool, plan: Plan) -> None:
    for (total, expected), errors in pool.run(accumulate, plan, world_size=4):
        assert total == pytest.approx(expected, rel=1e-5)
        assert max(errors) < 1e-5


def evaluate_between(plan: Plan) -> None:
    """An evaluation before the optimizer's step, and one before a call that adds up."""
    model, _ = make(plan)
    model.train_step(*batch(0))
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.evaluate(*batch(1))
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert not any(stage.early_gradient.tensors() for stage in model.stages)
    model.zero_grad()
    model.evaluate(*batch(1))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("plan", [PIPELINE, MIXED, DATA_PARALLEL], ids=["pipeline", "mixed", "unsharded"])
def test_an_evaluation_leaves_gradients_alone(pool: Pool, plan: Plan) -> None:
    pool.run(evaluate_between, plan, world_size=4)


def trains_with(optimizer_class: type[torch.optim.Optimizer]) -> tuple[float, float]:
    model, plain = make(PIPELINE)
    optimizers = [optimizer_class(module.parameters(), lr=1e-2) for module in (model, plain)]
    ids, labels = batch(0)
    for _ in range(2):
        model.train_step(ids, labels)
        F.cross_entropy(plain(ids).logits.flatten(0, 1), labels.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return float(model.evaluate(ids, labels)), float(F.cross_entropy(plain(ids).logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_elementwise_optimizer_takes_the_parameters(
    pool: Pool, optimizer_class: type[torch.optim.Optimizer]
) -> None:
    for ours, plain in pool.run(trains_with, optimizer_class, world_size=4):
        assert ours == pytest.approx(plain, rel=1e-4)


def states(world_plan: Plan, other_plan: Plan) -> None:
    world = init_world("cpu")
    model, plain = make(world_plan, world=world)
    names = [name for name, _ in model.named_parameters()]
    assert names == [part.name for part in model.local_parameters]
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    full = model.state_dict()
    if world.rank == 0:
        assert full.keys() == plain.state_dict().keys()
        assert all(torch.equal(full[name], value) for name, value in plain.state_dict().items())
        tiny_model("gpt2", 7).load_state_dict(full)
    else:
        assert full == {}
    other, _ = make(other_plan, seed=1, world=world)
    local = {name: value.clone() for name, value in other.state_dict(full=False).items()}
    assert float(other.evaluate(*batch(0))) != pytest.approx(float(model.evaluate(*batch(0))), rel=1e-3)
    other.load_state_dict(full)
    assert float(other.evaluate(*batch(0))) == pytest.approx(float(model.evaluate(*batch(0))), rel=1e-6)
    other.load_state_dict(local, full=False)
    assert all(torch.equal(value, local[name]) for name, value in other.state_dict(full=False).items())
    with pytest.raises(CheckpointError, match=r"must hold this rank's parts under this plan, but .*@"):
        other.load_state_dict(model.state_dict(full=False), full=False)
    before = other.evaluate(*batch(0))
    for broken, words in _broken(full):
        with pytest.raises(CheckpointError, match=words):
            other.load_state_dict(broken)
    assert other.evaluate(*batch(0)) == before


def _broken(full: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], str]]:
    """Damaged dictionaries, of which rank 0's count."""
    some = "transformer.wpe.weight"
    value = full.get(some, torch.zeros(()))
    return [
        ({name: kept for name, kept in full.items() if name != some}, f"{some} has shape none there and"),
        ({**full, "extra": value}, "extra has shape .* there and none in the model"),
        ({**full, some: value.T}, rf"{some} has shape \[32, 64\] there and \[64, 32\] in the model"),
        ({**full, some: value / 0}, f"weights of {some} hold NaN or inf"),
        ({**full, some: value.to(torch.int8)}, f"{some} is torch.int8"),
        ({**full, some: value.to(torch.float8_e4m3fn)}, f"{some} is torch.float8_e4m3fn"),
        ({**full, "lm_head.weight": torch.zeros(97, 32)}, "lm_head.weight must equal transformer.wte.weight"),
    ]


def test_weights_leave_and_enter_whole_or_in_parts(pool: Pool) -> None:
    pool.run(states, PIPELINE, MIXED, world_size=4)


def refusals() -> list[str]:
    plan = plan_for((4,), LayerStrategy(), *(LayerStrategy(),) * 4).model_copy(update={"world_size": 1})
    model, _ = make(plan)
    found = []
    for name in ("generate", "to", "half", "forward", "backward", "register_forward_hook", "get_input_embeddings"):
        assert not hasattr(model, name)
        with pytest.raises(UnsupportedError) as caught:
            getattr(model, name)
        found.append(str(caught.value))
    for attempt in (lambda: model(torch.zeros(1)), lambda: copy.deepcopy(model), lambda: pickle.dumps(model)):
        with pytest.raises(UnsupportedError) as caught:
            attempt()
        found.append(str(caught.value))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = model.nonsense  # type: ignore[attr-defined]
    first, second = list(model.parameters())[:2]
    second.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"requires_grad of .*wpe\.weight was changed after parallelize"):
        model.train_step(*batch(0))
    second.requires_grad_(True)
    model.train_step(*batch(0))
    first.data = first.data.clone()
    with pytest.raises(ConfigError, match=r"wte\.weight has lost its storage; change it in place"):
        model.evaluate(*batch(0))
    return found


def test_what_one_process_of_many_cannot_do_is_refused_by_name(pool: Pool) -> None:
    texts = pool.run(refusals, world_size=1)[0]
    assert texts[0] == (
        "a parallel model has no generate: save_pretrained(directory), then load it with "
        "AutoModelForCausalLM.from_pretrained in one process"
    )
    assert "has no half: the plan says what runs where and in which precision" in texts[2]
    assert "has no forward: train_step gives loss and gradients" in texts[3]
    assert "has no register_forward_hook: each process holds a part of it" in texts[5]
    assert "cannot be called: train_step gives loss and gradients" in texts[7]
    assert "cannot be copied or pickled" in texts[8]
    assert "cannot be copied or pickled" in texts[9]


def parallelized_twice(strategy: LayerStrategy) -> None:
    world = init_world("cpu")
    plan = plan_for((4,), strategy, *(strategy,) * 4).model_copy(update={"world_size": world.world_size})
    model = tiny_model("gpt2")
    parallelize(model, plan, world=world)
    with pytest.raises(ConfigError, match="has been consumed by parallelize or fully_shard; give a new one"):
        parallelize(model, plan, world=world)
    broken = tiny_model("gpt2")
    with torch.no_grad():
        broken.transformer.wpe.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"wpe\.weight hold NaN"):
        parallelize(broken, plan, world=world)
    with pytest.raises(ConfigError, match="has been consumed"):  # and does not start anew from a seed
        parallelize(broken, plan, world=world)


@pytest.mark.parametrize("strategy", [LayerStrategy(dp_replicate=2), LayerStrategy(tp=2)], ids=["whole", "cut"])
def test_a_model_parallelized_twice_is_refused(pool: Pool, strategy: LayerStrategy) -> None:
    pool.run(parallelized_twice, strategy, world_size=2)


def surroundings() -> None:
    world = init_world("cpu")
    plan = plan_for((4,), LayerStrategy(), *(LayerStrategy(),) * 4).model_copy(update={"world_size": 1})
    model, _ = make(plan, world=world)
    expected = model.evaluate(*batch(0))
    for contexts, words in (
        (torch.autocast("cpu", torch.bfloat16), "torch.autocast is in effect for cpu"),
        (torch.inference_mode(), "torch.inference_mode is in effect"),
        (torch.no_grad(), "torch.no_grad is in effect"),
    ):
        with contexts, pytest.raises(ConfigError, match=words):
            model.train_step(*batch(0))
    torch.set_default_dtype(torch.bfloat16)
    try:
        for attempt in (lambda: model.train_step(*batch(0)), lambda: make(plan, world=world)):
            with pytest.raises(ConfigError, match=r"set_default_dtype\(torch.bfloat16\) is in effect"):
                attempt()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        assert model.evaluate(*batch(0)) == expected


def test_steps_do_not_run_where_torch_is_set_to_compute_otherwise(pool: Pool) -> None:
    pool.run(surroundings, world_size=1)
