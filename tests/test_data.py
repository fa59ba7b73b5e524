"""What callers hand in as data is checked, and what is wrong is said."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bnsurgery._data import batches_of, check_bounds, check_labels, check_pair, describe, is_pair, unpack

X, Y = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ((X, Y), True),
        ([X, Y], True),
        ([(X, Y), (X, Y)], False),
        ([(X, Y)], False),
        ((X, Y, Y), False),
        ((X, [0, 1]), False),
        (iter((X, Y)), False),
        (X, False),
        ({"x": X, "y": Y}, False),
        (DataLoader(TensorDataset(X, Y)), False),
        (None, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_pair_of_tensors_is_told_from_batches(data: object, expected: bool) -> None:
    assert is_pair(data) is expected


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_pair_is_cut_into_batches_in_order(count: int, batch_size: int) -> None:
    x, y = torch.arange(3.0 * count).view(count, 3), torch.arange(count)
    batches = list(batches_of((x, y), batch_size))
    sizes = [len(part) for part, _ in batches]
    assert sizes == [batch_size] * (count // batch_size) + [count % batch_size] * (count % batch_size > 0)
    assert torch.equal(torch.cat([part for part, _ in batches]), x)
    assert torch.equal(torch.cat([labels for _, labels in batches]), y)


@pytest.mark.parametrize(
    "form",
    [list, tuple, iter, lambda batches: (batch for batch in batches), lambda batches: [list(b) for b in batches]],
    ids=["list", "tuple", "iterator", "generator", "lists"],
)
def test_batches_of_an_iterable_are_left_as_they_are(form: Callable[[list[tuple[Tensor, Tensor]]], object]) -> None:
    batches = [(X[:2], Y[:2]), (X[2:], Y[2:]), (X[:1], Y[:1])]
    seen = list(batches_of(form(batches), 1))
    assert [(x.data_ptr(), y.data_ptr()) for x, y in seen] == [(x.data_ptr(), y.data_ptr()) for x, y in batches]


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (X, "a tensor (5, 3, 2, 2) of torch.float32"),
        ((X,), "a tuple of 1 (a tensor (5, 3, 2, 2) of torch.float32)"),
        (
            (X, [0, 1, 2, 3, 4]),
            "a tuple of 2 (a tensor (5, 3, 2, 2) of torch.float32, a list of 5 (a int, a int, a ",
        ),
        ({"image": X, "label": Y}, "a dict"),
        ("xy", "a str"),
        (None, "a NoneType"),
    ],
    ids=["tensor", "one", "labels in a list", "dict", "str", "None"],
)
def test_a_batch_must_be_a_pair_of_tensors(batch: object, what: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"data must yield pairs (x, y) of tensors, got {what}")):
        unpack(batch)
    with pytest.raises(ValueError, match=re.escape(f"data must yield pairs (x, y) of tensors, got {what}")):
        list(batches_of([batch], 1))


WRONG_PAIRS = [
    (X.to(torch.uint8), Y, "x must be floating point, got torch.uint8: scale images to [0, 1] first"),
    (X.long(), Y, "x must be floating point, got torch.int64"),
    (X.to(torch.complex64), Y, "x must be floating point, got torch.complex64"),
    (torch.rand(()), torch.tensor(0), "x must have shape (N, ...), got ()"),
    (torch.rand(5), Y, "x must have shape (N, ...), got (5,)"),
    (X, Y.double(), "y must hold integer labels, got torch.float64"),
    (X, Y > 2, "y must hold integer labels, got torch.bool"),
    (X, Y[:4], "y must have shape (5,) to go with x (5, 3, 2, 2), got (4,)"),
    (X, Y.view(5, 1), "y must have shape (5,) to go with x (5, 3, 2, 2), got (5, 1)"),
    (X, torch.tensor(3), "y must have shape (5,) to go with x (5, 3, 2, 2), got ()"),
]


@pytest.mark.parametrize(("x", "y", "message"), WRONG_PAIRS, ids=[message for _, _, message in WRONG_PAIRS])
def test_wrong_types_and_shapes_are_named(x: Tensor, y: Tensor, message: str) -> None:
    for check in (lambda: check_pair(x, y), lambda: unpack((x, y)), lambda: list(batches_of((x, y), 2))):
        with pytest.raises(ValueError, match=re.escape(message)):
            check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_right_pairs_pass(dtype: torch.dtype, labels: torch.dtype, count: int) -> None:
    x, y = unpack((X[:count].to(dtype), Y[:count].to(labels)))
    assert (x.dtype, y.dtype, len(x)) == (dtype, labels, count)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (1.01, (0.0, 1.0), "x must lie in bounds=(0, 1), got values from 0.5 to 1.01"),
        (-0.01, (0.0, 1.0), "x must lie in bounds=(0, 1), got values from -0.01 to 0.5"),
        (255.0, (0.0, 1.0), "x must lie in bounds=(0, 1), got values from 0.5 to 255: scale the inputs"),
        (1.5, (-1.0, 1.0), "x must lie in bounds=(-1, 1), got values from 0.5 to 1.5"),
        (torch.nan, (0.0, 1.0), "x must lie in bounds=(0, 1), got values from nan to nan"),
        (torch.inf, (0.0, 1.0), "x must lie in bounds=(0, 1), got values from 0.5 to inf"),
        (-torch.inf, (0.0, 1.0), "x must lie in bounds=(0, 1), got values from -inf to 0.5"),
    ],
)
def test_inputs_out_of_bounds_are_told_with_their_range(
    value: float, bounds: tuple[float, float], message: str
) -> None:
    x = torch.full((2, 3), 0.5)
    check_bounds(x, bounds)
    x[1, 1] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        check_bounds(x, bounds)


def test_rounding_is_not_out_of_bounds_and_nothing_is_in_bounds() -> None:
    check_bounds(torch.tensor([[-5e-5, 1 + 5e-5]]), (0.0, 1.0))
    check_bounds(torch.empty(0, 3), (0.0, 1.0))
    check_bounds(torch.tensor([[0.5]], requires_grad=True), (0.0, 1.0))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 4], "y must lie in 0 ... 3, got labels from 0 to 4"),
        ([-1, 1, 2], "y must lie in 0 ... 3, got labels from -1 to 2"),
        ([-100, 0, 255], "y must lie in 0 ... 3, got labels from -100 to 255"),
    ],
)
def test_labels_out_of_range_are_told_with_their_range(labels: list[int], message: str) -> None:
    check_labels(torch.tensor([0, 1, 3]), torch.rand(3, 4))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_labels(torch.tensor(labels), torch.rand(3, 4))


@pytest.mark.parametrize("shape", [(3,), (3, 4, 2), (2, 4), (4, 3, 3, 3)], ids=str)
def test_outputs_that_are_no_logits_are_told_with_their_shape(shape: tuple[int, ...]) -> None:
    message = re.escape(f"the model must return logits (3, classes), got {shape}")
    with pytest.raises(ValueError, match=message):
        check_labels(torch.tensor([0, 1, 3]), torch.rand(shape))


def test_no_labels_are_in_range() -> None:
    check_labels(torch.empty(0, dtype=torch.long), torch.rand(0, 4))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (X, "a tensor (5, 3, 2, 2) of torch.float32"),
        ((), "a tuple of 0 ()"),
        ([Y, "s"], "a list of 2 (a tensor (5,) of torch.int64, a str)"),
        ([1, 2, 3, 4], "a list of 4 (a int, a int, a int)"),
        (3.5, "a float"),
    ],
    ids=["tensor", "empty", "mixed", "long", "float"],
)
def test_values_are_described_for_messages(value: object, expected: str) -> None:
    assert describe(value) == expected
