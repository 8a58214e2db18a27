"""A cell of one's own, as a fused layer: its gradient's flow as a picture, and its C++ (docs/own-cells.md).

python examples/own_cell.py --out own-cell.png
"""

import argparse

import torch

import fusedrnn
from fusedrnn.user_cells import sigmoid, tanh


@fusedrnn.cell(gates="f n")
def mgu(x, rec, h):
    f = sigmoid(x.f + rec.f)
    n = tanh(x.n + rec.n(f * h))
    return (1 - f) * h + f * n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="own-cell.png", help="where the picture goes")
    args = parser.parse_args()
    torch.manual_seed(0)
    layer = mgu.Module(16, 64, num_layers=2)
    with fusedrnn.record_gradients(layer) as recorded:
        layer(torch.randn(100, 8, 16))[0][-1].square().sum().backward()
    print(recorded.summary())
    recorded.plot(args.out)
    print(mgu.source())


if __name__ == "__main__":
    main()
