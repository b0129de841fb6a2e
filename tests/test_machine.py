"""Where things are kept, and what MLX is told before it is imported."""

import os
import subprocess
import sys
import threading
import time

import pytest

from rvc_mlx import machine
from rvc_mlx.machine import cache_folder, memory_bytes, processors, set_up_cuda

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="CUDA is for Linux")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RVC_MLX_HOME", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RVC_MLX_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "rvc_mlx"


def test_processors_are_those_of_this_process():
    assert 1 <= processors() <= (os.cpu_count() or 1)


def test_memory_is_what_the_container_may_fill(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "_CGROUP_LIMIT", limit)
    physical = memory_bytes()
    assert 1 << 28 < physical < 1 << 50
    for told, expected in [("max\n", physical), (f"{1 << 60}\n", physical)]:
        limit.write_text(told)
        assert memory_bytes() == expected
    limit.write_text(f"{1 << 27}\n")
    assert memory_bytes() == 1 << 27


@on_linux
def test_settings_for_cuda_leave_the_users_alone(monkeypatch, tmp_path):
    for name in (*machine._CUDA_SETTINGS, "MLX_PTX_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RVC_MLX_HOME", str(tmp_path))
    monkeypatch.setenv("MLX_CUDA_CONV_CACHE_SIZE", "7")
    set_up_cuda()
    assert os.environ["MLX_CUDA_CONV_CACHE_SIZE"] == "7"
    assert int(os.environ["MLX_CUDA_GRAPH_CACHE_SIZE"]) > 400
    # Kernels of another MLX are not taken for this one's.
    folder = os.environ["MLX_PTX_CACHE_DIR"]
    assert folder.startswith(str(tmp_path / "compiled" / "cuda-mlx-"))
    assert folder[-1].isdigit()


@on_linux
def test_they_are_made_before_mlx_is_imported():
    code = (
        "import os, sys, rvc_mlx; assert 'mlx.core' not in sys.modules; "
        "print(os.environ['MLX_ENABLE_CACHE_THRASHING_CHECK'])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_")}
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, env=environment, capture_output=True, check=True)
    assert run.stdout.strip() == b"0"


@on_linux
def test_mlx_multiplies_by_openblas_unless_it_was_there_first():
    pytest.importorskip("faiss")
    code = (
        "import sys; {first}; import rvc_mlx; import mlx.core as mx; "
        "from rvc_mlx.machine import lend_openblas; "
        "x = mx.arange(12.0).reshape(3, 4); "
        "maps = open('/proc/self/maps').read(); "
        "print('libopenblas' in maps, lend_openblas(), (x @ x.T).tolist()[2])"
    )
    lines = []
    forbid = "import os; os.environ['RVC_MLX_OPENBLAS'] = '0'"
    for first in ("pass", "import mlx.core", forbid):
        words = [sys.executable, "-c", code.format(first=first)]
        run = subprocess.run(words, capture_output=True, check=True, text=True)
        lines.append(run.stdout.split(maxsplit=2))
    assert lines[0][0] == "True"
    assert "libopenblas" in lines[0][1]
    assert lines[1][:2] == lines[2][:2] == ["False", "None"]
    assert {line[2] for line in lines} == {"[62.0, 214.0, 366.0]\n"}


def test_work_in_parallel_comes_in_order_and_waits_to_be_taken(monkeypatch):
    monkeypatch.setattr(machine, "processors", lambda: 3)
    begun = []

    def work(item):
        time.sleep(0.02 if item % 2 == 0 else 0)
        begun.append(item)
        return item**2

    results = machine.in_parallel(work, range(40))
    assert next(results) == 0
    assert len(begun) <= 6  # two items a thread
    assert list(results) == [n**2 for n in range(1, 40)]
    assert sorted(begun) == list(range(40))


def test_work_is_taken_on_the_callers_thread_when_its_turn_comes(monkeypatch):
    monkeypatch.setattr(machine, "processors", lambda: 2)
    taken = []

    def items():
        for n in range(20):
            taken.append(threading.current_thread())
            yield n

    go = threading.Event()

    def work(n):
        go.wait(1)
        return n**2

    results = machine.in_parallel(work, items())
    assert next(results) == 0
    assert taken == [threading.main_thread()] * 4  # two items a thread
    go.set()
    assert list(results) == [n**2 for n in range(1, 20)]


def test_what_is_done_is_given_as_more_is_taken(monkeypatch):
    monkeypatch.setattr(machine, "processors", lambda: 4)
    taken = []

    def items():
        for n in range(6):
            taken.append(n)
            yield n
            time.sleep(0.2)  # meanwhile it is done

    results = machine.in_parallel(lambda n: n, items())
    for n, result in enumerate(results):
        assert result == n
        assert len(taken) <= n + 2


def test_work_in_parallel_raises_what_the_work_raises():
    with pytest.raises(ZeroDivisionError):
        list(machine.in_parallel(lambda n: 1 / n, range(3, -1, -1)))


def test_one_item_needs_no_thread():
    [thread] = machine.in_parallel(lambda _: threading.current_thread(), [0])
    assert thread is threading.main_thread()


def test_work_within_work_starts_no_more_threads(monkeypatch):
    monkeypatch.setattr(machine, "processors", lambda: 3)

    def inner(_):
        return threading.current_thread().name

    def outer(_):
        return {threading.current_thread().name, *machine.in_parallel(inner, range(5))}

    assert [len(names) for names in machine.in_parallel(outer, range(4))] == [1] * 4
