"""The sigmoid and tanh of the instruction set in use, against wider arithmetic, in units of the last place.

float32 is compared with float64 over the whole range of float32 bit patterns (a stride of them); float64 with
np.longdouble (80 bits on x86) on a dense grid and random points. The bounds are those stated in csrc/cpu/vec.h, and in
csrc/persistent/value.h for the kernels of a GPU, which are emulated a thread at a time: fewer numbers there.
"""

import numpy as np
import pytest
import torch

import fusedrnn

pytestmark = pytest.mark.isa
PERSISTENT = fusedrnn._C.isa() == "persistent"
FLOAT32_BOUND = 4.0 if PERSISTENT else 2.5
WIDER = {np.float32: np.float64, np.float64: np.longdouble}
needs_longdouble = pytest.mark.skipif(
    np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps, reason="no type wider than float64 on this platform"
)


def activations(x: np.ndarray) -> dict[str, np.ndarray]:
    """As an LSTM saves its gates for the backward pass: a sample for each number, one unit, weights of one."""
    numbers = torch.from_numpy(x).reshape(1, -1, 1)
    w_ih, w_hh = numbers.new_ones(4, 1), numbers.new_zeros(4, 1)
    *_, saved = fusedrnn.ops.layer_forward(numbers, None, None, None, [w_ih, w_hh], "lstm", False, True)
    return {"sigmoid": saved[0, :, 0].numpy(), "tanh": saved[0, :, 2].numpy()}


def exact(function: str, x: np.ndarray) -> np.ndarray:
    wide = x.astype(WIDER[x.dtype.type])
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-wide)) if function == "sigmoid" else np.tanh(wide)


def ulps(result: np.ndarray, expected: np.ndarray) -> np.ndarray:
    spacing = np.spacing(np.abs(expected.astype(result.dtype))).astype(expected.dtype)
    return np.abs(result.astype(expected.dtype) - expected) / spacing


def finite_float32(stride: int) -> np.ndarray:
    bits = np.arange(0, 1 << 32, stride, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    return x[np.isfinite(x)]


def inputs(dtype, limit: float) -> np.ndarray:
    if dtype == np.float32:
        x = finite_float32(64 * 4099 if PERSISTENT else 4099)
    else:
        rng = np.random.default_rng(0)
        tiny = rng.standard_normal(100_000) * 10.0 ** rng.integers(-300, 2, 100_000)
        x = np.concatenate([np.linspace(-limit, limit, 400_001), tiny])
    return np.ascontiguousarray(x[np.abs(x) <= limit], dtype=dtype)


CASES = [
    pytest.param(np.float32, "sigmoid", 88.7, FLOAT32_BOUND, id="float32-sigmoid"),
    pytest.param(np.float32, "tanh", 3e38, FLOAT32_BOUND, id="float32-tanh"),
    pytest.param(np.float64, "sigmoid", 709.7, 3.0, id="float64-sigmoid", marks=needs_longdouble),
    pytest.param(np.float64, "tanh", 1e300, 3.0, id="float64-tanh", marks=needs_longdouble),
]


@pytest.mark.parametrize(("dtype", "function", "limit", "bound"), CASES)
def test_error_in_units_of_the_last_place(dtype, function, limit, bound, record_property):
    x = inputs(dtype, limit)
    if dtype == np.float64 and function == "tanh":
        x = np.concatenate([inputs(dtype, 25.0), [1e10, -1e300]])
    error = ulps(activations(x)[function], exact(function, x))
    worst = int(np.argmax(error))
    record_property("ulp", float(error[worst]))
    assert error[worst] <= bound, f"{function}({x[worst]!r}): {error[worst]:.2f} ulp"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits_are_exact(dtype):
    """To the bit, at 0, the smallest and the largest numbers and the infinities: 1e-308 times inf is inf, not NaN."""
    info = np.finfo(dtype)
    small = np.array([0, info.smallest_subnormal, 3 * info.smallest_subnormal, info.tiny / 4, info.tiny], dtype)
    large = np.array([np.log(info.max) * 1.01, info.max, np.inf], dtype)
    x = np.concatenate([small, -small[1:], large, -large])
    found = activations(x)
    assert np.array_equal(found["sigmoid"], [0.5] * 9 + [1, 1, 1, 0, 0, 0]) and not np.signbit(found["sigmoid"]).any()
    assert np.array_equal(found["tanh"], [*x[:9], 1, 1, 1, -1, -1, -1])
    assert np.array_equal(np.signbit(found["tanh"]), np.signbit(x))
    assert all(np.isnan(values).all() for values in activations(np.array([np.nan, -np.nan], dtype)).values())


def test_every_length_takes_the_same_path():
    """A tail of a vector gives the same bits as the middle of one: units of a layer, their numbers as biases."""
    numbers = torch.linspace(-9, 9, 67)
    whole = activations(numbers.numpy())
    for n in range(1, 67):
        biases = numbers[:n].repeat(4)
        weights = [torch.zeros(4 * n, 1), torch.zeros(4 * n, n), biases, torch.zeros(4 * n)]
        *_, saved = fusedrnn.ops.layer_forward(torch.zeros(1, 1, 1), None, None, None, weights, "lstm", False, True)
        assert np.array_equal(saved[0, 0, :n], whole["sigmoid"][:n])
        assert np.array_equal(saved[0, 0, 2 * n : 3 * n], whole["tanh"][:n])
