"""Third-party libraries, unchanged, on torch.nn as it is and on torch.nn patched: the same losses, and both times.

``make test-clients`` runs it, in an environment of its own (requirements-clients.txt); ``make test`` does not collect
it. Weights are random, data are made here, nothing is downloaded. Sizes are the libraries' defaults where they have
any, except for flair's language model, whose usual 1024 to 2048 units would take minutes.

A client is a function that makes a model and returns its step, which trains once and returns the loss. The two models
of a client, one for each torch.nn, take their steps in turn from the same seeds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import flair
import numpy as np
import pandas as pd
import pytest
import torch
from dispatched import ours
from flair.data import Dictionary
from flair.models import LanguageModel
from pytorch_forecasting import RecurrentNetwork, TimeSeriesDataSet
from sb3_contrib import RecurrentPPO
from stanza.models.common.packed_lstm import PackedLSTM
from stanza.models.tokenization.trainer import Trainer
from torch import nn

import fusedrnn

Step = Callable[[], float]
STEPS = 13
RTOL = 1e-5  # of the loss at any of them; seen: 3e-7


def recurrent_ppo() -> Step:
    """sb3-contrib's RecurrentPPO on CartPole, actor and critic each an LSTM: 128 steps played, then 8 updates."""
    model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=128, batch_size=64, n_epochs=4, seed=0, device="cpu")

    def step() -> float:
        model.learn(128, reset_num_timesteps=False, log_interval=None)
        return float(model.logger.name_to_value["train/loss"])

    return step


def packed_lstm(rec_dropout: float) -> Step:
    """stanza's PackedLSTM as a tagger has it, on ragged sentences; with rec_dropout it is a loop over LSTMCells."""
    model = PackedLSTM(
        100, 200, 2, batch_first=True, dropout=0.5, bidirectional=True, pad=True, rec_dropout=rec_dropout
    )
    head = nn.Linear(400, 17)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=2e-3, betas=(0.9, 0.95), eps=1e-6)
    lengths = sorted(np.random.randint(3, 30, size=16).tolist(), reverse=True)
    words, tags = torch.randn(16, lengths[0], 100), torch.randint(17, (16, lengths[0]))

    def step() -> float:
        output, _ = model(words, lengths)
        loss = nn.functional.cross_entropy(head(output).flatten(0, 1), tags.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def tokenizer() -> Step:
    """stanza's tokenizer, its model and its trainer."""
    args = dict(
        lang="en", vocab_size=90, feat_dim=5, emb_dim=32, hidden_dim=64, rnn_layers=1, conv_res=None, hierarchical=True,
        hier_invtemp=0.5, use_mwt=False, dropout=0.33, feat_dropout=0.05, tok_noise=0.02, lr0=2e-3, weight_decay=0.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    trainer = Trainer(args, device="cpu")
    lengths = sorted(np.random.randint(40, 100, size=32).tolist(), reverse=True)
    units, labels = torch.randint(1, 90, (32, lengths[0])), torch.randint(3, (32, lengths[0]))
    features, text = torch.randint(2, (32, lengths[0], 5)).float(), ["x" * length for length in lengths]
    for row, length in enumerate(lengths):
        units[row, length:], labels[row, length:] = 0, -1
    return lambda: trainer.update((units, labels, features, text))


def recurrent_network(cell_type: str) -> Step:
    """pytorch-forecasting's RecurrentNetwork, trained by its own loss on series of several lengths, then asked."""
    count, length = 64, 60
    data = pd.DataFrame(
        {
            "time": np.tile(np.arange(length), count),
            "series": np.repeat(np.arange(count), length).astype(str),
            "value": np.sin(np.arange(count * length) / 5) + 0.1 * np.random.normal(size=count * length),
        }
    )
    series = TimeSeriesDataSet(
        data, time_idx="time", target="value", group_ids=["series"], min_encoder_length=5, max_encoder_length=24,
        max_prediction_length=6, time_varying_unknown_reals=["value"], time_varying_known_reals=["time"],
    )  # fmt: skip
    batches = series.to_dataloader(train=True, batch_size=64, num_workers=0)
    model = RecurrentNetwork.from_dataset(series, cell_type=cell_type, hidden_size=64, rnn_layers=2, dropout=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = next(iter(batches))

    def step() -> float:
        model.train()
        loss = model.loss(model(x)["prediction"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            return loss.item() + model.loss(model(x)["prediction"], y).item()  # each value predicted from the last

    return step


def language_model(recurrent_type: str) -> Step:
    """flair's character language model, as its trainer calls it: states handed on; then as its embeddings call it."""
    flair.device = torch.device("cpu")
    dictionary = Dictionary()
    for character in "abcdefghijklmnopqrstuvwxyz .,\n":
        dictionary.add_item(character)
    model = LanguageModel(dictionary, True, hidden_size=256, nlayers=1, recurrent_type=recurrent_type)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    characters = torch.randint(len(dictionary), (STEPS + 2, 64, 32))
    hidden, batches = model.init_hidden(32), iter(characters)

    def step() -> float:
        nonlocal hidden
        model.train()
        data = next(batches)
        optimizer.zero_grad()
        output, _, hidden = model.forward(data, hidden)
        loss = nn.functional.cross_entropy(output.view(-1, len(dictionary)), data.roll(-1, 0).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        hidden = model.repackage_hidden(hidden)
        model.eval()
        with torch.no_grad():
            sentences = ["the quick brown fox", "jumps over the lazy dog."]
            return loss.item() + model.get_representation(sentences, "\n", " ").abs().mean().item()

    return step


CLIENTS: dict[str, Callable[[], Step]] = {
    "sb3-contrib RecurrentPPO": recurrent_ppo,
    "stanza PackedLSTM": lambda: packed_lstm(0.0),
    "stanza PackedLSTM, rec_dropout": lambda: packed_lstm(0.2),
    "stanza tokenizer": tokenizer,
    "pytorch-forecasting RecurrentNetwork, LSTM": lambda: recurrent_network("LSTM"),
    "pytorch-forecasting RecurrentNetwork, GRU": lambda: recurrent_network("GRU"),
    "flair LanguageModel, LSTM": lambda: language_model("lstm"),
    "flair LanguageModel, GRU": lambda: language_model("gru"),
}


def seeded(seed: int, call: Callable):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return call()


@pytest.fixture(scope="module")
def rows() -> Iterator[list[str]]:
    """The rows of the table that is printed at the end."""
    found: list[str] = []
    yield found
    print(
        f"\n\nOne thread, medians of {STEPS - 1} steps in turn; the ratio with quartiles. Difference: the largest "
        f"relative one of the losses of {STEPS} steps.\n\n"
        "| client | first loss | difference | torch.nn, ms | patched, ms | ratio |\n|---|---:|---:|---:|---:|---:|"
    )
    print(*found, sep="\n")


@pytest.mark.filterwarnings("error:.*goes to torch.nn's own forward")
@pytest.mark.parametrize("name", CLIENTS)
def test_same_losses(name: str, rows: list[str]) -> None:
    contexts = (nullcontext, fusedrnn.patch_torch)
    steps, losses, seconds = [], ([], []), ([], [])
    for context in contexts:
        with context():
            steps.append(seeded(0, CLIENTS[name]))
    for index in range(STEPS):
        for side, context in enumerate(contexts):
            with context():
                begin = time.perf_counter()
                losses[side].append(seeded(index, steps[side]))
                seconds[side].append(time.perf_counter() - begin)
    theirs, fused = (np.array(found) for found in losses)
    difference = (abs(fused - theirs) / abs(theirs)).max()
    times = [1e3 * statistics.median(found[1:]) for found in seconds]
    ratios = (torchs / patched for torchs, patched in zip(*(found[1:] for found in seconds), strict=True))
    low, ratio, high = statistics.quantiles(ratios, n=4)
    rows.append(
        f"| {name} | {theirs[0]:.7g} | {difference:.1e} | {times[0]:.3g} | {times[1]:.3g} "
        f"| **{ratio:.2f}** ({low:.2f}-{high:.2f}) |"
    )
    assert np.isfinite(losses).all() and len(set(losses[0])) > 1
    assert difference < RTOL

    for context, step in zip(contexts, steps, strict=True):
        with context():
            assert ours(step) == (context is fusedrnn.patch_torch)
