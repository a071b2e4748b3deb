"""Launches are noted, refused and compiled as they should be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from quadriga.kernels.triton import launch
from quadriga.kernels.triton.cases import CASES, meta
from quadriga.kernels.triton.combine import combine, combine_kernel


def test_launches_are_noted_in_order_and_meta_tensors_are_not_run() -> None:
    with launch.recording() as noted:
        out = combine(meta(6, 40), meta(2, 3, dtype=torch.int32), meta(2, 3, dtype=torch.float32))
        combine(torch.ones(1, 2048), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    assert out.shape == (2, 40) and out.is_meta
    assert [one.kernel for one in noted] == [combine_kernel] * 2
    assert [one.grid for one in noted] == [(2, 1), (1, 2)]
    assert noted[0].name == "combine_kernel" and noted[0].constants == {"TOP_K": 3, "BLOCK": 64}
    assert noted[0].arguments[3] is None and noted[0].arguments[5] == 40


def test_nothing_is_launched_for_no_tokens() -> None:
    with launch.recording() as noted:
        out = combine(torch.ones(0, 40), torch.zeros(0, 3, dtype=torch.int32), torch.ones(0, 3))
    assert out.shape == (0, 40) and noted == []


def test_every_row_of_the_table_is_recorded_without_reading_a_value() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        with launch.recording() as noted:
            case.call()
        assert noted, case.name


def _compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: in this one, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "quadriga.kernels.triton.check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("only", ["combine, dbrx-132b, 8 tokens", "experts in q4, dbrx-132b, 8 tokens"])
def test_kernels_compile_for_gpus_that_are_not_here(only: str) -> None:
    ended = _compiled("--only", only)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["sm_80", "sm_90", "sm_100"]
    assert lines[-1].endswith("0 with faults")


def test_an_unknown_row_is_an_error() -> None:
    ended = _compiled("--only", "no such row")
    assert ended.returncode == 2 and "no row's name contains 'no such row'" in ended.stderr
