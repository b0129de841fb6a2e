"""Write the results in ``docs/EVALUATION.md``, from the result files and nothing else.

    python tools/render_evaluation.py [--results benchmarks/results/evaluation] [--check]

The part between the two marks of the document is replaced, and the pictures beside the
results are copied to ``docs/images``. ``--check`` writes nothing and fails if the document
is not up to date.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from common import table
from evaluation_report import clips_told, goals_table, notes, summary_table

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- results: made by tools/render_evaluation.py; do not edit -->\n"
END = "<!-- end of results -->\n"
DOCUMENT = Path("docs/EVALUATION.md")
IMAGES = Path("docs/images")
NOTHING = "Nothing has been measured yet.\n"
Result = dict[str, Any]


def read_results(folder: Path) -> list[Result]:
    """Every result of a folder by name; ``label`` is the file's, and added.

    Raises:
        ValueError: a file is not the result of an evaluation.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        if content.get("benchmark") not in SECTIONS:
            raise ValueError(
                f"{path.name}: not a result of an evaluation ({', '.join(SECTIONS)}); "
                "take it out of the folder"
            )
        results.append(content | {"label": path.stem})
    return results


def picture_name(label: str) -> str:
    """Of the page of an evaluation, in the folder of images."""
    return f"evaluation-{label}.png"


def percent(value: float | None) -> str:
    """A share as a table cell."""
    return "-" if value is None else f"{100 * value:.1f}"


def goal_rows(result: Result) -> str:
    """The goals of a network's report."""
    header = ("goal", "target", "reached", "clips", "verdict")
    rows = [
        [
            row["goal"],
            row["target"],
            "-" if row["reached"] is None else f"{row['reached']:.1f}",
            row["clips"],
            row["verdict"],
        ]
        for row in result.get("goals", [])
    ]
    return table(header, rows)


def conversion(result: Result) -> list[str]:
    """An evaluation of conversions: goals, figures, what was not measured.

    Recordings that no voice made, as the anchors, have no goals.
    """
    files = [f["file"] for voice in result["voices"] for f in voice["files"].values()]
    parts = [
        f"### Conversions: {result['label']}",
        clips_told(result)
        + (f"; {', '.join(files)}" if files else "")
        + f"; judged by {', '.join(result['judges'])}.",
        *([goals_table(result["voices"])] if files else []),
        summary_table(result["voices"]),
    ]
    if remarks := notes(result["voices"]):
        parts.append("Not measured:\n\n" + "\n".join(f"- {note}" for note in remarks))
    return parts


def pitch(result: Result) -> list[str]:
    """A report of pitch trackers: the network's goals, then all trackers."""
    kinds = {
        "rpa": "within 50 cents",
        "rpa_heard": "and called voiced",
        "vde": "voicing error",
        "missed": "voice missed",
        "false": "voice added",
        "octave": "octave off",
    }
    rows = [
        [name, noise, *(percent(score[k]) for k in kinds), f"{score['cents']:.1f}"]
        for name, scores in result["trackers"].items()
        for noise, score in scores.items()
    ]
    return [
        "### Pitch network",
        f"Exact labels; {result['clips']} clips, {result['seconds']:g} s, of "
        f"{', '.join(result['speakers'])}. In %, but for the median error in cents.",
        goal_rows(result),
        table(("tracker", "noise", *kinds.values(), "cents"), rows),
    ]


def content(result: Result) -> list[str]:
    """A report of an encoder: its goals, phones by speaker, the speaker probe."""
    heard = [
        [
            name,
            "held out" if row["held_out"] else "trained on",
            percent(row["all"]),
            percent(row["speech"]),
        ]
        for name, row in result["frame_accuracy"].items()
    ]
    named = [
        [name.replace("_", " "), percent(v)]
        for name, v in result["speaker_named"].items()
    ]
    return [
        "### Content encoder",
        f"Labels of the engines; {result['clips_per_speaker']} clips a speaker.",
        goal_rows(result),
        table(("speaker", "", "frames right, %", "without silence, %"), heard),
        table(("linear probe on", "speaker named, %"), named),
    ]


SECTIONS: dict[str, Callable[[Result], list[str]]] = {
    "evaluation": conversion,
    "pitch": pitch,
    "content": content,
}


def measured_on(results: list[Result]) -> str:
    """File, machine, versions and commit of every result."""
    rows = []
    for result in results:
        facts = result["environment"]
        computed = facts["gpu"] if facts["gpu"] != "none" else facts["cpu"]
        versions = {"python": facts["python"]} | facts["versions"]
        listed = [f"{n} {v}" for n, v in versions.items() if v != "not installed"]
        commit = str(facts["commit"])[:12] or "unknown"
        if facts.get("dirty") or str(facts["commit"]).endswith("-dirty"):
            commit += " with changes"
        cells = [f"`{result['label']}.json`", computed, facts["cores"]]
        rows.append([*cells, ", ".join(listed), commit])
    return table(("file", "machine", "cores", "versions", "commit"), rows)


def section(results: list[Result], images: Collection[str]) -> str:
    """Everything between the marks."""
    if not results:
        return NOTHING
    order = list(SECTIONS)
    parts = []
    for result in sorted(results, key=lambda r: order.index(r["benchmark"])):
        parts += SECTIONS[result["benchmark"]](result)
        if (name := picture_name(result["label"])) in images:
            parts.append(f"![source and outputs of {result['label']}](images/{name})")
    parts += ["### Result files", measured_on(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def replaced(document: str, made: str) -> str:
    """The document with another text between its marks.

    Raises:
        ValueError: it does not have both marks, each once and in order.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"{DOCUMENT}: expected the lines {BEGIN!r} and {END!r} once")
    before, rest = document.split(BEGIN)
    if END not in rest:
        raise ValueError(f"{DOCUMENT}: {END!r} comes before {BEGIN!r}")
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "evaluation"
    )
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    given = parser.parse_args(arguments)
    try:
        return render(given.results, given.root, given.check)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def render(folder: Path, root: Path, check: bool) -> int:
    """Write the document and copy the pictures; 1 where ``check`` finds it stale."""
    results = read_results(folder)
    images = root / IMAGES
    for result in () if check else results:
        page = folder / f"{result['label']}.png"
        if page.exists():
            images.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(page, images / picture_name(result["label"]))
    path = root / DOCUMENT
    document = path.read_text("utf-8")
    made = replaced(document, section(results, {p.name for p in images.glob("*.png")}))
    if check:
        if made != document:
            print(f"{DOCUMENT} is not up to date: python tools/render_evaluation.py")
        return int(made != document)
    path.write_text(made, "utf-8")
    print(f"wrote {DOCUMENT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
