"""Proximal policy optimisation with a recurrent policy, on a task that needs memory: ``python recurrent_ppo.py``.

An episode shows a cue, -1 or 1, in its first step, then noise for a random while, then asks: an action that names the
cue earns 1, the other -1, and the next episode begins. Two things in it are fusedrnn's:

- acting: ``lstm.step`` takes all environments one step further;
- learning: ``lstm(observations, state, reset=begins)`` computes a whole rollout, of whatever episodes it consists, in
  one call. Elsewhere that is a Python loop over time, or episodes are cut out and padded.

[Schulman 2017], with generalised advantage estimation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import fusedrnn

OBSERVATION = 3  # cue, noise, whether it is time to answer


class Recall:
    """``batch`` environments side by side; episodes of ``shortest`` to ``longest`` steps."""

    def __init__(self, batch: int, shortest: int, longest: int) -> None:
        self.batch, self.shortest, self.longest = batch, shortest, longest
        self.cue, self.left = torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
        self.begins = torch.ones(batch, dtype=torch.bool)

    def observe(self) -> tuple[Tensor, Tensor]:
        """(B, 3), and where an episode begins, (B,)."""
        begins = self.begins
        self.cue = torch.where(begins, torch.randint(2, (self.batch,)) * 2.0 - 1, self.cue)
        self.left = torch.where(begins, torch.randint(self.shortest - 1, self.longest, (self.batch,)), self.left - 1)
        asked = self.left == 0
        return torch.stack([self.cue * begins, torch.randn(self.batch), asked.float()], 1), begins

    def act(self, action: Tensor) -> Tensor:
        """The reward, (B,)."""
        self.begins = self.left == 0
        return torch.where(self.begins, (action * 2.0 - 1) * self.cue, 0.0)


class Policy(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = fusedrnn.LSTM(OBSERVATION, hidden)
        self.actor, self.critic = nn.Linear(hidden, 2), nn.Linear(hidden, 1)

    def heads(self, y: Tensor) -> tuple[Categorical, Tensor]:
        return Categorical(logits=self.actor(y)), self.critic(y).squeeze(-1)


def advantages(rewards: Tensor, values: Tensor, begins: Tensor, discount: float = 0.95, trace: float = 0.9) -> Tensor:
    """(T, B), from values (T + 1, B); ``begins`` (T + 1, B): an episode carries nothing over to the one before."""
    found, carried = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        goes_on = (~begins[t + 1]).float()
        delta = rewards[t] + discount * goes_on * values[t + 1] - values[t]
        carried = delta + discount * trace * goes_on * carried
        found[t] = carried
    return found


def update(policy: Policy, optimizer: torch.optim.Optimizer, environments: Recall, state: tuple, steps: int) -> tuple:
    """One rollout and what is learned from it: the last state, and the share of right answers."""
    start, rollout = state, []
    with torch.no_grad():
        for _ in range(steps):
            x, begins = environments.observe()
            state = tuple(s * ~begins.unsqueeze(1) for s in state)
            y, state = policy.lstm.step(x, state)
            chosen, value = policy.heads(y)
            action = chosen.sample()
            rollout.append((x, begins, action, chosen.log_prob(action), value, environments.act(action)))
        x, begins, actions, old, values, rewards = (torch.stack(each) for each in zip(*rollout, strict=True))
        begins_next = torch.cat([begins, environments.begins.unsqueeze(0)])
        # The value of the step after the last is not known yet: that of the last stands for it.
        gain = advantages(rewards, torch.cat([values, values[-1:]]), begins_next)
        returns, scaled = gain + values, (gain - gain.mean()) / (gain.std() + 1e-6)
    for _ in range(4):
        y, _ = policy.lstm(x, start, reset=begins)
        chosen, value = policy.heads(y)
        ratio = (chosen.log_prob(actions) - old).exp()
        surrogate = torch.minimum(ratio * scaled, ratio.clamp(0.8, 1.2) * scaled).mean()
        loss = 0.5 * (value - returns).square().mean() - surrogate - 0.01 * chosen.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
    answered = rewards != 0
    return state, float((rewards[answered] > 0).float().mean())


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the share of right answers in the last tenth of the updates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--updates", type=int, default=40)
    add("--environments", type=int, default=16)
    add("--steps", type=int, default=128, help="of a rollout")
    add("--hidden", type=int, default=32)
    add("--longest", type=int, default=12, help="steps of an episode, 3 at least")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.longest < 3:
        parser.error(f"--longest must be 3 at least, got {args.longest}")
    torch.manual_seed(args.seed)
    policy, environments = Policy(args.hidden), Recall(args.environments, 3, args.longest)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    state: tuple = tuple(torch.zeros(2, 1, args.environments, args.hidden))
    right = []
    for i in range(args.updates):
        state, share = update(policy, optimizer, environments, state, args.steps)
        right.append(share)
        if (i + 1) % max(1, args.updates // 10) == 0:
            last = right[-max(1, args.updates // 10) :]
            print(f"update {i + 1}: {sum(last) / len(last):.0%} right", flush=True)
    last = right[-max(1, args.updates // 10) :]
    return sum(last) / len(last)


if __name__ == "__main__":
    main()
