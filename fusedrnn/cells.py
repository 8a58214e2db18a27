"""The cells fusedrnn knows: names, gates and states, mirrored by the constants of ``csrc/cells``.

A test holds this table equal to the compiled one (``fusedrnn._C.cells()``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CellInfo:
    """What Python needs to know of a cell.

    Attributes:
        name: registry name, the ``cell`` argument of the ops.
        gates: gate names in the order of the rows of ``weight_ih`` and ``weight_hh`` (torch.nn's order).
        states: names of the states carried through time, ``h`` first.
        saved: values kept for the backward pass per unit, sample and step, besides the states.
        projectable: whether ``h`` may be a projection ``W_hr m`` of the cell's output ``m``.
        parameters: names of the parameters of a unit, vectors of H beside the weights, in the order of ``weight_unit``.
        first: gates that multiply ``h_{t-1}``; the others multiply a function of these and of it. None: all do. 0: none
            does, and ``weight_hh`` (U*H) is the units' parameters.
        split: the last gates whose gradients by ``x`` and by ``h`` differ.
        norms: layer normalisation. 1: of W_ih x_t and of W_hh h_{t-1}; 2: of c_t as well. The units' parameters are
            then the gains, of x by gate, of h by gate, and c's gain and bias, which begin as ones and zeros.
        argument_split: with norms, the last gates whose two biases have different gradients.
        keeps: the gate that multiplies the state before, for initialisers. None: there is none.
        takes: the gate that multiplies what is new, if it is another than ``keeps``. None: it is not. Of a cell where
            it alone has a name, what it does not take is kept.
        maskable: whether ``recurrent_dropout`` is defined: the first gates and what the others multiply depend on h
            through the products and through one factor alone.
        added: whether it is a user's own, for this process (:mod:`fusedrnn.user_cells`).
        eager: whether it has no kernels: torch's operations compute it, one after the other.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...] = ("h",)
    saved: int = 0
    projectable: bool = False
    parameters: tuple[str, ...] = ()
    first: int | None = None
    split: int = 0
    norms: int = 0
    argument_split: int = 0
    keeps: str | None = None
    takes: str | None = None
    maskable: bool = True
    added: bool = False
    eager: bool = False

    @property
    def has_small_weights(self) -> bool:
        """Whether there are kernels for matrices in int8 and bfloat16."""
        return not (self.parameters or self.added or self.beside > 1)

    @property
    def beside(self) -> int:
        """States besides ``h``: blocks of H where the ops say ``c``."""
        return len(self.states) - 1

    @property
    def product(self) -> bool:
        """Whether gates multiply ``h_{t-1}``."""
        return self.first != 0

    @property
    def gradient_blocks(self) -> int:
        """Blocks of H in a row of the gates' gradients (``dgates`` of csrc/problem.h)."""
        of_arguments = len(self.gates) + self.argument_split if self.norms else 0
        return len(self.gates) + self.split + len(self.parameters) + of_arguments

    @property
    def row_values(self) -> int:
        """Numbers of a row that are saved for the backward pass besides those of the units."""
        return 2 * self.norms

    @property
    def blocks(self) -> int:
        """Blocks of H rows in ``weight_hh``."""
        return len(self.gates) if self.product else len(self.parameters)

    @property
    def has_unit_weight(self) -> bool:
        """Whether the units' parameters are a weight of their own, ``weight_unit``."""
        return self.product and len(self.parameters) > 0


def _gains(gates: str, norms: int) -> tuple[str, ...]:
    """The parameters of a unit of a cell with layer normalisation."""
    return (*(f"gain_{of}_{gate}" for of in "xh" for gate in gates), *(("gain_c", "bias_c") if norms == 2 else ()))


CELLS: dict[str, CellInfo] = {
    cell.name: cell
    for cell in (
        CellInfo("rnn_tanh", gates=("h",)),
        CellInfo("rnn_relu", gates=("h",)),
        CellInfo("residual_rnn", gates=("g",), saved=1),
        CellInfo(
            "lstm", gates=("i", "f", "g", "o"), states=("h", "c"), saved=4, projectable=True, keeps="f", takes="i"
        ),
        CellInfo("gru", gates=("r", "z", "n"), saved=4, split=1, keeps="z"),
        CellInfo("gru_reset_before", gates=("r", "z", "n"), saved=3, first=2, keeps="z"),
        CellInfo("mgu", gates=("f", "n"), saved=2, first=1, takes="f"),
        CellInfo(
            "peephole_lstm",
            gates=("i", "f", "g", "o"),
            states=("h", "c"),
            saved=4,
            parameters=("p_i", "p_f", "p_o"),
            keeps="f",
            takes="i",
        ),
        CellInfo("indrnn_tanh", gates=("h",), parameters=("u",), first=0),
        CellInfo("indrnn_relu", gates=("h",), parameters=("u",), first=0),
        CellInfo(
            "layer_norm_lstm",
            gates=("i", "f", "g", "o"),
            states=("h", "c"),
            saved=12,
            parameters=_gains("ifgo", 2),
            split=4,
            norms=2,
            keeps="f",
            takes="i",
        ),
        CellInfo(
            "layer_norm_gru",
            gates=("r", "z", "n"),
            saved=10,
            parameters=_gains("rzn", 1),
            split=3,
            norms=1,
            argument_split=1,
            keeps="z",
        ),
        CellInfo("slstm", gates=("i", "f", "z", "o"), states=("h", "c", "n", "m"), saved=5, keeps="f", takes="i"),
    )
}
