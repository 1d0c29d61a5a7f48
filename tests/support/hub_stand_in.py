"""The part of the Hugging Face Hub's HTTP API that a model's download and upload need, served on this machine.

The client is the real `huggingface_hub`, in processes whose `HF_ENDPOINT` is this server.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Hub:
    """Repositories, in memory.

    Args:
        address: of the server.
        repos: `OWNER/MODEL` → commit → path → content. The last commit is `main`.
        tags: other names of commits.
        fetched: the paths of files that were downloaded, in order.
        ranges: begin and end of the parts of weights that were delivered.
        broken: True to refuse commits.
        unsteady: number of parts that will not be delivered.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.tags: dict[str, str] = {}
        self.fetched: list[str] = []
        self.large: dict[str, bytes] = {}
        self.ranges: list[tuple[int, int]] = []
        self.broken = False
        self.unsteady = 0

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Adds a commit, and returns its number."""
        told = repr([(path, hashlib.sha256(content).digest()) for path, content in sorted(files.items())])
        number = hashlib.sha1(f"{name}{len(self.repos.get(name, {}))}{told}".encode()).hexdigest()
        self.repos.setdefault(name, {})[number] = files
        return number

    def add(self, name: str, directory: Path) -> str:
        """Adds a commit of the files in a directory."""
        return self.commit(name, {file.name: file.read_bytes() for file in directory.iterdir()})

    def at(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """A commit and its files; None if there is none."""
        commits = self.repos.get(name)
        if not commits:
            return None
        number = list(commits)[-1] if revision == "main" else self.tags.get(revision, revision)
        return (number, commits[number]) if number in commits else None

    def environment(self, cache: Path) -> dict[str, str]:
        """The environment of a process for which this is the Hub."""
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        return {**{key: value for key, value in os.environ.items() if not key.startswith("HF_")}, **own}


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Serves a Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._model(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        else:
            self._missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if self.hub.broken and path.endswith("/commit/main"):
            self._say({"error": "out of order"}, 400)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            known = name in self.hub.repos
            if not known:
                self.hub.commit(name, {})
            self._say({"url": f"{self.hub.address}/{name}", "name": name}, 409 if known else 200)
        elif re.fullmatch(r"/api/models/.+/preupload/.+", path):
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            self._say({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.address}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._say({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        elif path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        else:
            self._missing("EntryNotFound")

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.hub.large[self.path.rpartition("/")[2]] = content
        self._say({})

    def _commit(self, name: str, lines: list[Any]) -> None:
        found = self.hub.at(name)
        assert found is not None
        files = dict(found[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = self.hub.commit(name, files)
        self._say({"success": True, "commitOid": number, "commitUrl": f"{self.hub.address}/{name}/commit/{number}"})

    def _model(self, name: str, revision: str) -> None:
        found = self.hub.at(name, revision)
        if found is None:
            self._missing("RevisionNotFound" if name in self.hub.repos else "RepoNotFound")
            return
        number, files = found
        self._say({"id": name, "sha": number, "private": False, "siblings": [{"rfilename": path} for path in files]})

    def _tree(self, name: str, revision: str) -> None:
        found = self.hub.at(name, revision)
        if found is None:
            self._missing("RevisionNotFound" if name in self.hub.repos else "RepoNotFound")
            return
        self._say(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in found[1].items()
            ]
        )

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self.hub.at(name, revision)
        if found is None or path not in found[1]:
            self._missing("EntryNotFound")
            return
        content = found[1][path]
        begin, end, status = 0, len(content), 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end, status = int(asked[1]), min(int(asked[2] or end) + 1, end), 206
        if status == 206 and self.hub.unsteady:
            self.hub.unsteady -= 1
            self.close_connection = True
            return
        if status == 206:
            self.hub.ranges.append((begin, end))
        if self.command == "GET":
            self.hub.fetched.append(path)
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", found[0])
        self.send_header("Content-Length", str(end - begin))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[begin:end])

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _say(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)
