from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch
from train_fakes import FakeModel, global_values, lineage_for, plan_for, section

from galvatron.core.errors import CheckpointError
from galvatron.train.checkpoint import TrainState, find_checkpoint, load_checkpoint, save_checkpoint
from galvatron.train.export import checkpoint_to_hf
from galvatron.train.index import INDEX_FILE, CheckpointIndex, _share
from galvatron.train.optimizer import build_optimizer


def save(root: Path, model: FakeModel, step: int, keep: int = 3) -> tuple[Path, torch.optim.Optimizer]:
    train = section()
    optimizer = build_optimizer(model.local_parameters, train)
    for moments in optimizer.state.values():
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.nn.init.normal_(moments[moment])
    state = TrainState(step=step, world_size=1, run=lineage_for(train))
    return save_checkpoint(root, model, optimizer, state, plan=plan_for(train), keep=keep), optimizer


def load(directory: Path, model: FakeModel) -> tuple[TrainState, torch.optim.Optimizer]:
    optimizer = build_optimizer(model.local_parameters, section())
    return load_checkpoint(directory, model, optimizer), optimizer


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


def test_another_layout_loads_weights_moments_and_update_count(tmp_path: Path) -> None:
    model, twin = FakeModel.make(seed=1), FakeModel.make(swapped=True, seed=2)
    directory, saved = save(tmp_path, model, step=20)
    state, loaded = load(directory, twin)
    assert state.step == 20
    for ours, theirs in zip(twin.local_parameters, model.local_parameters, strict=True):
        assert torch.equal(global_values(ours), theirs.tensor)
        assert float(loaded.state[ours.tensor]["step"]) == 20
    half = 257 // 2
    for moment in ("exp_avg", "exp_avg_sq"):
        whole = saved.state[model.table.tensor][moment]
        swapped = loaded.state[twin.table.tensor][moment]
        assert torch.equal(swapped, torch.cat([whole[half:], whole[:half]]))


def test_what_is_frozen_is_saved_without_moments(tmp_path: Path) -> None:
    model, twin = FakeModel.make(seed=1), FakeModel.make(seed=2)
    for frozen in (model.table, twin.table):
        frozen.tensor.requires_grad_(False)
    directory, _ = save(tmp_path, model, step=20)
    assert "table.weight" in CheckpointIndex.load(directory / INDEX_FILE).tensors
    assert "optimizer.exp_avg.bias" in CheckpointIndex.load(directory / INDEX_FILE).tensors
    assert "optimizer.exp_avg.table.weight" not in CheckpointIndex.load(directory / INDEX_FILE).tensors
    load(directory, twin)
    assert torch.equal(twin.table.tensor, model.table.tensor)
    thawed = FakeModel.make(seed=3)
    before = thawed.table.tensor.detach().clone()
    with pytest.raises(CheckpointError, match=r"table\.weight was frozen when .*step-000020 was saved and is trained"):
        load(directory, thawed)
    assert torch.equal(thawed.table.tensor, before)
    twin.bias.tensor.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"bias was trained when .*step-000020 was saved and is frozen now"):
        load(directory, twin)


def test_old_checkpoints_go_and_the_pointer_moves(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, FakeModel.make(), step, keep=2)
    assert names(tmp_path) == ["latest", "step-000020", "step-000030"]
    assert find_checkpoint(tmp_path, "latest").name == "step-000030"
    save(tmp_path, FakeModel.make(), 5, keep=2)  # after going back: the newest, not the highest, is kept
    assert names(tmp_path) == ["latest", "step-000005", "step-000030"]
    assert find_checkpoint(tmp_path.parent, tmp_path).name == "step-000005"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, FakeModel.make(seed=1), 10)
    model = FakeModel.make(seed=2)
    save(tmp_path, model, 10)
    twin = FakeModel.make()
    load(find_checkpoint(tmp_path, "latest"), twin)
    assert torch.equal(twin.table.tensor, model.table.tensor)
    assert names(tmp_path) == ["latest", "step-000010"]


def test_a_replacement_killed_half_way_is_undone(tmp_path: Path) -> None:
    save(tmp_path, FakeModel.make(), 10)
    (tmp_path / "step-000010").rename(tmp_path / ".step-000010.old")
    load(find_checkpoint(tmp_path, "latest"), FakeModel.make())
    (tmp_path / ".step-000020.tmp").mkdir()
    (tmp_path / ".latest.abc").touch()
    save(tmp_path, FakeModel.make(), 30)
    assert names(tmp_path) == ["latest", "step-000010", "step-000030"]


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(tmp_path: Path, file: str, damage: str) -> None:
    directory, _ = save(tmp_path, FakeModel.make(seed=1), 10)
    path = directory / file
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    twin = FakeModel.make(seed=2)
    before = twin.table.tensor.clone()
    with pytest.raises(CheckpointError, match=file):
        load(directory, twin)
    assert torch.equal(twin.table.tensor, before)


def test_another_model_is_refused(tmp_path: Path) -> None:
    directory, _ = save(tmp_path, FakeModel.make(), 10)
    other = FakeModel.make()
    other.bias.name = "biases"
    with pytest.raises(CheckpointError, match=r"bias has shape \[257\] there and none in the model"):
        load(directory, other)
    other.bias.name, other.bias.global_shape = "bias", (258,)
    with pytest.raises(CheckpointError, match=r"bias has shape \[257\] there and \[258\] in the model"):
        load(directory, other)


def test_no_pickle_is_ever_read(tmp_path: Path) -> None:
    directory, _ = save(tmp_path, FakeModel.make(), 10)
    trace = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb)
    assert trace.exists()  # the bomb works
    trace.unlink()
    (directory / ".metadata").write_bytes(bomb)
    data = directory / "rank-00000.safetensors"
    saved = data.read_bytes()
    data.write_bytes(bomb.ljust(len(saved), b"."))
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors holds other bytes than were saved"):
        load(directory, FakeModel.make())
    data.write_bytes(saved)
    for file in ("metadata.json", "state.json"):
        content = (directory / file).read_bytes()
        (directory / file).write_bytes(bomb.ljust(len(content), b"."))
        with pytest.raises(CheckpointError, match=file):
            load(directory, FakeModel.make())
        (directory / file).write_bytes(content)
    assert not trace.exists()


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        find_checkpoint(tmp_path, "latest")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path, tmp_path / "nowhere")
    (tmp_path / "latest").write_text("../../etc")
    with pytest.raises(CheckpointError, match="must name a checkpoint"):
        find_checkpoint(tmp_path, "latest")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file where the directory should be")
    with pytest.raises(CheckpointError, match="could not save"):
        save(tmp_path / "root", FakeModel.make(), 10)


FILES = ["rank-00000.safetensors", "state.json", "config.json", "plan.json", "metadata.json"]


@pytest.mark.parametrize("file", FILES)
def test_bytes_that_changed_in_place_are_found_wherever_they_are(tmp_path: Path, file: str) -> None:
    directory, _ = save(tmp_path, FakeModel.make(seed=1), 10)
    path = directory / file
    content = path.read_bytes()
    twin = FakeModel.make(seed=2)
    before = twin.table.tensor.clone()
    places = random.Random(file).sample(range(len(content)), 12)
    for place in (0, len(content) - 1, *places):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=file):
            load(directory, twin)
    path.write_bytes(content)
    load(directory, FakeModel.make())
    assert torch.equal(twin.table.tensor, before)


def test_a_zeroed_weight_is_named(tmp_path: Path) -> None:
    directory, _ = save(tmp_path, FakeModel.make(seed=1), 10)
    index = CheckpointIndex.load(directory / "metadata.json")
    (chunk,) = index.tensors["table.weight"].chunks
    with (directory / chunk.file).open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(257 * 257 * 4))
    with pytest.raises(CheckpointError, match=r"holds other bytes than were saved: table\.weight changed"):
        load(directory, FakeModel.make())
    with pytest.raises(CheckpointError, match=r"table\.weight changed"):
        checkpoint_to_hf(directory, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_shares_of_a_check_see_every_byte_once(tmp_path: Path) -> None:
    directory, _ = save(tmp_path, FakeModel.make(seed=1), 10)
    index = CheckpointIndex.load(directory / "metadata.json")
    spans = index._spans()
    for of in (1, 2, 3, 7, 50):
        assert [span for part in range(of) for span in _share(spans, part, of)] == spans
    assert sum(span.num_bytes for span in spans) == index.num_bytes
    for place in [(span.file, span.start) for span in spans if span.num_bytes]:
        path = directory / place[0]
        content = path.read_bytes()
        path.write_bytes(content[: place[1]] + bytes([content[place[1]] ^ 1]) + content[place[1] + 1 :])
        assert sum(1 for part in range(3) for _ in index.damage(directory, part=part, of=3)) == 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["table.weight", "optimizer.exp_avg_sq.bias"])
def test_numbers_that_are_not_finite_are_named_with_their_tensor(tmp_path: Path, name: str) -> None:
    model = FakeModel.make()
    directory, optimizer = save(tmp_path, model, 10)
    spoilt = model.table.tensor.data if name == "table.weight" else optimizer.state[model.bias.tensor]["exp_avg_sq"]
    spoilt.view(-1)[7] = torch.nan
    state = TrainState(step=20, world_size=1, run=lineage_for(section()))
    directory = save_checkpoint(tmp_path, model, optimizer, state, plan=plan_for(section()), keep=3)
    with pytest.raises(CheckpointError, match=rf"step-000020 was saved with NaN or inf in {name}; resume"):
        load(directory, FakeModel.make())
