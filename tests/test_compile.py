"""Training through torch.compile: the layers are traced, with the gradients of the eager call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedrnn


class Tagger(nn.Module):
    """A recurrent layer and a head, as models have them."""

    def __init__(self, layer: nn.Module, out: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(out, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.layer(x)
        while not isinstance(result, torch.Tensor):
            result = result[0]
        return self.head(result)


LAYERS = {
    "lstm": lambda: (fusedrnn.LSTM(4, 5, num_layers=2, bidirectional=True), (3, 2, 4), 10),
    "gru": lambda: (fusedrnn.GRU(4, 5), (3, 2, 4), 5),
    "rnn": lambda: (fusedrnn.RNN(4, 5, batch_first=True), (3, 2, 4), 5),
    "lstm cell": lambda: (fusedrnn.LSTMCell(4, 5), (3, 4), 5),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(model: nn.Module, compiled, x: torch.Tensor) -> None:
    """Values and gradients of the compiled model are the eager ones."""
    results = []
    for call in (model, compiled):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        results.append([leaf.grad, *(parameter.grad.clone() for parameter in model.parameters())])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_model_trains(name: str, backend: str) -> None:
    torch.manual_seed(0)
    layer, shape, out = LAYERS[name]()
    model = Tagger(layer, out)
    compare(model, torch.compile(model, backend=backend), torch.randn(shape))


@pytest.mark.parametrize("name", LAYERS)
def test_without_a_graph_break(name: str) -> None:
    """Dynamo leaves modules of torch.nn's recurrent classes to Python unless it is told to trace them."""
    torch.manual_seed(0)
    layer, shape, out = LAYERS[name]()
    model = Tagger(layer, out)
    with torch._dynamo.config.patch(allow_rnn=True):
        compare(model, torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(shape))
