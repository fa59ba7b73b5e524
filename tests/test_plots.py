"""Figures show the numbers that they are given."""

from __future__ import annotations

import builtins

import pytest
import torch

from bnsurgery import MissingExtraError, fold_bn
from bnsurgery.analysis import FeatureSet, GradientSimilarity, TransferMatrix, WeightShift, histogram
from bnsurgery.folding import Affine
from bnsurgery.plots import (
    plot_curves,
    plot_errors,
    plot_feature_set,
    plot_histograms,
    plot_normalized_weights,
    plot_similarities,
    plot_transfer,
    plot_weight_shift,
)
from networks import SMALL


def test_normalized_weights_show_the_mean_of_m_for_each_layer_and_model() -> None:
    folded = fold_bn(SMALL.build())
    doubled = {name: Affine(2 * affine.weight, affine.bias) for name, affine in folded.items()}
    ax = plot_normalized_weights({"before": folded, "after": doubled})
    before, after = ax.get_lines()
    means = [affine.weight.double().mean().item() for affine in folded.values()]
    assert list(before.get_xdata()) == [1, 2, 3]
    assert before.get_ydata() == pytest.approx(means)
    assert after.get_ydata() == pytest.approx([2 * mean for mean in means])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["before", "after"]
    assert before.get_linestyle() != after.get_linestyle()
    assert ax.get_ylabel().startswith("normalized weight")


def test_the_band_goes_from_the_10th_to_the_90th_percentile() -> None:
    affine = Affine(torch.arange(11.0), torch.zeros(11))
    ax = plot_normalized_weights({"model": {"a": affine, "b": affine}})
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((1, 9))


@pytest.mark.parametrize("folded", [{}, {"a": {}}, {"a": {"x": Affine(torch.ones(1), torch.ones(1))}, "b": {}}])
def test_nothing_to_draw_is_refused(folded: dict[str, dict[str, Affine]]) -> None:
    with pytest.raises(ValueError, match="folded must hold the same number of layers for each model, got"):
        plot_normalized_weights(folded)


def test_errors_are_drawn_over_the_epochs() -> None:
    ax = plot_errors([0, 1], {"clean": [9.0, 20.0], "robust": [100.0, 85.0]})
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [[9.0, 20.0], [100.0, 85.0]]
    assert ax.get_xlabel() == "epoch"


def test_a_curve_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"errors\['clean'\] must have 2 values, one for each epoch, got 1"):
        plot_errors([0, 1], {"clean": [9.0]})


def test_histograms_are_outlines_in_percent_of_their_own_values() -> None:
    found = {
        "NORMAL": histogram(torch.tensor([0.1, 0.2, 0.9, 5.0]), bins=2, bounds=(0, 1)),
        "ADV": histogram(torch.tensor([0.9]), bins=2, bounds=(0, 1)),
    }
    ax = plot_histograms(found, xlabel="confidence")
    normal, adv = ax.patches
    assert normal.get_data().values.tolist() == [50, 25]
    assert normal.get_data().edges.tolist() == [0, 0.5, 1]
    assert adv.get_data().values.tolist() == [0, 100]
    assert normal.get_linestyle() != adv.get_linestyle()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["NORMAL (1 outside)", "ADV"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "share of values (%)")
    assert plot_histograms(found, xlabel="logit", ax=ax) is ax


def test_no_histogram_is_refused() -> None:
    with pytest.raises(ValueError, match="histograms must hold at least one, got none"):
        plot_histograms({}, xlabel="gamma")


def test_given_axes_are_drawn_into() -> None:
    ax = plot_errors([0], {"clean": [9.0]})
    assert plot_errors([0], {"robust": [100.0]}, ax=ax) is ax
    assert len(ax.get_lines()) == 2


def test_without_matplotlib_the_message_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def blocked(name: str, *args: object, **options: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingExtraError, match=r"pip install 'bnsurgery\[plot\]'"):
        plot_errors([0], {"clean": [9.0]})


def texts(ax: object) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_curves_are_drawn_over_the_epochs_and_told_apart() -> None:
    ax = plot_curves([0, 1], {"BN": [0.9, 0.5], "no BN": [0.9, 0.8]}, ylabel="LIGS")
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [[0.9, 0.5], [0.9, 0.8]]
    assert ax.get_lines()[0].get_linestyle() != ax.get_lines()[1].get_linestyle()
    assert (texts(ax), ax.get_ylabel()) == (["BN", "no BN"], "LIGS")
    with pytest.raises(ValueError, match=r"curves\['BN'\] must have 2 values, one for each epoch, got 3"):
        plot_curves([0, 1], {"BN": [0.9, 0.5, 0.4]}, ylabel="LIGS")
    with pytest.raises(ValueError, match="curves must hold at least one curve, got none"):
        plot_curves([0, 1], {}, ylabel="LIGS")


def test_similarities_are_histograms_with_their_mean_and_who_has_none() -> None:
    cosines = torch.tensor([-0.9, 0.1, 0.3, 0.7], dtype=torch.float64)
    ax = plot_similarities({"BN": GradientSimilarity(cosines, 6, 1, 1)}, bins=4)
    assert texts(ax) == ["BN (LIGS 0.050, 2 left out)"]
    assert list(ax.patches[0].get_data().values) == [25.0, 0.0, 50.0, 25.0]
    assert list(ax.patches[0].get_data().edges) == [-1, -0.5, 0, 0.5, 1]
    with pytest.raises(ValueError, match="histograms must hold at least one"):
        plot_similarities({})


def test_a_transfer_matrix_has_rows_for_those_attacked() -> None:
    found = TransferMatrix(("a", "b"), 10, (0, 5), ((9, 7), (3, 10)), ((9, 4), (3, 5)))
    ax = plot_transfer(found)
    assert [text.get_text() for text in ax.texts] == ["90", "70", "30", "100"]
    assert [text.get_position() for text in ax.texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b"]
    assert "given the examples: error (%)" in ax.get_xlabel()
    assert [text.get_text() for text in plot_transfer(found, of="rate").texts] == ["90", "80", "30", "100"]
    with pytest.raises(ValueError, match="of must be 'error' or 'rate', got 'both'"):
        plot_transfer(found, of="both")


def test_a_feature_set_is_a_row_of_images_with_both_labels() -> None:
    images = torch.rand(4, 3, 5, 6)
    made = FeatureSet(images, torch.tensor([1, 2, 3, 3]), torch.tensor([0, 1, 3, 2]), "random", 4, 0, 1)
    ax = plot_feature_set(made, count=3)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0 to 1", "1 to 2", "3"]
    shown = torch.from_numpy(ax.images[0].get_array().data)
    assert shown.shape == (5, 18, 3)
    for place in range(3):
        assert torch.allclose(shown[:, 6 * place : 6 * place + 6].permute(2, 0, 1), images[place])
    named = plot_feature_set(made, classes=["cat", "dog", "emu", "fox"], count=1)
    assert [tick.get_text() for tick in named.get_xticklabels()] == ["cat to dog"]
    with pytest.raises(ValueError, match=r"images in \[0, 1\], got values from .*: undo mean= and std="):
        plot_feature_set(FeatureSet(3 * images, made.labels, made.sources, "random", 4, 0, 1))
    with pytest.raises(ValueError, match="classes must name 4 classes at least, got 2"):
        plot_feature_set(made, classes=["cat", "dog"])
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"count must be at least 1, got {count}"):
            plot_feature_set(made, count=count)
    vectors = FeatureSet(torch.rand(4, 3), made.labels, made.sources, "random", 4, 0, 1)
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\) of 1 or 3 channels, got \(4, 3\)"):
        plot_feature_set(vectors)


def test_weight_shifts_are_drawn_layer_by_layer_with_their_average() -> None:
    ax = plot_weight_shift(
        {"down": WeightShift({"a": -0.3, "b": -0.1}, -0.2), "up": WeightShift({"a": 0.0, "b": 0.2}, 0.1)}
    )
    assert [list(line.get_ydata()) for line in ax.get_lines()[:2]] == [[-0.3, -0.1], [0.0, 0.2]]
    assert texts(ax) == ["down (average -0.200)", "up (average +0.100)"]
    with pytest.raises(ValueError, match=r"same number of layers each, and at least one shift, got \{\}"):
        plot_weight_shift({})
