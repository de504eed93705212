"""Images as patches with grids: whose are whose, and batches that do not fit together."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from galvatron.models import family_of, meta_model, spec_of, task_of
from galvatron.models.grids import GRIDS, KINDS, PIXELS, Grids, positions_beside_images, usual_sides
from galvatron.models.inputs import blank_inputs, random_inputs
from galvatron.testing.models import tiny_config, tiny_model

CONFIG = tiny_config("qwen2_vl")
GRID = Grids.of(CONFIG)


def _batch() -> dict[str, Tensor]:
    """Three texts of one, two and no images."""
    return random_inputs(CONFIG, task_of(CONFIG), 3, 16, torch.Generator().manual_seed(0))


def test_the_tower_is_what_comes_before_one_stack() -> None:
    family, spec = family_of(CONFIG), spec_of(meta_model(CONFIG))
    assert (family.tower, [stack.path for stack in family.stacks]) == ("model.visual", ["model.language_model.layers"])
    assert family.before == ("model.language_model.embed_tokens", "model.visual")
    towers = [p for p in spec.embedding.parameters if p.name.startswith("model.visual.")]
    assert len(towers) == len(spec.embedding.parameters) - 1
    assert not any(p.cut for p in towers)


def test_texts_have_their_own_images() -> None:
    assert GRID is not None
    batch = _batch()
    assert batch[GRIDS].tolist() == [[1, 2, 2], [1, 4, 2], [1, 2, 4]]
    second = GRID.of_rows(batch, [1])
    assert torch.equal(second[GRIDS], batch[GRIDS][1:])
    assert torch.equal(second[PIXELS], batch[PIXELS][4:])
    turned = GRID.of_rows(batch, [2, 1, 0])
    assert torch.equal(turned[PIXELS], torch.cat((batch[PIXELS][4:], batch[PIXELS][:4])))
    assert GRID.of_rows(batch, [2]) == {}


def test_positions_are_those_that_the_model_counts() -> None:
    model, batch = tiny_model(CONFIG), _batch()
    positions = positions_beside_images(model, batch)
    ids = {name: batch[name] for name in ("input_ids", PIXELS, GRIDS)}
    with torch.no_grad():
        wanted = model(**batch).logits
        assert torch.equal(model(**ids, position_ids=positions).logits, wanted)
        plain = torch.arange(16).expand(3, 3, 16)
        assert not torch.allclose(model(**ids, position_ids=plain).logits, wanted)
    assert positions.shape == (3, 3, 16)


def test_an_image_of_half_of_a_text_stands_for_the_usual_one() -> None:
    assert (usual_sides(4096), usual_sides(16), usual_sides(1)) == (((45, 45),), ((2, 2),), ())
    blank = blank_inputs(CONFIG, "vision_language", 2, 16)
    assert int(blank[KINDS].sum()) == 2 * 2 * 2
    assert blank[GRIDS].tolist() == [[1, 4, 4]] * 2


def _changed(name: str, value: object) -> dict[str, object]:
    return {**_batch(), name: value}


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        (_batch(), None),
        ({name: values for name, values in _batch().items() if name != GRIDS}, "image_grid_thw go together"),
        ({name: values for name, values in _batch().items() if name != KINDS}, "images need mm_token_type_ids"),
        (_changed(KINDS, torch.zeros(3, 16, dtype=torch.int64)), "mm_token_type_ids must be 1 where input_ids stand"),
        (_changed("video_grid_thw", torch.ones(1, 3)), "video_grid_thw is of videos"),
        (_changed(GRIDS, torch.tensor([[1, 2, 2], [1, 2, 4]])), r"pixel_values must be \[12, 24\].*got \[20, 24\]"),
        (_changed(GRIDS, torch.tensor([[1, 2, 2], [1, 4, 2], [1, 8, 1]])), "must have rows and columns by 2"),
        (_changed(GRIDS, torch.tensor([[1, 4, 2], [1, 2, 2], [1, 2, 4]])), "image 0, of row 0, has 1 tokens.*makes 2"),
        (_changed(GRIDS, torch.tensor([[1, 2, 2], [1, 4, 4]])), r"have 3 images.*has 2"),
        ({"input_ids": _batch()["input_ids"]}, "5 tokens of images but there are none"),
        ({"input_ids": torch.zeros(3, 16, dtype=torch.int64)}, None),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_are_refused(batch: dict[str, Tensor], problem: str | None) -> None:
    assert GRID is not None
    found = GRID.problem(batch)
    assert found is None if problem is None else re.search(problem, str(found)), found
