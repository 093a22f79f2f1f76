"""A server on loopback that answers as the Hugging Face hub does for model repositories.

Create, preupload, commit, list and download; large files by Git LFS, or as huggingface_hub sends
them with hf_xet: through the xet protocol, in xorbs of compressed chunks and a shard that says
which chunks a file is made of. What was sent is unpacked, and served whole.
"""

import base64
import hashlib
import json
import re
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import yaml


def is_the_hub_of_this_process(hub, monkeypatch, cache):
    """huggingface_hub reads where it is when it is imported; cache: a folder of the test's own."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("{repo_id}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/" + "".join(template[1:])
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("HF_TOKEN", hub.token)


class ModelHub:
    """repos: name -> path -> bytes. `token`: the one that may write, and see what is private."""

    def __init__(self, token="hf_right"):
        self.token = token
        self.repos = {}
        self.private = set()
        self.asked = []  # (method, path) of each request
        self.stored = {}  # large files by sha256
        self.xorbs = {}  # lists of chunks by hash
        hub = self

        class Answers(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self):
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(urlsplit(self.path).path)
                hub.asked.append((self.command, path))
                right = self.headers.get("Authorization") == f"Bearer {hub.token}"
                status, headers, data = hub.answer(self.command, path, sent, right)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_HEAD = do_GET = do_POST = do_PUT = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self):
        self.server.shutdown()

    def answer(self, method, path, sent, right):
        """(status, headers, body)"""
        for pattern, what, writes in (
            (r"/api/repos/create", self.create, True),
            (r"/api/validate-yaml", self.validate_yaml, False),
            (r"/api/models/(\w+/[\w.-]+)/preupload/main", self.preupload, True),
            (r"/api/models/(\w+/[\w.-]+)/xet-write-token/main", self.xet_token, True),
            (r"/api/models/(\w+/[\w.-]+)/commit/main", self.commit, True),
            (r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", self.lfs_batch, True),
            (r"/api/models/(\w+/[\w.-]+)/tree/([\w.-]+)", self.tree, False),
            (r"/api/models/(\w+/[\w.-]+)(?:/revision/([\w.-]+))?", self.info, False),
            (r"/(\w+/[\w.-]+)/resolve/([\w.-]+)/(.+)", self.file, False),
        ):
            found = re.fullmatch(pattern, path)
            if found is None:
                continue
            if writes and not right:
                return error(401, "", "Invalid username or password.")
            repo = found[1] if found.groups() else None  # and whether it may be seen
            hidden = repo in self.private and not right
            if repo is not None and (repo not in self.repos or hidden):
                return error(404 if right else 401, "RepoNotFound", "Repository not found")
            return what(sent, *found.groups())
        return self.storage(method, path, sent)

    # --- the hub ----------------------------------------------------------------------------

    def create(self, sent):
        asked = json.loads(sent)
        repo = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.url}/{repo}"}
        if repo in self.repos:
            return reply(url, 409)
        self.repos[repo] = {}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.private.add(repo)
        return reply(url)

    def validate_yaml(self, sent):
        """A card's front matter, as strict as the hub in what ours has."""
        data = yaml.safe_load(json.loads(sent)["content"].split("---")[1])
        names = [*data.get("base_model", []), *data.get("datasets", [])]
        wrong = [n for n in names if not re.fullmatch(r"[\w.-]+/[\w.-]+", n)]
        wrong += [t for t in data["tags"] if not isinstance(t, str)]
        told = {"errors": [{"message": f"{n}: not valid"} for n in wrong], "warnings": []}
        return reply(told, 400 if wrong else 200)

    def preupload(self, sent, repo):
        def mode(path):
            return "lfs" if path.endswith((".safetensors", ".parquet", ".png")) else "regular"

        files = json.loads(sent)["files"]
        told = [
            {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files
        ]
        return reply({"files": told})

    def commit(self, sent, repo):
        for line in sent.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.stored[value["oid"]]  # nothing: not sent
        sha = self.sha(repo)
        return reply({"commitUrl": f"{self.url}/{repo}", "commitOid": sha, "pullRequestUrl": None})

    def sha(self, repo):
        listed = {p: hashlib.sha1(d).hexdigest() for p, d in sorted(self.repos[repo].items())}
        return hashlib.sha1(json.dumps(listed).encode()).hexdigest()

    def at(self, repo, revision):
        return revision in (None, "main", self.sha(repo))

    def tree(self, sent, repo, revision):
        if not self.at(repo, revision):
            return error(404, "RevisionNotFound", "Invalid rev id")
        return reply(
            [
                {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for p, d in self.repos[repo].items()
            ]
        )

    def info(self, sent, repo, revision=None):
        if not self.at(repo, revision):
            return error(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in self.repos[repo]]
        told = {"id": repo, "sha": self.sha(repo), "siblings": siblings, "tags": []}
        return reply(told | {"private": repo in self.private})

    def file(self, sent, repo, revision, path):
        if not self.at(repo, revision):
            return error(404, "RevisionNotFound", "Invalid rev id")
        if path not in self.repos[repo]:
            return error(404, "EntryNotFound", "Entry not found", self.sha(repo))
        data = self.repos[repo][path]
        etag = hashlib.sha1(data).hexdigest()
        return 200, {"X-Repo-Commit": self.sha(repo), "ETag": f'"{etag}"'}, data

    # --- large files: LFS -------------------------------------------------------------------

    def lfs_batch(self, sent, repo):
        return reply(
            {
                "transfer": "basic",
                "objects": [
                    o | {"actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}}
                    for o in json.loads(sent)["objects"]
                ],
            }
        )

    # --- large files: xet -------------------------------------------------------------------

    def xet_token(self, sent, repo):
        told = {"casUrl": f"{self.url}/cas", "accessToken": "short-lived", "exp": soon()}
        headers = {
            "X-Xet-Cas-Url": told["casUrl"],
            "X-Xet-Access-Token": told["accessToken"],
            "X-Xet-Token-Expiration": str(told["exp"]),
        }
        status, types, data = reply(told)
        return status, types | headers, data

    def storage(self, method, path, sent):
        kind, _, key = path.strip("/").rpartition("/")
        if kind == "lfs" and method == "PUT":
            assert hashlib.sha256(sent).hexdigest() == key
            self.stored[key] = sent
            return reply({})
        if kind == "cas/v1/xorb-grants/default":
            grant = {"id": key, "method": "PUT", "url": f"{self.url}/xorbs/{key}", "headers": {}}
            return reply(grant, 201)
        if kind == "xorbs" and method == "PUT":
            self.xorbs[key] = chunks_of(sent)
            return reply({})
        if kind.startswith("cas/v1/xorb-commits/default"):
            return reply({"was_inserted": True}, 200 if key in self.xorbs else 404)
        if kind == "cas/v1/xorbs/default" and method == "POST":
            self.xorbs[key] = chunks_of(sent)
            return reply({"was_inserted": True})
        if key == "shards" and method == "POST":
            for sha, parts in files_of(sent):
                data = b"".join(b"".join(self.xorbs[xorb][a:b]) for xorb, a, b in parts)
                assert hashlib.sha256(data).hexdigest() == sha
                self.stored[sha] = data
            return reply({"type": "result", "result": 1})
        return error(404, "", "not found")


def chunks_of(xorb):
    """A xorb's chunks, unpacked: each after 8 bytes of version, sizes and compression."""
    chunks, at = [], 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        packed = int.from_bytes(xorb[at + 1 : at + 4], "little")
        scheme, size = xorb[at + 4], int.from_bytes(xorb[at + 5 : at + 8], "little")
        data = xorb[at + 8 : at + 8 + packed]
        if scheme:
            data = pa.decompress(data, size, codec="lz4", asbytes=True)
        chunks.append(ungrouped(data) if scheme == 2 else data)
        at += 8 + packed
    return chunks


def ungrouped(data):
    """Bytes that were sorted by their place in words of four, in their order again."""
    found, at = bytearray(len(data)), 0
    for place in range(4):
        n = len(range(place, len(data), 4))
        found[place::4] = data[at : at + n]
        at += n
    return bytes(found)


def hash_name(data):
    """Of 32 bytes, as the protocol writes a hash: four words, each from its end."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def files_of(shard):
    """(sha256, [(xorb, first chunk, last chunk + 1)]) of each file that a shard tells of."""
    at = 48
    while shard[at : at + 32] != b"\xff" * 32:
        flags, n = struct.unpack_from("<II", shard, at + 32)
        entries = [shard[at + 48 * i : at + 48 * (i + 1)] for i in range(1, n + 1)]
        parts = [(hash_name(e[:32]), *struct.unpack_from("<II", e, 40)) for e in entries]
        at += 48 * (1 + n + (n if flags & 1 << 31 else 0))
        assert flags & 1 << 30, "a file without its sha256"
        yield hash_name(shard[at : at + 32]), parts
        at += 48


def soon():
    return int(time.time()) + 3600


def reply(data, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(data).encode()


def error(status, code, message, sha=""):
    headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": sha}
    return status, headers, json.dumps({"error": message}).encode()
