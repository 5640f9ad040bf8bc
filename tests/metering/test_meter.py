"""Windows are contiguous, scopes count what they say, and a reading costs microseconds."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ecogen.metering.meter import CpuMeter, Meter, ModelledMeter, Scope, null_meter
from ecogen.records import Traffic, Usage


def burn(seconds: float) -> float:
    """Spend CPU time; returns how much."""
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass
    return time.thread_time() - began


@pytest.mark.parametrize("scope", ["process", "thread"])
def test_windows_lose_nothing_and_count_nothing_twice(scope: Scope) -> None:
    before_s = time.perf_counter()
    meter = CpuMeter("n", scope)
    begun_s, spent_s, windows = time.perf_counter(), 0.0, []
    for _ in range(4):
        spent_s += meter.run(burn, 0.01)
        meter.add_flops(5.0)
        last_s = time.perf_counter()
        windows.append(meter.take("tuning"))
    assert last_s - begun_s <= sum(w.wall_s for w in windows) <= time.perf_counter() - before_s
    assert sum(w.cpu_s for w in windows) == pytest.approx(spent_s, abs=0.01)
    assert [w.flops for w in windows] == [5.0] * 4
    assert meter.take("tuning").flops == 0


def test_an_idle_window_has_wall_time_but_hardly_cpu_time() -> None:
    meter = CpuMeter("n")
    time.sleep(0.03)
    usage = meter.take("tuning")
    assert usage.wall_s >= 0.03
    assert usage.cpu_s < 0.02


def test_thread_scope_counts_this_nodes_work_only() -> None:
    first, second = CpuMeter("a", "thread"), CpuMeter("b", "thread")
    burn(0.02)
    with ThreadPoolExecutor(1) as compute:
        spent_s = [compute.submit(m.run, burn, s).result() for m, s in ((first, 0.01), (second, 0.03))]
    assert first.take("tuning").cpu_s == pytest.approx(spent_s[0], abs=0.003)
    assert second.take("tuning").cpu_s == pytest.approx(spent_s[1], abs=0.003)


def test_nodes_of_one_process_together_spend_no_more_than_the_process() -> None:
    meters = [CpuMeter(str(i), "thread") for i in range(3)]
    process = CpuMeter("process")
    for meter in meters:
        meter.run(burn, 0.005)
    assert sum(meter.take("tuning").cpu_s for meter in meters) <= process.take("tuning").cpu_s


def test_process_scope_counts_all_threads() -> None:
    meter = CpuMeter("n")
    with ThreadPoolExecutor(2) as pool:
        spent_s = sum(pool.map(burn, [0.01, 0.01]))
    assert meter.take("tuning").cpu_s >= spent_s


def test_work_that_fails_is_counted_and_says_so() -> None:
    def fail() -> None:
        burn(0.01)
        raise ValueError("no")

    meter = CpuMeter("n", "thread")
    with pytest.raises(ValueError, match="no"):
        meter.run(fail)
    assert meter.take("tuning").cpu_s >= 0.01


def test_adding_from_several_threads_loses_nothing() -> None:
    meter = CpuMeter("n", "thread")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: meter.add_flops(1.0), range(1000)))
    assert meter.take("tuning").flops == 1000


def test_a_usage_carries_traffic_phase_and_memory() -> None:
    traffic = (Traffic("b", "control", 1, 2, 3),)
    usage = CpuMeter("n", "thread").take("serving", traffic, 77)
    assert (usage.node_id, usage.phase, usage.traffic, usage.memory_bytes) == ("n", "serving", traffic, 77)
    assert usage.method == "measured"


def test_a_process_knows_its_peak_memory_and_a_shared_one_does_not() -> None:
    assert CpuMeter("n").take("tuning").memory_bytes > 10**6
    assert CpuMeter("n", "thread").take("tuning").memory_bytes == 0


@pytest.mark.parametrize("scope", ["process", "thread"])
def test_a_reading_costs_less_than_50_us(scope: Scope) -> None:
    meter = CpuMeter("n", scope)
    assert min(_seconds_of_readings(meter, 100) for _ in range(5)) / 100 < 50e-6


def _seconds_of_readings(meter: Meter, count: int) -> float:
    began_s = time.thread_time()  # on a busy machine others' time is no cost of a reading
    for _ in range(count):
        meter.take("tuning")
    return time.thread_time() - began_s


def test_a_modelled_meter_computes_on_a_virtual_clock() -> None:
    now_s = 100.0
    meter = ModelledMeter("n", 1e9, lambda: now_s)
    assert meter.run(lambda: "result") == "result"
    meter.add_flops(2e9)
    now_s = 105.0
    assert meter.take("tuning") == Usage("n", "tuning", 5.0, 2.0, 2e9, method="modelled")
    assert meter.take("tuning") == Usage("n", "tuning", 0.0, 0.0, method="modelled")


def test_a_null_meter_spends_nothing() -> None:
    meter = null_meter("n")
    meter.add_flops(1e12)
    usage = meter.take("tuning", memory_bytes=9)
    assert (usage.wall_s, usage.cpu_s, usage.flops, usage.memory_bytes) == (0, 0, 1e12, 9)
