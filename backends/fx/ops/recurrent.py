"""Recurrent layers, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch

from lwc.backends.fx.ops.activations import ACTIVATIONS
from lwc.backends.fx.registry import op

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor
Direction: TypeAlias = Literal["forward", "reverse", "bidirectional"]
Activation: TypeAlias = Callable[[Tensor], Tensor]
State: TypeAlias = tuple[Tensor, ...]
Step: TypeAlias = Callable[[Tensor, State], State]

_ALPHA = {"affine": 1.0, "leakyrelu": 0.01, "thresholdedrelu": 1.0, "scaledtanh": 1.0}
_ALPHA |= {"hardsigmoid": 0.2, "elu": 1.0}
_BETA = {"affine": 0.0, "scaledtanh": 1.0, "hardsigmoid": 0.5}


def _activations(
    names: Sequence[str] | None,
    usual: Sequence[str],
    directions: int,
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    clip: float | None,
) -> list[list[Activation]]:
    """Return the activations of each direction.

    Alphas and betas are listed for those activations alone that have some. What the third one
    shows, the cell of an LSTM, ONNX Runtime does not clip.
    """
    count = len(usual)
    chosen = [name.lower() for name in names or list(usual) * directions]
    left_alphas, left_betas = list(alphas or ()), list(betas or ())
    made: list[Activation] = []
    for number, name in enumerate(chosen):
        alpha, beta = _ALPHA.get(name, 0.0), _BETA.get(name, 0.0)
        if name in _ALPHA and left_alphas:
            alpha = left_alphas.pop(0)
        if name in _BETA and left_betas:
            beta = left_betas.pop(0)
        bound = clip if number % count < 2 else None
        made.append(_clipped(ACTIVATIONS[name], alpha, beta, bound))
    return [made[count * i : count * (i + 1)] for i in range(directions)]


def _clipped(
    function: Callable[[Tensor, float, float], Tensor], a: float, b: float, clip: float | None
) -> Activation:
    if clip is None:
        return lambda x: function(x, a, b)
    return lambda x: function(x.clamp(-clip, clip), a, b)


class _Layer:
    """What RNN, GRU and LSTM share: directions, lengths, and how tensors lie."""

    def __init__(
        self, x: Tensor, direction: Direction, lengths: Tensor | None, layout: int
    ) -> None:
        self.layout = layout
        self.x = x.transpose(0, 1) if layout else x
        self.lengths = lengths
        self.backwards = {
            "forward": [False],
            "reverse": [True],
            "bidirectional": [False, True],
        }[direction]

    def begin(self, state: Tensor | None, index: int, hidden: int) -> Tensor:
        """Return the state that a direction starts from."""
        if state is None:
            return self.x.new_zeros((self.x.shape[1], hidden))
        return state[:, index] if self.layout else state[index]

    def scan(self, step: Step, start: State, back: bool) -> tuple[Tensor, State]:
        """Run over the sequence; a sequence that has ended keeps its state and gives zeros.

        One without a single step ends in zeros, whatever it starts from: ONNX Runtime has it so.
        """
        state = start
        rows = []
        count = self.x.shape[0]
        for place in range(count)[:: -1 if back else 1]:
            after = step(self.x[place], state)
            shown = after[0]
            if self.lengths is not None:
                here = (place < self.lengths).unsqueeze(-1)
                shown = torch.where(here, shown, torch.zeros_like(shown))
                after = tuple(
                    torch.where(here, new, old) for new, old in zip(after, state, strict=True)
                )
            state = after
            rows.append(shown)
        if not rows:
            empty = state[0].new_zeros((0, *state[0].shape))
            return empty, tuple(torch.zeros_like(old) for old in state)
        if self.lengths is not None:
            begun = (self.lengths > 0).unsqueeze(-1)
            state = tuple(torch.where(begun, last, torch.zeros_like(last)) for last in state)
        return torch.stack(rows[::-1] if back else rows), state

    def run(self, direction: Callable[[int], tuple[Step, State]]) -> tuple[Tensor, ...]:
        """Run every direction, and put them together as the layout has them.

        Args:
            direction: Returns the step of a direction and the state it starts from.
        """
        found = [self.scan(*direction(index), back) for index, back in enumerate(self.backwards)]
        y = torch.stack([rows for rows, _ in found], dim=1)
        states = [torch.stack(each) for each in zip(*(final for _, final in found), strict=True)]
        if self.layout:
            y = y.permute(2, 0, 1, 3)
            states = [state.transpose(0, 1) for state in states]
        return (y, *states)


@op("RNN", many=True, ignored="output_sequence")
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    hidden_size: int | None = None,
    direction: Direction = "forward",
    activations: Sequence[str] | None = None,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    clip: float | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """Run f(W x + R h + b)."""
    layer = _Layer(x, direction, lengths, layout)
    hidden = r.shape[-1]
    functions = _activations(
        activations, ["Tanh"], len(layer.backwards), activation_alpha, activation_beta, clip
    )

    def direction_of(index: int) -> tuple[Step, State]:
        bias = 0 if b is None else b[index, :hidden] + b[index, hidden:]

        def step(now: Tensor, state: State) -> State:
            total = now @ w[index].T + state[0] @ r[index].T + bias
            return (functions[index][0](total),)

        return step, (layer.begin(initial_h, index, hidden),)

    return layer.run(direction_of)


@op("GRU", many=True, ignored="output_sequence")
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    hidden_size: int | None = None,
    direction: Direction = "forward",
    activations: Sequence[str] | None = None,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    clip: float | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """Run gated recurrent units; gates lie as update, reset, hidden."""
    layer = _Layer(x, direction, lengths, layout)
    hidden = r.shape[-1]
    usual = ["Sigmoid", "Tanh"]
    functions = _activations(
        activations, usual, len(layer.backwards), activation_alpha, activation_beta, clip
    )

    def direction_of(index: int) -> tuple[Step, State]:
        zeros = x.new_zeros(3 * hidden)
        of_x = zeros if b is None else b[index, : 3 * hidden]
        of_h = zeros if b is None else b[index, 3 * hidden :]

        def step(now: Tensor, state: State) -> State:
            (h,) = state
            gate, new = functions[index]
            from_x = (now @ w[index].T + of_x).split(hidden, -1)
            recurrent, shift = r[index].split(hidden), of_h.split(hidden)
            update = gate(from_x[0] + h @ recurrent[0].T + shift[0])
            reset = gate(from_x[1] + h @ recurrent[1].T + shift[1])
            if linear_before_reset:
                inner = reset * (h @ recurrent[2].T + shift[2])
            else:
                inner = (reset * h) @ recurrent[2].T + shift[2]
            return ((1 - update) * new(from_x[2] + inner) + update * h,)

        return step, (layer.begin(initial_h, index, hidden),)

    return layer.run(direction_of)


@op("LSTM", many=True, ignored="output_sequence")
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    hidden_size: int | None = None,
    direction: Direction = "forward",
    activations: Sequence[str] | None = None,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    clip: float | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """Run long short-term memory; gates lie as input, output, forget, cell."""
    layer = _Layer(x, direction, lengths, layout)
    hidden = r.shape[-1]
    usual = ["Sigmoid", "Tanh", "Tanh"]
    functions = _activations(
        activations, usual, len(layer.backwards), activation_alpha, activation_beta, clip
    )

    def direction_of(index: int) -> tuple[Step, State]:
        bias: Any = 0 if b is None else b[index, : 4 * hidden] + b[index, 4 * hidden :]
        peeps = x.new_zeros(3, hidden) if peepholes is None else peepholes[index].reshape(3, hidden)

        def step(now: Tensor, state: State) -> State:
            h, c = state
            gate, new, shown = functions[index]
            i, o, f, g = (now @ w[index].T + h @ r[index].T + bias).split(hidden, -1)
            i = gate(i + peeps[0] * c)
            f = 1 - i if input_forget else gate(f + peeps[2] * c)
            after = f * c + i * new(g)
            return gate(o + peeps[1] * after) * shown(after), after

        return step, (layer.begin(initial_h, index, hidden), layer.begin(initial_c, index, hidden))

    return layer.run(direction_of)
