"""Opacus, unchanged, and our layers: the gradients of every sample, or a refusal before anything is computed.

``make test-clients`` runs it, in an environment of its own (requirements-clients.txt). Opacus differentiates a module
that it does not know by its one input and one output. A layer that also returns states is refused by
``make_private``; inside a module with one output, all of it is differentiated by ``vmap(grad)``, and so are our layers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusedrnn

T, B, I, H = 3, 4, 5, 6
MODES = pytest.mark.parametrize("mode", ["hooks", "functorch"])
LAYERS = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus's, of its random numbers and its hooks


def private(model: nn.Module, mode: str) -> nn.Module:
    data = DataLoader(TensorDataset(torch.randn(8, T, I)), batch_size=B)
    return PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=data,
        noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode,
    )[0]  # fmt: skip


def outputs(base: type[nn.RNNBase]) -> nn.Module:
    """A subclass of the layer whose forward returns the outputs alone."""
    body = {"forward": lambda self, x: base.forward(self, x)[0]}
    return type("Outputs", (base,), body)(I, H, num_layers=2, batch_first=True, bidirectional=True)


class Summary(nn.Module):
    """Outputs and last state of the layer, in a module that has a parameter of its own."""

    def __init__(self, base: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.scale = base(I, H, batch_first=True), nn.Parameter(torch.randn(H))

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.layer(x)
        return y[:, 0] + self.scale * (state[0] if isinstance(state, tuple) else state)[-1]


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "ResidualRNN", "RNNCell", "LSTMCell", "GRUCell"])
@MODES
def test_states_are_refused(mode: str, name: str) -> None:
    model = nn.Sequential(nn.Linear(I, I), getattr(fusedrnn, name)(I, H))
    with pytest.raises(NotImplementedError, match=f"fusedrnn.{name} takes and returns states too"):
        private(model, mode)


@pytest.mark.parametrize("make", [outputs, Summary])
@LAYERS
@MODES
def test_gradients_of_every_sample(mode: str, name: str, make: Callable[[type], nn.Module]) -> None:
    """Against torch.nn's layer, a sample after the other."""
    model, theirs = (nn.Sequential(nn.Linear(I, I), make(getattr(of, name))) for of in (fusedrnn, nn))
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(B, T, I)
    private(model, mode)(x).flatten(1).square().sum(1).mean().backward()
    for b in range(B):
        theirs.zero_grad()
        theirs(x[b : b + 1]).square().sum().backward()
        for (parameter, p), (_, q) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(p.grad_sample[b], q.grad, rtol=1e-4, atol=1e-5, msg=parameter)
