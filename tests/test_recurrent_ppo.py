"""examples/recurrent_ppo.py: it learns, and what it learns from is what it did."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

spec = importlib.util.spec_from_file_location("recurrent_ppo", Path(__file__).parents[1] / "examples/recurrent_ppo.py")
ppo: ModuleType = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ppo)


def test_it_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert ppo.main(["--updates", "30", "--longest", "8", "--environments", "8", "--steps", "64"]) > 0.9
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("update 3: ") and len(lines) == 10


def test_a_rollout_computed_again_is_what_was_acted() -> None:
    """Steps with states set to zero by hand, against one call with the same marks."""
    environments, policy = ppo.Recall(5, 3, 6), ppo.Policy(8)
    state = tuple(torch.zeros(2, 1, 5, 8))
    for _ in range(3):
        start, steps = state, []
        with torch.no_grad():
            for _ in range(20):
                x, begins = environments.observe()
                state = tuple(s * ~begins.unsqueeze(1) for s in state)
                y, state = policy.lstm.step(x, state)
                environments.act(torch.zeros(5))
                steps.append((x, begins, y))
            x, begins, y = (torch.stack(each) for each in zip(*steps, strict=True))
            found, last = policy.lstm(x, start, reset=begins)
        torch.testing.assert_close(found, y)
        for a, b in zip(last, state, strict=True):
            torch.testing.assert_close(a, b)


def test_the_environment_and_the_advantages() -> None:
    environments = ppo.Recall(50, 3, 5)
    cue, lengths = torch.zeros(50), torch.zeros(50, dtype=torch.long)
    for _ in range(40):
        x, begins = environments.observe()
        cue, lengths = torch.where(begins, x[:, 0], cue), torch.where(begins, 0, lengths) + 1
        assert (x[~begins, 0] == 0).all() and (cue.abs() == 1).all()
        reward = environments.act((cue > 0).long())
        asked = x[:, 2] == 1
        assert (reward[asked] == 1).all() and (reward[~asked] == 0).all()
        assert ((lengths[asked] >= 3) & (lengths[asked] <= 5)).all()
    begins = torch.tensor([[True], [False], [True], [False]])
    rewards, values = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    found = ppo.advantages(rewards, values, begins, 0.5, 0.5)
    second = 1.0 - 2.0
    torch.testing.assert_close(found.flatten(), torch.tensor([0.5 * 2 - 1 + 0.25 * second, second, 0.5 * 4 - 3]))
    with pytest.raises(SystemExit):
        ppo.main(["--longest", "2"])
