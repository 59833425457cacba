"""The coefficients of growing regularisation against the numbers of the authors' code."""

from pathlib import Path

import numpy as np
import pytest

from fastprune.growing import GrowingCoefficients, Growth

GREG = np.load(Path(__file__).parent / "golden" / "greg.npz")
TPP = np.load(Path(__file__).parent / "golden" / "tpp.npz")
WEIGHTS = [GREG["greg/net/features.0.weight"], GREG["greg/net/features.3.weight"]]
MAGNITUDES = np.concatenate([np.abs(w).mean((1, 2, 3)) for w in WEIGHTS])
SIZES = {"features.0": 8, "features.3": 6}
CUT = np.zeros(14, bool)
CUT[[0, 7, 4, 2, 8 + 4, 8 + 2, 8 + 3]] = True


@pytest.mark.parametrize("kind, name", [("greg-1", "GReg-1"), ("greg-2", "GReg-2")])
@pytest.mark.parametrize("bits, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_every_update_is_the_authors(kind, name, bits, dtype):
    golden = {key: GREG[f"greg/{name}/{bits}/{key}"] for key in ("k", "reg0", "reg1", "final_reg0")}
    coefficients = GrowingCoefficients(Growth(kind), SIZES, None if kind == "greg-2" else CUT, dtype)
    wanted, updates = golden["k"].tolist(), 0
    while not coefficients.finished:
        assert coefficients.due(10 * updates) and not coefficients.due(10 * updates + 1)
        coefficients.update(10 * updates, MAGNITUDES, CUT)
        updates += 1
        if updates in wanted:
            i = wanted.index(updates)
            assert np.array_equal(coefficients.reg[:8], golden["reg0"][i][:, 0]), updates
            assert np.array_equal(coefficients.reg[8:], golden["reg1"][i][:, 0]), updates
    assert coefficients.reg.dtype == dtype and np.array_equal(coefficients.reg[:8], golden["final_reg0"][:, 0])
    finish = GREG[f"greg/{name}/{bits}/finish_update_count"][:2]  # the third layer loses nothing
    assert np.array_equal(coefficients.finished_at // 10 + 1, finish)
    assert coefficients.finished_at.max() == GREG[f"greg/{name}/{bits}/iter_stabilize_reg"]
    if kind == "greg-2":
        assert coefficients.picked_at // 10 + 1 == GREG[f"greg/{name}/{bits}/pick_update_count"] == 1001


def test_float32_is_what_the_published_logs_show():
    """A log in issue 4 of the authors' repository prints 0.87404 in iteration 48200 of GReg-2, which is update 9641."""
    coefficients = GrowingCoefficients(Growth("greg-2", ratio_limit=None), SIZES)
    for update in range(9641):
        coefficients.update(5 * update, None, CUT)
    assert f"{coefficients.level[0]:.5f}" == "0.87404"


def test_the_magnitude_ratio_ends_growing():
    coefficients = GrowingCoefficients(Growth("greg-1"), SIZES, CUT, np.float64)
    magnitudes, updates, decay = MAGNITUDES.copy(), 0, GREG["greg/magratio/decay"]
    while not coefficients.finished:
        magnitudes[:8][CUT[:8]] *= decay[0]
        magnitudes[8:][CUT[8:]] *= decay[1]
        coefficients.update(10 * updates, magnitudes)
        expected = [GREG[f"greg/magratio/hist{i}"][updates] for i in (0, 1)]
        np.testing.assert_allclose(coefficients.ratios, expected, rtol=1e-12)
        np.testing.assert_allclose(coefficients.level, GREG["greg/magratio/regmax"][updates], rtol=1e-12)
        updates += 1
    assert updates == GREG["greg/magratio/finish_update_count"][0] == 17


def test_a_layer_sees_the_last_ratios_of_those_behind_it():
    """As the authors go through the layers: at the first update the first layer sees only itself."""
    sizes, cut = {"a": 2, "b": 2}, np.array([True, False, True, False])
    coefficients = GrowingCoefficients(Growth("greg-1", ratio_limit=10), sizes, cut)
    coefficients.update(0, np.array([1.0, 20.0, 1.0, 2.0]))
    assert coefficients.finished_at.tolist() == [0, -1]
    coefficients = GrowingCoefficients(Growth("greg-1", ratio_limit=10), sizes, cut)
    coefficients.update(0, np.array([1.0, 2.0, 1.0, 2.0]))
    coefficients.update(10, np.array([1.0, 1000.0, 1.0, 1000.0]))  # b's last ratio was 2
    assert coefficients.finished_at.tolist() == [-1, 10]
    coefficients.update(20, np.array([1.0, 1000.0, 1.0, 1000.0]))
    assert coefficients.finished_at.tolist() == [20, 10]


@pytest.mark.parametrize("tau", [10, 5])
def test_tpp_grows_in_closed_form(tau):
    cut = TPP[f"tpp/schedule_tau{tau}/reg"][-1][:, 0] > 0
    coefficients = GrowingCoefficients(
        Growth("tpp", update_interval=tau, ratio_limit=None), {"a": len(cut)}, cut, np.float64
    )
    iters = TPP[f"tpp/schedule_tau{tau}/iters"].tolist()
    assert iters[-1] == 10000 * tau
    for i, step in enumerate(iters):
        assert coefficients.due(step)
        coefficients.update(step)
        np.testing.assert_allclose(coefficients.reg, TPP[f"tpp/schedule_tau{tau}/reg"][i][:, 0], rtol=1e-15)
        assert coefficients.finished == TPP[f"tpp/schedule_tau{tau}/finish"][i]


def test_a_power_reaches_the_limit_in_the_same_step():
    for power in (1, 2, 3):
        growth = Growth("tpp", update_interval=5, reg_step=0.01, power=power, ratio_limit=None)
        coefficients = GrowingCoefficients(growth, {"a": 2}, np.array([True, False]), np.float64)
        coefficients.update(250)
        assert coefficients.level[0] == pytest.approx(0.5**power)
        coefficients.update(495)
        assert not coefficients.finished
        coefficients.update(500)
        assert coefficients.finished and coefficients.level[0] == pytest.approx(1.0)


def test_fixed_regularisation_is_there_at_once():
    coefficients = GrowingCoefficients(Growth("fixed", fixed_steps=40, ratio_limit=None), SIZES, CUT)
    coefficients.update(0)
    assert np.array_equal(coefficients.reg, CUT.astype(np.float32)) and not coefficients.finished
    coefficients.update(40)
    assert not coefficients.finished
    coefficients.update(50)
    assert coefficients.finished


def test_greg_2_leaves_a_layer_that_loses_nothing_alone():
    growth = Growth("greg-2", pick_step=0.01)
    coefficients = GrowingCoefficients(growth, {"a": 2, "b": 2})
    coefficients.update(0, np.ones(4), np.array([True, False, False, False]))
    assert coefficients.picked_at == 0 and coefficients.finished_at.tolist() == [-1, 0]
    coefficients.update(10, np.ones(4))
    np.testing.assert_allclose(coefficients.reg, [0.0101, -1e-4, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("updates", [5, 1003])
def test_a_loaded_state_goes_on_bit_for_bit(updates):
    whole = GrowingCoefficients(Growth("greg-2"), SIZES)
    for i in range(updates):
        whole.update(10 * i, MAGNITUDES, CUT)
    second = GrowingCoefficients(Growth("greg-2"), SIZES)
    second.load_state_dict(whole.state_dict())
    for i in range(updates, updates + 3):
        for c in (whole, second):
            c.update(10 * i, MAGNITUDES, CUT)
    assert np.array_equal(whole.reg, second.reg) and np.array_equal(whole.ratios, second.ratios)
    with pytest.raises(ValueError, match="expected the state of 2 channels in 1 layers, got 14 in 2"):
        GrowingCoefficients(Growth("greg-2"), {"a": 2}).load_state_dict(whole.state_dict())


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="unknown kind 'greg-3'; did you mean 'greg-"):
        Growth("greg-3")
    with pytest.raises(ValueError, match="update_interval must be at least 1, got 0"):
        Growth("greg-1", update_interval=0)
    with pytest.raises(ValueError, match="reg_step must be above 0, got 0"):
        Growth("greg-1", reg_step=0)
    with pytest.raises(ValueError, match="greg-1 needs cut"):
        GrowingCoefficients(Growth("greg-1"), SIZES)
    with pytest.raises(ValueError, match=r"expected bool \(14,\), got bool \(3,\)"):
        GrowingCoefficients(Growth("greg-1"), SIZES, np.ones(3, bool))
