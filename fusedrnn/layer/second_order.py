"""The second backward pass of one layer: Hessian-vector products by hand.

Let phi = <dy, y> + <dh_n, h_n> + <dc_n, c_n>. The first backward pass gives g, the gradient of phi by everything that
the layer takes. Its own backward, for a cotangent v of g, is H v, H the Hessian of phi, and, by dy, dh_n and dc_n, the
tangent J v of the outputs. Equations: ``docs/derivations.md``, section T.

No graph is built through time. What the elementwise part of a step does to small changes is known for all steps
before a scan begins; a step of a scan is one product with W_hh and a few sums. Rows of all steps lie one after another,
N of them. A cell has O outputs: its states and, where some gates multiply q instead of h_{t-1}, q.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..cells import CELLS
from .call import LayerCall, Leaves, Needs, OutputGradients, Weights
from .differentiable import STEPS, KnownActivations, previous


def hessian_vector_product(
    call: LayerCall, y: Tensor, saved: Tensor, dgates: Tensor, cotangents: OutputGradients, v: Leaves, needs: Needs
) -> tuple[OutputGradients, Leaves]:
    """J v, for those outputs whose cotangents are given, and H v, by x and the weights if needed.

    Args:
        call: the layer.
        y: what it gave, (T, B, D*R) or (N, D*R).
        saved: what it saved, (D, N, *). Its dtype is that of the computation: float32 for 16-bit tensors.
        dgates: the gates' gradients as :meth:`LayerCall.backward` gave them for the cotangents.
        cotangents: None for zero.
        v: the vector.
        needs: whether H v by x and by the weights is wanted.

    Nothing is recorded for a further derivative. Not for cells with parameters of their units.
    """
    x, states, rows, dtype = call.x, call.states, call.rows, saved.dtype
    directions = call.directions

    def flat(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.flatten(0, -2).to(dtype)

    def of_direction(given: Sequence[Tensor | None], d: int) -> list[Tensor | None]:
        return [None if s is None else s[d].to(dtype) for s in given]

    def of(given: Leaves, d: int) -> Leaves:
        weights = Weights.split(call.info, given.weights, directions)[d]
        wide = Weights(*(None if w is None else w.to(dtype) for w in weights))
        return Leaves(flat(given.x), of_direction(given.states, d), wide)

    dots, found = [], []
    for d in range(directions):
        y_rows, dy, dc = (
            None if t is None else flat(t).chunk(directions, dim=1)[d] for t in (y, cotangents.y, cotangents.c)
        )
        direction = _Direction(call.cell, d == 1, rows, of(call.leaves, d), y_rows, saved[d])
        given = OutputGradients(dy, dc, of_direction(cotangents.finals, d))
        dot, gradients = direction.product(given, dgates[d], of(v, d), needs)
        dots.append(dot)
        found.append(gradients)
    y_dot, c_dot, finals_dot = zip(*dots, strict=True)
    rows_dot = (_joined(dot, dim=1) for dot in (y_dot, c_dot))
    outputs = [*(t.reshape(*x.shape[:-1], t.size(1)) for t in rows_dot)]
    outputs += map(torch.stack, zip(*finals_dot, strict=True))
    j_v = [None if given is None else dot.to(x.dtype) for given, dot in zip(cotangents.flat, outputs, strict=True)]
    dx = None if not needs.x else found[0].x if directions == 1 else found[0].x + found[1].x
    by_state = zip(states, *(g.states for g in found), strict=True)
    return OutputGradients.of(*j_v), Leaves(
        None if dx is None else dx.view_as(x).to(x.dtype),
        [None if s is None else torch.stack(parts).to(x.dtype) for s, *parts in by_state],
        [w.to(x.dtype) for g in found for w in g.weights] if needs.weights else [None] * len(call.weights),
    )


class _Direction:
    """One direction, about the point where the layer was called."""

    def __init__(
        self, cell: str, reverse: bool, rows: Sequence[int], arguments: Leaves, y: Tensor, saved: Tensor
    ) -> None:
        self.reverse, self.rows, self.x = reverse, list(rows), arguments.x
        self.order = range(len(rows))[:: -1 if reverse else 1]
        self.w_ih, self.w_hh, b_ih, b_hh, self.w_hr, _ = arguments.weights
        self.bias = b_ih is not None
        info, step = CELLS[cell], STEPS[cell]
        gates = len(info.gates)
        self.hidden, self.two_states = self.w_hh.size(0) // gates, len(info.states) == 2
        before = [previous(y, arguments.states[0], rows, reverse)]
        if self.two_states:
            begin = info.saved * self.hidden
            before += [previous(saved[:, begin : begin + self.hidden], arguments.states[1], rows, reverse)]
        # The gates in parts: those that multiply h_{t-1}, then those that multiply q.
        self.parts: list[slice] = []
        operands, products = [], []

        zero, count = self.x.new_zeros(()), self.x.size(0)  # for what nothing depends on, if the gates are known

        def saved_of(index: int) -> Tensor:
            return saved[:, index * self.hidden : (index + 1) * self.hidden]

        def product(operand: Tensor, first: int, last: int) -> Tensor:
            part = slice(first * self.hidden, last * self.hidden)
            self.parts.append(part)
            operands.append(operand)
            if step.gates is None:
                rec = linear(operand.detach(), self.w_hh[part], None if b_hh is None else b_hh[part])
            elif step.product is None:
                rec = zero.expand(count, part.stop - part.start)
            else:
                rest = zero.expand(count, part.stop - part.start - self.hidden)
                rec = torch.cat([rest, saved_of(step.product)], dim=1)
            products.append(rec.requires_grad_())
            return rec

        if step.gates is None:
            activations, inputs = torch, linear(self.x, self.w_ih, b_ih)
        else:
            activations = KnownActivations([saved_of(i) for i in step.gates] or [y])
            inputs = zero.expand(count, gates * self.hidden)
        with torch.enable_grad():  # of one step's elementwise part, all steps at once
            inputs = inputs.detach().requires_grad_()
            before[-1] = before[-1].detach().requires_grad_()  # alone has a path around the products (cell.h)
            self.outputs = [*step.of(activations, inputs, product, *before), *operands[1:]]  # (T1)
        self.operands = [operand.detach() for operand in operands]
        self.leaves = [inputs, *products, before[-1]]
        # (T2): of each output by inputs (N, G*H), by each part's products (N, its gates*H), by the state (N, H)
        found = [
            torch.autograd.grad(o, self.leaves, torch.ones_like(o), retain_graph=True, allow_unused=True)
            for o in self.outputs
        ]
        self.by_input, *self.by_product, self.by_state = zip(*found, strict=True)

    def product(
        self, cotangents: OutputGradients, dgates: Tensor, v: Leaves, needs: Needs
    ) -> tuple[tuple[Tensor, Tensor, list[Tensor]], Leaves]:
        """J v and H v."""
        w_ih, w_hr = self.w_ih, self.w_hr
        v_ih, v_hh, v_b_ih, v_b_hh, v_hr, _ = v.weights
        v_parts = [None if v_hh is None else v_hh[part] for part in self.parts]

        # The tangents, onwards in time.
        inputs = self._sum((v.x, w_ih.T), (self.x, _turned(v_ih)), bias=v_b_ih, size=w_ih.size(0))  # (T3)
        products = [
            self._sum((o, _turned(w)), bias=None if v_b_hh is None else v_b_hh[part], size=part.stop - part.start)
            for o, w, part in zip(self.operands, v_parts, self.parts, strict=True)
        ]
        y_dot, final, outputs = self._tangents(inputs, products, v)
        operands = [previous(y_dot, v.states[0], self.rows, self.reverse), outputs[-1]][: len(self.parts)]
        last = previous(outputs[1], v.states[1], self.rows, self.reverse) if self.two_states else operands[0]

        # The adjoints, and how they change.
        d_products = [dgates[:, part] for part in self.parts]
        d_y, deltas = self._adjoints(cotangents, d_products)
        d_inputs, (d_inputs_dot, *d_products_dot, d_last_dot) = self._curvature(deltas, [inputs, *products, last])
        d_operands_dot = [
            self._sum((d, w), size=o.size(1)) for d, w, o in zip(d_products, v_parts, self.operands, strict=True)
        ]
        d_m_dot = None if w_hr is None else self._sum((d_y, v_hr), size=self.hidden)
        d_y_dot, deltas_dot, start = self._adjoints_dot(d_products_dot, d_last_dot, d_operands_dot, d_m_dot)
        if needs.x or needs.weights:
            for by_input, delta in zip(self.by_input, deltas_dot, strict=True):
                if by_input is not None:
                    self._by_gate(d_inputs_dot).addcmul_(self._by_gate(by_input), delta.unsqueeze(1))  # (T8)

        # The products after the scans. (T9)
        dx = self._sum((d_inputs_dot, w_ih), (d_inputs, v_ih), size=self.x.size(1)) if needs.x else None
        dw = []
        if needs.weights:
            outer = [
                _outer(d_dot, o, d, o_dot)
                for d_dot, o, d, o_dot in zip(d_products_dot, self.operands, d_products, operands, strict=True)
            ]
            dw = [_outer(d_inputs_dot, self.x, d_inputs, v.x), _joined(outer)]
            if self.bias:
                dw += [d_inputs_dot.sum(0), _joined([d.sum(0) for d in d_products_dot])]
            if w_hr is not None:
                dw += [_outer(d_y_dot, self.outputs[0].detach(), d_y, outputs[0])]
        return (y_dot, outputs[1] if self.two_states else y_dot, final), Leaves(dx, start, dw)

    def _tangents(self, inputs: Tensor, products: list[Tensor], v: Leaves) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Of y, of the final states, of all outputs; ``products``: what does not come from h_{t-1} or q, then all."""
        h = self._start(v.states[0], self.w_hh.size(1))
        last = self._start(v.states[1], self.hidden) if self.two_states else h
        outputs = [
            torch.zeros_like(o) if by is None else self._by_gate(by * inputs).sum(1)
            for o, by in zip(self.outputs, self.by_input, strict=True)
        ]
        y = outputs[0]
        if self.w_hr is not None:
            y = self._sum((self.outputs[0].detach(), _turned(v.weights.w_hr)), size=self.w_hr.size(0))
        weights = [self.w_hh[part].T for part in self.parts]
        y_steps, by_state = self._steps(y), [self._steps(by) for by in self.by_state]
        by_product = [[self._steps(by) for by in part] for part in self.by_product]
        product_steps = [self._steps(p) for p in products]
        output_steps = [self._steps(o) for o in outputs]
        for t in self.order:
            n, out = self.rows[t], [o[t] for o in output_steps]
            for o, by in zip(out, by_state, strict=True):  # (T4)
                if by is not None:
                    o.addcmul_(by[t], last[:n])
            for p, rec in enumerate(product_steps):
                rec[t].addmm_(out[-1] if p else h[:n], weights[p])
                for o, by in zip(out, by_product[p], strict=True):
                    if by is not None:
                        o += self._by_gate(by[t] * rec[t]).sum(1)
            if self.w_hr is not None:
                y_steps[t].addmm_(out[0], self.w_hr.T)
            h = _with_rest(y_steps[t], h)
            last = _with_rest(out[1], last) if self.two_states else h
        return y, [h, last] if self.two_states else [h], outputs

    def _adjoints(self, cotangents: OutputGradients, d_products: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Of h_t as it leaves the step (N, R), and of each output: all paths, from the gradients of the products."""
        d_operands = [d @ self.w_hh[part] for d, part in zip(d_products, self.parts, strict=True)]
        d_y = previous(d_operands[0], cotangents.finals[0], self.rows, not self.reverse)  # (T5)
        if cotangents.y is not None:
            d_y += cotangents.y
        deltas = [d_y if self.w_hr is None else d_y @ self.w_hr]
        if self.two_states:
            deltas += [self.x.new_zeros(deltas[0].shape) if cotangents.c is None else cotangents.c.clone()]
        deltas += d_operands[1:]
        # Around the products: the last state alone, which takes from every output of the next step.
        own = int(self.two_states)
        others = [
            by * delta
            for o, (by, delta) in enumerate(zip(self.by_state, deltas, strict=True))
            if o != own and by is not None
        ]
        start = cotangents.finals[1] if self.two_states else None
        if others or start is not None:
            others = others or [torch.zeros_like(deltas[own])]
            deltas[own] += previous(sum(others), start, self.rows, not self.reverse)
        if self.by_state[own] is not None:
            steps, by_state = self._steps(deltas[own]), self._steps(self.by_state[own])
            for following, t in pairwise(self.order[::-1]):
                n = min(self.rows[t], self.rows[following])
                steps[t][:n].addcmul_(by_state[following][:n], steps[following][:n])
        return d_y, deltas

    def _curvature(self, deltas: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(T6): the gradients of ``inputs``, and the change of every leaf's along ``tangents`` with deltas held."""
        with torch.enable_grad():
            first = torch.autograd.grad(self.outputs, self.leaves, deltas, create_graph=True, allow_unused=True)
        curved = [(g, dot) for g, dot in zip(first, tangents, strict=True) if g is not None and g.requires_grad]
        found = torch.autograd.grad(
            [g for g, _ in curved], self.leaves, [dot for _, dot in curved], allow_unused=True, materialize_grads=True
        )
        # The scans write into them: each has memory of its own. (What adds two leaves has one gradient for both.)
        others, own = {t.untyped_storage().data_ptr() for t in (*deltas, *tangents)}, []
        for t in found:
            shared = t.untyped_storage().data_ptr() in others
            own.append(t.clone(memory_format=torch.contiguous_format) if shared else t.contiguous())
            others.add(own[-1].untyped_storage().data_ptr())
        return first[0].detach(), own

    def _adjoints_dot(
        self, d_products: Sequence[Tensor], d_last: Tensor, d_operands: Sequence[Tensor], d_m: Tensor | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Tangents of :meth:`_adjoints` and of the initial states' gradients.

        On entry each argument holds what a step adds by itself, on return also what comes from the next step.
        """
        dh = self._start(None, self.w_hh.size(1))
        dc = self._start(None, self.hidden)
        d_y: list[Tensor] = [dh] * len(self.rows)
        deltas: list[list[Tensor]] = [[dh] * len(self.rows) for _ in self.outputs]
        weights = [self.w_hh[part] for part in self.parts]
        by_state, last_steps, m_steps = [self._steps(by) for by in self.by_state], self._steps(d_last), self._steps(d_m)
        by_product = [
            [None if by is None else self._steps(self._by_gate(by)) for by in part] for part in self.by_product
        ]
        steps = [
            (self._steps(self._by_gate(d)), self._steps(d), self._steps(o))
            for d, o in zip(d_products, d_operands, strict=True)
        ]
        for t in self.order[::-1]:  # (T7)
            n = self.rows[t]
            d_y[t] = dh[:n]
            delta = [d_y[t] if m_steps is None else m_steps[t].addmm_(d_y[t], self.w_hr)]
            delta += [dc[:n]] if self.two_states else []
            for p, (by_gate, rec, operand) in reversed(list(enumerate(steps))):
                for by, d in zip(by_product[p], delta, strict=False):  # of q nothing is known yet, nor asked
                    if by is not None:
                        by_gate[t].addcmul_(by[t], d.unsqueeze(1))
                operand[t].addmm_(rec[t], weights[p])
                delta += [operand[t]] if p else []
            for by, d in zip(by_state, delta, strict=True):
                if by is not None:
                    last_steps[t].addcmul_(by[t], d)
            back = steps[0][2][t]
            if self.two_states:
                dc = _with_rest(last_steps[t], dc)
            else:
                back = back.add_(last_steps[t])
            dh = _with_rest(back, dh)
            for own, d in zip(deltas, delta, strict=True):
                own[t] = d
        joined = [torch.cat(own) for own in deltas]
        return joined[0] if m_steps is None else torch.cat(d_y), joined, [dh, dc] if self.two_states else [dh]

    def _by_gate(self, t: Tensor) -> Tensor:
        """(N, gates * H) -> (N, gates, H)."""
        return t.unflatten(1, (t.size(1) // self.hidden, self.hidden))

    def _steps(self, t: Tensor | None) -> Sequence[Tensor] | None:
        """Views of each step's rows."""
        return None if t is None else torch.unsafe_split_with_sizes(t, self.rows)

    def _start(self, state: Tensor | None, size: int) -> Tensor:
        return self.x.new_zeros(self.rows[0], size) if state is None else state

    def _sum(self, *terms: tuple[Tensor | None, Tensor | None], size: int, bias: Tensor | None = None) -> Tensor:
        """The products of ``terms`` and the bias, summed, (N, size). What is None is zero."""
        found = None if bias is None else bias.repeat(self.x.size(0), 1)  # the scans write into it
        for a, b in terms:
            if a is not None and b is not None:
                found = a @ b if found is None else found.addmm_(a, b)
        return self.x.new_zeros(self.x.size(0), size) if found is None else found


def _with_rest(rows: Tensor, before: Tensor) -> Tensor:
    """The state of all samples after a step of the first: those that have ended, or not begun, keep theirs."""
    return rows if len(rows) == len(before) else torch.cat([rows, before[len(rows) :]])


def _outer(d_dot: Tensor, operand: Tensor, d: Tensor, operand_dot: Tensor | None) -> Tensor:
    """The tangent of the weight gradient d^T operand."""
    found = d_dot.T @ operand
    return found if operand_dot is None else found.addmm_(d.T, operand_dot)


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _turned(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.T
