"""Another system's computation and memory files become a model profile, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from galvatron.core.errors import ProfileError
from galvatron.core.model_profile import ActivationSample, ComputeSample, ModelProfile
from galvatron.exchange import card_of_file, import_hardware, import_model, named_spec
from galvatron.search import search
from unit.exchange.hetu_fixtures import (
    MIB,
    SEQ_LEN,
    SPEC,
    TWO_KINDS,
    one_kind_files,
    reference_folder,
    two_kind_files,
    write,
)


def compute(profile: ModelProfile, unit: str, tp: int) -> list[ComputeSample]:
    return [sample for sample in profile.compute if (sample.unit, sample.tp) == (unit, tp)]


def activation(profile: ModelProfile, unit: str, tp: int, recompute: str = "none") -> ActivationSample:
    (found,) = (s for s in profile.activations if (s.unit, s.tp, s.recompute) == (unit, tp, recompute))
    return found


def test_times_are_of_the_batch_and_never_fall_with_it(tmp_path: Path) -> None:
    profile = import_model(*one_kind_files(tmp_path), SPEC)
    assert (profile.origin, profile.seq_len, profile.precision) == ("imported", SEQ_LEN, "bf16")
    samples = compute(profile, "layer", 1)
    assert [sample.batch for sample in samples] == [1, 2, 4]
    assert [sample.forward_s for sample in samples] == pytest.approx([4e-3, 4e-3, 5e-3])
    assert all(sample.backward_s == 2 * sample.forward_s for sample in samples)
    assert [sample.forward_s for sample in compute(profile, "head", 1)] == pytest.approx([2e-3, 3e-3])
    assert all(sample.forward_s == 0 for sample in compute(profile, "embedding", 1))


def test_a_rank_of_tp_ranks_takes_the_time_of_its_share_of_the_batch(tmp_path: Path) -> None:
    profile = import_model(*one_kind_files(tmp_path), SPEC)
    assert profile.tp_degrees() == (1, 2, 4)
    for tp in (2, 4):
        shares = [(sample.batch / tp, sample.forward_s) for sample in compute(profile, "layer", tp)]
        assert shares == [(sample.batch, sample.forward_s) for sample in compute(profile, "layer", 1)]


def test_activations_are_saved_or_built_up_again(tmp_path: Path) -> None:
    profile = import_model(*one_kind_files(tmp_path), SPEC)
    saved, again = activation(profile, "layer", 2), activation(profile, "layer", 2, "full")
    assert (saved.bytes_per_sequence, saved.workspace_bytes_per_sequence) == (4.5 * MIB, 0)
    assert again.bytes_per_sequence == MIB // 2
    assert again.bytes_per_sequence + again.workspace_bytes_per_sequence == saved.bytes_per_sequence


def test_ends_hold_at_least_what_was_measured_with_and_without_a_pipeline(tmp_path: Path) -> None:
    profile = import_model(*one_kind_files(tmp_path), SPEC)
    ends = {
        tp: [activation(profile, unit, tp).bytes_per_sequence / MIB for unit in ("embedding", "head")]
        for tp in (1, 2, 4)
    }
    assert ends == {1: [6.0, 15.0], 2: [3.0, 7.0], 4: [0.0, 6.0]}


def test_several_kinds_have_their_own_lengths(tmp_path: Path) -> None:
    profile = import_model(*two_kind_files(tmp_path), TWO_KINDS)
    assert profile.seq_len == 256
    assert profile.tp_degrees() == (1, 2), "no more than embedding and head were measured at"
    assert compute(profile, "stage1", 2)[0].forward_s == pytest.approx(3e-3)
    assert compute(profile, "stage1", 2)[0].batch == 24
    whole = activation(profile, "stage0", 2, "full").bytes_per_sequence
    assert whole == MIB, "without sequence parallelism every rank keeps the whole input"


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ProfileError, match=r"layer type 0 has .* MiB of parameters but a layer of model toy has 40\.0 MiB"
    ):
        import_model(*one_kind_files(tmp_path, factor=1.2), SPEC)
    with pytest.raises(ProfileError, match=r"has layer types \[0\] but model pyramid has 2 kinds"):
        import_model(*one_kind_files(tmp_path), TWO_KINDS)


def test_a_length_must_have_been_measured(tmp_path: Path) -> None:
    computation, memory = one_kind_files(tmp_path)
    with pytest.raises(ProfileError, match=r"needs 64 tokens .* measured at 128; choose that by --seq-len"):
        import_model(computation, memory, SPEC, seq_len=64)
    write(computation, json.loads(computation.read_text()) | {"layertype_0_bsz1_seq256": 9.0})
    with pytest.raises(ProfileError, match="measured at seq_len 128, 256; choose one by --seq-len"):
        import_model(computation, memory, SPEC)
    assert import_model(computation, memory, SPEC, seq_len=128).seq_len == 128


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"layernum[2]_bsz1_seq128": 1.0}, "must have keys such as layertype_0_bsz8_seq2048"),
        ({"layertype_0_bsz1_seq128": "fast"}, "layertype_0_bsz1_seq128 must be a number of 0 or more, got 'fast'"),
        ({"layertype_0_bsz1_seq128": -1.0}, "must be a number of 0 or more, got -1.0"),
        ([1], "must hold one JSON object, got a list"),
        ({"layertype_0_bsz1_seq128": 1.0}, "has no layertype_other at"),
    ],
)
def test_a_malformed_computation_file_is_one_sentence(tmp_path: Path, data: object, message: str) -> None:
    computation, memory = one_kind_files(tmp_path)
    write(computation, data)
    with pytest.raises(ProfileError, match=message) as caught:
        import_model(computation, memory, SPEC)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layertype_0_sp", {"128": {"parameter_size": 1.0}}, "tp_activation_per_bsz_dict: must be given"),
        ("layertype_0_sp", 3, "layertype_0_sp must list values by sequence length"),
        ("other_memory_pp_off_sp", {}, "must hold tp 1 of every layer type and of other_memory_pp_off"),
    ],
)
def test_a_malformed_memory_file_is_one_sentence(tmp_path: Path, key: str, value: object, message: str) -> None:
    computation, memory = one_kind_files(tmp_path)
    write(memory, json.loads(memory.read_text()) | {key: value})
    with pytest.raises(ProfileError, match=message):
        import_model(computation, memory, SPEC)


def test_a_file_name_tells_model_and_precision(tmp_path: Path) -> None:
    names = {
        "bf16_llama2-7b_all": "llama2-7b",
        "bf16_t5-3B": "t5-3b",
        "fp32_swin-huge": "swin-h",
        "fp16_vit-huge": "vit-huge",
    }
    for name, card in names.items():
        assert card_of_file(Path(f"computation_profiling_{name}.json")) == card
    computation, memory = one_kind_files(tmp_path)
    with pytest.raises(ProfileError, match=r"was measured in fp8, but profiles are of bf16 or fp16 or fp32"):
        import_model(computation.rename(tmp_path / "computation_profiling_fp8_toy.json"), memory, SPEC)
    with pytest.raises(ProfileError, match=r"must be called computation_profiling_PRECISION_MODEL\.json"):
        card_of_file(Path("times.json"))


@pytest.mark.parametrize("folder", ["llama2-7b", "t5-3b", "swin-huge"])
def test_the_real_files_agree_with_the_cards(folder: str) -> None:
    (computation,) = (reference_folder() / folder).glob("computation_*.json")
    (memory,) = (reference_folder() / folder).glob("memory_*.json")
    profile = import_model(computation, memory, named_spec(card_of_file(computation)))
    assert profile.tp_degrees() == (1, 2, 4, 8)
    assert ModelProfile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize("folder", ["t5-3b", "swin-huge"])
def test_several_stacks_are_planned_from_the_real_files(folder: str) -> None:
    """Two stacks and four, on a node of 8 GPUs."""
    (computation,) = (reference_folder() / folder).glob("computation_*.json")
    (memory,) = (reference_folder() / folder).glob("memory_*.json")
    profile = import_model(computation, memory, named_spec(card_of_file(computation)))
    hardware, _ = import_hardware(reference_folder() / "hardware", 1, 8, 80 * 10**9)
    found = search(
        profile, hardware, global_batch_size=64, memory_limit_bytes=20 * 10**9, num_candidates=1, baselines=False
    )
    proof = found.prediction.proof
    assert profile.spec.stacks > 1
    assert proof is not None
    assert proof.gap == 0
    found.plan.validate(profile.spec, hardware.world_size)
