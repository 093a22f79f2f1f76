"""A server on loopback that answers as the Hugging Face hub does, with datasets of one's own."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """repos: name -> revision -> path -> bytes."""

    def __init__(self, repos):
        self.repos = repos
        self.asked = []

        class Answers(BaseHTTPRequestHandler):
            hub = self

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer()

            def do_POST(self):
                self.answer()

            def answer(self, body=True):
                n = int(self.headers.get("Content-Length") or 0)
                status, headers, data = self.hub.answer(self.path, self.rfile.read(n))
                wanted = self.headers.get("Range")
                if wanted and status == 200:
                    first, last = wanted.removeprefix("bytes=").split("-")
                    part = data[int(first) : int(last) + 1 if last else None]
                    headers["Content-Range"] = (
                        f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
                    )
                    status, data = 206, part
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self):
        self.server.shutdown()

    def answer(self, path, sent):
        """(status, headers, body)"""
        self.asked.append(unquote(path))
        parts = urlsplit(path).path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            return self.api("/".join(parts[2:4]), parts[4:], sent)
        if parts[0] == "datasets" and len(parts) >= 5 and parts[3] == "resolve":
            return self.file("/".join(parts[1:3]), unquote(parts[4]), unquote("/".join(parts[5:])))
        return missing("RepoNotFound")

    def revision(self, repo, name):
        """(sha, files) of a revision's name or sha."""
        for revision, files in self.repos.get(repo, {}).items():
            sha = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
            if name in (revision, sha):
                return sha, files
        return None

    def api(self, repo, rest, sent):
        if repo not in self.repos:
            return missing("RepoNotFound")
        found = self.revision(repo, unquote(rest[1]) if len(rest) > 1 else "main")
        if found is None:
            return missing("RevisionNotFound")
        sha, files = found
        if rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": name} for name in files]
            return reply(
                {"id": repo, "sha": sha, "siblings": siblings, "private": False, "tags": []}
            )
        entries = [
            {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
            for p, d in files.items()
        ]
        folders = {p.rsplit("/", i)[0] for p in files for i in range(1, p.count("/") + 1)}
        entries += [{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in folders]
        if rest[0] == "paths-info":
            asked = json.loads(sent)["paths"]
            return reply([e for e in entries if e["path"] in asked])
        if rest[0] == "tree":
            under = unquote("/".join(rest[2:]))
            inside = [e for e in entries if not under or e["path"].startswith(f"{under}/")]
            return reply(inside) if inside else missing("EntryNotFound")
        return missing("EntryNotFound")

    def file(self, repo, revision, path):
        if repo not in self.repos:
            return missing("RepoNotFound")
        found = self.revision(repo, revision)
        if found is None:
            return missing("RevisionNotFound")
        sha, files = found
        if path not in files:
            return missing("EntryNotFound", sha)
        etag = hashlib.sha1(files[path]).hexdigest()
        return (
            200,
            {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"},
            files[path],
        )


def reply(data):
    return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()


def missing(code, sha=""):
    return 404, {"X-Error-Code": code, "X-Repo-Commit": sha, "X-Error-Message": code}, b"{}"
