"""The table against models of published sizes: transformers' own, on the meta device, in both spellings."""

import json

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

from amaxbridge.export.architectures.facts import architecture_of
from tests.support.paths import ROOT
from tests.support.published_models import class_of, configured

PUBLISHED = sorted((ROOT / "tests" / "published_models").glob("*.json"))


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_every_tensor_is_known_and_fits(file) -> None:  # type: ignore[no-untyped-def]
    """No tensor of a published model is refused: sizes are read as its config.json means them."""
    published = json.loads(file.read_text())
    config = configured(published)
    with torch.device("meta"):
        model = class_of(published)(config)
    known = architecture_of(published)
    assert known is not None
    state = dict(model.state_dict())
    for tensors in (state, revert_weight_conversion(model, state)):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert len(shapes) > 100
        here = known.with_axes_of(shapes)
        assert [name for name in shapes if here.fact(name) is None] == []
        assert [misfit for name, shape in shapes.items() if (misfit := here.misfits(name, shape))] == []
