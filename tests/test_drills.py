"""The drills of `experiments/drills`: faults made for real, each under a watchdog."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments" / "drills"))

import faults
from bench import can_mount


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A cache with what all drills compile and prepare."""
    folder = tmp_path_factory.mktemp("drills")
    faults.Bench(folder / "first", folder / "cache").begin()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", faults.DRILLS)
def test_no_fault_of_reporting_stops_blocks_or_hides_a_run(name, shared):
    if faults.DRILLS[name][2] and not can_mount():
        pytest.skip("small disks need root")
    went_well, outcome = faults.run_drill(name, shared, shared / "cache")
    assert went_well, outcome
