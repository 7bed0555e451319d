"""Images and labels as callers have them: one rule for bytes, tensors and NumPy alike, loaders read in their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pacd_fast.data import as_float, as_images, images_of, labelled

BYTES = torch.arange(48, dtype=torch.uint8).mul(5).view(4, 3, 2, 2)


def test_bytes_are_divided_by_255_and_floats_stay():
    assert torch.equal(as_images(BYTES), BYTES.float() / 255)
    assert torch.equal(as_images(BYTES.numpy()), as_float(BYTES))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(2, 3).to(dtype)  # not in [0, 1]: a classifier may take any pixels
        assert as_images(x) is x
    x = np.random.default_rng(0).random((2, 3, 4))
    for each in (x, x.astype(">f4"), x[:, ::-1], np.broadcast_to(x[:1], (2, 3, 4))):
        assert np.array_equal(as_images(each).numpy(), each)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "uint8 .* or floating, not torch.int64"),
        (torch.ones(2, 3, dtype=torch.bool), "not torch.bool"),
        (torch.ones(2, 3, dtype=torch.complex64), "not torch.complex64"),
        (np.ones((2, 3), np.int32), "not torch.int32"),
        (np.array([["a"]]), "must hold numbers, not <U1"),
        (np.array([[object()]]), "must hold numbers, not object"),
        ([[0.5]], "a tensor or a NumPy array, not list"),
        (torch.ones(3), r"must be \[N, ...\], not \(3,\)"),
        (torch.ones(2, 3).to_sparse(), "must be a dense tensor"),
        (torch.ones(2, 3, device="meta"), "must be a dense tensor"),
    ],
)
def test_other_things_are_no_images(images, message):
    with pytest.raises(ValueError, match=message):
        as_images(images)


def test_labelled_images_in_every_form():
    y = torch.tensor([3, 1, 2, 0])
    forms = [
        (BYTES, y),
        [BYTES.numpy(), y.numpy().astype(np.uint8)],
        (BYTES, [3, 1, 2, 0]),
        (BYTES, y[:, None].int()),
        TensorDataset(BYTES, y),
        DataLoader(TensorDataset(BYTES, y), batch_size=3),
        [(BYTES[:3], y[:3]), (BYTES[3:].numpy(), y[3:])],
        ((BYTES[i : i + 1], y[i : i + 1]) for i in range(4)),
    ]
    for form in forms:
        images, labels = labelled(form)
        assert torch.equal(images, BYTES) and torch.equal(labels, y) and labels.dtype == torch.int64


def test_images_without_labels():
    y = torch.tensor([3, 1, 2, 0])
    forms = [
        (BYTES, y),
        (BYTES, [3, 1, 2, 0]),
        TensorDataset(BYTES),
        DataLoader(TensorDataset(BYTES, y), batch_size=3),
        DataLoader(BYTES, batch_size=3),
        (BYTES[i : i + 1].numpy() for i in range(4)),
    ]
    for form in forms:
        assert torch.equal(as_images(images_of(form)), as_images(BYTES))
    for wrong, message in (
        ([BYTES[0], BYTES[1]], "not 2 in a list: give torch.stack"),
        (list(BYTES), "not 4 in a list: give torch.stack"),
        (BYTES, "not Tensor"),
        ([(BYTES, y, y)], "must give batches"),
    ):
        with pytest.raises(ValueError, match=message):
            images_of(wrong)


def test_a_loader_leaves_the_generator_alone():
    loader = DataLoader(TensorDataset(BYTES, torch.arange(4)), shuffle=True)
    before = torch.get_rng_state()
    assert sorted(labelled(loader)[1].tolist()) == [0, 1, 2, 3]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BYTES, "not Tensor"),
        (7, "not int"),
        ((BYTES, torch.zeros(4)), r"whole-number labels \[N\], not \(4, 3, 2, 2\) and torch.float32"),
        ((BYTES, torch.zeros(3, dtype=torch.int64)), r"\(3,\)"),
        ((BYTES.long(), torch.zeros(4, dtype=torch.int64)), "not torch.int64"),
        ([BYTES[:1], BYTES[1:2], BYTES[2:3]], "must give batches"),
        ([], "gives no batch"),
        ([(BYTES, [0, 1, 2, 3]), (BYTES.float(), [0, 1, 2, 3])], "several dtypes"),
        (DataLoader([(object(), 1)]), "gives no tensors"),
    ],
)
def test_what_is_no_labelled_set(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        labelled(data)
    assert "\n" not in str(caught.value)
