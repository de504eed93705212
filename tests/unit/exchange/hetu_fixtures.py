"""Small made-up files in Hetu-Galvatron's formats, and where the real ones are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from galvatron.core.model import Cut, LayerKind, ModelSpec, ParameterSpec, UnitSpec
from unit.profiles import make_spec

MIB = 2**20
SPEC = make_spec(2, hidden=1024, ffn=2048, heads=8, kv_heads=8, vocab=1000)
SEQ_LEN = 128


def reference_folder() -> Path:
    """The folder of the reference system's own files; skips the test where there is none."""
    default = Path(__file__).parents[4] / "shared" / "reference_profiles"
    folder = Path(os.environ.get("GALVATRON_REFERENCE_PROFILES", default))
    if not (folder / "hardware").is_dir():
        pytest.skip("needs GALVATRON_REFERENCE_PROFILES, a folder of the reference system's profiles")
    return folder


def write(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def layer_memory(spec: ModelSpec, index: int, factor: float = 1.0) -> dict[str, object]:
    """A layer's entry: 1 % more parameters than the spec has, 8 MiB a sample, cut by tp; 1 MiB recomputed."""
    return {
        "parameter_size": factor * 1.01 * spec.layers[index].num_parameters * 4 / MIB,
        "tp_activation_per_bsz_dict": {"1": 8.0, "2": 4.5, "4": 2.5, "checkpoint": 1.0},
    }


def one_kind_files(folder: Path, factor: float = 1.0) -> tuple[Path, Path]:
    """(computation, memory) of ``SPEC``, as the newer line writes them: with sequence parallelism."""
    computation = {
        "layernum[2]_bsz1_seq128": 9.0,
        "layertype_0_bsz1_seq128": 4.0,
        "layertype_0_bsz2_seq128": 1.5,  # noise: two samples in 3 ms, one in 4 ms
        "layertype_0_bsz4_seq128": 1.25,
        "layertype_other_bsz1_seq128": 2.0,
        "layertype_other_bsz2_seq128": 1.5,
    }
    memory = {
        "1_1_8_sp": {"layernum[1]_bsz8_seq128_rank0_ms": 1.0},
        "layertype_0_sp": {"128": layer_memory(SPEC, 0, factor)},
        "other_memory_pp_off_sp": {"128": {"model_states": {"1": 9.0}, "activation": {"1": 20.0, "2": 10.0, "4": 6.0}}},
        "other_memory_pp_on_first_sp": {"128": {"model_states": {"1": 9.0}, "activation": {"1": 6.0, "2": 3.0}}},
        "other_memory_pp_on_last_sp": {"128": {"model_states": {"1": 9.0}, "activation": {"1": 15.0, "2": 6.0}}},
    }
    return (
        write(folder / "computation_profiling_bf16_toy_all.json", computation),
        write(folder / "memory_profiling_bf16_toy_all.json", memory),
    )


def stage_kind(name: str, hidden: int, fixed_tokens: int) -> LayerKind:
    """A kind of layer that is one square matrix."""
    weight = ParameterSpec(name="weight", shape=(hidden, hidden), cut=Cut(dim=0, segments=(hidden,)))
    return LayerKind(
        name=name,
        count=2,
        hidden_size=hidden,
        ffn_size=hidden,
        num_heads=4,
        num_kv_heads=4,
        head_dim=hidden // 4,
        fixed_tokens=fixed_tokens,
        parameters=(weight,),
    )


TWO_KINDS = ModelSpec(
    name="pyramid",
    family="swin",
    layers=(stage_kind("stage0", 1024, 0), stage_kind("stage1", 2048, 64)),
    vocab_size=1000,
    max_seq_len=256,
    tied_embeddings=False,
    embedding=UnitSpec(parameters=()),
    head=UnitSpec(parameters=()),
)


def two_kind_files(folder: Path) -> tuple[Path, Path]:
    """(computation, memory) of ``TWO_KINDS``, as the older line writes them: lists of lengths, no suffix."""
    computation = {
        "layertype_0_bsz12_seq256": 0.5,
        "layertype_1_bsz12_seq64": 0.25,
        "layertype_other_bsz12_seq[256,64]": 0,
    }
    memory = {
        "layertype_0": {"256": layer_memory(TWO_KINDS, 0)},
        "layertype_1": {"64": layer_memory(TWO_KINDS, 1)},
        "other_memory_pp_off": {"[256,64]": {"model_states": {"1": 9.0}, "activation": {"1": 20.0, "2": 10.0}}},
    }
    return (
        write(folder / "computation_profiling_bf16_pyramid.json", computation),
        write(folder / "memory_profiling_bf16_pyramid.json", memory),
    )


def hardware_files(folder: Path, nodes: int = 1, gpus: int = 4) -> Path:
    """Bandwidths of a node of 4, or of two such nodes ten times slower between them; times of 1, 2 and 4 MiB."""
    near = {f"allreduce_size_{n}_consec_1": 100.0 for n in (2, 4)}
    write(folder / f"allreduce_bandwidth_1nodes_{gpus}gpus_per_node.json", near | {"allreduce_size_2_consec_0": 80.0})
    write(folder / f"p2p_bandwidth_1nodes_{gpus}gpus_per_node.json", {"pp_size_2": 50.0, "pp_size_4": 40.0})
    if nodes > 1:
        far = {"allreduce_size_8_consec_1": 20.0, "allreduce_size_2_consec_0": 5.0, "allreduce_size_4_consec_0": 10.0}
        write(folder / f"allreduce_bandwidth_{nodes}nodes_{gpus}gpus_per_node.json", near | far)
        write(folder / f"p2p_bandwidth_{nodes}nodes_{gpus}gpus_per_node.json", {"pp_size_2": 5.0, "pp_size_4": 4.0})
    times = {
        f"{op}_size_{n}_{mb}MB_time": 1e3 * (n * 1e-5 + mb * MIB * 1e-11)
        for op in ("allreduce", "all2all")
        for n in (2, 4)
        for mb in (1, 2, 4)
    }
    write(folder / f"sp_time_1nodes_{gpus}gpus_per_node.json", times)
    write(folder / "overlap_coefficient.json", {"overlap_coe": 1.2})
    return folder
