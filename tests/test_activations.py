"""The vector sigmoid and tanh of every instruction set, against wider arithmetic, in units of the last place.

float32 is compared with float64 over the whole range of float32 bit patterns (a stride of them); float64 with
np.longdouble (80 bits on x86) on a dense grid and random points. The bounds are those stated in csrc/cpu/vec.h.
"""

import numpy as np
import pytest

from fusedrnn import _C

ISAS = _C.supported_isas()
WIDER = {np.float32: np.float64, np.float64: np.longdouble}
needs_longdouble = pytest.mark.skipif(
    np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps, reason="no type wider than float64 on this platform"
)


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
        x = finite_float32(4099)
    else:
        rng = np.random.default_rng(0)
        tiny = rng.standard_normal(100_000) * 10.0 ** rng.integers(-300, 2, 100_000)
        x = np.concatenate([np.linspace(-limit, limit, 400_001), tiny])
    return np.ascontiguousarray(x[np.abs(x) <= limit], dtype=dtype)


CASES = [
    pytest.param(np.float32, "sigmoid", 88.7, 2.5, id="float32-sigmoid"),
    pytest.param(np.float32, "tanh", 3e38, 2.5, id="float32-tanh"),
    pytest.param(np.float64, "sigmoid", 709.7, 3.0, id="float64-sigmoid", marks=needs_longdouble),
    pytest.param(np.float64, "tanh", 1e300, 3.0, id="float64-tanh", marks=needs_longdouble),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "function", "limit", "bound"), CASES)
def test_error_in_units_of_the_last_place(isa, dtype, function, limit, bound, record_property):
    x = inputs(dtype, limit)
    if dtype == np.float64 and function == "tanh":
        x = np.concatenate([inputs(dtype, 25.0), [1e10, -1e300]])
    error = ulps(_C.activation(isa, function, x), exact(function, x))
    worst = int(np.argmax(error))
    record_property("ulp", float(error[worst]))
    assert error[worst] <= bound, f"{function}({x[worst]!r}): {error[worst]:.2f} ulp"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits_are_exact(isa, dtype):
    """To the bit, at +-0, the smallest and the largest numbers and the infinities: 1e-308 times inf is inf, not NaN."""
    info = np.finfo(dtype)
    small = np.array([0, info.smallest_subnormal, 3 * info.smallest_subnormal, info.tiny / 4, info.tiny], dtype)
    large = np.array([np.log(info.max) * 1.01, info.max, np.inf], dtype)
    x = np.concatenate([small, -small, large, -large])
    sigmoid, tanh = _C.activation(isa, "sigmoid", x), _C.activation(isa, "tanh", x)
    assert np.array_equal(sigmoid, [0.5] * 10 + [1, 1, 1, 0, 0, 0]) and not np.signbit(sigmoid).any()
    assert np.array_equal(tanh, [*x[:10], 1, 1, 1, -1, -1, -1]) and np.array_equal(np.signbit(tanh), np.signbit(x))
    for function in ("sigmoid", "tanh"):
        assert np.isnan(_C.activation(isa, function, np.array([np.nan, -np.nan], dtype))).all()


@pytest.mark.parametrize("isa", ISAS)
def test_every_length_takes_the_same_road(isa):
    """A tail of a vector gives the same bits as the middle of one."""
    x = np.linspace(-9, 9, 67, dtype=np.float32)
    whole = _C.activation(isa, "tanh", x)
    for n in range(1, 67):
        assert np.array_equal(_C.activation(isa, "tanh", x[:n].copy()), whole[:n])
