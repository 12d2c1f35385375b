"""What is minimised: which loss of which outputs, from what the module is and who teaches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.calibration.collect import on_feed
from lwc.calibration.inputs import RoleKind, fed_inputs, input_role
from lwc.calibration.text import id_input
from lwc.core.errors import InputError, LwcError, PassError

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Feed, Runner

__all__ = [
    "LossName",
    "Objective",
    "TextModel",
    "TokenInputs",
    "choose_objective",
    "predicts_next",
    "text_model",
    "token_inputs",
    "vocabulary",
]

Array: TypeAlias = "np.ndarray[Any, Any]"
LossName: TypeAlias = Literal["cross-entropy", "kl", "reverse-kl", "mse"]


@dataclass(frozen=True)
class TokenInputs:
    """Inputs of a model of tokens.

    Attributes:
        ids: `[batch, length]`.
        mask: 0 where there is padding, `[batch, past and length]`, or None.
    """

    ids: str
    mask: str | None


@dataclass(frozen=True)
class TextModel:
    """Inputs and outputs of a model that gives logits for token ids.

    Attributes:
        logits: The output, `[batch, length, classes]`.
        inputs: Its ids and their mask.
    """

    logits: str
    inputs: TokenInputs


def token_inputs(module: Module) -> TokenInputs | None:
    """Return the inputs of a module that takes token ids, else None."""
    try:
        ids = id_input(module)
    except LwcError:
        return None
    masks = [
        value.name
        for value in fed_inputs(module)
        if value is not ids
        and value.shape is not None
        and len(value.shape) == 2
        and input_role(module, value).kind is RoleKind.MASK
    ]
    return TokenInputs(ids.name or "", masks[0] if masks else None)


def text_model(module: Module) -> TextModel | None:
    """Return how a module takes tokens and gives logits for each, or None where it does not."""
    classes = vocabulary(module)
    logits = [
        value.name or ""
        for value in module.graph.outputs
        if value.shape is not None and len(value.shape) == 3 and value.shape[2] == classes
    ]
    if classes is None or not logits:
        return None
    inputs = token_inputs(module)
    return None if inputs is None else TextModel(logits[0], inputs)


def vocabulary(module: Module) -> int | None:
    """Return the rows of the table that token ids look up, or None where there are no ids."""
    try:
        return input_role(module, id_input(module)).high + 1
    except LwcError:
        return None


def predicts_next(model: TextModel, feeds: Mapping[int, Feed], runner: Runner) -> bool:
    """Tell whether logits depend on no later token, by a run in which later ones are others.

    Args:
        model: Inputs and outputs.
        feeds: What it may be fed, by number; the first one with two tokens or more is used.
        runner: Runs it.

    Raises:
        PassError: Logits are NaN or infinite; -inf may rule a token out.
        LwcError: The module cannot be run.
    """
    name, mask = model.inputs.ids, model.inputs.mask
    number, feed = next(
        ((at, each) for at, each in feeds.items() if each[name].shape[1] > 1), (0, None)
    )
    if feed is None:
        return False
    if mask is not None:
        feed = {**feed, mask: np.ones_like(feed[mask])}
    ids, names = feed[name], [model.logits]
    half = ids.shape[1] // 2
    with on_feed(number):
        seen = runner.run(feed, names)[model.logits]
        if seen.shape[:2] != ids.shape:
            return False
        # The id that is there least, or not at all: whatever the feed is, others in another order
        # or the same ones again would not tell.
        late = ids[:, half:].ravel().astype(np.int64)
        others = ids.copy()
        others[:, half:] = np.bincount(late, minlength=seen.shape[2]).argmin()
        changed = runner.run({**feed, name: others}, names)[model.logits]
    early, also = (each[:, :half].astype(np.float32) for each in (seen, changed))
    finite = np.isfinite(early)
    if not (finite | np.isneginf(early)).all() or not finite.any():
        raise PassError(
            f"feed {number} of the calibration data: '{model.logits}' has numbers that are not "
            "finite",
            remedy="look at the model before this pass",
        )
    return bool(np.allclose(early, also, rtol=0, atol=1e-3 * float(np.abs(early[finite]).max())))


@dataclass(frozen=True)
class Objective:
    """A loss of a module's outputs: (1 - weight) · cross-entropy + weight · distance.

    Attributes:
        loss: `cross-entropy`, where weight is 0, or the distance from the teacher.
        outputs: What is compared with the teacher's.
        logits: The output for cross-entropy, or None.
        tokens: Inputs that hold its labels, and say where there is padding, which does not count;
            or None.
        weight: Share of the distance.
        temperature: Of the divergences.
    """

    loss: LossName
    outputs: tuple[str, ...]
    logits: str | None
    tokens: TokenInputs | None
    weight: float
    temperature: float = 1.0

    @property
    def told(self) -> str:
        """The formula, for people."""
        parts = ((1 - self.weight, "cross-entropy"), (self.weight, self.loss))
        return " + ".join(
            name if share == 1 else f"{share:g} {name}" for share, name in parts if share > 0
        )

    def __call__(
        self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], taught: Mapping[str, Array]
    ) -> Any:
        """Return the loss as a torch scalar.

        Args:
            outputs: Those of the module, as tensors by name.
            inputs: What it was fed, as tensors by name.
            taught: The teacher's outputs; empty where the weight is 0.

        Raises:
            PassError: An output has another shape than the teacher's.
            InputError: An output is empty.
        """
        from lwc.train.losses import next_token_loss

        total: Any = 0.0
        if self.weight < 1:
            assert self.logits is not None
            assert self.tokens is not None
            ids = inputs[self.tokens.ids]
            plain = next_token_loss(outputs[self.logits], ids, self._mask(inputs))
            total = (1 - self.weight) * plain
        if self.weight > 0:
            parts = [self._distance(n, outputs[n], taught[n], inputs) for n in self.outputs]
            total = total + self.weight * sum(parts)
        return total

    def positions(self, feed: Feed) -> int:
        """Return over how many positions the loss on a feed is a mean: 0 where it says nothing.

        They are those that have a label; of the distance alone, all that are no padding; 1 where
        the model takes no tokens.
        """
        if self.tokens is None:
            return 1
        mask = self._mask(feed)
        there = np.ones(feed[self.tokens.ids].shape, np.bool_) if mask is None else mask != 0
        return int((there if self.weight == 1 else there[:, 1:] & there[:, :-1]).sum())

    def _distance(self, name: str, student: Any, teacher: Array, inputs: Mapping[str, Any]) -> Any:
        import torch

        from lwc.train import losses

        if student.shape != teacher.shape:
            raise PassError(
                f"the teacher gives '{name}' of shape {list(teacher.shape)}, the model of shape "
                f"{list(student.shape)}",
                remedy="give a teacher of the same outputs, or teacher=none",
            )
        if not student.numel():
            raise InputError(
                f"output '{name}' is empty, so there is nothing to compare",
                remedy="leave that feed out",
            )
        given = torch.from_numpy(np.array(teacher)).to(student.dtype)
        mask = self._mask(inputs)
        # Only outputs with a row for each token have padding.
        if mask is not None and (student.dim() != 3 or student.shape[:2] != mask.shape):
            mask = None
        if self.loss == "mse":
            return losses.mean_squares(given, student, mask)
        diverge = losses.kl_divergence if self.loss == "kl" else losses.reverse_kl_divergence
        return diverge(given, student, self.temperature, mask)

    def _mask(self, inputs: Mapping[str, Any]) -> Any:
        """Return the mask of padding, of the tokens alone where it covers a past too."""
        if self.tokens is None or self.tokens.mask is None or self.tokens.mask not in inputs:
            return None
        return inputs[self.tokens.mask][:, -inputs[self.tokens.ids].shape[1] :]


def choose_objective(
    module: Module,
    loss: LossName | Literal["auto"],
    weight: float,
    temperature: float,
    *,
    taught: bool,
    causal: bool,
) -> Objective:
    """Choose the objective of a module.

    Args:
        module: The module.
        loss: What is asked for. `auto` is, with a teacher, `kl` of logits and `mse` of all else,
            and without one `cross-entropy`.
        weight: Share of the distance from the teacher, where next tokens can be predicted too.
        temperature: Of the divergences.
        taught: Whether there is a teacher.
        causal: Whether logits predict the next token.

    Raises:
        PassError: The loss needs a teacher or labels that are not there, or no output has floats.
    """
    text = text_model(module)
    predicts = text is not None and causal
    if loss == "auto":
        loss = ("mse" if text is None else "kl") if taught else "cross-entropy"
    if loss == "cross-entropy" and not predicts:
        raise PassError(
            "nothing says what its outputs should be: it gives no logits for the next token, and "
            "has no teacher",
            remedy="give teacher= a file, or run it after a pass that changed the model",
        )
    if loss != "cross-entropy" and not taught:
        raise PassError(
            f"loss={loss} needs a teacher",
            remedy="give teacher= a file, or run it after a pass that changed the model",
        )
    if loss == "mse":
        outputs = tuple(
            v.name or "" for v in module.graph.outputs if v.dtype is None or _is_float(v.dtype)
        )
    else:
        outputs = (_logits(module) if text is None else text.logits,)
    if not outputs:
        raise PassError("no output holds floats, so there is nothing to compare")
    share = 0.0 if loss == "cross-entropy" else weight if predicts else 1.0
    logits, tokens = (None, token_inputs(module)) if text is None else (text.logits, text.inputs)
    return Objective(loss, outputs, logits, tokens, share, temperature)


def _logits(module: Module) -> str:
    """Return the output whose last axis is taken for classes: the first that holds floats."""
    for value in module.graph.outputs:
        if value.dtype is None or _is_float(value.dtype):
            return value.name or ""
    raise PassError("no output holds floats, so there is nothing to compare")


def _is_float(dtype: ir.DataType) -> bool:
    return dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
