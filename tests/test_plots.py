"""Figures show the numbers that they are given."""

from __future__ import annotations

import builtins

import pytest
import torch

from bnsurgery import MissingExtraError, fold_bn
from bnsurgery.analysis import histogram
from bnsurgery.folding import Affine
from bnsurgery.plots import plot_errors, plot_histograms, plot_normalized_weights
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
