"""Tables of the documents, made from the result files and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import grouped_stages, table

Result = dict[str, Any]
MIB = 1 << 20
BACKENDS = {
    "openvino": "CPU, OpenVINO",
    "mlx-cpu": "CPU, MLX",
    "cuda": "NVIDIA GPU, MLX CUDA",
    "metal": "Apple GPU, MLX Metal",
}


def read_results(folder: Path) -> list[Result]:
    """Every result of a folder, quick ones left out; ``file`` is added to each.

    Raises:
        ValueError: a file is not a result.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        if "-quick" in path.stem:
            continue
        content = json.loads(path.read_text("utf-8"))
        if not {"benchmark", "sides", "environment"} <= content.keys():
            raise ValueError(
                f"{path.name}: not a result of a benchmark; take it out of the folder"
            )
        results.append(content | {"file": path.name})
    return results


def chosen(results: Iterable[Result], prefix: str) -> list[Result]:
    """Results of one benchmark, CPU first."""
    order = list(BACKENDS)
    found = [
        r
        for r in results
        if r["benchmark"] == prefix or _parent(r["benchmark"]) == prefix
    ]
    return sorted(found, key=lambda r: (order.index(r["sides"]["backend"]), r["file"]))


def _parent(name: str) -> str:
    return name.split("-", 1)[0]


def machine(result: Result) -> str:
    """What computed on our side, short."""
    facts, backend = result["environment"], result["sides"]["backend"]
    if backend in ("cuda", "metal"):
        return f"{facts['gpu']}"
    return f"{facts['cpu']}, {facts['cores']} cores"


def commit(result: Result, digits: int = 10) -> str:
    """What was measured."""
    facts = result["environment"]
    changed = " with changes" if facts.get("dirty") else ""
    return (facts["commit"] or "unknown")[:digits] + changed


def labels(result: Result) -> list[str]:
    """The first columns of every table."""
    sides = result["sides"]
    ours = f"{BACKENDS[sides['backend']]}, {sides['precision']}"
    theirs = f"{sides['torch_device']}, {sides['torch_precision']}"
    return [machine(result), ours, theirs]


LABELS = ("machine", "ours", "PyTorch")


def _with_missing(
    header: tuple[str, ...],
    rows: list,
    results: list[Result],
    backends: tuple[str, ...] = ("openvino", "cuda", "metal"),
) -> str:
    """The table, with a row for every kind of device that nobody has measured."""
    measured = {result["sides"]["backend"] for result in results}
    for backend in backends:
        if backend not in measured:
            blank = ["not measured"] * (len(header) - len(LABELS))
            rows.append(["-", BACKENDS[backend], "-", *blank])
    return table(header, rows)


def rows_table(
    results: list[Result], benchmark: str, columns: dict[str, Callable[[dict], Any]]
) -> str:
    """One line per row of every result of a benchmark."""
    found = chosen(results, benchmark)
    rows = [
        [*labels(result), *(column(row) for column in columns.values())]
        for result in found
        for row in result["rows"]
    ]
    return _with_missing((*LABELS, *columns), rows, found)


def _median(side: str) -> Callable[[dict], Any]:
    return lambda row: row.get(side, {}).get("median_s")


def _of(name: str) -> Callable[[dict], Any]:
    return lambda row: row.get(name)


TIMES = {
    "ours, s": _median("ours"),
    "PyTorch, s": _median("torch"),
    "speed-up": _of("speedup"),
}
ERRORS = {
    "max abs": _of("max_abs"),
    "mean abs": _of("mean_abs"),
    "scale": _of("scale"),
    "correlation": _of("correlation"),
}


def rmvpe(results: list[Result]) -> str:
    """RMVPE by length."""
    columns = {"audio, s": _of("seconds"), **TIMES}
    columns |= {
        "x realtime": _of("realtime_factor"),
        "s per s": _of("compute_per_second"),
    }
    columns |= {"max cents": _of("max_cents"), "mean cents": _of("mean_cents")}
    columns |= {"voicing equal": _of("voicing_agreement")}
    return rows_table(results, "rmvpe", columns)


def rmvpe_parts(results: list[Result]) -> str:
    """Where the time of five seconds goes."""
    found = chosen(results, "rmvpe")
    parts = list(found[0]["parts_s"]) if found else ["mel", "network", "decoding"]
    rows = [[*labels(r), *(r["parts_s"][part] for part in parts)] for r in found]
    return _with_missing((*LABELS, *parts), rows, found)


def components(results: list[Result]) -> str:
    """Each network alone."""
    found = [
        result
        | {"rows": [row | {"length": result["seconds"]} for row in result["rows"]]}
        for result in chosen(results, "components")
    ]
    columns = {"component": _of("component"), "audio, s": _of("length")}
    return rows_table(found, "components", columns | TIMES | ERRORS)


def rvc_full(results: list[Result]) -> str:
    """Complete synthesis."""
    columns = {"audio, s": _of("seconds"), **TIMES, **ERRORS}
    return rows_table(results, "rvc_full", columns)


def training(results: list[Result]) -> str:
    """One step of both networks."""
    found = [
        r | {"rows": [row | r["options"] | _blas(r) for row in r["rows"]]}
        for r in chosen(results, "training")
    ]
    columns = {n: _of(n) for n in ("preset", "batch_size", "blas", "way")}
    columns |= TIMES | {"largest loss error": _of("largest_loss_error")}
    rows = [
        [*labels(r), *(column(row) for column in columns.values())]
        for r in found
        for row in r["rows"]
    ]
    header = (*LABELS, *(name.replace("_", " ") for name in columns))
    return _with_missing(header, rows, found, ("mlx-cpu", "cuda", "metal"))


def _blas(result: Result) -> dict[str, str]:
    on_gpu = result["sides"]["backend"] in ("cuda", "metal")
    return {"blas": "-" if on_gpu else result["sides"]["blas"]}


def audio_parity(results: list[Result]) -> str:
    """Waveforms of real audio."""
    found = [r | {"rows": [r]} for r in chosen(results, "audio_parity")]
    columns = {"audio, s": _of("seconds"), **ERRORS}
    columns |= {
        "SNR, dB": _of("snr_db"),
        "RMSE": _of("rmse"),
        "RMS ratio": _of("rms_ratio"),
        "log-mel mean abs": _of("log_mel_mean_abs"),
    }
    return rows_table(found, "audio_parity", columns)


def _e2e_rows(results: list[Result]) -> list[tuple[Result, dict]]:
    return [(r, row) for r in chosen(results, "e2e") for row in r["rows"]]


def e2e(results: list[Result]) -> str:
    """File to file."""
    header = ("machine", "program", "precision", "audio, s", "first run ever, s")
    header += ("cold, s", "warm, s", "speed-up", "x realtime", "s per s")
    header += ("peak MiB", "GPU MiB")
    rows = [
        [machine(result), _program(result, row), row["precision"], row["seconds"]]
        + [row.get(n) for n in ("first_run_s", "cold_s", "warm_median_s", "speedup")]
        + [row["realtime_factor"], 1 / row["realtime_factor"]]
        + [row[n] // MIB for n in ("peak_memory_bytes", "gpu_peak_bytes")]
        for result, row in _e2e_rows(results)
    ]
    return _e2e_table(header, rows, results, "e2e")


def _program(result: Result, row: dict) -> str:
    backend = BACKENDS[result["sides"]["backend"]]
    if row["side"] == "ours":
        return f"ours ({backend})"
    return f"PyTorch ({result['sides']['torch_device']})"


def _e2e_table(
    header: tuple[str, ...], rows: list, results: list[Result], name: str
) -> str:
    measured = {result["sides"]["backend"] for result in chosen(results, name)}
    for backend in ("openvino", "cuda", "metal"):
        if backend not in measured:
            blank = ["not measured"] * (len(header) - 2)
            rows.append(["-", f"ours ({BACKENDS[backend]})", *blank])
    return table(header, rows)


def e2e_stages(results: list[Result]) -> str:
    """Where the time of a warm conversion goes."""
    rows, groups = [], dict.fromkeys(("stages",))
    for result, row in _e2e_rows(results):
        groups = grouped_stages(row["stages_s"], row["warm_median_s"])
        start = [machine(result), _program(result, row), row["precision"]]
        rows.append([*start, row["seconds"], *groups.values()])
    header = ("machine", "program", "precision", "audio, s")
    return _e2e_table((*header, *groups), rows, results, "e2e")


def memory(results: list[Result]) -> str:
    """Peak memory by length."""
    header = ("machine", "program", "precision", "audio, s", "peak MiB", "GPU MiB")
    header += ("conversion, s",)
    rows = [
        [machine(result), _program(result, row), row["precision"], row["seconds"]]
        + [row[n] // MIB for n in ("peak_memory_bytes", "gpu_peak_bytes")]
        + [row["first_s"]]
        for result in chosen(results, "memory")
        for row in result["rows"]
    ]
    return _e2e_table(header, rows, results, "memory")


def environments(results: list[Result]) -> str:
    """File, machine, versions and commit of every result."""
    header = ("file", "machine", "memory GiB", "system", "versions", "commit")
    rows = []
    for result in results:
        facts = result["environment"]
        versions = ", ".join(
            f"{name} {version}"
            for name, version in {
                "python": facts["python"],
                **facts["versions"],
            }.items()
            if version != "not installed"
        )
        start = [result["file"], machine(result), facts["memory_gib"]]
        rows.append([*start, facts["system"], versions, commit(result)])
    return table(header, rows) if rows else "There are no results yet."


def parity_rows(results: list[Result], folder: Path) -> list[dict[str, Any]]:
    """Every comparison with a tolerance: of the scripts, and of the test suite."""
    rows = [
        row | {"engine": labels(result)[1]}
        for result in results
        for row in result.get("rows", [])
        if "max_tolerance" in row
    ]
    for path in sorted(folder.glob("parity*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            given = json.loads(line)
            names = {"max_abs": "max", "mean_abs": "mean"}
            names |= {f"{n}_tolerance": f"{n} tolerance" for n in ("max", "mean")}
            names |= {"stage": "stage", "test": "test", "scale": "scale"}
            row = {ours: given[theirs] for ours, theirs in names.items()}
            row |= {name: given.get(name, "") for name in ("machine", "commit")}
            rows.append(row | {"engine": given.get("engine", BACKENDS["openvino"])})
    return rows


def parity(rows: list[dict[str, Any]]) -> str:
    """The parity table; the verdict is worked out here, from the figures."""
    header = ("stage", "ours", "max", "mean", "tolerance, max", "tolerance, mean")
    names = (
        "stage",
        "engine",
        "max_abs",
        "mean_abs",
        "max_tolerance",
        "mean_tolerance",
    )
    cells = [
        [*(row[n] for n in names), f"`{row['test']}`", verdict(row)] for row in rows
    ]
    if not cells:
        return "Nothing has been compared yet."
    return table((*header, "test", "verdict"), cells)


def verdict(row: dict[str, Any]) -> str:
    """Whether a row is within both tolerances."""
    good = row["max_abs"] <= row["max_tolerance"]
    return "ok" if good and row["mean_abs"] <= row["mean_tolerance"] else "**FAILS**"
