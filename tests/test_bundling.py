"""Bundling: the set of files, what their metadata tells, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from stand_ins import write_run, write_stand_ins

from recipes import bundle
from recipes.bundle_runs import find_run
from rvc_mlx.bundled_models import NETWORKS
from rvc_mlx.checkpoint import (
    hash_file,
    name_and_hash,
    read_checkpoint,
    save_checkpoint,
)
from rvc_mlx.retrieval import read_index

FILES = [
    *("contentvec.safetensors", "rms.index", "rms.safetensors", "rmvpe.safetensors"),
    *("slt.index", "slt.safetensors"),
]
HEARD = {"frame_accuracy": {"kal": {"all": 0.5, "speech": 0.25}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Stand-ins for everything that is bundled; not to be changed."""
    return write_stand_ins(tmp_path_factory.mktemp("made"))


def words(made, into, **others):
    """The command line, with other values for some options."""
    given = {"encoder": made.encoder, "rmvpe": made.rmvpe, "slt": made.slt}
    given |= {"rms": made.rms, "recordings": made.recordings, **others}
    line = []
    for name, value in given.items():
        voice = name in ("slt", "rms")
        line += ["--voice", f"{name}={value}"] if voice else [f"--{name}", str(value)]
    return [*line, "--into", str(into)]


def judged(kind, path, **figures):
    """A report of a judge of networks."""
    network = {"file": path.name, "sha256": hash_file(path)}
    how = {"benchmark": kind, "environment": {}, "packages": {}, "network": network}
    return {**how, "goals": [{"goal": "F0", "met": True}], **figures}


def conversions(path, name="slt"):
    """A report about conversions."""
    files = {"voice": {"file": path.name, "sha256": hash_file(path)}}
    voice = {"name": name, "files": files, "summary": {"f0": {"rpa": 90}}}
    clips = [{"source": source} for source in ("a", "a", "b")]
    return {"benchmark": "evaluation", "voices": [{**voice, "clips": clips}]}


@pytest.fixture(scope="module")
def reports(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    trackers = {"harvest": {}, made.rmvpe.name: {"0 dB": {}}}
    written = {
        "content": judged("content", made.encoder, **HEARD),
        "f0": judged("pitch", made.rmvpe, clips=2, trackers=trackers),
        "heard": conversions(made.slt / "slt.safetensors"),
    }
    for name, report in written.items():
        (folder / f"{name}.json").write_text(json.dumps(report))
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def bundled_set(made, reports, tmp_path_factory):
    into = tmp_path_factory.mktemp("into")
    (into / "slt.index").write_bytes(b"old")
    (into / "speech.flac").write_bytes(b"kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "INDEX_ROWS", 100)
        assert bundle.main([*words(made, into), "--metrics", *reports]) == 0
    return into


def refused(made, into, caplog, message, **others):
    """Exit code 1, one line, and nothing written."""
    before = {path.name: path.read_bytes() for path in into.iterdir()}
    assert bundle.main(words(made, into, **others)) == 1
    [line] = [r.getMessage() for r in caplog.records if r.name == "recipes"]
    assert message in line
    assert "\n" not in line
    assert {path.name: path.read_bytes() for path in into.iterdir()} == before


def test_the_set_replaces_what_was_there(bundled_set):
    names = sorted(path.name for path in bundled_set.iterdir())
    assert names == sorted([*FILES, "speech.flac"])
    assert (bundled_set / "speech.flac").read_bytes() == b"kept"


def test_weights_are_those_of_the_run_in_half_precision(made, bundled_set):
    for source, name in (
        (made.encoder, "contentvec"),
        (made.rmvpe, "rmvpe"),
        (made.slt / "slt.safetensors", "slt"),
    ):
        before = read_checkpoint(source).tensors
        after = read_checkpoint(bundled_set / f"{name}.safetensors").tensors
        assert before.keys() == after.keys()
        for key, value in after.items():
            assert value.dtype == np.float16
            assert np.array_equal(value, before[key])


def test_metadata_tells_where_a_voice_comes_from(bundled_set):
    told = read_checkpoint(bundled_set / "slt.safetensors").metadata
    expected = {
        "kind": "voice",
        "model_name": "slt",
        "embedder_model": NETWORKS,
        "embedder_sha256": hash_file(bundled_set / "contentvec.safetensors"),
        "pitch_model": NETWORKS,
        "pitch_sha256": hash_file(bundled_set / "rmvpe.safetensors"),
        "speakers": "slt_hts",
        "licences_of_voices": "CMU permissive",
        "packages": "festvox-us-slt-hts=0 htsengine=1",  # of this speaker alone
        "seed": 0,
        "started_from": "before.safetensors (sha256 0)",
        "limits": bundle.LIMITS,
        "metrics": {"heard": {"clips": 2, "conversions": 3, "f0": {"rpa": 90}}},
    }
    assert told.items() >= expected.items()
    other = read_checkpoint(bundled_set / "rms.safetensors").metadata
    assert (other["speakers"], other["seed"], other["metrics"]) == ("rms", 1, {})
    assert "started_from" not in other


def test_reports_go_to_what_they_judge(bundled_set):
    content, pitch = (
        read_checkpoint(bundled_set / f"{kind}.safetensors").metadata["metrics"]
        for kind in ("contentvec", "rmvpe")
    )
    assert content == {"content": HEARD}
    trackers = {"this network": {"0 dB": {}}, "harvest": {}}
    assert pitch == {"f0": {"clips": 2, "trackers": trackers}}


def test_index_is_shrunk_to_centres(made, bundled_set):
    before = read_index(made.slt / "slt.index")
    after = read_index(bundled_set / "slt.index")
    assert (len(before), len(after), after.width) == (500, 100, 64)
    spread = before.vectors.std()
    assert 0.3 * spread < after.vectors.std() < 0.9 * spread  # means of a few each


def test_the_same_parts_give_the_same_bytes(made, reports, bundled_set, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "INDEX_ROWS", 100)
        patch.setattr(bundle, "_speak", lambda stage, name: None)
        assert bundle.main([*words(made, tmp_path), "--metrics", *reports]) == 0
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (bundled_set / name).read_bytes()


def test_a_voice_may_be_another_one_of_the_run(made, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "_speak", lambda stage, name: None)
    run = tmp_path / "run"
    shutil.copytree(made.slt, run)
    (run / "slt.safetensors").rename(run / "slt_3e_9s.safetensors")
    line = words(made, tmp_path / "into", slt=run / "slt_3e_9s.safetensors")
    assert bundle.main(line) == 0
    assert (tmp_path / "into" / "slt.safetensors").is_file()


def test_another_kind_is_refused(made, tmp_path, caplog):
    refused(
        made, tmp_path, caplog, "this is an RMVPE pitch network", encoder=made.rmvpe
    )


def test_another_encoder_than_the_voice_learnt_from_is_refused(made, tmp_path, caplog):
    into, other = tmp_path / "into", tmp_path / "other.safetensors"
    into.mkdir()
    checkpoint = read_checkpoint(made.encoder)
    save_checkpoint(other, checkpoint.tensors, {**checkpoint.metadata, "steps": 7})
    refused(made, into, caplog, "give the file that it was trained with", encoder=other)


def test_a_voice_of_another_width_is_refused(made, tmp_path, caplog):
    run = write_run(tmp_path / "wide", "slt", made, 0, width=48)
    into = tmp_path / "into"
    into.mkdir()
    refused(made, into, caplog, "this voice wants 48-wide features", slt=run)


def test_a_silent_voice_is_refused(made, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(bundle, "QUIETEST", 10.0)
    refused(made, tmp_path, caplog, "train the voice longer")


def test_more_than_the_limit_is_refused(made, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(bundle, "MOST_BYTES", 10_000)
    refused(made, tmp_path, caplog, "expected at most 10000")


def test_a_weight_beyond_half_precision_is_refused(made, tmp_path, caplog):
    into, run = tmp_path / "into", tmp_path / "run"
    into.mkdir()
    shutil.copytree(made.slt, run)
    checkpoint = read_checkpoint(run / "slt.safetensors")
    name = "enc_p.emb_phone.bias"
    tensors = checkpoint.tensors | {name: np.full(64, 1e6, np.float32)}
    save_checkpoint(run / "slt.safetensors", tensors, checkpoint.metadata)
    refused(made, into, caplog, f"{name}: 1e+06 does not fit float16", slt=run)


@pytest.mark.parametrize(
    "missing", ["slt.safetensors", "slt.index", "run.json", "features.json"]
)
def test_an_incomplete_run_is_refused(made, tmp_path, caplog, missing):
    into, run = tmp_path / "into", tmp_path / "run"
    into.mkdir()
    shutil.copytree(made.slt, run)
    (run / missing).unlink()
    refused(made, into, caplog, f"{missing}: there is no such file", slt=run)


def test_recordings_without_provenance_are_refused(made, tmp_path, caplog):
    recordings, into = tmp_path / "recordings", tmp_path / "into"
    into.mkdir()
    refused(made, into, caplog, "has no provenance.json", recordings=recordings)


def test_each_voice_is_wanted_once(made, tmp_path, caplog):
    line = words(made, tmp_path)
    for wrong in ([*line, "--voice", f"slt={made.rms}"], [*line, "--voice", "bob=x"]):
        caplog.clear()
        assert bundle.main(wrong) == 1
        assert "expected one for each of slt, rms" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["content", "pitch", "evaluation", "other", "list"])
def test_a_report_about_something_else_is_refused(made, tmp_path, caplog, kind):
    other, message = made.rms / "rms.safetensors", "not what is to be bundled"
    report = judged(kind, other, trackers={}, **HEARD)
    if kind == "evaluation":
        report = conversions(other)
    elif kind not in ("content", "pitch"):
        message = "no report that is known"
    path = tmp_path / "report.json"
    path.write_text(json.dumps([report] if kind == "list" else report))
    line = [*words(made, tmp_path / "into"), "--metrics", str(path)]
    assert bundle.main(line) == 1
    assert message in caplog.text
    assert not (tmp_path / "into").exists()


def test_a_report_about_another_voice_is_refused(made, tmp_path, caplog):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(conversions(made.slt / "slt.safetensors", "bob")))
    line = [*words(made, tmp_path / "into"), "--metrics", str(path)]
    assert bundle.main(line) == 1
    assert "judges bob, which is not to be bundled" in caplog.text


def test_a_voice_that_heard_strangers_says_so(made, tmp_path):
    run = tmp_path / "slt"
    shutil.copytree(made.slt, run)
    packages = {"kokoro-js": "1.2", "festival": "2"}
    more = {"packages": {"espeak-ng": "1.5"}}
    (run / "strangers.json").write_text(
        json.dumps({"made_with": [{"packages": packages}, more], "clips": 3})
    )
    networks = {"features": made.encoder, "pitch": made.rmvpe}
    facts = find_run("slt", run, networks, made.recordings).facts
    assert facts["strangers"].endswith(" (Apache-2.0): espeak-ng=1.5 kokoro-js=1.2")
    assert "strangers" not in find_run("slt", made.slt, networks, made.recordings).facts


def test_a_pitch_network_may_be_calibrated_after_the_voice(made, tmp_path):
    read = read_checkpoint(made.rmvpe)
    told = {**read.metadata, "calibrated_from": name_and_hash(made.rmvpe)}
    changed = {name: value + 1 for name, value in read.tensors.items()}
    for metadata in (told, {**told, "calibrated_from": "another"}):
        path = tmp_path / f"{len(str(metadata))}.safetensors"
        save_checkpoint(path, changed, metadata)
        networks = {"features": made.encoder, "pitch": path}
        if metadata is told:
            run = find_run("slt", made.slt, networks, made.recordings)
            assert run.voice == made.slt / "slt.safetensors"
        else:
            with pytest.raises(ValueError, match="trained with a network"):
                find_run("slt", made.slt, networks, made.recordings)
