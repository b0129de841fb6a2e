"""An evaluation in tables: goals, figures of the voices, figures of the clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import table, verdict
from judging import is_figure


class Shown(NamedTuple):
    """A figure of the summary.

    Attributes:
        judge: whose.
        metric: its name in the results.
        label: its name for people, with the unit.
        sign: ``"<="`` or ``">="`` where there is a goal.
        goal: the goal.
    """

    judge: str
    metric: str
    label: str
    sign: str = ""
    goal: float = 0.0

    def verdict(self, value: Any) -> str:
        """``met``, ``missed``, ``not measured``, or nothing without a goal."""
        if not self.sign:
            return ""
        return verdict(value if is_figure(value) else None, self.sign, self.goal)


SUMMARY = (
    Shown("f0", "rpa", "F0 within 50 cents, %", ">=", 95),
    Shown("f0", "rpa_both_voiced", "F0 within 50 cents where both voiced, %"),
    Shown("f0", "median_cents", "F0 error, median cents"),
    Shown("f0", "octave_errors", "F0 an octave off, %"),
    Shown("f0", "voicing_error", "voicing error, %"),
    Shown("speaker", "similarity_target", "similarity to target", ">=", 0.80),
    Shown("speaker", "similarity_source", "similarity to source"),
    Shown("speaker", "source_to_target", "source's similarity to target"),
    Shown("speaker", "nearer_target", "nearer target than source, %", ">=", 95),
    Shown("words", "character_error_source", "character error of source, %"),
    Shown("words", "character_error_output", "character error of output, %"),
    Shown("words", "character_gap", "character error added, points", "<=", 12),
    Shown("words", "word_error_source", "word error of source, %"),
    Shown("words", "word_error_output", "word error of output, %"),
    Shown("words", "word_gap", "word error added, points"),
    Shown("words", "character_drift", "characters heard differently, %"),
    Shown("phones", "accuracy_source", "phone frames right, source, %"),
    Shown("phones", "accuracy_output", "phone frames right, output, %"),
    Shown("phones", "agreement", "phone frames as in source, %"),
    Shown("dnsmos", "overall_source", "DNSMOS of source"),
    Shown("dnsmos", "overall_output", "DNSMOS of output"),
    Shown("dnsmos", "p808_output", "P.808 MOS of output"),
    Shown("loudness", "loudness_gap", "loudness, output - source, dB"),
    Shown("loudness", "clipped_output", "clipped samples per clip"),
    Shown("clicks", "joins", "joins"),
    Shown("clicks", "clicks_at_joins", "clicks added at joins", "<=", 0),
    Shown("clicks", "clicks_source", "clicks in source"),
    Shown("clicks", "new_clicks", "clicks added anywhere"),
)
CLIP_COLUMNS = (
    Shown("f0", "rpa", "RPA"),
    Shown("f0", "median_cents", "cents"),
    Shown("f0", "voicing_error", "voicing"),
    Shown("speaker", "similarity_target", "to target"),
    Shown("speaker", "similarity_source", "to source"),
    Shown("words", "character_error_source", "CER source"),
    Shown("words", "character_error_output", "CER output"),
    Shown("words", "character_drift", "CER drift"),
    Shown("phones", "accuracy_output", "phones"),
    Shown("phones", "agreement", "phones agree"),
    Shown("dnsmos", "overall_output", "DNSMOS"),
    Shown("loudness", "loudness_gap", "dB"),
    Shown("clicks", "new_clicks", "clicks"),
)


def _cell(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


def _found(judged: Mapping[str, Mapping[str, Any]], shown: Shown) -> Any:
    return judged.get(shown.judge, {}).get(shown.metric)


def summary_table(voices: Sequence[dict[str, Any]]) -> str:
    """A line per figure, a column per voice; figures that no voice has are left out."""
    rows = []
    for shown in SUMMARY:
        values = [_found(voice["summary"], shown) for voice in voices]
        if all(value is None for value in values):
            continue
        cells = [f"{table_cell(v)} {shown.verdict(v)}".strip() for v in values]
        goal = f"{shown.sign} {shown.goal:g}" if shown.sign else ""
        rows.append([shown.label, goal, *cells])
    return table(("figure", "goal", *(voice["name"] for voice in voices)), rows)


def table_cell(value: Any) -> str:
    """A figure with at most two decimals; ``-`` for none."""
    return "-" if value is None else f"{_cell(value):g}"


def clips_table(voices: Sequence[dict[str, Any]]) -> str:
    """A line per clip, voice and seed."""
    clips = [clip for voice in voices for clip in voice["clips"]]
    columns = [
        shown
        for shown in CLIP_COLUMNS
        if any(_found(clip["judged"], shown) is not None for clip in clips)
    ]
    facts = ("seed", "semitones") if seeds_of(voices) > 1 else ("semitones",)
    rows = [
        [clip["source"], voice["name"], *(table_cell(clip.get(fact)) for fact in facts)]
        + [table_cell(_found(clip["judged"], shown)) for shown in columns]
        for voice in voices
        for clip in voice["clips"]
    ]
    return table(("clip", "voice", *facts, *(s.label for s in columns)), rows)


def seeds_of(voices: Sequence[dict[str, Any]]) -> int:
    """How often a clip was converted into a voice, each time with another seed."""
    return max(len({clip.get("seed") for clip in v["clips"]}) for v in voices)


def clips_told(facts: Mapping[str, Any]) -> str:
    """How many clips there are, and how often they were converted."""
    seeds = seeds_of(facts["voices"])
    told = f", converted with {seeds} seeds of the noise" if seeds > 1 else ""
    return f"{len(facts['sources'])} clips{told}"


def notes(voices: Sequence[dict[str, Any]]) -> list[str]:
    """What could not be measured and why, with the number of conversions."""
    counted = Counter(
        f"{voice['name']}, {judge}: {values['note']}"
        for voice in voices
        for clip in voice["clips"]
        for judge, values in clip["judged"].items()
        if values.get("note")
    )
    return [f"{note} ({count} conversions)" for note, count in counted.items()]


class Reached(NamedTuple):
    """What a voice reached of a goal.

    Attributes:
        voice: its name.
        shown: the goal.
        value: the figure, or None.
        conversions: how many it is made of.
    """

    voice: str
    shown: Shown
    value: Any
    conversions: int

    @property
    def verdict(self) -> str:
        """``met``, ``missed`` or ``not measured``."""
        return self.shown.verdict(self.value)


def goals(voices: Sequence[dict[str, Any]]) -> list[Reached]:
    """Every goal of the judges that were asked, for every voice."""
    return [
        Reached(
            voice["name"],
            shown,
            _found(voice["summary"], shown),
            sum(is_figure(_found(c["judged"], shown)) for c in voice["clips"]),
        )
        for voice in voices
        for shown in SUMMARY
        if shown.sign and shown.judge in voice["summary"]
    ]


def goals_table(voices: Sequence[dict[str, Any]]) -> str:
    """A line per voice and goal: target, reached, over how many conversions, verdict."""
    rows = [
        [
            row.voice,
            row.shown.label,
            f"{row.shown.sign} {row.shown.goal:g}",
            table_cell(row.value),
            f"{row.conversions} of {len(voice['clips'])}",
            row.verdict,
        ]
        for voice in voices
        for row in goals([voice])
    ]
    return table(("voice", "goal", "target", "reached", "conversions", "verdict"), rows)


def missed_goals(voices: Sequence[dict[str, Any]]) -> list[str]:
    """The goals that a voice misses, or that could not be measured, in words."""
    return [
        f"{row.voice}: {row.shown.label} is {table_cell(row.value)}, "
        f"the goal is {row.shown.sign} {row.shown.goal:g}"
        for row in goals(voices)
        if row.verdict != "met"
    ]


def write_report(path: Path, facts: dict[str, Any], picture: str) -> str:
    """Write the tables as markdown; returns them."""
    voices = facts["voices"]
    parts = [
        f"# Evaluation: {facts['label']}",
        f"{clips_told(facts)}, judged by {', '.join(facts['judges'])}. "
        "What the figures mean: docs/EVALUATION.md.",
        *([goals_table(voices)] if goals(voices) else []),
        summary_table(voices),
        clips_table(voices),
    ]
    if remarks := notes(voices):
        parts.append("Not measured:\n\n" + "\n".join(f"- {note}" for note in remarks))
    image = [f"![source and output]({picture})"] if picture else []
    path.write_text("\n\n".join([*parts, *image]) + "\n", "utf-8")
    return "\n\n".join(parts[1:])
