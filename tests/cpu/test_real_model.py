"""tools/real_model.py: which differences of greedy texts are a matter of rounding."""

from __future__ import annotations

import pytest
import torch
from load_tool import load_tool

pytest.importorskip("transformers")
real_model = load_tool("real_model")

THEIRS = torch.tensor([5, 6, 7, 8])


@pytest.mark.parametrize(
    ("mine", "margin", "excused"),
    [
        ([5, 6, 7, 8], [1.0, 1.0, 1.0, 1.0], True),
        ([5, 6, 9, 9], [1.0, 1.0, 0.01, 1.0], True),  # what follows another token is another text
        ([5, 6, 9, 9], [1.0, 1.0, 0.03, 1.0], False),
        ([5, 9, 9, 9], [1.0, 1.0, 0.0, 0.0], False),  # the tie came later
    ],
)
def test_only_a_tie_where_texts_first_differ_excuses_that(mine, margin, excused):
    assert real_model.leaves_at_a_tie(torch.tensor(mine), THEIRS, torch.tensor(margin), noise=0.02) is excused


def test_margins_are_of_the_tokens_that_follow_the_prompt(monkeypatch):
    """Position i of the logits is about token i + 1."""
    logits = torch.tensor([[0.0, 9.0, 0.0], [5.0, 3.0, 0.0], [0.0, 1.0, 1.0], [7.0, 0.0, 0.0]])
    monkeypatch.setattr(real_model, "logits_of", lambda model, ids: logits[: len(ids)])
    found = real_model.margins(None, torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert found.tolist() == [2.0, 0.0]
