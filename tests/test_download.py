"""Downloads through the real huggingface_hub client from a hub on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rvc_mlx.download import PUBLIC_WEIGHTS, WeightFile, Weights, download, locate

CONTENT = bytes(range(256)) * 2000
CONFIG = b'{"hidden_size": 768}'
REPO = "someone/voices"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


TABLE = {
    "pinned": Weights(REPO, (WeightFile("model.pt", len(CONTENT), sha256(CONTENT)),)),
    "unsized": Weights(REPO, (WeightFile("sub/model.pt", sha256=sha256(CONTENT)),)),
    "recorded": Weights(
        REPO, (WeightFile("deep/er/model.bin"), WeightFile("config.json"))
    ),
}


class Hub:
    """The part of the hub that serves files: HEAD, and GET with a range."""

    def __init__(self):
        self.files = {}
        self.requests = []  # (method, path, Range header)
        self.tokens = set()  # Authorization headers
        self.break_after = []  # bytes after which to drop each coming GET
        self.status = None  # answers every request with this status if set


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def fail(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def head(self):
        """Send the headers; gives the content and its first byte, if there is any."""
        hub, wanted = self.server.hub, self.headers.get("Range")
        hub.requests.append((self.command, self.path, wanted))
        hub.tokens.add(self.headers.get("Authorization"))
        prefix = f"/{REPO}/resolve/main/"
        content = hub.files.get(self.path.removeprefix(prefix))
        if hub.status is not None:
            return self.fail(hub.status, "")
        if content is None or not self.path.startswith(prefix):
            return self.fail(404, "EntryNotFound")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{sha256(content)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            last, size = len(content) - 1, len(content)
            self.send_header("Content-Range", f"bytes {start}-{last}/{size}")
        self.end_headers()
        return content, start

    def do_HEAD(self):
        self.head()

    def do_GET(self):
        if (found := self.head()) is None:
            return
        content, start = found
        if self.server.hub.break_after:
            content = content[: start + self.server.hub.break_after.pop(0)]
            self.close_connection = True
        self.wfile.write(content[start:])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hub = Hub()
    hub.files = {
        "model.pt": CONTENT,
        "sub/model.pt": CONTENT,
        "deep/er/model.bin": CONTENT,
        "config.json": CONFIG,
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}
    )
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def files_in(folder):
    """Visible files; the lock and the client's own records are hidden."""
    return sorted(
        str(path.relative_to(folder))
        for path in Path(folder).rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.parts)
    )


def fetch(hub, name, folder, **options):
    return download(name, folder=folder, endpoint=hub.endpoint, table=TABLE, **options)


def test_a_file_arrives_whole_and_is_not_fetched_twice(hub, tmp_path):
    path = fetch(hub, "pinned", tmp_path / "w")
    assert path == tmp_path / "w" / "pinned" / "model.pt"
    assert path.read_bytes() == CONTENT
    assert files_in(tmp_path / "w") == ["pinned/model.pt"]
    assert not (path.parent / ".partial").exists()
    before = len(hub.requests)
    assert fetch(hub, "pinned", tmp_path / "w") == path
    assert len(hub.requests) == before


def test_only_the_file_is_asked_for_and_no_token_is_sent(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(hub, "unsized", tmp_path)
    assert {path for _, path, _ in hub.requests} == {
        f"/{REPO}/resolve/main/sub/model.pt"
    }
    assert {method for method, _, _ in hub.requests} == {"HEAD", "GET"}
    assert hub.tokens == {None}


def test_an_interrupted_transfer_is_resumed(hub, tmp_path):
    hub.break_after = [100_000, 50_000]
    path = fetch(hub, "pinned", tmp_path)
    assert path.read_bytes() == CONTENT
    ranges = [wanted for method, _, wanted in hub.requests if method == "GET"]
    assert len(ranges) == 3
    assert ranges[0] is None
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in ranges[1:]]
    assert 0 < starts[0] < starts[1] < len(CONTENT)


def test_a_transfer_that_keeps_breaking_off_leaves_no_file(hub, tmp_path):
    hub.break_after = [1000] + [0] * 40
    with pytest.raises(ConnectionError, match=r"could not be downloaded.*--from-dir"):
        fetch(hub, "pinned", tmp_path / "w")
    assert files_in(tmp_path / "w") == []
    assert locate("pinned", folder=tmp_path / "w", table=TABLE) is None
    hub.break_after = []
    assert fetch(hub, "pinned", tmp_path / "w").read_bytes() == CONTENT
    assert not (tmp_path / "w" / "pinned" / ".partial").exists()


@pytest.mark.parametrize("change", [b"x", b""], ids=["longer", "other"])
def test_a_file_of_another_size_or_hash_is_refused(hub, tmp_path, change):
    hub.files["model.pt"] = CONTENT + change if change else CONTENT[::-1]
    with pytest.raises(ValueError, match="the hub's file has changed") as caught:
        fetch(hub, "pinned", tmp_path / "w")
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path / "w") == []
    assert not (tmp_path / "w" / "pinned" / ".partial").exists()
    assert locate("pinned", folder=tmp_path / "w", table=TABLE) is None
    hub.files["model.pt"] = CONTENT
    assert fetch(hub, "pinned", tmp_path / "w").read_bytes() == CONTENT


def test_a_file_of_another_size_is_refused_before_its_transfer(hub, tmp_path):
    hub.files["model.pt"] = CONTENT * 2
    with pytest.raises(ValueError, match=f"has {2 * len(CONTENT)} bytes"):
        fetch(hub, "pinned", tmp_path)
    assert "GET" not in {method for method, _, _ in hub.requests}


def test_a_file_that_the_hub_lacks(hub, tmp_path):
    del hub.files["model.pt"]
    with pytest.raises(FileNotFoundError, match=r"has no file model\.pt.*--from-dir"):
        fetch(hub, "pinned", tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("status", [403, 500])
def test_a_hub_that_refuses(hub, tmp_path, status):
    hub.status = status
    with pytest.raises(ConnectionError, match="--from-dir") as caught:
        fetch(hub, "pinned", tmp_path)
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == []


def test_without_a_network_the_error_says_what_to_do(hub, tmp_path):
    free = "http://127.0.0.1:1"
    with pytest.raises(ConnectionError) as caught:
        download("pinned", folder=tmp_path, endpoint=free, table=TABLE)
    message = str(caught.value)
    assert message.startswith("model.pt: could not be downloaded from someone/voices (")
    assert "--from-dir" in message
    assert str(tmp_path / "pinned" / "model.pt") in message
    assert "\n" not in message


def test_offline_mode_says_the_same(hub, tmp_path):
    code = f"""
from rvc_mlx.download import WeightFile, Weights, download
table = {{"x": Weights({REPO!r}, (WeightFile("model.pt"),))}}
try:
    download("x", folder={str(tmp_path)!r}, endpoint={hub.endpoint!r}, table=table)
except ConnectionError as error:
    assert "--from-dir" in str(error), error
    print("refused")
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "refused\n", done.stderr
    assert not hub.requests


def test_unpinned_files_are_recorded_and_then_held_to_it(hub, tmp_path):
    path = fetch(hub, "recorded", tmp_path)
    assert files_in(tmp_path) == [
        "recorded/config.json",
        "recorded/model.bin",
        "recorded/recorded.json",
    ]
    record = json.loads((tmp_path / "recorded" / "recorded.json").read_text())
    assert record == {
        "config.json": {"size": len(CONFIG), "sha256": sha256(CONFIG)},
        "model.bin": {"size": len(CONTENT), "sha256": sha256(CONTENT)},
    }
    path.unlink()
    hub.files["deep/er/model.bin"] = CONTENT[::-1]
    with pytest.raises(ValueError, match=sha256(CONTENT)):
        fetch(hub, "recorded", tmp_path)
    assert not path.exists()
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match="delete"):
        fetch(hub, "recorded", tmp_path)


def test_a_damaged_record_is_an_error(hub, tmp_path):
    fetch(hub, "recorded", tmp_path)
    for text in ("{", "[]", '{"model.bin": 3}', '{"model.bin": {"size": "x"}}'):
        (tmp_path / "recorded" / "recorded.json").write_text(text)
        with pytest.raises(ValueError, match="record of hashes is damaged"):
            fetch(hub, "recorded", tmp_path)


def test_a_present_file_of_another_content_is_an_error(hub, tmp_path):
    path = fetch(hub, "pinned", tmp_path)
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match=f"delete {path}"):
        fetch(hub, "pinned", tmp_path)
    assert path.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(
    "place", ["deep/er/model.bin", "recorded/model.bin", "model.bin"]
)
def test_files_come_from_a_local_folder(tmp_path, place):
    source = tmp_path / "source"
    (source / place).parent.mkdir(parents=True)
    (source / place).write_bytes(CONTENT)
    (source / "config.json").write_bytes(CONFIG)
    path = download("recorded", folder=tmp_path / "w", from_dir=source, table=TABLE)
    assert path.read_bytes() == CONTENT
    assert (path.parent / "config.json").read_bytes() == CONFIG
    assert (path.parent / "recorded.json").is_file()


def test_a_local_file_of_another_content_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match=r"sha256 .*is another file"):
        download("pinned", folder=tmp_path / "w", from_dir=tmp_path, table=TABLE)
    assert [p for p in (tmp_path / "w").rglob("*") if p.is_file()] == []


def test_a_missing_local_file_lists_the_places(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no model\.pt; looked for .*pinned"
    ):
        download("pinned", folder=tmp_path / "w", from_dir=tmp_path, table=TABLE)


def test_locate(tmp_path):
    def find(name):
        return locate(name, folder=tmp_path, table=TABLE)

    assert find("pinned") is None
    (tmp_path / "pinned").mkdir()
    (tmp_path / "pinned" / "model.pt").write_bytes(CONTENT[:-1])
    assert find("pinned") is None
    (tmp_path / "pinned" / "model.pt").write_bytes(CONTENT)
    assert find("pinned") == tmp_path / "pinned" / "model.pt"
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded" / "model.bin").write_bytes(CONTENT)
    assert find("recorded") is None
    (tmp_path / "recorded" / "config.json").write_bytes(CONFIG)
    assert find("recorded") == tmp_path / "recorded" / "model.bin"


@pytest.mark.parametrize("function", [download, locate])
def test_an_unknown_name_lists_the_known_ones(function, tmp_path):
    with pytest.raises(ValueError, match=r"'rmvp'; known are rmvpe, hubert-fairseq"):
        function("rmvp", folder=tmp_path)


def test_the_public_table_is_well_formed():
    for weights in PUBLIC_WEIGHTS.values():
        names = [file.name for file in weights.files]
        assert len(set(names)) == len(names)
        for file in weights.files:
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
            assert ".." not in Path(file.path).parts
