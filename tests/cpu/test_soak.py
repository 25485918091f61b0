"""tools/soak.py on the CPU: a clean run, and that it sees wrong results, errors in threads, and memory that grows."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch
from load_tool import load_tool


@pytest.fixture(scope="module")
def soak():
    return load_tool("soak")


def test_a_clean_run(soak, tmp_path, capsys):
    assert soak.main(["--seconds", "2", "--device", "cpu", "--threads", "2", "--csv", str(tmp_path / "soak.csv")]) == 0
    assert "none wrong, no leak" in capsys.readouterr().out
    with open(tmp_path / "soak.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["checked"]) > 0 and int(rows[-1]["wrong"]) == 0
    assert [int(row["products"]) for row in rows] == sorted(int(row["products"]) for row in rows)


def test_a_wrong_result_and_a_thread_that_fails_are_seen(soak):
    made = soak.Soak(torch.device("cpu"), 1)
    for product in made.products:
        product.expected.view(torch.int16)[0, 0] += 1
    rows = list(made.rows(0.5))
    assert rows[-1].wrong == rows[-1].checked > 0
    assert any("results differ from the first" in fault for fault in soak.faults(rows, made.errors))

    made = soak.Soak(torch.device("cpu"), 1)
    made.products = [replace(made.products[0], a=made.products[0].a[:, :3])]
    rows = list(made.rows(0.5))
    assert any(fault.startswith("thread 0: ValueError: a has shape") for fault in soak.faults(rows, made.errors))


def test_memory_that_grows_is_a_fault(soak):
    rows = [soak.Row(float(s), 10, 1, 0, 500.0 + 100 * (s < 2) + 2 * s, 9000.0 + s) for s in range(40)]
    assert soak.faults(rows, []) == [], "62 MB after the first fifth, and the start does not count"
    grown = [replace(row, host_mb=row.host_mb + 3 * row.seconds, device_mb=row.device_mb + row.seconds) for row in rows]
    assert [fault.split(" grew")[0] for fault in soak.faults(grown, [])] == ["host memory", "device memory"]
