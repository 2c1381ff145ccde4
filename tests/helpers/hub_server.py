"""A small Hub in this process: the parts of its HTTP API that pushing and loading an adapter need.

The client, `huggingface_hub`, chooses its endpoint once, from `HF_ENDPOINT`, so that whoever is to talk to the server
runs in a process of its own, with `environment(...)` as its environment. With hf_xet installed, the client of version 2
sends large files through the Xet protocol, without asking the server; `HF_HUB_DISABLE_XET=1` makes it use git LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS_POINTER_SIZE = 130


@dataclass
class Commit:
    """A commit of a repository: all its files, not only those that have changed."""

    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A repository with the branch `main`, and others if need be."""

    private: bool
    branches: dict[str, list[Commit]]
    large: set[str] = field(default_factory=set)  # paths that came by LFS

    @property
    def commits(self) -> list[Commit]:
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files


class Refused(Exception):
    """An answer with an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server, its repositories, and a log of what it was asked.

    Attributes:
        users: user names by access token; a token of another user may read public repositories and write nothing.
        failures: by part of an API's path, such as `"/commit/"`, the status with which requests to it are refused.
    """

    def __init__(self) -> None:
        self.users = {"hf_writer": "writer", "hf_stranger": "stranger"}
        self.failures: dict[str, int] = {}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # under another name, as the Hub's storage: the client then asks there, and without the token
        self.storage = f"http://localhost:{self._server.server_port}"
        self.lock = threading.RLock()

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: str, token: str | None = "hf_writer") -> dict[str, str]:
        """The environment of a process that talks to this Hub and to nothing else."""
        dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}
        own["no_proxy"] = own["NO_PROXY"]
        return {**kept, **own, **({"HF_TOKEN": token} if token else {})}

    def create(self, user: str, wanted: dict[str, Any]) -> dict[str, Any]:
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        if not name.startswith(f"{user}/"):
            raise Refused(
                403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}"
            )
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        answer = {"url": f"{self.endpoint}/{name}", "name": name, "id": "0" * 24, "private": private}
        if name in self.repositories:
            raise Refused(409, json.dumps(answer))
        first = Commit(hashlib.sha1(name.encode()).hexdigest(), "initial commit", {".gitattributes": b""})
        self.repositories[name] = Repository(private, {"main": [first]})
        return answer

    def find(self, name: str, user: str | None, writes: bool = False) -> Repository:
        repository = self.repositories.get(name)
        owner = name.split("/")[0]
        if repository is None or (repository.private and user != owner):
            # as the Hub does, which tells a stranger nothing about what there is
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if writes and user != owner:
            raise Refused(403, "You don't have write access to this repository")
        return repository

    @staticmethod
    def at(repository: Repository, revision: str) -> Commit:
        if revision in repository.branches:
            return repository.branches[revision][-1]
        for commit in (commit for commits in repository.branches.values() for commit in commits):
            if commit.sha == revision:
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    @staticmethod
    def branch(repository: Repository, name: str) -> dict[str, Any]:
        if name in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[name] = list(repository.commits)
        return {}

    def preupload(self, repository: Repository, held_files: dict[str, bytes], wanted: dict[str, Any]) -> dict[str, Any]:
        files = []
        for file in wanted["files"]:
            is_binary = b"\0" in base64.b64decode(file["sample"])
            held = held_files.get(file["path"])
            oid = None if held is None else _oid(held, file["path"] in repository.large)
            mode = "lfs" if is_binary or file["size"] > 10_000_000 else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        assert wanted["operation"] == "upload" and wanted["hash_algo"] == "sha256"
        objects = []
        for each in wanted["objects"]:
            actions = {
                "upload": {"href": f"{self.storage}/lfs/{each['oid']}"},
                "verify": {"href": f"{self.endpoint}/lfs-verify"},
            }
            objects.append({**each, **({} if each["oid"] in self.objects else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "The content does not have the sha256 that was announced")
        self.objects[oid] = content

    def commit(self, name: str, repository: Repository, branch: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        assert lines[0]["key"] == "header"
        commits = repository.branches[branch]
        files, large = dict(commits[-1].files), set(repository.large)
        for line in lines[1:]:
            value = line["value"]
            large.discard(value["path"])
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, f"{value['path']} was committed, but not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
                large.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, f"what is a {line['key']}?")
        if "README.md" in files:
            problems = card_problems(files["README.md"].decode())
            if problems:
                raise Refused(400, "; ".join(problems))
        sha = hashlib.sha1(f"{commits[-1].sha} {len(commits)} {branch}".encode()).hexdigest()
        commits.append(Commit(sha, lines[0]["value"]["summary"], files))
        repository.large = large
        return {"commitUrl": f"{self.endpoint}/{name}/commit/{sha}", "commitOid": sha, "success": True}

    def tree(self, repository: Repository, commit: Commit, under: str = "") -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for path, content in sorted(commit.files.items()):
            if under and not path.startswith(f"{under}/"):
                continue
            entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content, False)}
            if path in repository.large:
                oid = _oid(content, True)
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": LFS_POINTER_SIZE}
            entries.append(entry)
        if under and not entries:
            raise Refused(404, f"{under} does not exist", "EntryNotFound")
        return entries

    @staticmethod
    def info(name: str, repository: Repository, commit: Commit) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        card = commit.files.get("README.md", b"").decode()
        data = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
        owned = {"_id": "0" * 24, "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit.sha}
        state = {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        return {**owned, **state, "tags": data.get("tags", []), "siblings": siblings, "cardData": data}


def card_problems(content: str) -> list[str]:
    """What the Hub would refuse in the metadata of a model card: what is no YAML, and results that are not whole."""
    found = re.match(r"^---\n(.*?)\n---(\n|$)", content, re.DOTALL)
    if found is None:
        return []
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    problems = []
    for name in ("tags", "datasets", "metrics"):
        if not all(isinstance(each, str) and each for each in data.get(name, [])):
            problems.append(f"{name} must be a list of names")
    if "base_model" in data and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data["base_model"])):
        problems.append("base_model must be a model's name on the Hub")
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not {"task", "dataset", "metrics"} <= set(result):
                problems.append("a result in model-index needs task, dataset and metrics")
            elif not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                problems.append("task and dataset of a result need a type and the dataset a name")
            elif not all("type" in metric and "value" in metric for metric in result["metrics"]):
                problems.append("a metric needs a type and a value")
    return problems


def _oid(content: bytes, large: bool) -> str:
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        body = self._body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            try:
                for part, status in self.hub.failures.items():
                    if part in path:
                        raise Refused(status, f"the server was told to answer {status}")
                answer, headers, status = self._answer(path, body)
            except Refused as error:
                answer, status = json.dumps({"error": str(error)}).encode(), error.status
                if error.status == 409:
                    answer = str(error).encode()
                headers = {"X-Error-Message": str(error)} if error.status != 409 else {}
                headers |= {"X-Error-Code": error.code} if error.code else {}
        self._send(answer, headers, status)

    def _send(self, answer: bytes, headers: dict[str, str], status: int) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(answer)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _answer(self, path: str, body: bytes) -> tuple[bytes, dict[str, str], int]:
        if path.startswith("/lfs/"):  # as at a storage service: the address is the permission
            content = self.hub.objects.get(path[5:], b"")
            if self.command == "PUT":
                self.hub.store(path[5:], body)
                content = b""
            return content, {"ETag": f'"{path[5:]}"'}, 200
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*map(unquote, found.groups()))
        answer = self._api(path, body)
        return json.dumps(answer).encode(), {"Content-Type": "application/json"}, 200

    def _api(self, path: str, body: bytes) -> Any:
        hub, user = self.hub, self._user()
        if path == "/lfs-verify":
            if json.loads(body)["oid"] not in hub.objects:
                raise Refused(404, "no such object")
            return {}
        if path == "/api/validate-yaml":
            problems = card_problems(json.loads(body)["content"])
            if problems:
                raise Refused(400, "; ".join(problems))
            return {"errors": [], "warnings": []}
        if path in ("/api/repos/create", "/api/whoami-v2"):
            if user is None:
                raise Refused(401, "Invalid username or password.")
            identity = {"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"type": "access_token"}}
            return identity if path == "/api/whoami-v2" else hub.create(user, json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            hub.find(found[1], user, writes=True)
            return hub.batch(json.loads(body))
        found = re.fullmatch(
            r"/api/models/([^/]+/[^/]+?)(?:/(preupload|commit|revision|tree|branch)/([^/]+)(?:/(.+))?)?", path
        )
        if found is None:
            raise Refused(404, f"no such page: {path}", "RepoNotFound")
        name, what, revision, under = (group and unquote(group) for group in found.groups())  # "/" in a branch is %2F
        repository = hub.find(name, user, writes=what in ("preupload", "commit", "branch"))
        if what == "branch":
            return hub.branch(repository, revision)
        commit = hub.at(repository, revision or "main")
        if what == "preupload":
            return hub.preupload(repository, commit.files, json.loads(body))
        if what == "commit":
            return hub.commit(name, repository, revision, [json.loads(line) for line in body.splitlines()])
        if what == "tree":
            return hub.tree(repository, commit, under or "")
        return hub.info(name, repository, commit)

    def _resolve(self, name: str, revision: str, path: str) -> tuple[bytes, dict[str, str], int]:
        repository = self.hub.find(name, self._user())
        commit = self.hub.at(repository, revision)
        content = commit.files.get(path)
        if content is None:
            raise Refused(404, f"Entry not found: {path}", "EntryNotFound")
        is_large = path in repository.large
        oid = _oid(content, is_large)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{oid}"'}
        if not is_large:
            return content, headers, 200
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return b"", {**headers, "Location": f"{self.hub.storage}/lfs/{oid}"}, 302
